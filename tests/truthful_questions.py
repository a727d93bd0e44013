"""The behaviour truthfulness, and rows of its questions."""

from __future__ import annotations

from typing import Any

from sides import source
from steer2edit.behaviours.base import Source
from steer2edit.behaviours.truthfulness import OPEN, Truthfulness
from steer2edit.files.schema import parse


def truthfulness(**options: Any) -> Truthfulness:
    return parse(Truthfulness, options, under="behaviour")


def _row(number: int, correct: int = 2, incorrect: int = 2, **row: Any) -> dict[str, Any]:
    """A question whose best answer is the second of its correct ones."""
    good = [f"True {number}.{i}" for i in range(correct)]
    bad = [f"False {number}.{i}" for i in range(incorrect)]
    raw = {"question": f"Question {number}?", "best_answer": good[correct // 2]}
    return raw | {"correct_answers": good, "incorrect_answers": bad, **row}


def _source(path: str, seed: int = 0, **counts: Any) -> Source:
    return source(path, seed, kind=OPEN, **counts)
