"""A whole run in which edits are compared with every baseline: what its files, its report and its judgement say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import steer2edit as s2e
from runs import save_pico, tiny_recipe, whole_run
from steer2edit.behaviours import safety
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.files.reading import read_json, read_jsonl
from steer2edit.files.writing import write_jsonl
from steer2edit.models.load import load_model
from steer2edit.pipeline.judge import judge
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import STAGES, read_study, run_all, run_stage
from steer2edit.recipe import Recipe, load_recipe
from steer2edit.report.page import describe
from steer2edit.searching.candidates import TITLES

KINDS = ["system", "steering", "layer", "direction", "edit"]


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = save_pico(tmp_path_factory.mktemp("pico") / "model", num_hidden_layers=6)
    return tiny_recipe(
        folder,
        search__rho_attn=[0.1, 1.0],
        search__steering="auto",
        search__alpha=[0.0],
        search__span=[0.02, 0.5],  # a random model reaches it in every way
        search__baselines=["system", "layer", "direction"],
        behaviour__instructions=["Refuse everything.", "Decline, whatever you are asked to do for anybody."],
    )


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed. Nobody changes it."""
    return whole_run(tmp_path_factory.mktemp("runs") / "whole", recipe)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_the_study_and_the_choice_hold_every_method(whole: Path, recipe: Recipe) -> None:
    study, choice = read_study(Run(whole, recipe)), read_json(whole / "choice.json")
    counts = {kind: len(study.of_kind(kind)) for kind in KINDS}
    assert counts == {"system": 2, "steering": 2, "layer": 4, "direction": 4, "edit": 2}
    assert choice["tried"] == counts
    assert choice["evaluations"] == study.evaluations == {kind: 5 * count for kind, count in counts.items()}
    assert set(choice["front"]) == set(choice["hypervolume"]) == set(KINDS)
    trials = {trial.candidate.id: trial for trial in study.trials}
    for kind in KINDS:
        chosen = trials[choice[kind]["id"]]
        assert (chosen.candidate.kind, chosen.candidate.config) == (kind, choice[kind]["config"])
        assert {name: choice[kind][name] for name in chosen.means()} == chosen.means()
        # The rule is the same for all: the highest refusal, of equals the smallest KL.
        ranked = [(-(t.mean("refusal") or 0.0), t.mean("utility_loss")) for t in study.of_kind(kind)]
        assert (-chosen.mean("refusal"), chosen.mean("utility_loss")) == min(ranked)
    assert s2e.Edit.load(whole / "edit.safetensors").edited()


def test_the_results_compare_the_edit_with_every_other_method(whole: Path) -> None:
    results, choice = read_json(whole / "evaluation/results.json"), read_json(whole / "choice.json")
    assert list(results["systems"]) == ["base", *KINDS]
    for kind in KINDS:
        system = results["systems"][kind]
        assert (system["id"], system["config"]) == (choice[kind]["id"], choice[kind]["config"])
        assert system["utility_loss"]["n"] == 2
        assert system["utility_loss"]["mean"] > 0
    assert list(results["differences"]) == [f"edit - {kind}" for kind in ("base", *KINDS[:-1])]
    assert {difference["n"] for difference in results["differences"].values()} == {2}


def test_the_answers_are_those_to_the_prompts_that_stand_beside_them(whole: Path, recipe: Recipe) -> None:
    items = recipe.behaviour.items(recipe.source, "test")
    answers, choice = read_jsonl(whole / "evaluation/answers.jsonl"), read_json(whole / "choice.json")
    engine = TransformersEngine(*load_model(recipe.model.name, dtype="float32", device="cpu"), rows=8)
    for asking, kinds in ((None, ["base"]), (choice["system"]["config"]["system"], ["system"])):
        requests = [Request(engine.tokens(item.messages(asking))) for item in items]
        made = engine.generate(requests, [s2e.NOTHING], recipe.evaluation.new_tokens)
        for row, answer in zip(answers, made, strict=True):
            # Under whatever key: what the model said is there.
            assert answer.text in [text for key, text in row.items() if key not in ("prompt", "kind")], kinds
    assert [(row["prompt"], row["kind"]) for row in answers] == [(item.prompt, item.kind) for item in items]


