"""The guided command in a terminal of its own: from the first question to the end, and Ctrl-C in each phase."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("there is no pseudo-terminal", allow_module_level=True)

from runs import save_pico, tiny_recipe, whole_run
from steer2edit.files.reading import read_json
from steer2edit.recipe import Recipe, load_recipe
from terminal import Terminal, plain


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_pico(tmp_path_factory.mktemp("pico") / "model")


@pytest.fixture(scope="module")
def recipe(model: str) -> Recipe:
    return tiny_recipe(model)


def _written(recipe: Recipe, folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def searched(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run whose search is whole; not to be changed."""
    return whole_run(tmp_path_factory.mktemp("runs") / "searched", recipe, until="search")


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (120, 40)])
def test_from_the_first_question_to_a_saved_adapter(
    columns: int, lines: int, recipe: Recipe, model: str, tmp_path: Path
) -> None:
    # The shipped recipes are the list; the tiny one is given by its file, as the flag of that question.
    screen = Terminal(tmp_path, model, "--recipe", _written(recipe, tmp_path), columns=columns, lines=lines)
    cost = screen.answer("Go on [Y/n]: ", "y")
    for word in ("model", "change", "search", "tokens", "time", "directory"):
        assert f"{word} " in cost
    run = screen.wait_for("Which one")
    for stage in ("traces", "probe", "score", "search"):
        assert f"✓\u00a0{stage}" in run
    assert "rule's" in run  # a narrow cell may break the phrase
    taken = "edit-0.1-off-0.2"
    screen.child.sendline(taken)
    screen.answer("What now [quit]: ", "save")
    screen.answer("Save as [adapter]: ", "")
    screen.answer("Where to [", "kept")
    saved = screen.answer("What now [quit]: ", "quit")
    assert "Saved: kept" in saved
    assert screen.end()[0] == 0
    assert (tmp_path / "kept/adapter_model.safetensors").is_file()
    (folder,) = (tmp_path / "runs").iterdir()
    assert read_json(folder / "choice.json")["edit"]["id"] == taken
    assert load_recipe(folder).search.pick in (taken, None)
    # A line that is drawn again must not be longer than the terminal, or the screen would run away.
    drawn = [line for line in plain(screen.raw).split("\n") if "\u00a0" in line]
    assert drawn
    assert all(len(part) <= columns for line in drawn for part in line.split("\r"))


@pytest.mark.slow
def test_the_first_question_lists_the_recipes_and_ctrl_c_leaves_nothing(model: str, tmp_path: Path) -> None:
    screen = Terminal(tmp_path, model)
    listed = screen.wait_for("Number or name: ")
    for name in ("demo", "pirate", "sentiment", "lists", "truthfulness", "brevity", "own"):
        assert f"{name} " in listed
    screen.interrupt()
    code, rest = screen.end()
    assert code == 130
    assert "steer2edit: stopped; nothing was written." in rest
    assert "Traceback" not in screen.raw
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_while_the_cost_is_asked_leaves_nothing(recipe: Recipe, model: str, tmp_path: Path) -> None:
    screen = Terminal(tmp_path, model, "--recipe", _written(recipe, tmp_path))
    screen.wait_for("Go on [Y/n]: ")
    screen.interrupt()
    code, rest = screen.end()
    assert (code, "stopped; nothing was written." in rest) == (130, True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_ctrl_c_in_the_search_gives_the_terminal_back_and_the_run_goes_on(model: str, tmp_path: Path) -> None:
    slow = tiny_recipe(
        model,
        evaluation__new_tokens=60,
        evaluation__rows=1,
        evaluation__batch=2,
        search__rho_attn=[0.1, 0.2, 0.3],
    )
    screen = Terminal(tmp_path, model, "--recipe", _written(slow, tmp_path), "--yes", "--out", "runs/slow")
    screen.wait_for("4/8 search:")
    screen.wait_for("search ")
    screen.interrupt()
    code, rest = screen.end()
    assert code == 130
    assert "steer2edit: stopped; `steer2edit runs/slow` goes on from here." in rest
    assert "Traceback" not in screen.raw
    assert screen.raw.rindex("\x1b[?25h") > screen.raw.rindex("\x1b[?25l")  # the cursor is back
    again = Terminal(tmp_path, "runs/slow", "--yes", "--set", "evaluation.resamples=50")
    code, rest = again.end()
    assert code == 0, again.raw
    assert (tmp_path / "runs/slow/report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("question", ["Which one", "What now"])
def test_ctrl_c_at_a_later_question_says_how_it_goes_on(question: str, searched: Path, tmp_path: Path) -> None:
    shutil.copytree(searched, tmp_path / "run")
    screen = Terminal(tmp_path, "./run")
    screen.answer("Go on", "y")
    screen.wait_for("Which one")
    if question != "Which one":
        screen.child.sendline("1")
        screen.wait_for(question)
    screen.interrupt()
    code, rest = screen.end()
    assert code == 130
    assert "stopped; `steer2edit ./run` goes on from here." in rest
    assert (tmp_path / "run/edit.safetensors").is_file() == (question == "What now")


@pytest.mark.slow
def test_the_end_of_the_input_stops_like_ctrl_c(model: str, tmp_path: Path) -> None:
    screen = Terminal(tmp_path, model)
    screen.wait_for("Number or name: ")
    screen.child.sendeof()
    code, rest = screen.end()
    assert (code, "stopped; nothing was written." in rest) == (130, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serch", "x"], "Did you mean 'search'"),
        (["evalute", "x"], "Did you mean 'evaluate'"),
        (["qqq"], "A model is a folder"),
        (["./nowhere"], "no such folder"),
    ],
)
def test_a_first_word_that_is_no_verb_is_taken_for_what_it_looks_like(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    screen = Terminal(tmp_path, *arguments)
    code, rest = screen.end()
    assert code == 2
    assert said in " ".join(rest.split())


@pytest.mark.slow
@pytest.mark.parametrize("without", [False, True])
def test_no_color_is_respected(without: bool, searched: Path, tmp_path: Path) -> None:
    shutil.copytree(searched, tmp_path / "run")
    variables = {"NO_COLOR": "1"} if without else {}
    screen = Terminal(tmp_path, "edit", "./run", **variables)
    assert screen.end()[0] == 0
    assert "✓\u00a0edit" in plain(screen.raw)
    coloured = re.search(r"\x1b\[(?:[0-9]+;)*[349][0-7][;m]", screen.raw)
    assert (coloured is None) == without
