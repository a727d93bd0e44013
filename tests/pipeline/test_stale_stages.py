"""What a run does again, and when: after a change of the recipe, of its files, of traces put there by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import steer2edit as s2e
from run_files import UNDRAWN, _alter, _bytes
from runs import tiny_recipe
from steer2edit.errors import EditError, FileError
from steer2edit.files.reading import read_json
from steer2edit.models.load import load_model
from steer2edit.pipeline.judge import judge
from steer2edit.pipeline.keys import stage_keys
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import STAGES, Stage, run_all, run_stage
from steer2edit.probing.traces import read_traces
from steer2edit.recipe import Recipe

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the stages that run from now on."""
    names: list[str] = []

    def watched(name: str, stage: Stage) -> Stage:
        def work(run: Run) -> list[str]:
            names.append(name)
            return stage.work(run)

        return replace(stage, work=work)

    for name, stage in list(STAGES.items()):
        monkeypatch.setitem(STAGES, name, watched(name, stage))
    return names


def _from(stage: str) -> list[str]:
    return list(STAGES)[list(STAGES).index(stage) :]


def test_a_second_run_does_nothing(
    run_copy: Path, recipe: Recipe, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("steer2edit.engines.plan.load_model", load)
    before = (run_copy / "manifest.json").read_bytes()
    run_all(Run(run_copy, recipe))
    assert ran == []
    assert (run_copy / "manifest.json").read_bytes() == before


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("key", "value", "first"),
    [
        ("search__limits", {"over_refusal": 0.9, "degenerate": None}, "edit"),
        ("data__test", {"harmful": 1, "benign": 2, "borderline": 1}, "evaluate"),
        ("name", "other", "report"),
    ],
)
def test_a_change_of_the_recipe_reruns_only_what_depends_on_it(
    key: str, value: Any, first: str, run_copy: Path, recipe: Recipe, ran: list[str]
) -> None:
    run_all(Run(run_copy, tiny_recipe(recipe.model.name, **{key: value})))
    assert ran == _from(first)


@pytest.mark.usefixtures("undrawn")
def test_other_exports_and_resamples_make_no_answer_again(run_copy: Path, recipe: Recipe, ran: list[str]) -> None:
    journals = {file: file.read_bytes() for file in run_copy.rglob("journal-*")}
    run_all(Run(run_copy, tiny_recipe(recipe.model.name, exports=[])))
    assert ran == ["export", "report"]
    ran.clear()
    run_all(Run(run_copy, tiny_recipe(recipe.model.name, exports=[], evaluation__resamples=60)))
    assert ran == ["edit", "evaluate", "report"]
    assert {file: file.read_bytes() for file in run_copy.rglob("journal-*")} == journals


@pytest.mark.parametrize(
    ("key", "value", "first"),
    [
        ("seed", 2, "traces"),
        ("behaviour__negative", ["benign"], "traces"),
        ("data__probe", {"harmful": 2, "benign": 3}, "traces"),
        ("model__dtype", "bfloat16", "traces"),
        ("search__rho_attn", [0.1], "search"),
        ("search__variants", ["full", "l0"], "search"),
        ("search__variants", ["full", "k_mean"], "score"),
        ("search__method", "tpe", "search"),
        ("search__rule", "knee", "edit"),
        ("search__tolerance", 0.5, "edit"),
        ("search__reference", 0.5, "edit"),
        ("data__questions", {"file": "questions.jsonl"}, "search"),
        ("data__validation", {"harmful": 1}, "search"),
        ("evaluation__new_tokens", 3, "search"),
    ],
)
def test_a_stage_whose_part_of_the_recipe_changed_is_not_whole(
    key: str, value: Any, first: str, tiny_run: Path, recipe: Recipe
) -> None:
    changed = Run(tiny_run, tiny_recipe(recipe.model.name, **{key: value}))
    assert [stage for stage in STAGES if not changed.is_whole(stage)] == _from(first)


