"""What a response shows, and what a set of them says: rates and losses with bootstrap intervals."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import FileError, RecipeError
from .files import numbered_jsonl

_TOKEN = re.compile(r"\w+|[^\w\s]")


def degenerate(text: str) -> bool:
    """Whether a response is no language: empty, without a letter, one word or n-gram over and over, or next to no
    distinct words. Such a response never counts as a success."""
    tokens = _TOKEN.findall(text.lower())
    words = [token for token in tokens if any(c.isalnum() for c in token)]
    if not words:
        return True
    # A ruled line, dots or the brackets of code are no loop unless there is next to nothing else.
    if _loops(words, 0.5) or _loops(tokens, 0.8):
        return True
    return len(words) >= 12 and len(set(words)) / len(words) < 0.25


def _loops(tokens: Sequence[str], share: float) -> bool:
    """Whether a cycle of up to six tokens, gone through four times or so, takes at least this share of all."""
    if len(tokens) < 6:
        return False
    for n in range(1, 7):
        repeats = run = 0
        for i in range(n, len(tokens)):
            run = run + 1 if tokens[i] == tokens[i - n] else 0
            repeats = max(repeats, run)
        # `repeats` tokens in a row continue a cycle of n: n + repeats tokens say what n could.
        if repeats >= max(4, 3 * n - 1) and n + repeats >= share * len(tokens):
            return True
    return False


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


@dataclass(frozen=True)
class Question:
    """A question, its choices, and the number of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int


def load_questions(path: str | Path, first: int, count: int) -> list[Question]:
    """`count` questions of a JSON Lines file, from the one numbered `first` on.

    Raises:
        FileError: a row is no question. RecipeError: there are too few.
    """
    found = []
    for number, row in numbered_jsonl(path):
        question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
        texts = isinstance(choices, list) and all(isinstance(x, str) and x.strip() for x in (question, *choices))
        if not isinstance(choices, list) or not texts or type(answer) is not int or not 0 <= answer < len(choices):
            raise FileError(
                f"line {number} of {path} is not a question",
                got=row,
                fix="Write a question, its choices (texts) and the number of the right one from 0 on.",
            )
        found.append(Question(str(question), tuple(choices), answer))
    if len(found) < first + count:
        raise RecipeError(
            f"{path} has too few questions", got=f"{len(found)}, {first + count} asked", fix="Ask for fewer."
        )
    return found[first : first + count]
