"""Means of a set of items, with intervals: Wilson's for rates, the bootstrap's for everything else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# Two-sided 95 %.
_Z = 1.959963984540054


def interval(values: Sequence[float | None], rate: bool, resamples: int, seed: int, samples: int = 1) -> dict[str, Any]:
    """Mean and 95 % interval over items, of shares or of other numbers.

    Args:
        values: one number an item; of several sampled answers to a prompt their mean, so that the interval clusters by
            prompt. None is a number that is not finite: then there is no mean, and `not_finite` counts them.
        rate: whether they are shares of yes (Wilson's interval) or not (a percentile bootstrap).
        samples: how many answers an item's share is the mean of.
    """
    if not values:
        return {"mean": None, "low": None, "high": None, "n": 0, "method": "none"}
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        not_finite = len(values) - len(finite)
        none = {"mean": None, "low": None, "high": None}
        return none | {"n": len(values), "method": "none", "not_finite": not_finite}
    x = np.asarray(finite, dtype=np.float64)
    mean = float(x.mean())
    if rate:
        low, high = wilson(mean, _effective_size(x, samples))
        return {"mean": mean, "low": low, "high": high, "n": len(x), "method": "wilson"}
    low, high = _percentiles(x, resamples, seed)
    return {"mean": mean, "low": low, "high": high, "n": len(x), "method": "bootstrap"}


def finite(values: Sequence[float]) -> list[float | None]:
    """None in place of what is not finite, as a journal and `interval` have it."""
    return [value if math.isfinite(value) else None for value in values]


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share of n (E. B. Wilson, 1927).

    >>> [round(bound, 4) for bound in wilson(0.0, 64)]
    [0.0, 0.0566]
    """
    centre = share + _Z**2 / (2 * n)
    reach = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    # At a share of 0 or 1 the bound is 0 or 1 exactly, which rounding would miss.
    low = 0.0 if share == 0 else (centre - reach) / scale
    high = 1.0 if share == 1 else (centre + reach) / scale
    return low, high


def _effective_size(x: np.ndarray, samples: int) -> float:
    """How many independent answers say as much as these clusters: between the prompts and all of their answers."""
    share = float(x.mean())
    if samples == 1 or len(x) < 2 or share in (0.0, 1.0):
        return len(x)
    variance_of_mean = float(x.var(ddof=1)) / len(x)
    if variance_of_mean == 0:
        return len(x) * samples
    return min(max(share * (1 - share) / variance_of_mean, len(x)), len(x) * samples)


def paired_difference(
    a: Sequence[float | None], b: Sequence[float | None], resamples: int, seed: int
) -> dict[str, Any]:
    """mean(a − b) over the same items, with a 95 % percentile bootstrap interval."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not pairs or len(pairs) < len(a):
        return {"mean": None, "low": None, "high": None, "n": len(a), "method": "none"}
    difference = np.array([x - y for x, y in pairs], dtype=np.float64)
    low, high = _percentiles(difference, resamples, seed)
    mean = float(difference.mean())
    return {"mean": mean, "low": low, "high": high, "n": len(difference), "method": "paired bootstrap"}


def _percentiles(x: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    random = np.random.default_rng(seed)
    means = x[random.integers(0, len(x), size=(resamples, len(x)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
