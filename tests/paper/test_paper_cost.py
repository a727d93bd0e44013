"""The cost of a suite: its work counted by hand, the formulas of a machine, and what a plan says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property, reduce
from operator import add
from pathlib import Path

import pytest

from runs import tiny_recipe
from steer2edit.engines.host import Host
from steer2edit.errors import FileError
from steer2edit.paper.cost import asked_on, baselines_of, cost_of, edits_of, part_work, run_work, steering_of
from steer2edit.paper.facts import paper_models, profile_named
from steer2edit.paper.forecast import Forecast, as_json, forecast, lines_of
from steer2edit.paper.machine import Hardware, Shape, Speed, Work, cache_bytes, edit_numbers, estimate, parameters
from steer2edit.paper.plan import plan_suite
from steer2edit.paper.traced import PREFIX, TEMPLATE, tokens_of, traced
from steer2edit.pipeline.keys import ORDER
from steer2edit.recipe import load_recipe
from tiny_six import save_tiny

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


def whole(parts: Mapping[str, Work]) -> Work:
    return reduce(add, parts.values())


def test_a_run_is_counted_by_hand() -> None:
    recipe = tiny_recipe()
    items = recipe.behaviour.items(recipe.source, "validation")
    prompt = TEMPLATE + sum(tokens_of(item.text) for item in items) / len(items)
    asked = asked_on(recipe, "validation")
    assert (asked.answers, asked.prompt, asked.choices) == (5, pytest.approx(prompt), 0)
    work = run_work(recipe)
    assert list(work) == list(ORDER)  # every stage of a run
    # Own answers to 6 probe prompts, of 5 tokens.
    assert work["traces"].written == 6 * 5
    # 5 candidates on validation and 3 on test, each with 5 answers of 4 tokens, and 2 neutral answers of 4 tokens.
    assert (work["search"].written, work["evaluate"].written) == (5 * 5 * 4 + 2 * 4, 3 * 5 * 4 + 2 * 4)
    # Every candidate reads 5 prompts, and 2 before the neutral answers, which are scored; these 2 are read once more.
    assert work["search"].read == pytest.approx((5 * (5 + 2) + 2) * prompt)
    assert (work["search"].scored, work["evaluate"].scored) == (5 * 2 * 4, 3 * 2 * 4)
    assert whole(work).loads == 1


def test_choices_are_scored_after_a_prompt_that_is_read_once(tmp_path: Path) -> None:
    (planned,) = plan_suite("truthfulness", tmp_path, profile="smoke").runs
    recipe = planned.recipe
    asked = asked_on(recipe, "validation")
    items = [item for item in recipe.behaviour.items(recipe.source, "validation") if item.choices]
    assert (asked.questions, asked.choices) == (3, 6)
    tokens = sum(tokens_of(choice) for item in items for choice in item.choices)
    work = asked.work(new_tokens=4, neutral=2, neutral_tokens=5)
    assert work.scored == pytest.approx(tokens + 2 * 5)
    prompts = sum(TEMPLATE + tokens_of(item.text) for item in items)
    assert work.read == pytest.approx(prompts + (1 + 2) * asked.prompt)
    # On test every answer of the data set is a choice.
    assert asked_on(recipe, "test").choices > asked.choices
    assert asked_on(recipe, "test", 2).questions == 2


def test_traces_are_counted_as_each_behaviour_makes_them(tmp_path: Path) -> None:
    """The positive side, and the pass over both sides, against the responses themselves."""
    runs = {
        run.behaviour: run.recipe
        for suite in ("all", "styles")
        for run in plan_suite(suite, tmp_path, profile="smoke").runs
    }
    for name in ("truthfulness", "lists"):  # written ones: no model is asked
        recipe = runs[name]
        items = recipe.behaviour.items(recipe.source, "probe")
        traces = recipe.behaviour.make_traces(None, items)  # type: ignore[arg-type]
        found = traced(recipe, None)
        prompt = PREFIX + TEMPLATE + sum(tokens_of(item.text) for item in items) / len(items)
        assert found.writing == Work()
        assert found.probing.read == pytest.approx(
            len(traces) * prompt + sum(tokens_of(trace.response) for trace in traces)
        )
        positive = [tokens_of(trace.response) for trace in traces if trace.label == "positive"]
        assert found.positive == pytest.approx(prompt + sum(positive) / len(positive))
    safety = traced(runs["safety"], None)  # 8 own answers of 6 tokens, and 4 written ones
    assert safety.writing.written == 8 * 6
    # Of 10 answers of 24 tokens a fifth on either side.
    brevity = traced(runs["efficiency"], None)
    assert brevity.writing.written == 10 * 24
    assert brevity.probing.read == pytest.approx(4 * (brevity.positive + 24 / 2))  # the positive ones are the shortest
    assert traced(runs["efficiency"], 7.0).writing.written == 10 * 7


def test_an_expected_length_is_taken_where_it_is_shorter() -> None:
    recipe = tiny_recipe()
    short, full, long = (whole(run_work(recipe, length)).written for length in (2.0, None, 100.0))
    assert short < full == long


def test_baselines_count_as_often_as_they_are_tried() -> None:
    recipe = tiny_recipe(search__baselines=["system", "layer"])
    prompts = len(recipe.behaviour.asking())
    assert baselines_of(recipe, 6) == prompts + 6
    assert baselines_of(tiny_recipe(), 6) == 0


def test_the_demos_answers_are_counted_as_its_journal_had_them() -> None:
    """Its run tried 26 candidates on 80 prompts and 6 on 240, 24 tokens each, and wrote 49,651 and 34,414 tokens. Its
    calibrations measured 18 and 51 candidates, each on 4 answers."""
    work = run_work(load_recipe("demo"))
    own = 12 * 40
    assert work["search"].written - own == pytest.approx(49651, rel=0.1)
    assert work["evaluate"].written - own == pytest.approx(34414, rel=0.1)
    assert work["traces"].written == 240 * 48
    calibration = work["search"].scored - 26 * 12 * 40
    assert calibration / 40 / 4 == pytest.approx(18 + 51, rel=0.2)


def test_training_is_counted_by_hand() -> None:
    """Two steps of 8 traces by LoRA, 4 by full fine-tuning, and each of the three checkpoints on validation."""
    changes = {"lora": {"learning_rate": [1e-3], "steps": [2]}, "full": {"learning_rate": [1e-5], "steps": [1, 4]}}
    recipe = tiny_recipe(training=changes)
    work = run_work(recipe, size=1000.0)
    tokens = traced(recipe, None).positive
    assert work["train"].lora == pytest.approx(2 * 8 * tokens * 1.25)
    assert work["train"].full == pytest.approx(4 * 8 * tokens * 1.25)
    assert work["train"].written == 3 * 5 * 4
    assert work["train"].loads == 3
    # Two checkpoints of every weight, each in fp32 beside the trainer's copy with two moments.
    assert work["train"].stored == 2 * 4 * 4 * 1000
    assert work["evaluate"].written == run_work(tiny_recipe())["evaluate"].written + 2 * 5 * 4
    slow, fast = (Speed(1e9, 1e9, 1e9, lora=rate, full=1e9) for rate in (1.0, 2.0))
    assert slow.seconds(work["train"]) - fast.seconds(work["train"]) == pytest.approx(work["train"].lora / 2)


def test_parts_ask_only_what_the_runs_own_test_did_not() -> None:
    recipe, profile = tiny_recipe(), profile_named("smoke")
    one = 5 * 4  # a candidate's answers
    # Of two stars and two strengths of the sweep one each is the choice.
    assert part_work("trade_off", recipe, profile).written == 2 * one
    assert part_work("trade_off", recipe, profile.model_copy(update={"swept": 1})).written == one
    assert part_work("training", recipe, profile) == Work()
    # With fewer prompts of each kind nothing is known: the original model is asked again.
    for prompts, written in ((None, 4 * one), (1, (1 + 4) * 3 * 4)):
        few = profile.model_copy(update={"sensitivity": profile.sensitivity.model_copy(update={"prompts": prompts})})
        assert part_work("sensitivity", recipe, few).written == pytest.approx(written)


def test_ablations_cost_more_with_more_points() -> None:
    recipe, profile = tiny_recipe(), profile_named("smoke")
    more = profile.model_copy(update={"ablations": profile.ablations.model_copy(update={"points": 5})})
    few, many = (part_work("ablations", recipe, p).written for p in (profile, more))
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
    found = [Forecast(cost, {"search": 60.0, "train": 30.0}) for cost in costs]
    lines = lines_of(plan, found)
    assert "trained on; about 90 s here" in lines[1]
    assert lines[-2:] == ["  in all: about 4 min here", "  of it: search 3 min, train 90 s"]
    unknown = lines_of(plan, [Forecast(cost, {}, "the model cannot be loaded") for cost in costs])
    assert "not measured here: the model cannot be loaded" in unknown[1]
    assert not any(line.startswith("  in all") for line in unknown)
    data = as_json(plan, found)
    assert [run["seconds"] for run in data["runs"]] == [90.0] * 3
    assert data["runs"][0]["parts"] == {"search": 60.0, "train": 30.0}


def test_a_plan_says_where_full_fine_tuning_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 billion parameters 16 bytes each: more than 80 GB; the model itself fits into half precision."""
    monkeypatch.setattr("steer2edit.paper.forecast.cpu_here", lambda folder: Hardware(1e11, 1e10, 1e9, 1e12, 4))
    changes = ["training.full={}"]
    name = "llama-3-8b-instruct"
    for made, said in ((changes, True), ([], False)):
        plan = plan_suite("training", tmp_path, model=name, profile="smoke", changes=made)
        lines = [line for line in lines_of(plan, forecast(plan, tmp_path, fetch=False)) if "an estimate" in line]
        assert ["full fine-tuning does not fit: it needs 128 GB in fp32" in line for line in lines] == [
            said,
            said,
            False,
        ]


