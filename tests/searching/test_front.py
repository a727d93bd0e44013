"""The front, what it covers, and the rules that choose, against slow plain loops and hand-made trials."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer2edit.behaviours.base import COMMON, Measure
from steer2edit.behaviours.safety import OVER_REFUSAL, REFUSAL
from steer2edit.searching.candidates import Candidate, Trial
from steer2edit.searching.choice import moved
from steer2edit.searching.front import RULES, Aim, choose, hypervolume, hypervolume_interval, pareto

NO_LIMITS: dict[str, float | None] = {"over_refusal": None}


MEASURES = {measure.name: measure for measure in (REFUSAL, OVER_REFUSAL, *COMMON)}
AIM = Aim(REFUSAL, {})


def _trial(id: str, cost: float | None = 0.3, refusal: float = 0.5, **numbers: float | None) -> Trial:
    means = {"utility_loss": cost, "refusal": refusal, "over_refusal": 0.1, "degenerate": 0.0, **numbers}
    return Trial(Candidate(id, "edit", {}), {name: (mean,) for name, mean in means.items()}, "0")


def _point(trial: Trial) -> tuple[float, float]:
    point = AIM.point(trial)
    assert point is not None
    return point


# Few numbers, so that points often share one or both.
POINTS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 2.0]), st.sampled_from([0.0, 0.2, 0.5, 1.0])))


def _dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] >= b[1] and a != b


@given(POINTS)
def test_the_front_is_what_none_of_all_others_beats_by_rising_cost_and_of_equals_the_first(
    points: list[tuple[float, float]],
) -> None:
    trials = [_trial(str(i), *p) for i, p in enumerate(points)]
    unbeaten = []
    for i, p in enumerate(points):
        if not any(_dominates(q, p) for q in points) and p not in points[:i]:
            unbeaten.append(str(i))
    found = pareto(trials, AIM)
    assert sorted(t.candidate.id for t in found) == sorted(unbeaten)
    costs, refusals = [t.mean("utility_loss") for t in found], [t.mean("refusal") for t in found]
    assert costs == sorted(set(costs))
    assert refusals == sorted(set(refusals))


def test_a_trial_without_a_utility_loss_is_on_no_front() -> None:
    trials = [_trial("a", None, 1.0), _trial("b", 0.2, 0.5)]
    assert [t.candidate.id for t in pareto(trials, AIM)] == ["b"]
    assert pareto([], AIM) == pareto(trials[:1], AIM) == []
    assert AIM.point(trials[0]) is None
    assert AIM.point(trials[1]) == (0.2, 0.5)


@pytest.mark.parametrize(
    ("points", "reference", "volume"),
    [
        ([], 1.0, 0.0),
        ([(0.0, 1.0)], 1.0, 1.0),
        ([(0.0, 1.0)], 7.0, 1.0),
        ([(0.25, 0.8)], 1.0, 0.75 * 0.8),
        ([(0.5, 0.8)], 2.0, 0.75 * 0.8),
        ([(1.0, 1.0)], 1.0, 0.0),  # on the reference
        ([(1.5, 1.0)], 1.0, 0.0),  # beyond it
        ([(0.25, 0.8), (1.5, 1.0)], 1.0, 0.75 * 0.8),
        ([(0.2, 0.5), (0.6, 0.9)], 1.0, 0.4 * 0.5 + 0.4 * 0.9),
        ([(0.6, 0.9), (0.2, 0.5)], 1.0, 0.4 * 0.5 + 0.4 * 0.9),
        ([(0.2, 0.5), (0.4, 0.3), (0.6, 0.9)], 1.0, 0.4 * 0.5 + 0.4 * 0.9),  # the second is beaten
        ([(0.2, 0.5), (0.2, 0.7), (0.2, 0.5)], 1.0, 0.8 * 0.7),
    ],
)
def test_the_hypervolume_of_hand_made_points(
    points: list[tuple[float, float]], reference: float, volume: float
) -> None:
    assert hypervolume(points, reference) == pytest.approx(volume, abs=1e-12)


@given(POINTS, st.sampled_from([0.4, 1.0, 3.0]))
def test_the_hypervolume_is_the_share_of_dominated_cells_of_a_grid(
    points: list[tuple[float, float]], reference: float
) -> None:
    # All coordinates are multiples of 0.05 and 0.1, so that the centres of cells of that size tell exactly.
    costs = np.arange(0.025, reference, 0.05)
    cells = [(x, y) for x in costs for y in np.arange(0.05, 1, 0.1)]
    dominated = sum(any(cost <= x and attribute >= y for cost, attribute in points) for x, y in cells)
    assert hypervolume(points, reference) == pytest.approx(dominated / len(cells), abs=1e-9)


# The interval -------------------------------------------------------------------------------------------------------


def _measured(id: str, flags: list[bool], kl: list[float]) -> Trial:
    shown = tuple(map(float, flags))
    return Trial(Candidate(id, "edit", {}), {"refusal": shown, "utility_loss": tuple(kl)}, "0")


def _drawn(count: int, seed: int) -> list[Trial]:
    draw = np.random.default_rng(seed)
    return [
        _measured(str(i), (draw.random(20) < (i + 1) / (count + 1)).tolist(), (0.2 * i + draw.random(12) / 5).tolist())
        for i in range(count)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_holds_the_hypervolume(seed: int) -> None:
    trials = _drawn(3, seed)
    found = hypervolume_interval(trials, AIM, 400, seed=0)
    assert found["mean"] == hypervolume([_point(t) for t in trials], 1.0)
    assert found["low"] < found["mean"] < found["high"]
    assert (found["reference"], found["trials"]) == (1.0, 3)


def test_the_interval_depends_on_the_seed_alone() -> None:
    trials = _drawn(4, 0)
    assert hypervolume_interval(trials, AIM, 100, seed=3) == hypervolume_interval(trials, AIM, 100, seed=3)
    assert (
        hypervolume_interval(trials, AIM, 100, seed=3)["low"] != hypervolume_interval(trials, AIM, 100, seed=4)["low"]
    )


def test_the_interval_is_that_of_all_resamples() -> None:
    # One trial of two prompts and two answers: the volume is p(1 − c), whose 16 equally likely values are known.
    trial = _measured("a", [True, False], [0.0, 0.4])
    values = sorted(
        (p0 + p1) / 2 * (1 - (c0 + c1) / 2)
        for p0, p1, c0, c1 in itertools.product((1, 0), (1, 0), (0.0, 0.4), (0.0, 0.4))
    )
    found = hypervolume_interval([trial], AIM, 4000, seed=0)
    assert found["mean"] == pytest.approx(0.5 * 0.8)
    assert (found["low"], found["high"]) == pytest.approx((values[0], values[-1]))  # both tails hold 1/16 or more


def test_trials_share_the_prompts_that_are_drawn() -> None:
    # Two trials that refuse opposite prompts: of prompts that they share one of them refuses half or more, always.
    flags = [True, False] * 10
    trials = [_measured("a", flags, [0.1] * 4), _measured("b", [not flag for flag in flags], [0.1] * 4)]
    assert hypervolume_interval(trials, AIM, 500, seed=1)["low"] >= 0.5 * 0.9 - 1e-12


def test_what_is_certain_has_an_interval_of_no_width() -> None:
    found = hypervolume_interval([_measured("a", [True] * 5, [0.25] * 3)], AIM, 50, seed=0)
    assert (found["mean"], found["low"], found["high"]) == (0.75, 0.75, 0.75)


@pytest.mark.parametrize("trials", [[], [_trial("a", None)]])
def test_nothing_covers_nothing(trials: list[Trial]) -> None:
    none = {"mean": 0.0, "low": 0.0, "high": 0.0, "reference": 2.0, "trials": 0}
    assert hypervolume_interval(trials, Aim(REFUSAL, {}, reference=2.0), 50, seed=0) == none


# The rules ----------------------------------------------------------------------------------------------------------


def _chosen(rule: Any, *trials: Trial, tolerance: float = 0.0, **limits: float | None) -> str | None:
    by_measure = {MEASURES[name]: limit for name, limit in (limits or NO_LIMITS).items()}
    chosen = choose(trials, Aim(REFUSAL, by_measure, rule, tolerance))
    return None if chosen is None else chosen.candidate.id


@pytest.mark.parametrize("rule", RULES)
def test_a_trial_above_a_limit_is_never_chosen_and_one_on_it_is(rule: str) -> None:
    plain = _trial("plain", 0.3, 0.5, accuracy_loss=0.0)
    limits = {"over_refusal": 0.2, "utility_loss": 0.5, "degenerate": 0.1, "accuracy_loss": 0.05}
    for name, limit in limits.items():
        best = {"cost": 0.3, "refusal": 1.0, "accuracy_loss": 0.0}
        number = "cost" if name == "utility_loss" else name
        assert _chosen(rule, _trial("over", **{**best, number: limit + 1e-9}), plain, **limits) == "plain"
        assert _chosen(rule, _trial("on", **{**best, number: limit}), plain, **limits) == "on"
        assert _chosen(rule, _trial("unknown", **{**best, number: None}), plain, **limits) == "plain"
    assert _chosen(rule, _trial("free", 0.1, 0.9, over_refusal=1.0), plain) == "free"


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_chosen_where_nothing_is_within_the_limits(rule: str) -> None:
    assert _chosen(rule) is None
    assert _chosen(rule, _trial("a"), _trial("b"), over_refusal=0.05) is None


def test_largest_is_the_highest_refusal_then_the_smallest_cost_then_the_first() -> None:
    assert _chosen("largest", _trial("a", refusal=0.4), _trial("b", refusal=0.7), _trial("c", refusal=0.6)) == "b"
    assert _chosen("largest", _trial("a", 0.4), _trial("b", 0.2), _trial("c", 0.3)) == "b"
    assert _chosen("largest", _trial("a"), _trial("b"), _trial("c")) == "a"
    assert _chosen("largest", _trial("a", None, 0.4), _trial("b", None, 0.6)) == "b"


def test_cheapest_is_the_smallest_cost_within_the_tolerance_of_the_best() -> None:
    trials = _trial("best", 0.9, 0.75), _trial("near", 0.4, 0.5), _trial("far", 0.1, 0.25)
    assert _chosen("cheapest", *trials, tolerance=0.0) == "best"
    assert _chosen("cheapest", *trials, tolerance=0.24) == "best"
    assert _chosen("cheapest", *trials, tolerance=0.25) == "near"
    assert _chosen("cheapest", *trials, tolerance=1.0) == "far"
    # Of equal costs the higher refusal, then the first.
    assert _chosen("cheapest", _trial("a", 0.2, 0.5), _trial("b", 0.2, 0.6), tolerance=0.2) == "b"
    assert _chosen("cheapest", _trial("a", 0.2, 0.5), _trial("b", 0.2, 0.5), tolerance=0.2) == "a"
    assert _chosen("cheapest", _trial("a", None, 0.4), _trial("b", None, 0.6)) == "b"


@pytest.mark.parametrize("n", [20, 40, 60, 64, 100])
def test_the_tolerance_counts_prompts_without_rounding(n: int) -> None:
    """k refusals of n are within a tolerance of m/n of k + m, whatever binary fractions make of it."""
    for k, m in itertools.product(range(n), (1, 2, 5)):
        if k + m <= n:
            trials = _trial("best", 0.9, (k + m) / n), _trial("near", 0.1, k / n)
            assert _chosen("cheapest", *trials, tolerance=m / n) == "near", (k, m, n)


def test_the_knee_lies_farthest_above_the_line_between_the_ends() -> None:
    # Along the front from (0, 0.2) to (1, 0.7), as shares of it: b (0.2, 0.6), c (0.5, 0.8).
    trials = [
        _trial("end", 1.0, 0.7),
        _trial("beaten", 0.5, 0.3),
        _trial("c", 0.5, 0.6),
        _trial("b", 0.2, 0.5),
        _trial("start", 0.0, 0.2),
    ]
    assert _chosen("knee", *trials) == "b"
    # Another scale of one axis changes nothing; another shape does.
    assert (
        _chosen("knee", *(_trial(t.candidate.id, 100 * t.mean("utility_loss"), t.mean("refusal")) for t in trials))
        == "b"
    )
    trials[3] = _trial("b", 0.2, 0.3)
    assert _chosen("knee", *trials) == "c"


def test_a_front_of_fewer_than_three_has_no_knee_and_its_largest_is_taken() -> None:
    two = _trial("a", 0.1, 0.3), _trial("b", 0.9, 0.6), _trial("beaten", 0.95, 0.5)
    assert _chosen("knee", *two) == "b"
    assert _chosen("knee", two[0]) == "a"
    assert _chosen("knee", _trial("a", None, 0.3), _trial("b", None, 0.6)) == "b"


def test_of_points_equally_far_above_the_line_the_cheaper_is_the_knee() -> None:
    trials = _trial("d", 1.0, 1.0), _trial("c", 0.5, 0.75), _trial("b", 0.25, 0.5), _trial("a", 0.0, 0.0)
    assert _chosen("knee", *trials) == "b"


def test_a_line_has_no_bend_and_its_gentlest_end_is_taken() -> None:
    assert _chosen("knee", _trial("c", 1.0, 1.0), _trial("b", 0.5, 0.5), _trial("a", 0.0, 0.0)) == "a"


def test_the_rule_largest_ranks_by_a_finer_measure_where_there_is_one() -> None:
    share = Measure("share", "share", better="higher", worst=0.0, best=1.0)
    margin = Measure("margin", "margin", better="higher", worst=-1.0, best=1.0, rate=False)

    def trial(name: str, shown: float, nats: float, cost: float) -> Trial:
        values = {"share": (shown,), "margin": (nats,), "utility_loss": (cost,)}
        return Trial(Candidate(name, "edit", {}), values, "0")

    trials = [trial("coarse", 0.6, 0.1, 0.1), trial("fine", 0.5, 0.3, 0.2)]
    plain = Aim(share, {})
    ranked = Aim(share, {}, ranked=margin)
    assert [chosen.candidate.id for aim in (plain, ranked) if (chosen := choose(trials, aim))] == ["coarse", "fine"]
    assert plain.describe_rule().startswith("highest share within the limits")
    assert ranked.describe_rule().startswith("highest margin within the limits")
    base = trial("base", 0.5, 0.2, 0.0)
    assert [moved(trials[1], base, aim) for aim in (plain, ranked)] == [False, True]
    assert [moved(trials[0], base, aim) for aim in (plain, ranked)] == [True, False]