def test_the_report_has_a_row_for_every_method(whole: Path) -> None:
    report = (whole / "report.md").read_text(encoding="utf-8")
    choice = read_json(whole / "choice.json")
    on_test = [line.split(" | ")[0] for line in report.splitlines() if line.startswith(("| original", "| n |"))]
    assert on_test == ["| original", "| n"]
    for kind in KINDS:
        assert f"| {TITLES[kind]} ({describe(choice[kind]['config'])}) | " in report
        assert f"- {TITLES[kind]}: {describe(choice[kind]['config'])}; on validation refusal (harmful) " in report
        counts = f"| {TITLES[kind]} | {choice['tried'][kind]} | {choice['evaluations'][kind]} | "
        assert counts in report
    for kind in ("base", *KINDS[:-1]):
        assert f"- refusal (harmful), edit - {kind}: " in report
    figure = (whole / "figures/trade_off.svg").read_text(encoding="utf-8")
    for kind in KINDS[:-1]:
        assert TITLES[kind] in figure
    # A long system prompt is cut, and the card of what is exported has the same table.
    assert "“Decline, whatever you are asked to do fo…”" in report or "“Refuse everything.”" in report
    card = (whole / "adapter/README.md").read_text(encoding="utf-8")
    assert all(f"| {TITLES[kind]} (" in card for kind in KINDS)


def test_a_second_run_does_nothing_and_another_one_gives_the_same_numbers(
    copy: Path, whole: Path, recipe: Recipe, tmp_path: Path
) -> None:
    before = (copy / "manifest.json").read_bytes()
    run_all(Run(copy, recipe))
    assert (copy / "manifest.json").read_bytes() == before
    for stage in list(STAGES)[:-1]:
        run_stage(Run(tmp_path / "again", recipe), stage, "tiny.yaml")
    for name in ("search/trials.jsonl", "search/study.json", "choice.json", "evaluation/results.json"):
        assert (tmp_path / "again" / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_run_with_baselines_is_judged_again_without_a_model(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steer2edit.engines.host import Host

    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Host, "engine", property(load))
    same = judge(copy)
    assert (same["changed"], same["after"]["systems"]) == ({}, same["before"]["systems"])
    assert list(same["after"]["systems"]) == ["base", *KINDS]
    monkeypatch.setitem(safety._DETECTORS, "declining", lambda text: True)
    monkeypatch.setattr(safety, "degenerate", lambda text: False)
    judged = judge(copy)
    assert {system["refusal"]["mean"] for system in judged["after"]["systems"].values()} == {1.0}
    assert set(judged["changed"]) == {row["id"] for row in read_jsonl(copy / "search/trials.jsonl")}


def test_what_the_search_threw_out_is_not_chosen_by_a_new_judgement(copy: Path) -> None:
    """The best edit has losses that are not finite: it is among the discarded, and in the journal's round."""
    trials = read_jsonl(copy / "search/trials.jsonl")
    chosen = read_json(copy / "choice.json")["edit"]["id"]
    out = next(row for row in trials if row["id"] == chosen)
    write_jsonl(copy / "search/trials.jsonl", [row for row in trials if row is not out])
    thrown = {"id": out["id"], "kind": "edit", "config": out["config"], "why": "its losses are not finite"}
    write_jsonl(copy / "search/discarded.jsonl", [thrown])
    judged = judge(copy)
    assert chosen not in judged["changed"]
    assert judged["choice"]["new"] not in (None, chosen)


def test_a_method_of_which_nothing_stays_within_the_limits_is_said_to_have_none(copy: Path, recipe: Recipe) -> None:
    trials = [json.loads(line) for line in (copy / "search/trials.jsonl").read_text(encoding="utf-8").splitlines()]
    limit = 0.99 * min(row["utility_loss"] for row in trials if row["kind"] == "system")
    beyond = {kind for kind in KINDS if min(t["utility_loss"] for t in trials if t["kind"] == kind) > limit}
    limited = load_recipe(
        copy / "recipe.yaml", [f"search.limits={{utility_loss: {limit}, over_refusal: null, degenerate: null}}"]
    )
    run_all(Run(copy, limited))
    choice = read_json(copy / "choice.json")
    assert {kind for kind in KINDS if choice[kind] is None} == beyond == {"system"}
    results, report = read_json(copy / "evaluation/results.json"), (copy / "report.md").read_text(encoding="utf-8")
    assert list(results["systems"]) == ["base", *(kind for kind in KINDS if kind != "system")]
    assert "- system prompt: none stays within the limits." in report


def recipe_with(recipe: Recipe, override: str, folder: Path) -> Recipe:
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return load_recipe(folder / "recipe.yaml", [override])


def test_without_baselines_a_run_is_as_it_was(recipe: Recipe, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", recipe_with(recipe, "search.baselines=[]", tmp_path))
    for stage in ("traces", "probe", "score", "search", "edit"):
        run_stage(run, stage, "tiny.yaml")
    choice = read_json(tmp_path / "run/choice.json")
    assert set(choice["tried"]) == {"edit", "steering"}
    assert not {"system", "layer", "direction"} & set(choice)