# The profile `cpu`, by speeds of a machine with two cores -------------------------------------------------------------


def test_the_profile_cpu_has_two_hundred_test_prompts_for_each_attribute(tmp_path: Path) -> None:
    for suite in ("all", "styles"):
        for run in plan_suite(suite, tmp_path).runs:
            assert next(iter(run.recipe.data.test.values())) >= 200  # type: ignore[union-attr]
            assert run.recipe.evaluation.temperature == 0  # nothing is sampled, so that one seed is enough


def test_all_suites_of_the_profile_cpu_fit_into_ninety_minutes(tmp_path: Path) -> None:
    """By speeds that two cores have with the embedded model."""
    speed = Speed(written=200, read=400, scored=380, load=3, lora=110, full=75, stored=2.8e8)
    plans = [plan_suite(suite, tmp_path) for suite in ("all", "styles")]
    seconds = [cost_of(run, plan, size=135e6).seconds(speed) for plan in plans for run in plan.runs]
    assert sum(seconds) <= 90 * 60


# The trial ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def test_one_trial_serves_every_run_of_a_model_and_every_command_after_it(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    original = Host.engine.func  # type: ignore[attr-defined]

    def counted(host: Host) -> object:
        loaded.append(host.section.name)
        return original(host)

    engine = cached_property(counted)
    engine.__set_name__(Host, "engine")
    monkeypatch.setattr(Host, "engine", engine)
    plan = plan_suite("all", tmp_path, model=tiny, profile="smoke")
    first = forecast(plan, tmp_path)
    assert loaded == [tiny]
    assert forecast(plan, tmp_path) == first
    assert loaded == [tiny]
    speeds = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))["models"]
    (entry,) = speeds.values()
    assert all(value > 0 for value in entry["speed"].values())
    assert all(one.parts["train"] > 0 for one in first)
    # A suite without training, in another folder, measures no training.
    forecast(plan_suite("safety", tmp_path, model=tiny, profile="smoke"), tmp_path / "other")
    (entry,) = json.loads((tmp_path / "other/speed.json").read_text(encoding="utf-8"))["models"].values()
    assert (entry["speed"]["lora"], entry["speed"]["full"]) == (0.0, 0.0)


def test_a_model_that_is_not_to_be_had_says_why_and_the_plan_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "no model"
    folder.mkdir()
    found = forecast(plan_suite("all", tmp_path, model=str(folder), profile="smoke"), tmp_path)
    assert [one.seconds for one in found] == [None] * 3
    assert len({one.why for one in found}) == 1
    assert str(folder) in found[0].why


def test_a_broken_file_of_speeds_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "speed.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(FileError, match=r"speed\.json holds no speeds \(got: list\)\. Delete it\."):
        forecast(plan_suite("safety", tmp_path, profile="smoke"), tmp_path)
