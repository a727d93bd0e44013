"""The calibration finds the strengths of given KLs on curves that are known, and says so where there are none."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import steer2edit as s2e
from runs import FakeEngine, a_bench, make_scores, tiny_recipe
from steer2edit.behaviours.base import Item
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import EditError, ModelError, RecipeError
from steer2edit.guided.work import tried_of
from steer2edit.method.intervention import NOTHING
from steer2edit.paper.cost import edits_of
from steer2edit.recipe import load_recipe
from steer2edit.searching.calibrate import (
    Ladder,
    baseline_ladders,
    climb,
    joint_ladders,
    ladders_of,
    scale_of,
    targets_of,
)
from steer2edit.searching.candidates import Candidate, intervention_of, steered
from steer2edit.searching.rounds import run_study

Curve = Callable[[float], float]


def ladder(curve: Curve) -> Ladder:
    """A ladder of steering strengths that was climbed along a known curve."""
    made = Ladder("steering", steered, 0.01, 10.0, 0.0, targets_of((0.02, 1.0), 6))

    def measure(tried: Sequence[Candidate], name: str) -> list[float | None]:
        values = [curve(candidate.config["gamma"]) for candidate in tried]
        return [value if math.isfinite(value) else None for value in values]

    climb([made], measure, "calibration")
    return made


CURVES: dict[str, Curve] = {
    "quadratic": lambda s: s**2,
    "far to the left": lambda s: 4e4 * s**2,
    "far to the right": lambda s: 1e-6 * s**2,
    "steep": lambda s: s**8,
    "saturates": lambda s: 2 * s**2 / (1 + s**2),
    "with a threshold": lambda s: max(0.0, s - 0.3) ** 2,
    "noise beyond": lambda s: s**2 if s < 3 else math.nan,
    "falls again": lambda s: s**2 if s < 4 else 0.1,
}


@pytest.mark.parametrize("name", CURVES)
def test_points_lie_at_their_targets(name: str) -> None:
    climbed = ladder(CURVES[name])
    points = climbed.points()
    assert climbed.why_left_off() == ""
    targets = np.geomspace(0.02, 1.0, 6)
    assert [kl for _, kl in points] == pytest.approx(list(targets))
    truth = [CURVES[name](candidate.config["gamma"]) for candidate, _ in points]
    assert truth == pytest.approx(list(targets), rel=0.15)


@pytest.mark.parametrize(
    ("curve", "why"),
    [
        (lambda s: 0.0, "no strength reaches a KL of 0.02: the highest is 0"),
        (lambda s: 0.001, "no strength reaches a KL of 0.02: the highest is 0.001"),
        (lambda s: 3.0 + s, "the weakest strength has a KL of 3 already"),
        (lambda s: 0.001 if s < 0.5 else 7.0, "it jumps from a KL of 0.001 to 7, from nothing to noise"),
        (
            lambda s: 0.001 if s < 0.5 else math.nan,
            "it jumps from a KL of 0.001 to no finite number, from nothing to noise",
        ),
    ],
)
def test_a_ladder_without_useful_points_says_why(curve: Curve, why: str) -> None:
    climbed = ladder(curve)
    assert climbed.points() == []
    assert climbed.why_left_off() == why


def test_a_jump_in_the_middle_leaves_the_points_on_both_sides() -> None:
    climbed = ladder(lambda s: s**2 if s < 0.3 else 0.5 * (s + 0.7) ** 2)
    assert climbed.why_left_off() == ""
    assert 2 <= len(climbed.points()) < 6
    assert sorted([*climbed.missing(), *(kl for _, kl in climbed.points())]) == list(climbed.targets)
    (line,) = scale_of([], [climbed]).lines()
    assert line.endswith(f"no strength for KL {', '.join(f'{kl:.2g}' for kl in climbed.missing())}")


def test_a_curve_that_ends_below_the_span_keeps_its_lower_points() -> None:
    climbed = ladder(lambda s: 0.5 * s**3 / (1 + s**3))
    assert [kl for _, kl in climbed.points()] == pytest.approx(list(np.geomspace(0.02, 1.0, 6)[:5]))
    truth = [0.5 * g**3 / (1 + g**3) for g in (c.config["gamma"] for c, _ in climbed.points())]
    assert truth == pytest.approx([kl for _, kl in climbed.points()], rel=0.15)


def _curved(effect: float) -> Callable[[str, str], tuple[float, float]]:
    """KL of a candidate from its name, which holds ρ and α, or γ: larger for a smaller ρ and for a larger α."""

    def losses(answer: str, name: str) -> tuple[float, float]:
        if name == "base":
            return 0.0, 2.0
        kind, rest = name.split("-", 1)
        numbers = [float(x) for x in re.findall(r"[\d.]+(?:e[-+]\d+)?", rest)]
        if kind == "steering":
            return effect * numbers[0] ** 2, 2.0
        *rhos, alpha = numbers
        return effect * (1 + 10 * alpha) * sum(1 / rho**2 for rho in rhos), 2.0

    return losses


def _study(tmp_path: Path, effect: float, **search: Any) -> Any:
    changes = {"search__rho_attn": "auto", "search__rho_mlp": "auto", "search__steering": "auto"} | search
    recipe = tiny_recipe(**changes)
    items = [Item("harmful", "bad one"), Item("benign", "good one"), Item("benign", "good two")]
    engine = FakeEngine(losses=_curved(effect))
    bench = a_bench(engine, {"full": make_scores()}, items, recipe, tmp_path / "journal.jsonl")
    return run_study(bench, recipe.search, recipe.aim, recipe.seed), engine, recipe


@pytest.mark.parametrize("effect", [0.001, 0.1, 30.0])
def test_a_search_finds_its_scale_for_both_block_types_and_steering(tmp_path: Path, effect: float) -> None:
    study, _, _ = _study(tmp_path, effect, search__points=3, search__alpha=[0.0])
    edits, steering = study.of_kind("edit"), study.of_kind("steering")
    assert study.evaluations["edit"] == study.evaluations["steering"]  # equal budgets
    configs = [trial.candidate.config for trial in edits]
    both = [c for c in configs if c["rho_attn"] and c["rho_mlp"]]
    assert (len(configs) - len(both), len(both)) == (6, 3)
    for trial in [*edits, *steering]:
        assert 0.015 < trial.mean("utility_loss") < 1.3
    spread = sorted(trial.mean("utility_loss") for trial in steering)
    assert np.diff(np.log(spread)) == pytest.approx(np.log(50) / (len(spread) - 1), rel=0.3)
    assert set(study.scale) == {"edits", "steering", "others", "missing", "left_off"}
    assert study.scale["others"] == {}  # no other baseline is asked for
    assert len(study.scale["edits"]) == 3


def test_a_narrow_search_finishes_one_layer_range_and_gives_the_others_as_many_strengths(tmp_path: Path) -> None:
    search = {"search__rho_mlp": [None], "search__points": 4, "search__span": [0.1, 1.0], "search__narrow": True}
    search |= {"search__alpha": [0.0, 0.2], "search__baselines": []}
    study, _, recipe = _study(tmp_path, 0.1, **search)
    tried = [trial.candidate.config["alpha"] for trial in study.of_kind("edit")]
    assert sorted(map(tried.count, set(tried))) == [1, 4]
    assert study.evaluations["edit"] == study.evaluations["steering"]
    assert (len(tried), list(study.rounds)) == (5, ["0", "1"])
    assert tried_of(recipe.search, 0).edits == edits_of(recipe.search) == 5  # what the forecasts count


def test_in_a_narrow_search_a_baseline_has_at_each_layer_the_strengths_of_an_edits_ladder() -> None:
    auto = {"search__rho_attn": "auto", "search__rho_mlp": [None], "search__points": 5, "search__baselines": ["layer"]}
    for narrow, each in ((True, 5), (False, 2)):
        search = tiny_recipe(**auto, search__narrow=narrow).search
        of_layers = [one for one in baseline_ladders(search, 6, [1, 2, 3]) if one.name != "steering"]
        assert [len(one.targets) for one in of_layers] == [each] * 3


def test_a_narrow_search_tries_all_numbers_that_are_written() -> None:
    written = {"search__rho_attn": [0.1, 0.2], "search__rho_mlp": [None], "search__narrow": True}
    assert not tiny_recipe(**written).search.narrow
    assert tiny_recipe(**written | {"search__rho_attn": "auto"}).search.narrow


def test_a_style_is_narrowed_unless_its_points_are_written() -> None:
    def narrow(*overrides: str) -> bool:
        return load_recipe("lists", overrides).search.narrow

    assert narrow()
    assert narrow("search.span=[0.1,0.3]")
    assert not narrow("search.points=8")
    assert narrow("search.points=8", "search.narrow=true")


def test_every_alpha_has_a_ladder_and_l2_which_takes_none_has_one() -> None:
    changes = {"search__rho_attn": "auto", "search__rho_mlp": [None], "search__steering": "auto"}
    search = tiny_recipe(**changes, search__alpha=[0.2, 0.6], search__variants=["full", "l2"]).search
    ladders = ladders_of(search, {"full": make_scores()})
    assert [ladder.name for ladder in ladders] == ["ρ_attn at α 0.2", "ρ_attn at α 0.6", "ρ_attn at α 0.2, l2"]


def test_both_block_types_are_joined_where_their_kl_alone_is_equal() -> None:
    search = tiny_recipe(search__rho_attn="auto", search__rho_mlp="auto", search__alpha=[0.0], search__points=6).search
    scores = {"full": make_scores()}
    attn, mlp = ladders_of(search, scores)
    # The KL of attention rises from 0; that of the MLP jumps to 0.3 and goes on from there.
    curves = {
        "rho_attn": lambda strength: strength**2,
        "rho_mlp": lambda strength: 0.3 * strength if strength > 1 else 0.0,
    }

    def measure(tried: Sequence[Candidate], name: str) -> list[float | None]:
        (axis,) = {key for c in tried for key in curves if c.config[key] is not None}
        return [curves[axis](1 / candidate.config[axis]) for candidate in tried]

    climb([attn], measure, "calibration")
    climb([mlp], measure, "calibration")
    assert (len(attn.missing()), len(mlp.missing())) == (0, 4)
    (joint,) = joint_ladders(search, scores, [attn, mlp])
    config = joint.make(1.0).config
    kl = curves["rho_attn"](1 / config["rho_attn"])
    assert kl == pytest.approx(curves["rho_mlp"](1 / config["rho_mlp"]), rel=0.1)


def test_one_axis_is_found_and_the_other_is_as_written(tmp_path: Path) -> None:
    study, _, _ = _study(tmp_path, 0.1, search__rho_mlp=[None, 2.0], search__steering=[0.3], search__points=3)
    configs = [trial.candidate.config for trial in study.of_kind("edit")]
    assert {c["rho_mlp"] for c in configs} == {None, 2.0}
    assert all(c["rho_attn"] for c in configs)
    assert [t.candidate.config["gamma"] for t in study.of_kind("steering")] == [0.3]


def test_the_second_grid_lies_between_neighbours_of_the_same_alpha(tmp_path: Path) -> None:
    search = {"search__refine": 3, "search__rho_mlp": [None], "search__alpha": [0.0, 0.2], "search__points": 4}
    study, _, _ = _study(tmp_path, 0.1, **search)
    best = next(t.candidate.config for t in study.trials if t.candidate.id == study.refined["around"])
    first = [t.candidate.config for t in study.of_kind("edit") if t.round == "0"]
    same = sorted(c["rho_attn"] for c in first if c["alpha"] == best["alpha"])
    at = same.index(best["rho_attn"])
    low = (same[max(at - 1, 0)] + same[at]) / 2
    high = (same[min(at + 1, len(same) - 1)] + same[at]) / 2
    assert study.refined["rho_attn"] == pytest.approx(list(np.linspace(low, high, 3)), rel=1e-4)


def test_tpe_draws_from_the_range_that_was_found(tmp_path: Path) -> None:
    search = {"search__method": "tpe", "search__trials": 6, "search__at_once": 3}
    study, _, _ = _study(tmp_path, 0.1, **search)
    assert len(study.of_kind("edit")) == 6
    assert len(study.of_kind("steering")) == 6


def test_a_study_that_was_stopped_does_not_calibrate_again(tmp_path: Path) -> None:
    first, _, _ = _study(tmp_path, 0.1)
    again, engine, _ = _study(tmp_path, 0.1)
    assert engine.scored == []
    assert again.scale == first.scale
    assert [t.candidate.id for t in again.trials] == [t.candidate.id for t in first.trials]


def test_where_no_edit_has_an_effect_one_sentence_says_so(tmp_path: Path) -> None:
    with pytest.raises(EditError, match="nothing moved: no strength of any edit has a useful effect"):
        _study(tmp_path, 0.0)


def test_auto_needs_neutral_prompts(tmp_path: Path) -> None:
    recipe = tiny_recipe(search__rho_attn="auto", search__steering="auto")
    bench = a_bench(FakeEngine(), {"full": make_scores()}, [Item("harmful", "x")], recipe, tmp_path / "j.jsonl")
    with pytest.raises(RecipeError, match="`auto` finds strengths by KL per token"):
        run_study(bench, recipe.search, recipe.aim, recipe.seed)


def test_auto_is_what_a_recipe_without_numbers_has() -> None:
    recipe = tiny_recipe()
    assert (recipe.search.rho_attn, recipe.search.steering) == ([0.1, 0.3], [0.1, 0.4])
    assert not recipe.search.automatic
    raw = recipe.model_dump(mode="json")
    raw["search"] = {}
    from steer2edit.recipe import parse_recipe

    search = parse_recipe(raw).search
    assert (search.rho_attn, search.rho_mlp, search.steering) == ("auto", "auto", "auto")


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("search__rho_attn", "automatic", "the recipe's search.rho_attn cannot be used"),
        ("search__rho_attn", 0.2, "the recipe's search.rho_attn cannot be used.*valid list"),
        ("search__span", [1.0, 0.5], "span goes from a smaller KL to a larger one"),
        ("search__points", 1, "search.points cannot be used"),
    ],
)
def test_a_mistake_is_one_sentence(key: str, value: Any, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        tiny_recipe(**{key: value})


def test_in_python_a_model_is_calibrated_without_a_recipe(pico: Any, tokenizer: Any, traces: Any) -> None:
    model = pico()
    positive, negative = traces
    scores = s2e.score(model, s2e.collect(model, tokenizer, positive, negative))
    texts = ["What is the capital of France?", "Please ask me something else!"]
    scale = s2e.calibrate(model, scores, texts, tokenizer=tokenizer, points=3, new_tokens=6)
    points = [point for ladder in scale.edits.values() for point in ladder]
    assert len(scale.steering) == len(points) > 3
    assert repr(scale) == f"Scale({len(points)} edits on {len(scale.edits)} ladders, {len(points)} steering strengths)"
    assert scores.edit(**points[0][0].config).edited()
    engine = TransformersEngine(model, tokenizer)
    ids = [engine.tokens(Item("text", text).messages(None)) for text in texts]
    answers = engine.generate([Request(prompt) for prompt in ids], [NOTHING], 6)
    pairs = [(prompt, answer.ids) for prompt, answer in zip(ids, answers, strict=True) if answer.ids]
    for candidate, kl in [*points, *scale.steering]:
        measured = engine.losses(pairs, [intervention_of(candidate, {"full": scores})]).kl.mean().item()
        assert measured == pytest.approx(kl, rel=0.3)


def test_in_python_mistakes_are_one_sentence(pico: Any, tokenizer: Any, traces: Any) -> None:
    scores = s2e.score(pico(), s2e.collect(pico(), tokenizer, *traces))
    with pytest.raises(ModelError, match="made on another model"):
        s2e.calibrate(pico(), make_scores(), ["x"], tokenizer=tokenizer)
    with pytest.raises(EditError, match="a model needs its tokenizer"):
        s2e.calibrate(pico(), scores, ["x"])
    with pytest.raises(EditError, match="no answer to measure KL on"):
        s2e.calibrate(pico(), scores, [], tokenizer=tokenizer)
    with pytest.raises(RecipeError, match="Both block types are off"):
        s2e.calibrate(pico(), scores, ["x"], tokenizer=tokenizer, rho_attn=None, rho_mlp=None)