@pytest.mark.parametrize(
    ("search", "key", "value", "first"),
    [
        ({"refine": 2}, "rule", "knee", "search"),
        ({"method": "tpe"}, "limits", {"over_refusal": 0.9, "degenerate": None}, "search"),
        ({"method": "tpe"}, "reference", 0.5, "search"),
        ({"sanity": 2}, "limits", {"over_refusal": 0.9, "degenerate": None}, "edit"),
        ({"sanity": 2}, "limits", {"over_refusal": None, "degenerate": 0.5}, "search"),
        ({"sanity": 2}, "rule", "knee", "edit"),
    ],
)
def test_the_search_is_made_again_only_where_the_rule_and_the_limits_steer_it(
    search: dict[str, Any], key: str, value: Any, first: str, tmp_path: Path
) -> None:
    given = {f"search__{name}": x for name, x in search.items()}
    before = Run(tmp_path, tiny_recipe(**given)).keys
    after = Run(tmp_path, tiny_recipe(**given, **{f"search__{key}": value})).keys
    assert [stage for stage in STAGES if before[stage] != after[stage]] == _from(first)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("limits", {"over_refusal": 0.9, "degenerate": None}),
        ("rule", "cheapest"),
        ("reference", 0.5),
    ],
)
def test_a_new_rule_limit_or_reference_is_told_as_a_run_with_it_from_the_start_tells_it(
    key: str, value: Any, run_copy: Path, recipe: Recipe, tmp_path: Path
) -> None:
    changed = tiny_recipe(recipe.model.name, **{f"search__{key}": value})
    run_all(Run(run_copy, changed))
    run_all(Run(tmp_path / "fresh", changed))
    assert _bytes(run_copy, ["choice.json", "report.md"]) == _bytes(tmp_path / "fresh", ["choice.json", "report.md"])


