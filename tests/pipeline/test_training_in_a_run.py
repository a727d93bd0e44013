"""Training in a run: what its rows are, that nothing else is made again for them, and that a kill costs nothing."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import command, tiny_recipe, whole_run
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import FileError, RecipeError
from steer2edit.files.reading import read_json, read_jsonl
from steer2edit.method.intervention import NOTHING
from steer2edit.models.load import load_model
from steer2edit.pipeline import training as stage
from steer2edit.pipeline.judge import judge
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import STAGES, run_all, run_stage, run_training
from steer2edit.recipe import Recipe, load_recipe, overridden, training_overrides
from steer2edit.searching.bench import Bench
from steer2edit.training.course import checkpoint
from steer2edit.training.weights import carrying

KINDS = ["lora", "fine_tuning"]
TRAINING = {
    "lora": {"learning_rate": [1e-2], "steps": [1, 3]},
    "full": {"learning_rate": [1e-3, 1e-4], "steps": [2, 4, 6]},  # six checkpoints, of which two are tried
    "batch": 2,
}
# What a run with training and one to which it was added later agree on to the byte.
OUTPUTS = [
    *("choice.json", "search/trials.jsonl", "search/answers.jsonl", "edit.safetensors", "recipe.yaml"),
    *(f"training/{name}" for name in ("trials.jsonl", "discarded.jsonl", "study.json", "choice.json", "answers.jsonl")),
    *("evaluation/results.json", "evaluation/answers.jsonl", "report.md"),
]


pytestmark = pytest.mark.usefixtures("quiet", "undrawn")


@pytest.fixture(scope="module")
def plain(pico_folder: str) -> Recipe:
    return tiny_recipe(pico_folder)


@pytest.fixture(scope="module")
def recipe(plain: Recipe) -> Recipe:
    return overridden(plain, [f"training={json.dumps(TRAINING)}"])


@pytest.fixture(scope="module")
def untrained(tiny_run: Path) -> Path:
    """A finished run whose recipe asks for no training. Nobody changes it."""
    return tiny_run


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with training from the start, and its figures. Nobody changes it."""
    return whole_run(tmp_path_factory.mktemp("runs") / "whole", recipe)


