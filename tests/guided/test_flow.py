"""The guided command with a person who answers: what it asks, what the recipe records, and every flag."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from runs import command, tiny_recipe, whole_run
from sides import write_rows
from steer2edit.edits import Edit
from steer2edit.errors import FileError, Interrupted, ModelError, RecipeError, Steer2EditError
from steer2edit.files.reading import read_json
from steer2edit.guided import flow
from steer2edit.guided.change import Change, asked_change, folder_of, place_of, recipe_of
from steer2edit.guided.flow import Answers, guide
from steer2edit.guided.menu import Wishes, own_place, save
from steer2edit.guided.questions import Questions
from steer2edit.models.embedded import EMBEDDED
from steer2edit.pipeline import exports, stages
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import run_all
from steer2edit.recipe import Recipe, load_recipe, overridden, shipped_recipes
from task_sets import local_rows, write

EDITS = ("edit-0.1-off-0.2", "edit-0.3-off-0.2")


class Person(Questions):
    """Answers the questions in turn and keeps what was shown. "^C" is Ctrl-C; after the last answer the input ends."""

    def __init__(self, *answers: str, width: int = 200):
        self.shown = io.StringIO()
        self.left = list(answers)
        super().__init__(Console(file=self.shown, width=width), self._next)

    def _next(self, prompt: str) -> str:
        self.shown.write(prompt)
        if not self.left:
            raise EOFError
        answer = self.left.pop(0)
        if answer == "^C":
            raise KeyboardInterrupt
        self.shown.write(f"{answer}\n")
        return answer

    @property
    def screen(self) -> str:
        return self.shown.getvalue()


pytestmark = pytest.mark.usefixtures("quiet", "undrawn")


@pytest.fixture(scope="module")
def model(pico_folder: str) -> str:
    return pico_folder


@pytest.fixture(scope="module")
def recipe(model: str) -> Recipe:
    return tiny_recipe(model)


@pytest.fixture
def finished(tiny_run: Path) -> Path:
    """The folder of a whole run; not to be changed."""
    return tiny_run


@pytest.fixture(scope="module")
def searched(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose search is whole; not to be changed."""
    return whole_run(tmp_path_factory.mktemp("runs") / "searched", recipe, until="search")


