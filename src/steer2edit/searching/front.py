"""The trade-off of a set of trials: which of them no other beats, how much they cover, and the rules that choose one.

A trial's point is (cost, attribute): the utility loss, KL per token on neutral answers, to be small, and the
behaviour's attribute, to be as good as can be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..behaviours.base import UTILITY_LOSS, Measure
from .candidates import Trial

Rule = Literal["largest", "cheapest", "knee"]
Point = tuple[float, float]
COST = UTILITY_LOSS.name


@dataclass(frozen=True)
class Aim:
    """What a search should improve, and what that may cost.

    Attributes:
        attribute: the measure to improve. limits: what each measure may come to on validation; None is no limit.
        rule: which of the trials within the limits is chosen. tolerance: of the rule `cheapest`, on the attribute's
            scale from worst to best. reference: the utility loss, in nats, at which the hypervolume ends.
        ranked: what the rule `largest` ranks by; None is the attribute.
    """

    attribute: Measure
    limits: Mapping[Measure, float | None]
    rule: Rule = "largest"
    tolerance: float = 0.05
    reference: float = 1.0
    ranked: Measure | None = None

    @property
    def ranking(self) -> Measure:
        """The measure of which the rule `largest` takes the best."""
        return self.ranked or self.attribute

    def allows(self, trial: Trial) -> bool:
        """Whether each limited measure of a trial is within its limit."""
        return all(measure.allows(trial.mean(measure.name), limit) for measure, limit in self.limits.items())

    def missed(self, trial: Trial) -> list[str]:
        """The limits that a trial misses, for people: `degenerate 0.31, at most 0.1`."""
        missed = []
        for measure, limit in self.limits.items():
            mean = trial.mean(measure.name)
            if not measure.allows(mean, limit):
                bound = "at least" if measure.better == "higher" else "at most"
                missed.append(f"{measure.title} {'not measured' if mean is None else f'{mean:.2f}'}, {bound} {limit:g}")
        return missed

    def gain(self, trial: Trial) -> float | None:
        """The trial's attribute, with the sign that makes more of it better."""
        mean = trial.mean(self.attribute.name)
        return None if mean is None else self.attribute.gain(mean)

    def point(self, trial: Trial) -> Point | None:
        """(utility loss, gain); None where one of the two was not measured."""
        cost, gain = trial.mean(COST), self.gain(trial)
        return None if cost is None or gain is None else (cost, gain)

    def describe_rule(self) -> str:
        """The rule in words, from the measures' titles."""
        return RULES[self.rule].words(self)


def pareto(trials: Sequence[Trial], aim: Aim) -> list[Trial]:
    """The trials that none beats in one number without losing in the other, by rising cost; of equals the first."""
    measured = [(point, trial) for trial in trials if (point := aim.point(trial)) is not None]
    measured.sort(key=lambda pair: (pair[0][0], -pair[0][1]))
    front: list[Trial] = []
    best = -float("inf")
    for (_, gain), trial in measured:
        if gain > best:
            front.append(trial)
            best = gain
    return front


def hypervolume(points: Sequence[Point], reference: float) -> float:
    """The share of [0, reference] × [0, 1] that points (cost, scaled attribute) dominate: 1 is the best at no cost."""
    area, best, last = 0.0, 0.0, 0.0
    for cost, attribute in sorted(points):
        if cost >= reference:
            break
        area += best * (cost - last)
        best, last = max(best, attribute), cost
    return (area + best * (reference - last)) / reference


