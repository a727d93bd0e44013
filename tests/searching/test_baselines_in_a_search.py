"""Which baselines a search tries, that a kill costs nothing, and what the summary says of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baseline_bench import ITEMS, QUESTIONS, Prompting, _bench, _study, a_probe, a_recipe
from runs import FakeEngine, a_bench, make_scores
from steer2edit.behaviours.base import Item
from steer2edit.engines.base import Losses
from steer2edit.pipeline.keys import stage_keys
from steer2edit.probing.probe import Probe
from steer2edit.searching.candidates import BASELINES, asked, tried_layers
from steer2edit.searching.choice import require_choice, summary


def _curved(answer: str, name: str) -> tuple[float, float]:
    """KL is the square of the last number in a candidate's name."""
    found = re.findall(r"[\d.]+(?:e[-+]\d+)?", name)
    kl = float(found[-1]) ** 2 if found and name.startswith(("steering", "layer", "direction")) else 0.1
    return (0.0, 2.0) if name == "base" else (kl, 2.0)


def _fake(kind: type[FakeEngine] = Prompting, **features: bool) -> FakeEngine:
    engine = kind(lambda prompt, name: f"An answer to {prompt}.", _curved)
    for name, value in features.items():
        setattr(engine, name, value)
    return engine


@pytest.mark.parametrize("trials", [4, 7])
def test_with_tpe_there_are_as_many_of_each_as_trials(trials: int, tmp_path: Path) -> None:
    recipe = a_recipe(search__method="tpe", search__trials=trials, search__at_once=3)
    study = _study(recipe, _bench(_fake(), tmp_path / "j", recipe))
    counts = {kind: len(study.of_kind(kind)) for kind in (*BASELINES, "edit")}
    layers = len(tried_layers(a_probe()))
    shared = layers * -(-trials // layers)  # equal shares of the layers, rounded up
    assert counts == {"system": 3, "steering": trials, "layer": shared, "direction": shared, "edit": trials}
    # They go with the first round.
    assert {trial.round for trial in study.trials if trial.candidate.kind != "edit"} == {"0"}


@pytest.mark.parametrize("kinds", [[], ["system"], ["layer"], ["direction"], ["direction", "system"]])
def test_only_the_baselines_that_a_recipe_names_are_tried(kinds: list[str], tmp_path: Path) -> None:
    recipe = a_recipe(search__baselines=kinds, search__steering=[0.2])
    study = _study(recipe, _bench(_fake(), tmp_path / "j", recipe))
    assert {trial.candidate.kind for trial in study.trials} == {"base", "steering", "edit", *kinds}
    assert set(study.evaluations) == {"edit", "steering", *kinds}
    assert len(study.of_kind("steering")) == 1  # what is written stays as it is
    assert (study.scale is None) == (not {"layer", "direction"} & set(kinds))


def test_the_recipes_instructions_are_asked_in_place_of_the_behaviours(tmp_path: Path) -> None:
    for instructions in (["Refuse.", "Decline."], []):
        recipe = a_recipe(behaviour__instructions=instructions, search__baselines=["system"])
        study = _study(recipe, _bench(_fake(), tmp_path / f"{len(instructions)}", recipe))
        told = [asked(i, system) for i, system in enumerate(instructions)]
        assert [trial.candidate for trial in study.of_kind("system")] == told


@pytest.mark.parametrize(
    ("features", "probe", "prompts", "kinds", "said"),
    [
        ({"measures_prompts": False}, a_probe(), ITEMS, {"layer", "direction"}, "no system prompt is tried"),
        ({"rows_on_stream": False}, a_probe(), ITEMS, {"system", "layer"}, "direction is not tried: this engine adds"),
        ({}, None, ITEMS, {"system"}, "one layer and direction are not tried: the probe did not measure the residual"),
        ({}, a_probe(0), ITEMS, {"system"}, "one layer and direction are not tried: the probe did not measure"),
        ({}, a_probe(), [ITEMS[0]], {"system"}, "one layer and direction are not tried: their strengths are found by"),
        # Without neutral prompts there is nothing to measure under another prompt.
        ({"measures_prompts": False}, a_probe(), [ITEMS[0]], {"system"}, "there are no neutral prompts"),
    ],
)
def test_what_cannot_be_tried_is_left_out_and_said(
    features: dict[str, bool], probe: Probe | None, prompts: list[Item], kinds: set[str], said: str,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = a_recipe(search__steering=[0.2])
    engine = _fake(**features)
    bench = a_bench(engine, {"full": make_scores()}, prompts, recipe, tmp_path / "j", probe=probe)
    study = _study(recipe, bench)
    assert {trial.candidate.kind for trial in study.trials} == {"base", "steering", "edit", *kinds}
    assert said in capsys.readouterr().err


def test_a_study_with_baselines_that_was_cut_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    recipe = a_recipe(evaluation__batch=20)
    whole = tmp_path / "whole"
    told = _study(recipe, _bench(_fake(), whole, recipe))
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) > 12
    for kept in range(len(lines) + 1):
        journal = tmp_path / f"cut-{kept}"
        rest = lines[kept][: len(lines[kept]) // 2] if kept < len(lines) else b""
        journal.write_bytes(b"".join(lines[:kept]) + rest)
        engine = _fake()
        assert _study(recipe, _bench(engine, journal, recipe)) == told
        assert journal.read_bytes() == whole.read_bytes()
        if kept == len(lines):
            assert (engine.asked, engine.scored) == ([], [])


def test_the_span_of_the_baselines_is_a_part_of_the_search(tmp_path: Path) -> None:
    wide, narrow = (
        a_recipe(search__steering=[0.2], search__baselines=["layer"], search__span=span)
        for span in ((0.02, 1.0), (0.1, 0.4))
    )
    found = []
    for i, recipe in enumerate((wide, narrow)):
        study = _study(recipe, _bench(_fake(), tmp_path / str(i), recipe))
        found.append([trial.candidate.id for trial in study.of_kind("layer")])
    assert found[0] != found[1]
    # So the stage search is not whole any more once it is changed.
    assert stage_keys(wide)["search"] != stage_keys(narrow)["search"]


def test_the_baselines_are_a_part_of_the_search() -> None:
    keys = [stage_keys(a_recipe(search__baselines=kinds))["search"] for kinds in ([], ["system"], ["system", "layer"])]
    assert len(set(keys)) == 3


def test_a_baseline_whose_losses_are_not_finite_is_discarded_and_counted(tmp_path: Path) -> None:
    class Breaking(Prompting):
        def prompt_losses(self, pairs: Sequence[Any], prompts: Sequence[Any], progress: Any = None) -> Losses:
            losses = super().prompt_losses(pairs, prompts)
            return Losses(losses.kl / 0 * 0, losses.nll, losses.base_nll)

    recipe = a_recipe(search__baselines=["system"], search__steering=[0.2])
    study = _study(recipe, _bench(_fake(Breaking), tmp_path / "j", recipe))
    assert study.of_kind("system") == []
    assert [(row.candidate.id, row.why) for row in study.discarded] == [
        (f"system-{i}", "its losses are not finite") for i in range(3)
    ]
    assert study.evaluations["system"] == 3 * (len(ITEMS) + sum(len(item.choices) for item in QUESTIONS))
    found = summary(study, recipe.aim, "grid", 10, 1)
    assert (found["tried"]["system"], found["discarded"], found["front"]["system"]) == (0, 3, [])


def test_the_choice_is_of_edits_alone_and_the_summary_of_every_method(tmp_path: Path) -> None:
    recipe = a_recipe()
    study = _study(recipe, _bench(_fake(), tmp_path / "j", recipe))
    # Every other method refuses everything, and is still no edit.
    better = [
        t if t.candidate.kind == "edit" else replace(t, values={**t.values, "refusal": (1.0,) * t.count("refusal")})
        for t in study.trials
    ]
    assert require_choice(better, recipe.aim).candidate.kind == "edit"
    found = summary(study, recipe.aim, recipe.search.method, 20, recipe.seed)
    kinds = {"edit", *BASELINES}
    assert set(found["tried"]) == set(found["front"]) == set(found["hypervolume"]) == set(found["evaluations"]) == kinds
    assert found["tried"]["direction"] == len(study.of_kind("direction"))
    for kind in kinds:
        assert set(found["front"][kind]) <= {trial.candidate.id for trial in study.of_kind(kind)}
        assert found["hypervolume"][kind]["trials"] == len(study.of_kind(kind))