def test_changed_questions_are_noticed(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    keys = []
    for text in ("{}", "{ }"):
        file.write_text(text, encoding="utf-8")
        keys.append(Run(tmp_path, tiny_recipe(data__questions={"file": str(file)})).keys)
    assert [stage for stage in STAGES if keys[0][stage] != keys[1][stage]] == _from("search")


def test_other_neutral_prompts_of_the_package_are_noticed() -> None:
    keys = [tiny_recipe(utility={"prompts": f"builtin:{name}_prompts"}) for name in ("neutral", "everyday")]
    before, after = map(stage_keys, keys)
    assert [stage for stage in STAGES if before[stage] != after[stage]] == _from("search")


def test_a_limit_steers_a_narrow_search_and_no_other() -> None:
    def stale(narrow: bool) -> list[str]:
        same = {"search__rho_attn": "auto", "search__rho_mlp": [None], "search__narrow": narrow}
        before, after = (stage_keys(tiny_recipe(**same, search__limits={"utility_loss": at})) for at in (0.3, 0.4))
        return [stage for stage in STAGES if before[stage] != after[stage]]

    assert stale(True) == _from("search")
    assert stale(False) == _from("edit")


def test_a_changed_task_of_lm_eval_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    keys = []
    for text in ("task: mine\n", "task: mine\nnum_fewshot: 5\n"):
        file.write_text(text, encoding="utf-8")
        keys.append(stage_keys(tiny_recipe(data__utility=[str(file)])))
    assert [stage for stage in STAGES if keys[0][stage] != keys[1][stage]] == ["evaluate", "report"]


def test_a_changed_prompt_file_is_noticed(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("{}\n", encoding="utf-8")
    before = Run(tmp_path / "run", tiny_recipe("m", data__prompts=str(file))).keys
    file.write_text("{ }\n", encoding="utf-8")
    after = Run(tmp_path / "run", tiny_recipe("m", data__prompts=str(file))).keys
    assert [stage for stage in STAGES if before[stage] != after[stage]] == list(STAGES)


def _remove(path: Path) -> None:
    path.unlink()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("name", "damage", "first"),
    [
        ("traces.jsonl", _alter, "traces"),
        ("probe.safetensors", _remove, "probe"),
        ("scores.safetensors", _alter, "score"),
        ("search/trials.jsonl", _remove, "search"),
        ("edit.safetensors", _alter, "edit"),
        ("adapter/steer2edit.json", _remove, "export"),
        ("evaluation/results.json", _alter, "evaluate"),
        ("figures/lambda.svg", _remove, "report"),
    ],
)
def test_an_output_that_is_lost_or_altered_is_made_again_and_nothing_else(
    name: str,
    damage: Callable[[Path], None],
    first: str,
    run_copy: Path,
    tiny_run: Path,
    recipe: Recipe,
    ran: list[str],
) -> None:
    damage(run_copy / name)
    run_all(Run(run_copy, recipe))
    # What follows read the same bytes as before; only the card in an export's folder goes with the folder.
    assert ran == ([first, "report"] if first == "export" else [first])
    assert _bytes(run_copy, UNDRAWN) == _bytes(tiny_run, UNDRAWN)


@pytest.mark.usefixtures("undrawn")
def test_limits_that_nothing_keeps_stop_the_run_after_the_search(
    run_copy: Path, recipe: Recipe, ran: list[str]
) -> None:
    strict = tiny_recipe(recipe.model.name, search__limits={"utility_loss": 0.0})
    with pytest.raises(EditError, match="no edit stays within the limits"):
        run_all(Run(run_copy, strict))
    assert ran == ["edit"]
    # The old choice stands no longer for this recipe, and a run with the old recipe makes what is missing.
    assert not Run(run_copy, strict).is_whole("edit")
    assert Run(run_copy, recipe).is_whole("edit")


@pytest.mark.usefixtures("undrawn")
def test_the_checkpoint_of_a_run_is_the_base_with_the_edit_and_is_replaced_with_it(
    run_copy: Path, recipe: Recipe, ran: list[str]
) -> None:
    both = tiny_recipe(recipe.model.name, exports=["adapter", "checkpoint"])
    run_all(Run(run_copy, both))
    assert ran == ["export", "report"]
    for rho in (0.3, 0.1):
        if rho == 0.1:
            run_all(Run(run_copy, tiny_recipe(recipe.model.name, exports=["checkpoint"], search__rho_attn=[0.1])))
        edit = s2e.Edit.load(run_copy / "edit.safetensors")
        assert edit.config["rho_attn"] == rho
        base, _ = load_model(recipe.model.name, dtype="float32", device="cpu")
        edit.apply(base)
        exported = AutoModelForCausalLM.from_pretrained(str(run_copy / "checkpoint"))
        for name, tensor in base.state_dict().items():
            assert torch.equal(exported.state_dict()[name], tensor), name
    assert not (run_copy / "adapter").exists()  # it was the other edit's


# Traces that are put there by hand ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_traces_that_are_put_into_the_directory_are_taken_and_kept(
    recipe: Recipe, tiny_run: Path, tmp_path: Path, ran: list[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lines = (tiny_run / "traces.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    own = "".join(lines[:2] + lines[3:])
    (folder / "traces.jsonl").write_text(own, encoding="utf-8")
    run_stage(Run(folder, recipe), "probe", "tiny.yaml")
    run_all(Run(folder, recipe))
    assert (folder / "traces.jsonl").read_text(encoding="utf-8") == own
    assert read_json(folder / "manifest.json")["stages"]["traces"]["by_hand"] is True
    # Another recipe does not overwrite them either, and changed ones are probed again.
    run_all(Run(folder, tiny_recipe(recipe.model.name, behaviour__new_tokens=6)))
    assert (folder / "traces.jsonl").read_text(encoding="utf-8") == own
    (folder / "traces.jsonl").write_text("".join(lines), encoding="utf-8")
    ran.clear()
    run_all(Run(folder, tiny_recipe(recipe.model.name, behaviour__new_tokens=6)))
    assert ran[:4] == ["traces", "probe", "score", "search"]
    assert (folder / "traces.jsonl").read_text(encoding="utf-8") == "".join(lines)


@pytest.mark.usefixtures("undrawn")
def test_answers_of_other_scores_are_no_answers_of_these(recipe: Recipe, tiny_run: Path, tmp_path: Path) -> None:
    """The same recipe with other traces: everything is asked again, and gives what a new directory gives."""
    whole = (tiny_run / "traces.jsonl").read_text(encoding="utf-8")
    # The other way round: what showed the behaviour does not.
    labels = {"positive": "negative", "negative": "positive"}
    turned = re.sub(r'"label": "(\w+)"', lambda found: f'"label": "{labels[found[1]]}"', whole)
    folders = tmp_path / "again", tmp_path / "new"
    for folder, texts in zip(folders, ([whole, turned], [turned]), strict=True):
        folder.mkdir()
        for text in texts:
            (folder / "traces.jsonl").write_text(text, encoding="utf-8")
            run_all(Run(folder, recipe))
    again, new = (_bytes(folder, ["search/trials.jsonl", "evaluation/results.json"]) for folder in folders)
    assert again == new
    assert again != _bytes(tiny_run, ["search/trials.jsonl", "evaluation/results.json"])


def test_journals_that_earlier_versions_named_are_read_while_their_scores_are_here(
    run_copy: Path, recipe: Recipe
) -> None:
    run = Run(run_copy, recipe)
    named = {}
    for split, key in (("validation", "search"), ("test", "test answers")):
        path = run.journal(split)
        named[split] = path.rename(path.with_name(f"journal-{run.keys[key]}.jsonl"))
        assert run.journal(split) == named[split]
    assert judge(run_copy)["changed"] == {}
    _alter(run_copy / "scores.safetensors")
    assert run.journal("validation") != named["validation"]


def test_answers_of_another_commit_of_the_model_are_not_taken(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for commit in ("a" * 40, "b" * 40):
        monkeypatch.setattr(Run, "commit", commit)
        run_all(Run(tmp_path / "run", recipe), until="traces")
    journals = sorted((tmp_path / "run" / "traces").glob("journal-*.jsonl"))
    assert [journal.stem[-12:] for journal in journals] == ["a" * 12, "b" * 12]
    assert journals[0].read_bytes() == journals[1].read_bytes()


@pytest.mark.usefixtures("undrawn")
def test_traces_that_were_changed_after_the_stage_are_kept_under_another_name(run_copy: Path, recipe: Recipe) -> None:
    whole = (run_copy / "traces.jsonl").read_bytes()
    (run_copy / "traces.jsonl").write_bytes(whole + whole.splitlines(keepends=True)[0])
    run_all(Run(run_copy, recipe))
    assert (run_copy / "traces.jsonl").read_bytes() == whole
    assert (run_copy / "traces.changed.jsonl").read_bytes().startswith(whole)


def test_a_file_of_traces_is_taken_in_place_of_those_that_the_behaviour_makes(
    recipe: Recipe, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("steer2edit.engines.plan.load_model", load)
    given = tmp_path / "given.jsonl"
    lines = (tiny_run / "traces.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    given.write_text("".join(lines[:2] + lines[3:]), encoding="utf-8")
    with_file = tiny_recipe(recipe.model.name, behaviour__traces=str(given))
    run_stage(Run(tmp_path / "run", with_file), "traces", "tiny.yaml")
    assert read_traces(tmp_path / "run/traces.jsonl") == read_traces(given)
    assert "by_hand" not in read_json(tmp_path / "run/manifest.json")["stages"]["traces"]
    assert Run(tmp_path / "run", with_file).is_whole("traces")
    given.write_text("".join(lines), encoding="utf-8")
    changed = Run(tmp_path / "run", with_file)
    assert not changed.is_whole("traces")
    run_stage(changed, "traces", "tiny.yaml")
    assert read_traces(tmp_path / "run/traces.jsonl") == read_traces(tiny_run / "traces.jsonl")


def test_own_answers_are_not_made_twice(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steer2edit.engines.transformers import TransformersEngine
    from steer2edit.searching import own_answers

    monkeypatch.setattr(own_answers, "_BATCH", 2)
    generate, asked = TransformersEngine.generate, []

    def dying(self: Any, requests: Any, *rest: Any) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(requests))
        return generate(self, requests, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", dying)
        with pytest.raises(KeyboardInterrupt):
            run_stage(Run(tmp_path / "broken", recipe), "traces", "tiny.yaml")
    asked.clear()
    monkeypatch.setattr(
        TransformersEngine, "generate", lambda s, r, *rest: (asked.append(len(r)), generate(s, r, *rest))[1]
    )
    run_stage(Run(tmp_path / "broken", recipe), "traces", "tiny.yaml")
    assert asked == [2]  # six own answers in all
    run_stage(Run(tmp_path / "whole", recipe), "traces", "tiny.yaml")
    traces = [(tmp_path / name / "traces.jsonl").read_bytes() for name in ("broken", "whole")]
    assert traces[0] == traces[1]


def test_a_new_commit_of_a_hub_model_makes_the_stages_again(run_copy: Path, recipe: Recipe, monkeypatch: Any) -> None:
    manifest = read_json(run_copy / "manifest.json")
    monkeypatch.setattr("steer2edit.pipeline.run.resolved_revision", lambda name, revision=None: "a" * 40)
    assert Run(run_copy, recipe).is_whole("score")  # of a run of before, nothing is known
    run_stage(Run(run_copy, recipe), "score", "tiny.yaml")
    assert read_json(run_copy / "manifest.json")["stages"]["score"]["commit"] == "a" * 40
    assert "commit" not in manifest["stages"]["score"]
    assert Run(run_copy, recipe).is_whole("score")
    monkeypatch.setattr("steer2edit.pipeline.run.resolved_revision", lambda name, revision=None: "b" * 40)
    assert not Run(run_copy, recipe).is_whole("score")


def test_own_answers_of_several_calls_and_samplings_are_kept_apart(tmp_path: Path) -> None:
    from runs import FakeEngine
    from steer2edit.engines.base import Request, Sampling
    from steer2edit.method.intervention import NOTHING
    from steer2edit.searching.own_answers import Journalled

    def ask(temperature: float) -> int:
        engine = FakeEngine()
        journalled = Journalled(engine, tmp_path / "journal.jsonl")  # type: ignore[arg-type]
        for letter in "ab":
            journalled.generate([Request((ord(letter),))], [NOTHING], 4, None, Sampling(temperature))
        return len(engine.asked)

    assert [ask(0.0), ask(0.0), ask(0.9), ask(0.9)] == [2, 0, 2, 0]


# What fails, and what is left ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_what_another_recipe_left_is_marked_stale(run_copy: Path, recipe: Recipe) -> None:
    from steer2edit.report.inspection import describe

    with pytest.raises(EditError, match="no edit stays within the limits"):
        run_all(Run(run_copy, tiny_recipe(recipe.model.name, search__limits={"utility_loss": 0.0})))
    states = {row["stage"]: row["state"][:5] for row in describe(run_copy)["stages"]}
    assert [stage for stage, state in states.items() if state == "stale"] == _from("edit")
    run_all(Run(run_copy, recipe))
    assert {row["state"] for row in describe(run_copy)["stages"]} == {"whole"}


@pytest.mark.usefixtures("undrawn")
def test_an_export_that_fails_costs_no_evaluation_and_is_tried_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steer2edit.pipeline import exports

    def fail(*_: Any) -> None:
        raise FileError("the disk is full", got="nothing free", fix="Free some space.")

    with monkeypatch.context() as patch:
        patch.setitem(exports.EXPORTS, "adapter", fail)
        with pytest.raises(FileError, match="the disk is full"):
            run_all(Run(tmp_path / "run", recipe))
    assert (tmp_path / "run/evaluation/results.json").is_file()
    assert (tmp_path / "run/report.md").is_file()
    assert not Run(tmp_path / "run", recipe).is_whole("export")
    run_all(Run(tmp_path / "run", recipe))
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "run/adapter/README.md").is_file()


def test_own_answers_of_another_prompt_or_length_are_made_again(tmp_path: Path) -> None:
    from runs import FakeEngine
    from steer2edit.engines.base import Request
    from steer2edit.method.intervention import NOTHING
    from steer2edit.searching.own_answers import Journalled

    def ask(letter: str, tokens: int) -> int:
        engine = FakeEngine()
        journalled = Journalled(engine, tmp_path / "journal.jsonl")  # type: ignore[arg-type]
        journalled.generate([Request((ord(letter),))], [NOTHING], tokens)
        return len(engine.asked)

    assert [ask("a", 4), ask("a", 4), ask("b", 4), ask("b", 4), ask("b", 8), ask("b", 8)] == [1, 0, 1, 0, 1, 0]
