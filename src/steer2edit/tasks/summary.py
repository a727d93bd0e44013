"""A task's numbers: of each candidate the value of every question, means with intervals, and differences from the
original model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..searching.statistics import interval, paired_difference
from .base import Asked, Metric, Task, Value
from .bench import Replies

Values = list[Value | None]


@dataclass(frozen=True)
class Measured:
    """What a task gave.

    Attributes:
        metrics: what it reports. values: [candidates] metric → a value for each question; None where one is not finite.
        samples: how many answers each value is the mean of. about: what results.json says of the task.
    """

    metrics: tuple[Metric, ...]
    values: list[dict[str, Values]]
    samples: int
    about: dict[str, Any]


def values_of(task: Task, replies: Replies) -> list[dict[str, Values]]:
    """For each candidate: metric → a value for each question, the mean if a question has several answers."""
    out: list[dict[str, Values]] = []
    for of_candidate in replies.replies:
        if of_candidate is None:
            out.append({metric.name: [] for metric in task.metrics})
            continue
        asked: Asked = [
            (question, reply) for question, some in zip(replies.questions, of_candidate, strict=True) for reply in some
        ]
        scored = iter(task.score(asked))
        per_question = [[next(scored) for _ in some] for some in of_candidate]
        out.append(
            {
                metric.name: [_mean([one[metric.name] for one in some if metric.name in one]) for some in per_question]
                for metric in task.metrics
            }
        )
    return out


def _mean(values: Sequence[Value]) -> Value | None:
    if len(values) == 1 and isinstance(values[0], tuple):
        return values[0] if all(math.isfinite(x) for x in values[0]) else None
    numbers = [value for value in values if not isinstance(value, tuple)]
    mean = sum(numbers) / len(numbers)
    return mean if math.isfinite(mean) else None


def summarised(metric: Metric, values: Values, resamples: int, seed: int, samples: int) -> dict[str, Any]:
    """Mean, or what the metric makes of the values, with a 95 % interval over questions."""
    if metric.aggregate is None or not values or None in values:
        numbers = [value if not isinstance(value, tuple) else math.nan for value in values]
        return interval(numbers, metric.measure.rate, resamples, seed, samples)
    array = _array(values)
    low, high = _percentiles(metric, [array], resamples, seed)
    return {"mean": metric.aggregate(array), "low": low, "high": high, "n": len(values), "method": "bootstrap"}


def difference(metric: Metric, values: Values, base: Values, resamples: int, seed: int) -> dict[str, Any]:
    """How far a candidate's number is from the original model's on the same questions, with a paired interval."""
    if len(values) != len(base):
        return {"mean": None, "low": None, "high": None, "n": 0, "method": "none"}
    if metric.aggregate is None or None in values or None in base or not values:
        pairs = [[math.nan if isinstance(x, tuple) else x for x in some] for some in (values, base)]
        return paired_difference(pairs[0], pairs[1], resamples, seed)
    arrays = [_array(values), _array(base)]
    low, high = _percentiles(metric, arrays, resamples, seed)
    mean = metric.aggregate(arrays[0]) - metric.aggregate(arrays[1])
    return {"mean": mean, "low": low, "high": high, "n": len(values), "method": "paired bootstrap"}


def _array(values: Values) -> np.ndarray:
    """[questions], or [questions, 2] of pairs; of values that are no numbers, an array of objects."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(len(values), dtype=object)
        array[:] = values
        return array


def _percentiles(metric: Metric, arrays: Sequence[np.ndarray], resamples: int, seed: int) -> tuple[float, float]:
    """The interval of one array's aggregate, or of the difference between two arrays', over resampled questions."""
    assert metric.aggregate is not None
    random = np.random.default_rng(seed)
    numbers = []
    for _ in range(resamples):
        rows = random.integers(0, len(arrays[0]), size=len(arrays[0]))
        of_rows = [metric.aggregate(array[rows]) for array in arrays]
        numbers.append(of_rows[0] if len(of_rows) == 1 else of_rows[0] - of_rows[1])
    low, high = np.percentile(numbers, [2.5, 97.5])
    return float(low), float(high)


def add_to(results: dict[str, Any], name: str, kinds: Sequence[str], measured: Measured, plan: Any, seed: int) -> None:
    """Adds a task to results.json: its numbers to every system, the differences from the original model, what it is.

    Args:
        kinds: the system of each candidate; "base" is the original model. plan: with `resamples`.
    """
    base = measured.values[list(kinds).index("base")]
    for kind, values in zip(kinds, measured.values, strict=True):
        system = results["systems"][kind]
        for metric in measured.metrics:
            system[metric.name] = summarised(metric, values[metric.name], plan.resamples, seed, measured.samples)
            if kind != "base":
                differences = results.setdefault("task_differences", {}).setdefault(f"{kind} - base", {})
                differences[metric.name] = difference(
                    metric, values[metric.name], base[metric.name], plan.resamples, seed
                )
    shown = [metric.measure.to_json() | {"task": name} for metric in measured.metrics]
    results.setdefault("task_measures", []).extend(shown)
    results.setdefault("tasks", {})[name] = measured.about