@pytest.fixture
def file(recipe: Recipe, tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    return str(path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def by_rule(folder: Path) -> str:
    return str(read_json(folder / "choice.json")["edit"]["id"])


# From the first question to the menu ---------------------------------------------------------------------------------


def test_a_person_picks_a_point_saves_it_and_the_recipe_is_the_record(
    model: str, file: str, finished: Path, here: Path
) -> None:
    other = next(name for name in EDITS if name != by_rule(finished))
    person = Person("y", other, "save", "adapter", "out/adapter", "quit")
    guide(Answers(model, Change(file), Path("run")), person)
    assert person.left == []
    # Before the yes: what it takes. Before the pick: the front.
    for line in ("model ", "search      up to 2 edits, and 2 candidates", "tokens      up to", "time        about"):
        assert line in person.screen
    assert person.screen.index("time  ") < person.screen.index("Go on [Y/n]") < person.screen.index("Which one")
    assert "the rule's choice" in person.screen
    held = load_recipe("run")
    assert held.search.pick == other
    choice = read_json("run/choice.json")
    assert choice["edit"]["id"] == other
    assert choice["picked"]["by_rule"]["id"] == by_rule(finished)
    assert (here / "out/adapter/adapter_model.safetensors").is_file()
    # Running the record again changes nothing.
    before = Path("run/edit.safetensors").read_bytes()
    run_all(Run("run", held))
    assert Path("run/edit.safetensors").read_bytes() == before


def test_enter_takes_the_rules_choice_which_is_then_no_pick(searched: Path, finished: Path, here: Path) -> None:
    shutil.copytree(searched, here / "run")
    guide(Answers("run", Change()), Person("", "", "quit"))
    assert load_recipe("run").search.pick is None
    assert by_rule(Path("run")) == by_rule(finished)
    assert (here / "run/edit.safetensors").read_bytes() == (finished / "edit.safetensors").read_bytes()


def test_a_no_to_the_cost_leaves_nothing(model: str, file: str, here: Path) -> None:
    guide(Answers(model, Change(file), Path("run")), Person("n"))
    assert list(here.iterdir()) == []


def test_answers_of_a_point_are_shown_before_it_is_picked(searched: Path, here: Path) -> None:
    shutil.copytree(searched, here / "run")
    person = Person("y", "a 1", "a 99", "nonsense", "^C")
    with pytest.raises(Interrupted):
        guide(Answers("run", Change()), person)
    between = person.screen.split("Which one")
    assert between[1].count("  > ") == 3
    assert "search.pick names no edit" in between[2]
    assert "(got: nonsense)" in between[3]


def test_a_run_goes_on_where_it_was_left_and_asks_only_what_is_left(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    person = Person("report", "quit")
    guide(Answers(str(folder), Change()), person)
    assert person.left == []
    assert "Go on" not in person.screen
    assert "Which one" not in person.screen


def test_another_pick_of_a_finished_run_makes_only_what_follows_from_it(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    before = read_json(folder / "manifest.json")["stages"]
    other = next(name for name in EDITS if name != by_rule(folder))
    guide(Answers(str(folder), Change(), yes=True, pick=other))
    after = read_json(folder / "manifest.json")["stages"]
    made = [name for name in before if before[name]["key"] != after[name]["key"]]
    assert made == ["edit", "export", "evaluate", "report"]
    assert by_rule(folder) == other
    guide(Answers(str(folder), Change(), yes=True, pick="rule"))
    assert load_recipe(folder).search.pick is None
    assert by_rule(folder) == by_rule(finished)


# Every question is a flag ---------------------------------------------------------------------------------------------


def test_with_flags_nothing_is_asked(
    model: str, file: str, finished: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    other = next(name for name in EDITS if name != by_rule(finished))
    options = ["--recipe", file, "--out", "run", "--yes", "--pick", other, "--set", "seed=1", "--quiet"]
    options += ["--save", "edit", "--save", "gguf"]
    assert command(monkeypatch, model, *options) == 0
    printed = capfd.readouterr()
    assert "Go on" not in printed.err
    assert str(Path("run/edit.safetensors")) in printed.out
    assert Path("run/gguf/adapter.gguf").is_file()
    assert load_recipe("run").exports == ["adapter", "gguf"]
    assert by_rule(Path("run")) == other


def test_without_a_terminal_a_missing_flag_is_one_sentence_with_the_flags(
    model: str, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\ny\n"))
    for options in ([], ["--yes"], ["--recipe", "demo"], ["--more", "Be loud.", "--yes"]):
        assert command(monkeypatch, model, *options) == 2
        printed = capfd.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        for flag in ("--recipe", "--more", "--less", "--yes", "--pick", "--save", "--benchmark", "--push", "--chat"):
            assert flag in printed.err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--recipe", "demo", "--more", "Be loud."], ["a recipe says itself what to change", "--more"]),
        (["--recipe", "dmo", "--yes"], ["no such recipe", "dmo", "demo"]),
        (["--more", "Be loud.", "--less", "Be loud.", "--yes"], ["more and less are the same"]),
        (["--more", "none.jsonl", "--less", "no.jsonl", "--yes"], ["no such file", "none.jsonl"]),
        (["--recipe", "demo", "--yes", "--save", "zip"], ["an edit cannot be saved as that", "zip", "adapter"]),
        (["--recipe", "demo", "--yes", "--to", "x"], ["--to is where one thing is saved"]),
        (["--recipe", "demo", "--yes", "--items", "3"], ["--items says how many questions", "--benchmark"]),
        (["--recipe", "demo", "--yes", "--set", "seeed=3"], ["unknown key seeed", "seed"]),
    ],
)
def test_a_mistake_in_a_flag_is_one_sentence(
    options: list[str], parts: list[str], model: str, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    assert command(monkeypatch, model, *options, "--quiet") == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    for part in parts:
        assert part in printed.err
    assert list(here.iterdir()) == []


def test_a_model_that_is_nowhere_is_said_before_anything_is_asked(here: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        guide(Answers("./nowhere", Change()), Person())
    with pytest.raises(ModelError, match="Did you mean embedded:smollm2"):
        guide(Answers("embedded:smolm", Change()), Person())


def test_a_run_takes_no_other_recipe(finished: Path) -> None:
    with pytest.raises(RecipeError, match="a run has its recipe"):
        guide(Answers(str(finished), Change("demo")), Person())


# What to change -------------------------------------------------------------------------------------------------------


def test_shipped_recipes_are_listed_and_taken_by_number_name_or_beginning() -> None:
    names = sorted(shipped_recipes())
    for answer, name in (("1", names[0]), ("pirate", "pirate"), ("tru", "truthfulness")):
        person = Person("0", "99", "", "zzz", answer)
        assert asked_change(Change(), person).recipe == name
        for shipped in names:
            assert f"  {shipped} " in person.screen


def test_two_instructions_are_asked_for_where_they_are_missing() -> None:
    change = asked_change(Change(title="loud"), Person("own", "Be loud.", "Be soft."))
    assert (change.recipe, change.more, change.less, change.title) == (None, "Be loud.", "Be soft.", "loud")
    assert asked_change(Change(more="Be loud."), Person("Be soft.")).less == "Be soft."


def test_wrong_answers_are_asked_again(model: str, file: str, here: Path) -> None:
    person = Person("own", "Be loud.", "Be loud.", "own", "none.jsonl", "no.jsonl", "^C")
    with pytest.raises(Interrupted, match="nothing was written"):
        guide(Answers(model, Change(overrides=("seed=2",))), person)
    assert "more and less are the same" in person.screen
    assert person.left == []


def test_a_recipe_for_another_model_leaves_how_its_own_is_loaded_behind() -> None:
    own, other = (recipe_of(Change("pirate"), name) for name in (EMBEDDED, "someone/else"))
    assert own == load_recipe("pirate")
    assert (own.model.dtype, other.model.dtype, other.model.device) == ("float32", "auto", "auto")
    assert other.model.name == "someone/else"
    assert other.behaviour == own.behaviour
    assert recipe_of(Change("pirate", overrides=("model.device=cpu",)), "someone/else").model.device == "cpu"


def test_a_directory_with_another_run_is_never_taken(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    other = recipe.model_copy(update={"seed": 7})
    with pytest.raises(FileError, match="holds another run"):
        place_of(other, folder, (), None)
    with pytest.raises(FileError, match="holds another run"):
        place_of(other, folder, (), Person("elsewhere"))  # the flag says where
    assert place_of(recipe, folder, (), None) == (folder, load_recipe(folder))


def test_a_person_is_asked_for_another_directory(recipe: Recipe, finished: Path, here: Path) -> None:
    shutil.copytree(finished, folder_of(recipe))
    other = recipe.model_copy(update={"seed": 7})
    assert place_of(recipe, None, (), None)[0] == folder_of(recipe)
    free = folder_of(recipe).with_name(f"{folder_of(recipe).name}-2")
    assert place_of(other, None, (), Person("")) == (free, other)
    assert place_of(other, None, (), Person(str(folder_of(recipe)), "mine"))[0] == Path("mine")


def test_a_run_goes_on_with_what_was_picked_and_exported(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    held = recipe.model_copy(update={"exports": ["adapter", "gguf"]})
    (folder / "recipe.yaml").write_text(held.to_yaml(), encoding="utf-8")
    assert place_of(recipe, folder, (), None)[1].exports == ["adapter", "gguf"]


def test_a_changed_recipe_counts_although_the_search_is_the_same(
    recipe: Recipe, finished: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    changed = tiny_recipe(
        recipe.model.name,
        search__rule="knee",
        search__limits={"over_refusal": 0.9},
        data__test={"harmful": 1, "benign": 2, "borderline": 1},
        exports=["checkpoint"],
    )
    trained = overridden(load_recipe(folder), ["training.lora={}"])
    (folder / "recipe.yaml").write_text(trained.to_yaml(), encoding="utf-8")
    taken = place_of(changed, folder, (), None)[1]
    assert (taken.search.rule, taken.search.limits) == ("knee", {"over_refusal": 0.9})
    assert taken.data.test == changed.data.test
    assert taken.exports == ["checkpoint", *load_recipe(folder).exports]
    assert list(taken.training.methods) == ["lora"]


# Ctrl-C and the end of the input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [["^C"], []])
def test_a_stop_before_the_yes_leaves_nothing(stop: list[str], model: str, file: str, here: Path) -> None:
    with pytest.raises(Interrupted) as stopped:
        guide(Answers(model, Change(file), Path("a run")), Person(*stop))
    assert str(stopped.value) == "nothing was written"
    assert list(here.iterdir()) == []


def test_a_stop_at_the_pick_goes_on_at_the_pick(searched: Path, here: Path) -> None:
    shutil.copytree(searched, here / "a run")
    for stop in (["y", "^C"], ["y"]):
        with pytest.raises(Interrupted) as stopped:
            guide(Answers("a run", Change()), Person(*stop))
        assert str(stopped.value) == "`steer2edit './a run'` goes on from here"
    assert not (here / "a run/choice.json").exists()


def test_a_stop_in_the_menu_leaves_the_run_whole(finished: Path, here: Path) -> None:
    shutil.copytree(finished, here / "run")
    with pytest.raises(Interrupted, match=r"`steer2edit \./run` goes on from here"):
        guide(Answers("run", Change()), Person("save", "^C"))
    run = Run("run", load_recipe("run"))
    assert all(run.is_whole(stage) for stage in stages.STAGES)


@pytest.mark.parametrize("stage", ["search", "evaluate"])
def test_a_stop_in_any_stage_can_be_gone_on_from(
    stage: str, searched: Path, finished: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    shutil.copytree(searched, here / "run")
    if stage == "search":
        (here / "run/search/trials.jsonl").unlink()

    def interrupted(run: Run) -> list[str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(stages.STAGES, stage, stages.Stage(interrupted))
        assert command(monkeypatch, "./run", "--yes", "--quiet") == 130
    # As a word alone it would be the verb.
    assert capfd.readouterr().err.strip() == "steer2edit: stopped; `steer2edit ./run` goes on from here."
    assert command(monkeypatch, "./run", "--yes", "--quiet") == 0
    assert (here / "run/edit.safetensors").read_bytes() == (finished / "edit.safetensors").read_bytes()


# The menu -------------------------------------------------------------------------------------------------------------


def _menu(folder: Path, *answers: str) -> Person:
    person = Person(*answers)
    guide(Answers(str(folder), Change()), person)
    assert person.left == []
    return person


@pytest.mark.parametrize("kind", ["adapter", "checkpoint", "gguf", "edit"])
def test_each_kind_is_saved_in_the_run_or_elsewhere(kind: str, finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    elsewhere = tmp_path / "elsewhere"
    person = _menu(folder, "save", kind, "", "save", kind, str(elsewhere), "quit")
    own = own_place(folder, kind)
    assert f"Saved: {own}" in person.screen
    assert own.exists()
    assert elsewhere.exists()
    assert set(load_recipe(folder).exports) == {"adapter", *({kind} - {"edit"})}
    if kind == "edit":
        assert Edit.load(elsewhere).id == Edit.load(own).id
    if kind == "checkpoint":
        assert (own / "README.md").is_file()  # the card
        assert (own / "model.safetensors").read_bytes() == (elsewhere / "model.safetensors").read_bytes()


def test_a_gguf_model_is_no_export_of_a_recipe(finished: Path, tmp_path: Path) -> None:
    """The base here is a checkpoint, so that there is no GGUF file to edit: one sentence, and the run is whole."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    person = _menu(folder, "save", "gguf-model", "", "quit")
    assert "a GGUF file becomes an edited GGUF file" in person.screen
    assert own_place(folder, "gguf-model") == folder / "edited.gguf"
    assert load_recipe(folder).exports == ["adapter"]


def test_what_cannot_be_saved_leaves_the_run_as_it_was(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    before = (folder / "recipe.yaml").read_text(encoding="utf-8")

    def fails(run: Run, edit: Edit) -> None:
        raise FileError("the disk says no", got="nothing", fix="Try again.")

    monkeypatch.setitem(exports.EXPORTS, "checkpoint", fails)
    person = _menu(folder, "save", "checkpoint", "", "quit")
    assert "the disk says no (got: nothing). Try again." in person.screen
    assert (folder / "recipe.yaml").read_text(encoding="utf-8") == before
    assert all(Run(folder, load_recipe(folder)).is_whole(stage) for stage in ("export", "evaluate", "report"))
    with pytest.raises(FileError, match="output exists already"):
        save(folder, "edit", folder / "choice.json")


def test_a_mistake_in_the_menu_is_a_sentence_and_the_menu_comes_back(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    shared = tmp_path / "shared"
    person = _menu(
        folder,
        *("push", "no such/name/at/all", "y"),
        *("push", str(shared)),
        *("benchmark", "gsm8k", str(tmp_path / "no sets"), "none", "2"),
        *("sell", "quit"),
    )
    assert "the Hub does not take no such/name/at/all" in person.screen
    assert "(got: none). Write 1 or more." in person.screen
    assert "Write a number from 1 to 6, or a name." in person.screen
    assert (shared / "adapter_model.safetensors").is_file()
    assert (shared / "recipe.yaml").is_file()
    assert load_recipe(folder).data.utility == []


def test_a_benchmark_measures_a_task_and_the_recipe_says_so(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    sets = write(tmp_path / "sets/arc_easy.jsonl", local_rows("arc_easy")).parent
    _menu(folder, "benchmark", "arc_easy", str(sets), "2", "quit")
    assert load_recipe(folder).data.utility == ["arc_easy"]
    assert load_recipe(folder).data.utility_items == 2
    results = read_json(folder / "evaluation/results.json")
    assert results["tasks"]["arc_easy"]["n"] == 2
    assert json.loads((folder / "choice.json").read_text(encoding="utf-8"))["edit"]["id"] == by_rule(finished)


def test_the_chat_opens_with_the_run(finished: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello?\n/quit\n"))
    guide(Answers(str(finished), Change(), yes=True, wishes=Wishes(chat=True)))
    assert "Ask something; /help lists the commands." in capfd.readouterr().out


def test_wishes_are_checked_before_anything_runs(model: str, here: Path) -> None:
    with pytest.raises(Steer2EditError, match="cannot be saved as that"):
        guide(Answers(model, Change("demo"), yes=True, wishes=Wishes(save=("zip",))))
    assert list(here.iterdir()) == []


def test_a_recipe_that_runs_code_is_refused_unless_trusted(model: str, here: Path) -> None:
    (here / "score.py").write_text("def shows(prompt, response):\n    return 1.0\n", encoding="utf-8")
    more, less = (
        write_rows(here / f"{side}.jsonl", [{"prompt": f"Why {i}?", "response": side} for i in range(9)])
        for side in ("more", "less")
    )
    change = Change(None, more, less, score="{python: 'score.py:shows'}")
    with pytest.raises(RecipeError, match="trust-recipe-code"):
        guide(Answers(model, change, yes=True))


def test_names_of_edits_and_markup_are_shown_as_they_are() -> None:
    person = Person("x")
    person.say("a [bold] b\x1b[31m\u202e")
    assert person.screen == "a [bold] b\\x1b[31m\\u202e\n"
    assert flow.Answers("m", Change()).wishes.are_some is False
