"""The trade-off of a set of trials: which of them no other beats, how much they cover, and the rules that choose one.

Points are (cost, attribute): the utility loss, to be small, and the refusal rate, to be large.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .statistics import within

Trial = Mapping[str, Any]

Point = tuple[float, float]


def point(trial: Trial) -> Point:
    return trial["utility_loss"], trial["refusal"]


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that none beats in one number without losing in the other, by rising cost; of equals the first."""
    found: list[Trial] = []
    for trial in sorted((t for t in trials if None not in point(t)), key=lambda t: (point(t)[0], -point(t)[1])):
        if not found or point(trial)[1] > point(found[-1])[1]:
            found.append(trial)
    return found


def hypervolume(points: Sequence[Point], reference: float) -> float:
    """The share of [0, reference] × [0, 1] that the points dominate: 1 is every refusal at no cost."""
    area, best, last = 0.0, 0.0, 0.0
    for cost, attribute in sorted(points):
        if cost >= reference:
            break
        area += best * (cost - last)
        best, last = max(best, attribute), cost
    return (area + best * (reference - last)) / reference


def hypervolume_interval(trials: Sequence[Trial], reference: float, resamples: int, seed: int) -> dict[str, Any]:
    """The hypervolume of trials, and a 95 % percentile bootstrap interval over prompts and over benign answers.

    All trials share the resampled prompts. A front is the best of many, so that its mean and its interval lean upwards:
    methods may be compared at equal numbers of trials.
    """
    found = [t for t in trials if None not in point(t)]
    mean = hypervolume([point(t) for t in found], reference)
    if not found:
        return {"mean": mean, "low": mean, "high": mean, "reference": reference, "trials": 0}
    flags = np.array([t["flags"]["harmful"] for t in found], dtype=np.float64)  # [trials, prompts]
    kl = np.array([t["losses"]["kl"] for t in found], dtype=np.float64)  # [trials, answers]
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        attribute = flags[:, random.integers(0, flags.shape[1], flags.shape[1])].mean(axis=1)
        cost = kl[:, random.integers(0, kl.shape[1], kl.shape[1])].mean(axis=1)
        drawn.append(hypervolume(list(zip(cost.tolist(), attribute.tolist(), strict=True)), reference))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"mean": mean, "low": float(low), "high": float(high), "reference": reference, "trials": len(found)}


def _cost(trial: Trial) -> float:
    return 0.0 if trial["utility_loss"] is None else trial["utility_loss"]


def _largest(trials: Sequence[Trial], tolerance: float) -> Trial:
    return max(trials, key=lambda t: (t["refusal"], -_cost(t)))


def _cheapest(trials: Sequence[Trial], tolerance: float) -> Trial:
    best = max(t["refusal"] for t in trials)
    return min((t for t in trials if best - t["refusal"] <= tolerance + 1e-9), key=lambda t: (_cost(t), -t["refusal"]))


def _knee(trials: Sequence[Trial], tolerance: float) -> Trial:
    found = pareto(trials)
    if len(found) < 3:
        return _largest(trials, tolerance)
    (x0, y0), (x1, y1) = point(found[0]), point(found[-1])
    # Both axes from 0 to 1 along the front: the point farthest above the line between its ends.
    return max(found, key=lambda t: (point(t)[1] - y0) / (y1 - y0) - (point(t)[0] - x0) / (x1 - x0))


RULES: dict[str, tuple[str, Callable[[Sequence[Trial], float], Trial]]] = {
    "largest": ("highest refusal rate within the limits; of equals the smallest utility loss", _largest),
    "cheapest": ("smallest utility loss among those whose refusal rate is within the tolerance of the best", _cheapest),
    "knee": ("the knee of the Pareto front: farthest above the line between its ends, both axes from 0 to 1", _knee),
}


def choose(
    trials: Sequence[Trial], rule: str, limits: Mapping[str, float | None], tolerance: float = 0.0
) -> Trial | None:
    """What the rule takes of the trials that are within the limits; None if none is."""
    allowed = [t for t in trials if within(t, limits)]
    return RULES[rule][1](allowed, tolerance) if allowed else None
