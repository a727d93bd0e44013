"""Rates and losses of a set of items, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def interval(values: Sequence[float], resamples: int, seed: int) -> dict[str, Any]:
    """Mean and 95 % interval over prompts, of flags or of losses.

    A percentile bootstrap; where all flags are equal it would collapse to a point, so for a rate of 0 or 1 the exact
    (Clopper–Pearson) interval stands in its place, and `method` says so.
    """
    flags = np.asarray(values).dtype == bool
    x = np.asarray(values, dtype=np.float64)
    if not len(x):
        return {"mean": None, "low": None, "high": None, "n": 0, "method": "none"}
    mean = float(x.mean())
    if flags and mean in (0.0, 1.0):
        from scipy.stats import binomtest

        exact = binomtest(int(x.sum()), len(x)).proportion_ci(0.95, method="exact")
        return {"mean": mean, "low": float(exact.low), "high": float(exact.high), "n": len(x), "method": "exact"}
    low, high = _percentiles(x, resamples, seed)
    return {"mean": mean, "low": low, "high": high, "n": len(x), "method": "bootstrap"}


def paired_difference(a: Sequence[float], b: Sequence[float], resamples: int, seed: int) -> dict[str, Any]:
    """mean(a − b) over the same prompts, with a 95 % percentile bootstrap interval."""
    x = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    low, high = _percentiles(x, resamples, seed)
    return {"mean": float(x.mean()), "low": low, "high": high, "n": len(x), "method": "paired bootstrap"}


def _percentiles(x: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    random = np.random.default_rng(seed)
    means = x[random.integers(0, len(x), size=(resamples, len(x)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def rate(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


def within(trial: Mapping[str, Any], limits: Mapping[str, float | None]) -> bool:
    """Whether each limited number of a trial is there and not above its limit."""
    return all(
        limit is None or (trial.get(name) is not None and trial[name] <= limit) for name, limit in limits.items()
    )
