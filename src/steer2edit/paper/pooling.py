"""Means over seeds, sets and prompts with 95 % intervals, and what is computed from several of them.

A seed is a run of its own. With one seed and one set of prompts the intervals are those of every other table; otherwise
they are a bootstrap in two stages: seeds are drawn first, then prompts within each set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..searching.candidates import Values
from ..searching.statistics import interval, paired_difference

# [seeds][sets] → a number for each item.
Strata = Sequence[Sequence[Values]]


@dataclass(frozen=True)
class Number:
    """A mean with its interval. n: prompts, over all sets and seeds."""

    mean: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    seeds: int = 1

    @property
    def known(self) -> bool:
        return self.mean is not None


NONE = Number(None)


@dataclass(frozen=True)
class Draws:
    """A number and what the bootstrap makes of it [resamples], to be combined with others."""

    mean: float
    drawn: np.ndarray
    n: int
    seeds: int

    def number(self) -> Number:
        low, high = np.percentile(self.drawn, [2.5, 97.5])
        return Number(self.mean, float(low), float(high), self.n, self.seeds)


def whole(strata: Strata) -> bool:
    """Whether every seed has the same number of sets, and each of them numbers that are all finite."""
    sizes = {len(sets) for sets in strata}
    return len(sizes) == 1 and all(values and None not in values for sets in strata for values in sets) and sizes != {0}


def draws(strata: Strata, resamples: int, seed: int) -> Draws | None:
    """The mean over seeds of the mean over sets of each set's mean; None where a number is missing or not finite."""
    if not strata or not whole(strata):
        return None
    random = np.random.default_rng(seed)
    arrays = [[np.asarray(values, dtype=np.float64) for values in sets] for sets in strata]
    mean = float(np.mean([np.mean([array.mean() for array in sets]) for sets in arrays]))
    # Every set's resampled means [seeds, resamples], averaged over the sets.
    means = np.stack([np.mean([_resampled(array, resamples, random) for array in sets], axis=0) for sets in arrays])
    drawn = _over_seeds(means, random)
    return Draws(mean, drawn, sum(len(array) for sets in arrays for array in sets), len(arrays))


def _resampled(array: np.ndarray, resamples: int, random: np.random.Generator) -> np.ndarray:
    return array[random.integers(0, len(array), size=(resamples, len(array)))].mean(axis=1)


def _over_seeds(means: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """[seeds, resamples] → [resamples]: the mean over as many seeds, drawn with replacement."""
    seeds, resamples = means.shape
    if seeds == 1:
        return means[0]
    drawn = random.integers(0, seeds, size=(seeds, resamples))
    return np.take_along_axis(means, drawn, axis=0).mean(axis=0)


def pooled(of_seeds: Sequence[Values], rate: bool, resamples: int, seed: int, samples: int = 1) -> Number:
    """The mean of one set of prompts over its seeds.

    Args:
        rate: whether the items are shares of yes; samples: of how many answers each.
    """
    if len(of_seeds) == 1:
        return _number(interval(of_seeds[0], rate, resamples, seed, samples))
    drawn = draws([[values] for values in of_seeds], resamples, seed)
    return NONE if drawn is None else drawn.number()


def difference(pairs: Sequence[tuple[Values, Values]], resamples: int, seed: int) -> Number:
    """mean(a − b) over the same prompts of every seed."""
    if any(len(a) != len(b) for a, b in pairs) or not pairs:
        return NONE
    if len(pairs) == 1:
        return _number(paired_difference(pairs[0][0], pairs[0][1], resamples, seed))
    if any(None in a or None in b for a, b in pairs):
        return NONE
    strata = [[tuple(x - y for x, y in zip(a, b, strict=True) if x is not None and y is not None)] for a, b in pairs]
    drawn = draws(strata, resamples, seed)
    return NONE if drawn is None else drawn.number()


def product(one: Draws | None, other: Draws | None, divide: bool = False) -> Number:
    """one × other, or one / other; of two bootstraps over different prompts."""
    if one is None or other is None or (divide and (other.mean == 0 or (other.drawn == 0).any())):
        return NONE
    drawn = one.drawn / other.drawn if divide else one.drawn * other.drawn
    mean = one.mean / other.mean if divide else one.mean * other.mean
    return Draws(mean, drawn, min(one.n, other.n), min(one.seeds, other.seeds)).number()


def _number(row: dict[str, Any]) -> Number:
    return Number(row["mean"], row["low"], row["high"], row["n"])


# At an equal cost -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A candidate on test: what it costs and what it shows, of each item."""

    cost: Values
    shown: Values


def at_equal_cost(
    of_seeds: Sequence[tuple[Point, Sequence[Point]]], resamples: int, seed: int, relative: bool = False
) -> Number:
    """An edit's mean less that of a curve at the edit's cost, interpolated linearly between the curve's points.

    All points share the resampled items. There is no mean where a curve does not reach the edit's cost; the interval is
    of those resamples in which it does, and missing if these are fewer than half.

    Args:
        of_seeds: of every seed the edit and the curve's points.
        relative: the difference as a share of the curve's height.
    """
    random = np.random.default_rng(seed)
    means, drawn, n = [], [], 0
    for edit, curve in of_seeds:
        points = [edit, *curve]
        if len(curve) < 2 or any(None in p.cost or None in p.shown or not p.cost or not p.shown for p in points):
            return NONE
        cost = np.array([p.cost for p in points], dtype=np.float64)  # [points, items]
        shown = np.array([p.shown for p in points], dtype=np.float64)
        n += shown.shape[1]
        means.append(_gap(cost.mean(axis=1), shown.mean(axis=1), relative))
        drawn.append([_gap(_mean_of(cost, random), _mean_of(shown, random), relative) for _ in range(resamples)])
    if not means or math.isnan(sum(means)):
        return Number(None, n=n, seeds=len(means))
    mean = float(np.mean(means))
    gaps = _over_seeds(np.array(drawn), random)
    gaps = gaps[~np.isnan(gaps)]
    if len(gaps) < resamples / 2:
        return Number(mean, n=n, seeds=len(means))
    low, high = np.percentile(gaps, [2.5, 97.5])
    return Number(mean, float(low), float(high), n, len(means))


def _mean_of(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """[points, items] → the points' means over the same resampled items."""
    return values[:, random.integers(0, values.shape[1], values.shape[1])].mean(axis=1)


def _gap(cost: np.ndarray, shown: np.ndarray, relative: bool) -> float:
    """The first point's height above the line through the others; NaN outside its ends."""
    order = np.argsort(cost[1:], kind="stable")
    xs, ys = cost[1:][order], shown[1:][order]
    if not xs[0] <= cost[0] <= xs[-1]:
        return math.nan
    height = float(np.interp(cost[0], xs, ys))
    if not relative:
        return float(shown[0]) - height
    return math.nan if height == 0 else float(shown[0]) / height - 1