@pytest.fixture
def copy(untrained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(untrained, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


# What it leaves -----------------------------------------------------------------------------------------------------


def test_every_checkpoint_is_a_trial_and_each_method_has_as_many_as_there_are_edits(whole: Path) -> None:
    trials = read_jsonl(whole / "training/trials.jsonl")
    assert [row["id"] for row in trials] == [
        *("lora-0.01-1", "lora-0.01-3", "fine_tuning-0.0001-2", "fine_tuning-0.001-6")
    ]
    choice, search = read_json(whole / "training/choice.json"), read_json(whole / "choice.json")
    assert choice["tried"] == {"lora": 2, "fine_tuning": 2}
    assert choice["evaluations"] == {"lora": 10, "fine_tuning": 10}
    assert search["tried"]["edit"] == 2
    assert search["evaluations"]["edit"] == 10
    for kind in KINDS:
        ranked = [(-(row["refusal"] or 0), row["utility_loss"], row["id"]) for row in trials if row["kind"] == kind]
        assert choice[kind]["id"] == min(ranked)[-1]
    assert all(row["utility_loss"] > 0 for row in trials)
    courses = read_json(whole / "training/study.json")["courses"]
    assert [(c["kind"], c["learning_rate"], c["steps"], len(c["losses"])) for c in courses] == [
        *(("lora", 0.01, [1, 3], 3), ("fine_tuning", 0.0001, [2], 2), ("fine_tuning", 0.001, [6], 6))
    ]


def test_the_rows_on_test_are_those_of_the_models_with_the_chosen_weights(whole: Path, recipe: Recipe) -> None:
    """Answers and KL, made again by a model into which the weights were loaded by hand."""
    results = read_json(whole / "evaluation/results.json")
    assert list(results["systems"]) == ["base", "steering", *KINDS, "edit"]
    assert {"edit - lora", "edit - fine_tuning"} <= set(results["differences"])
    answers = read_jsonl(whole / "evaluation/answers.jsonl")
    items = recipe.behaviour.items(recipe.source, "test")
    model, tokenizer = load_model(recipe.model.name, dtype="float32", device="cpu")
    engine = TransformersEngine(model, tokenizer, rows=8)
    requests = [Request(engine.tokens(item.messages(None))) for item in items]
    neutral = [requests[i] for i, item in enumerate(items) if item.kind == "benign"]
    own = [(r.ids, a.ids) for r, a in zip(neutral, engine.generate(neutral, [NOTHING], 4), strict=True)]
    base = [engine.log_probabilities(*pair) for pair in own]
    for kind in KINDS:
        config = read_json(whole / "training/choice.json")[kind]["config"]
        (folder,) = (whole / "training").glob(f"{kind}-{config['learning_rate']:g}-*")
        with carrying(model, checkpoint(folder, config["steps"])):
            made = [answer.text for answer in engine.generate(requests, [NOTHING], 4)]
            logs = [engine.log_probabilities(*pair) for pair in own]
        assert [row[kind] for row in answers] == made
        kls = [float((b.exp() * (b - log)).sum(-1).mean()) for b, log in zip(base, logs, strict=True)]
        cell = results["systems"][kind]["utility_loss"]
        assert cell["mean"] == pytest.approx(sum(kls) / len(kls), rel=1e-4)
        assert cell["n"] == 2
        assert set(answers[0]["labels"]) == set(results["systems"])


def test_the_report_shows_them_beside_the_others(whole: Path) -> None:
    report = (whole / "report.md").read_text(encoding="utf-8")
    config = read_json(whole / "training/choice.json")["lora"]["config"]
    assert f"| rank-1 LoRA (learning rate 0.01, steps {config['steps']}) | " in report
    assert "| full fine-tuning (learning rate " in report
    assert "| rank-1 LoRA | 2 | 10 | " in report
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert "lora-0.01-1" in page
    assert "kind-fine_tuning" in page
    assert "rank-1 LoRA" in (whole / "figures/trade_off.svg").read_text(encoding="utf-8")


def test_of_whole_models_only_the_chosen_checkpoint_is_kept(whole: Path) -> None:
    chosen = read_json(whole / "training/choice.json")["fine_tuning"]["config"]
    kept = [file for folder in (whole / "training").glob("fine_tuning-*") for file in folder.glob("*.safetensors")]
    assert [file.name for file in kept] == [f"{chosen['steps']}.safetensors"]
    (lora,) = (whole / "training").glob("lora-*")
    assert sorted(file.name for file in lora.iterdir()) == ["1.safetensors", "3.safetensors", "losses.json"]


def test_a_run_without_training_has_no_trace_of_it(untrained: Path, plain: Recipe) -> None:
    assert list(read_json(untrained / "manifest.json")["stages"]) == [
        *("traces", "probe", "score", "search", "edit", "export", "evaluate", "report")
    ]
    assert list(read_json(untrained / "evaluation/results.json")["systems"]) == ["base", "steering", "edit"]
    assert not list((untrained / "training").glob("*"))
    assert Run(untrained, plain).is_whole("report")


# Added to a finished run --------------------------------------------------------------------------------------------


def test_added_to_a_finished_run_it_gives_the_same_and_runs_nothing_else_again(
    copy: Path, whole: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_json(copy / "manifest.json")["stages"]
    journals = {path: path.read_bytes() for path in copy.rglob("journal-*.jsonl")}
    made: list[int] = []
    generate = TransformersEngine.generate

    def counted(self: Any, requests: Any, *given: Any, **named: Any) -> Any:
        made.append(len(requests))
        return generate(self, requests, *given, **named)

    monkeypatch.setattr(TransformersEngine, "generate", counted)
    run_training(Run(copy, recipe), "tiny")
    # Five prompts for each of four checkpoints on validation, and of the two that were chosen on test; nothing else.
    assert sum(made) == 4 * 5 + 2 * 5
    assert contents(copy) == contents(whole)
    after = read_json(copy / "manifest.json")["stages"]
    assert list(after) == ["traces", "probe", "score", "search", "edit", "export", "train", "evaluate", "report"]
    for name in ("traces", "probe", "score", "search", "edit", "export"):
        assert after[name] == before[name]
    for path, content in journals.items():
        assert path.read_bytes().startswith(content)
        new = [json.loads(line) for line in path.read_bytes()[len(content) :].splitlines()]
        assert all(line["round"].split()[-2] in KINDS for line in new)
    made.clear()
    run_training(Run(copy, recipe), "tiny")
    run_all(Run(copy, recipe))
    assert made == []  # all of it is whole


def test_the_verb_adds_one_method_then_another(
    copy: Path, untrained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["training.lora={learning_rate: [0.01], steps: [1]}", "training.batch=2"]
    assert command(monkeypatch, "train", copy, *small, "--method", "lora", "--quiet", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert list(results["systems"]) == ["base", "steering", "lora", "edit"]
    assert results["systems"]["lora"]["id"] == "lora-0.01-1"
    lora = read_jsonl(copy / "training/trials.jsonl")
    full = "training.full={learning_rate: [0.001], steps: [1]}"
    assert command(monkeypatch, "train", copy, full, "--method", "full", "--quiet") == 0
    out = capsys.readouterr().out
    assert "fine-tuning" in out  # the table is narrow: names may break between words
    assert "LoRA" in out
    both = read_json(copy / "evaluation/results.json")
    assert list(both["systems"]) == ["base", "steering", "lora", "fine_tuning", "edit"]
    assert read_jsonl(copy / "training/trials.jsonl")[: len(lora)] == lora
    old = read_json(untrained / "evaluation/results.json")
    for kind in ("base", "steering", "edit"):
        assert both["systems"][kind] == old["systems"][kind]
    assert load_recipe(copy).training.lora is not None


def test_what_the_command_line_names_is_added_to_the_recipes_own_methods(tmp_path: Path, plain: Recipe) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(plain.to_yaml(), encoding="utf-8")
    assert training_overrides(recipe, []) == ["training.lora={}", "training.full={}"]
    assert training_overrides(recipe, ["full"]) == ["training.full={}"]
    recipe.write_text(overridden(plain, ["training.lora={steps: [3]}"]).to_yaml(), encoding="utf-8")
    assert training_overrides(recipe, []) == []
    assert training_overrides(recipe, ["lora", "full"]) == ["training.full={}"]
    with pytest.raises(RecipeError, match="no such training method"):
        training_overrides(recipe, ["lore"])


def test_its_answers_are_judged_again_with_the_others(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    judged = judge(folder)
    assert judged["before"]["systems"] == judged["after"]["systems"]
    assert judged["changed"] == {}


# A kill, and what is not read ---------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "place", ["in training", "between two courses", "on validation", "before the table", "on test"]
)
def test_a_run_that_was_killed_goes_on_to_the_same_tables(
    place: str, copy: Path, whole: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def dying(function: Any, at: int) -> Any:
        def work(*given: Any, **named: Any) -> Any:
            calls.append(given)
            if len(calls) == at:
                raise Killed
            return function(*given, **named)

        return work

    owner, name, at = {
        "in training": ("steer2edit.training.course.write_weights", stage, 3),
        "between two courses": ("steer2edit.pipeline.training.train", stage, 2),
        "on validation": (Bench, "run", 2),
        "before the table": (stage, "write_jsonl", 2),
        "on test": (Bench, "run", 4),
    }[place]
    with monkeypatch.context() as patched:
        if isinstance(owner, str):
            module, _, attribute = owner.rpartition(".")
            patched.setattr(owner, dying(getattr(importlib.import_module(module), attribute), at))
        else:
            patched.setattr(owner, str(name), dying(getattr(owner, str(name)), at))
        with pytest.raises(Killed):
            run_training(Run(copy, recipe), "tiny")
    run_training(Run(copy, recipe), "tiny")
    assert contents(copy) == contents(whole)


def test_no_test_prompt_is_read_before_the_choice(copy: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, bool]] = []
    items = Run.items

    def watched(self: Run, split: Any, locked: bool = True) -> Any:
        read.append((split, (copy / "training/choice.json").is_file()))
        return items(self, split, locked)

    monkeypatch.setattr(Run, "items", watched)
    run_training(Run(copy, recipe), "tiny")
    assert read == [("validation", False), ("test", True)]


def test_other_settings_are_trained_anew_and_their_old_checkpoints_go(
    copy: Path, recipe: Recipe, plain: Recipe
) -> None:
    small = {"learning_rate": [0.01], "steps": [1]}
    one = overridden(plain, [f"training.lora={json.dumps(small)}"])
    run_training(Run(copy, one), "tiny")
    (first,) = (copy / "training").glob("lora-*")
    other = overridden(one, ["training.batch=1"])
    run_training(Run(copy, other), "tiny")
    (second,) = (copy / "training").glob("lora-*")
    assert first != second
    trials = {line["round"] for path in copy.glob("search/journal-*") for line in read_jsonl(path)}
    assert len([name for name in trials if name.startswith("lora ")]) == 2  # neither took the other's answers


def test_an_export_that_fails_keeps_no_result_of_training_back(
    copy: Path, plain: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(run: Run) -> list[str]:
        raise FileError("no export here", got="nothing", fix="Leave it out.")

    monkeypatch.setitem(STAGES, "export", replace(STAGES["export"], work=fails))
    with pytest.raises(FileError, match="no export here"):
        run_training(
            Run(copy, overridden(plain, ["training.lora={learning_rate: [0.01], steps: [1]}", "exports=[]"])), "tiny"
        )
    assert "lora" in read_json(copy / "evaluation/results.json")["systems"]


# What is refused ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_went_astray_is_discarded_and_the_others_are_tried(copy: Path, plain: Recipe) -> None:
    wild = overridden(plain, ["training.full={learning_rate: [1.0e-3, 1.0e+36], steps: [2]}", "training.batch=2"])
    run_training(Run(copy, wild), "tiny")
    assert [row["id"] for row in read_jsonl(copy / "training/trials.jsonl")] == ["fine_tuning-0.001-2"]
    (row,) = read_jsonl(copy / "training/discarded.jsonl")
    assert (row["id"], row["why"]) == ("fine_tuning-1e+36-2", "its weights are not finite")
    assert "1 configurations were discarded" in (copy / "report.md").read_text(encoding="utf-8")


def test_nothing_within_the_limits_is_said_and_leaves_the_results_as_they_were(
    untrained: Path, copy: Path, plain: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "choose", lambda trials, aim: None)
    run_training(Run(copy, overridden(plain, ["training.lora={learning_rate: [0.01], steps: [1]}"])), "tiny")
    assert read_json(copy / "training/choice.json")["lora"] is None
    assert "- rank-1 LoRA: none stays within the limits." in (copy / "report.md").read_text(encoding="utf-8")
    assert read_json(copy / "evaluation/results.json") == read_json(untrained / "evaluation/results.json")


def test_a_missing_package_is_said_before_anything_is_run(
    tmp_path: Path, recipe: Recipe, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else find(name, *rest))
    with pytest.raises(FileError, match="needs the package trl"):
        run_all(Run(tmp_path / "new", recipe))
    assert not (tmp_path / "new").exists()
    assert command(monkeypatch, "train", copy, "--method", "lora", "--quiet") == 2
    error = capsys.readouterr().err
    assert error == (
        "steer2edit: training needs the package trl (got: it is not installed). pip install 'steer2edit[train]'\n"
    )
    assert "training" not in read_json(copy / "manifest.json")["stages"]


def test_an_engine_that_cannot_carry_weights_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    served = overridden(recipe, ["engine={name: vllm, python: /usr/bin/python3}"])
    with pytest.raises(RecipeError, match=r"with transformers in this process \(got: engine.name vllm\)"):
        run_all(Run(tmp_path / "new", served))
    spread = overridden(recipe, ["engine.distributed=ray"])
    with pytest.raises(RecipeError, match=r"engine\.distributed ray"):
        run_all(Run(tmp_path / "new", spread))


def test_a_run_that_is_not_searched_yet_says_which_stage_is_missing(
    tmp_path: Path, recipe: Recipe, plain: Recipe
) -> None:
    with pytest.raises(FileError, match="the stage traces has not been run"):
        run_training(Run(tmp_path / "new", recipe), "tiny")
    with pytest.raises(RecipeError, match="asks for no training"):
        run_training(Run(tmp_path / "new", plain), "tiny")


def test_the_test_waits_for_the_training_that_the_recipe_asks_for(copy: Path, recipe: Recipe) -> None:
    with pytest.raises(FileError, match="the stage train has not been run"):
        run_stage(Run(copy, recipe), "evaluate", "tiny")


def test_training_is_in_fp32_whatever_the_models_dtype(tmp_path: Path, recipe: Recipe) -> None:
    half = overridden(recipe, ["model.dtype=bfloat16", "training.full=null"])
    run_all(Run(tmp_path / "run", half))
    (row, *_) = [r for r in read_jsonl(tmp_path / "run/training/trials.jsonl") if r["kind"] == "lora"]
    assert row["utility_loss"] > 0
    (folder,) = (tmp_path / "run/training").glob("lora-*")
    from safetensors.torch import load_file

    assert {tensor.dtype for tensor in load_file(folder / "3.safetensors").values()} == {torch.float32}