def hypervolume_interval(trials: Sequence[Trial], aim: Aim, resamples: int, seed: int) -> dict[str, Any]:
    """The hypervolume of trials, and a 95 % percentile bootstrap interval over items and over neutral answers.

    All trials share the resampled items. A front is the best of many, so that its mean and its interval lean upwards:
    methods may be compared at equal numbers of trials.
    """
    attribute, reference = aim.attribute, aim.reference
    measured = [trial for trial in trials if aim.point(trial) is not None]

    def volume(costs: Sequence[float], means: Sequence[float]) -> float:
        return hypervolume(list(zip(costs, map(attribute.scaled, means), strict=True)), reference)

    if not measured:
        return {"mean": 0.0, "low": 0.0, "high": 0.0, "reference": reference, "trials": 0}
    shown = np.array([trial.values[attribute.name] for trial in measured], dtype=np.float64)  # [trials, items]
    kl = np.array([trial.values[COST] for trial in measured], dtype=np.float64)  # [trials, answers]
    # The means as everywhere else, to the last bit.
    mean = volume(
        [trial.mean(COST) or 0.0 for trial in measured], [trial.mean(attribute.name) or 0.0 for trial in measured]
    )
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        means = shown[:, random.integers(0, shown.shape[1], shown.shape[1])].mean(axis=1)
        costs = kl[:, random.integers(0, kl.shape[1], kl.shape[1])].mean(axis=1)
        drawn.append(volume(costs.tolist(), means.tolist()))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"mean": mean, "low": float(low), "high": float(high), "reference": reference, "trials": len(measured)}


# The rules ---------------------------------------------------------------------------------------------------------


def cost_of(trial: Trial) -> float:
    """The utility loss; 0 where it was not measured."""
    cost = trial.mean(COST)
    return 0.0 if cost is None else cost


def _gain(trial: Trial, aim: Aim) -> float:
    gain = aim.gain(trial)
    return -float("inf") if gain is None else gain


def _largest(trials: Sequence[Trial], aim: Aim) -> Trial:
    def rank(trial: Trial) -> float:
        mean = trial.mean(aim.ranking.name)
        return -float("inf") if mean is None else aim.ranking.gain(mean)

    return max(trials, key=lambda t: (rank(t), -cost_of(t)))


def _cheapest(trials: Sequence[Trial], aim: Aim) -> Trial:
    def scaled(trial: Trial) -> float:
        mean = trial.mean(aim.attribute.name)
        return -float("inf") if mean is None else aim.attribute.scaled(mean)

    best = max(scaled(t) for t in trials)
    near = [t for t in trials if scaled(t) >= best - aim.tolerance - 1e-9]
    return min(near, key=lambda t: (cost_of(t), -_gain(t, aim)))


def _knee(trials: Sequence[Trial], aim: Aim) -> Trial:
    front = pareto(trials, aim)
    if len(front) < 3:
        return _largest(trials, aim)
    points = [point for t in front if (point := aim.point(t)) is not None]
    (x0, y0), (x1, y1) = points[0], points[-1]
    # Both axes from 0 to 1 along the front: the point farthest above the line between its ends.
    heights = [(y - y0) / (y1 - y0) - (x - x0) / (x1 - x0) for x, y in points]
    return front[heights.index(max(heights))]


@dataclass(frozen=True)
class _Rule:
    choose: Callable[[Sequence[Trial], Aim], Trial]
    words: Callable[[Aim], str]


def _extreme(aim: Aim) -> str:
    return f"{'highest' if aim.ranking.better == 'higher' else 'lowest'} {aim.ranking.title}"


RULES: dict[Rule, _Rule] = {
    "largest": _Rule(
        _largest, lambda aim: f"{_extreme(aim)} within the limits; of equals the smallest {UTILITY_LOSS.title}"
    ),
    "cheapest": _Rule(
        _cheapest,
        lambda aim: (
            f"smallest {UTILITY_LOSS.title} among those whose {aim.attribute.title} is within the tolerance of the best"
        ),
    ),
    "knee": _Rule(
        _knee,
        lambda aim: (
            f"the knee of the Pareto front of {aim.attribute.title} against {UTILITY_LOSS.title}: farthest above"
            " the line between its ends, both axes from 0 to 1"
        ),
    ),
}


def choose(trials: Sequence[Trial], aim: Aim) -> Trial | None:
    """The trial that the rule takes of those within the limits; None if none is."""
    allowed = [trial for trial in trials if aim.allows(trial)]
    return RULES[aim.rule].choose(allowed, aim) if allowed else None
