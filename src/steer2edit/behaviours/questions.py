"""Rows of question files, and how they are divided into splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FileError, RecipeError
from ..files.reading import numbered_jsonl
from .base import SPLITS, Source, Split
from .contrast import divided
from .prompts import data_path, normalised


@dataclass(frozen=True)
class Row:
    """A question of a file, and what its file says of it."""

    question: str
    values: Mapping[str, Any]
    split: Split | None = None


def read_rows(path: str, wanted: str, fits: Callable[[Mapping[str, Any]], bool]) -> list[Row]:
    """The rows of a JSON Lines file with `question`, each question once.

    Args:
        wanted: what a row must hold, for the error. fits: whether it does.

    Raises:
        FileError: a row is none, or the file is empty.
    """
    path = data_path(path)
    rows: dict[str, Row] = {}
    for number, row in numbered_jsonl(path):
        question, split = row.get("question"), row.get("split")
        if not isinstance(question, str) or not question.strip() or split not in (None, *SPLITS) or not fits(row):
            raise FileError(f"line {number} of {Path(path).name} is no question", got=row, fix=f"Write {wanted}.")
        rows.setdefault(normalised(question), Row(question, row, split))
    if not rows:
        raise FileError(f"{path} is empty", got="no question", fix="Write one JSON object a line, with question.")
    return list(rows.values())


def rows_of(source: Source, kind: str, read: Callable[[str], list[Row]]) -> dict[Split, list[Row]]:
    """The rows of each split.

    Raises:
        RecipeError: there are too few, or a question stands in two files.
    """
    counts = {split: None if of is None else of[kind] for split, of in source.counts.items()}
    assert source.prompts is not None
    rows = read(source.prompts)
    if source.test_prompts is None:
        return divided(rows, counts, source.seed, Path(source.prompts).name)
    others = read(source.test_prompts)
    known = {normalised(row.question) for row in rows}
    if both := [row for row in others if normalised(row.question) in known]:
        raise RecipeError(
            "a question stands in data.prompts and in data.test_prompts",
            got=repr(both[0].question[:60]),
            fix="Leave it in one of them: test questions must be new to everything before.",
        )
    first = divided(rows, counts, source.seed, Path(source.prompts).name, ("probe", "validation"))
    test = others if counts["test"] is None else others[: counts["test"]]
    if len(test) < (counts["test"] or 0):
        raise RecipeError(
            f"{source.test_prompts} has too few questions",
            got=f"{len(others)}, {counts['test']} asked",
            fix="Ask for fewer.",
        )
    return first | {"test": test}
