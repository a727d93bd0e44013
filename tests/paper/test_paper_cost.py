"""The cost of a suite: its work counted by hand, the formulas of a machine, and what a plan says."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs import tiny_recipe
from steer2edit.paper.cost import (
    asked_on,
    baselines_of,
    cost_of,
    edits_of,
    part_work,
    run_work,
    steering_of,
    tokens_of,
)
from steer2edit.paper.facts import paper_models, profile_named
from steer2edit.paper.forecast import Forecast, as_json, lines_of
from steer2edit.paper.machine import Hardware, Shape, Speed, Work, cache_bytes, edit_numbers, estimate, parameters
from steer2edit.paper.plan import plan_suite
from steer2edit.recipe import load_recipe

SHAPE = Shape(
    model_type="llama", layers=2, d=8, heads=2, kv_heads=1, head_dim=4, neurons=10, vocabulary=100, tied=False
)  # fmt: skip
# By hand: q and o 8·8 each, k and v 8·4 each, three MLP maps 8·10.
INNER = 2 * (2 * 64 + 2 * 32 + 3 * 80)


def test_parameters_by_hand() -> None:
    assert parameters(SHAPE, embedding=False) == INNER == 864
    assert parameters(SHAPE) == INNER + 2 * 800
    assert parameters(SHAPE.model_copy(update={"tied": True})) == INNER + 800
    assert cache_bytes(SHAPE) == 2 * 2 * 1 * 4 * 2
    assert edit_numbers(SHAPE) == 2 * (8 + 10 + 12 + 16)


def test_a_machine_that_computes_slowly_is_bound_by_its_operations() -> None:
    found = estimate(SHAPE, Hardware(compute=1e3, bandwidth=1e12, disk=1e3), rows=4, length=10)
    forward = 2 * INNER / 1e3
    head = 2 * 800 / 1e3
    assert found.speed.read == pytest.approx(1 / forward)
    assert found.speed.scored == pytest.approx(1 / (forward + head))
    assert found.speed.written == pytest.approx(4 / (4 * (forward + head)), rel=1e-6)
    assert found.speed.load == pytest.approx(2 * (INNER + 1600) / 1e3)


def test_a_machine_with_a_slow_memory_is_bound_by_its_weights_and_caches() -> None:
    found = estimate(SHAPE, Hardware(compute=1e15, bandwidth=1e3, disk=1e9), rows=4, length=10)
    step = 2 * (INNER + 1600) / 1e3 + 4 * 32 * 10 / 1e3
    assert found.speed.written == pytest.approx(4 / step, rel=1e-6)


def test_rows_are_as_many_as_memory_holds() -> None:
    weights, row = 2 * (INNER + 1600), 32 * 10
    roomy = estimate(SHAPE, Hardware(1e9, 1e9, 1e9, memory=1.5e9 + weights + 3.5 * row), rows=8, length=10)
    assert (roomy.rows, roomy.fits) == (3, True)
    assert roomy.needed == pytest.approx(1.5e9 + weights + 3 * row)
    tight = estimate(SHAPE, Hardware(1e9, 1e9, 1e9, memory=1e9), rows=8, length=10)
    assert (tight.rows, tight.fits) == (1, False)


@pytest.mark.parametrize(("name", "fits"), [(name, name != "llama-3-8b-instruct") for name in paper_models()])
def test_the_six_models_on_24_gb(name: str, fits: bool) -> None:
    """Half-precision weights of 8 billion parameters are 16 GB: all six fit, with fewer rows at once."""
    found = estimate(paper_models()[name].shape, Hardware(1e13, 6e11, 2e9, 24e9), rows=256, length=600)
    assert found.fits
    assert found.rows <= 256
    assert found.needed <= 24e9
    assert fits or found.weights > 16e9


def test_a_speed_is_the_sum_over_kinds_of_tokens() -> None:
    assert Speed(10, 100, 50).seconds(Work(written=20, read=300, scored=100)) == 2 + 3 + 2
    assert Work(1, 2, 3).times(2) + Work(1, 1, 1) == Work(3, 5, 7)
    assert Work(1, 2, 3).tokens == 6


def test_candidates_are_counted_as_the_search_tries_them() -> None:
    recipe = tiny_recipe()
    assert edits_of(recipe.search) == 2
    assert steering_of(recipe.search, 2) == 2
    auto = tiny_recipe(search__rho_attn="auto", search__rho_mlp="auto", search__steering="auto", search__points=3)
    assert edits_of(auto.search) == 9
    assert steering_of(auto.search, 9) == 9
    one = tiny_recipe(search__rho_attn="auto", search__rho_mlp=[None], search__alpha=[0.1, 0.4], search__points=3)
    assert edits_of(one.search) == 6


def test_a_run_is_counted_by_hand() -> None:
    recipe = tiny_recipe()
    items = recipe.behaviour.items(recipe.source, "validation")
    prompt = 12 + sum(tokens_of(item.text) for item in items) / len(items)
    asked = asked_on(recipe, "validation")
    assert (asked.answers, asked.prompt, asked.choices) == (5, pytest.approx(prompt), 0)
    work = run_work(recipe)
    # 5 candidates on validation, 3 on test, of 5 answers of 4 tokens; own answers to 6 probe prompts of 5 tokens; the
    # neutral answers of both benches.
    assert work.written == 5 * 5 * 4 + 3 * 5 * 4 + 6 * 5 + 2 * 2 * 4
    assert work.scored > 8 * 2 * (prompt + 4)


def test_an_expected_length_is_taken_where_it_is_shorter() -> None:
    recipe = tiny_recipe()
    assert run_work(recipe, 2.0).written < run_work(recipe).written == run_work(recipe, 100.0).written


def test_baselines_count_as_often_as_they_are_tried() -> None:
    recipe = tiny_recipe(search__baselines=["system", "layer"])
    prompts = len(recipe.behaviour.asking())
    assert baselines_of(recipe, 6) == prompts + 6
    assert baselines_of(tiny_recipe(), 6) == 0


def test_the_demos_answers_are_counted_as_its_journal_had_them() -> None:
    """Its run tried 26 candidates on 80 prompts and 6 on 240, 24 tokens each, and wrote 49,651 and 34,414 tokens."""
    recipe = load_recipe("demo")
    written = run_work(recipe).written
    traces = 240 * 48  # own answers to all three kinds
    assert written - traces == pytest.approx(49651 + 34414, rel=0.1)


def test_parts_cost_more_with_more_points() -> None:
    recipe, profile = tiny_recipe(), profile_named("smoke")
    for part in ("trade_off", "ablations", "sensitivity"):
        assert part_work(part, recipe, profile, None).tokens > 0
    more = profile.model_copy(update={"ablations": profile.ablations.model_copy(update={"points": 5})})
    few, many = (part_work("ablations", recipe, p, None).written for p in (profile, more))
    # 3 more points of 9 methods, each 5 answers of 4 tokens.
    assert many - few == pytest.approx(3 * 9 * 5 * 4)


def test_nothing_of_test_is_read_to_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = plan_suite("all", tmp_path, profile="smoke")
    for run in plan.runs:
        kind = type(run.recipe.behaviour)
        whole = kind.items

        def watched(self: object, source: object, split: str, whole: object = whole) -> object:
            assert split != "test"
            return whole(self, source, split)  # type: ignore[operator]

        monkeypatch.setattr(kind, "items", watched)
        assert cost_of(run, plan).work.tokens > 0


def test_a_plan_says_tokens_time_disk_and_where_it_was_not_measured(tmp_path: Path) -> None:
    plan = plan_suite("training", tmp_path, profile="smoke")
    costs = [cost_of(run, plan) for run in plan.runs]
    found = [Forecast(cost, 90.0, "") for cost in costs]
    lines = lines_of(plan, found)
    assert "about 90 s here" in lines[1]
    assert lines[-2:] == ["  in all: about 4 min here", "  The training baselines are not counted."]
    unknown = lines_of(plan, [Forecast(cost, None, "the model cannot be loaded") for cost in costs])
    assert "not measured here: the model cannot be loaded" in unknown[1]
    assert not any(line.startswith("  in all") for line in unknown)
    data = as_json(plan, found)
    assert [run["seconds"] for run in data["runs"]] == [90.0] * 3
