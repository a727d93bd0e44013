"""Rows of question files, and how they are divided into splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FileError, RecipeError
from ..files.reading import numbered_jsonl
from .base import SPLITS, Source, Split
from .contrast import divided, divided_files
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
        FileError: a row is none, or the file is empty. RecipeError: a question stands in two splits.
    """
    path = data_path(path)
    rows: dict[str, Row] = {}
    for number, row in numbered_jsonl(path):
        question, split = row.get("question"), row.get("split")
        if not isinstance(question, str) or not question.strip() or split not in (None, *SPLITS) or not fits(row):
            raise FileError(f"line {number} of {Path(path).name} is no question", got=row, fix=f"Write {wanted}.")
        known = rows.setdefault(normalised(question), Row(question, row, split))
        if known.split != split:
            raise RecipeError(
                f"a question of {Path(path).name} stands in two splits",
                got=repr(question[:60]),
                fix="Leave it in one of them: test questions must be new to everything before.",
            )
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
    names = Path(source.prompts).name, Path(source.test_prompts).name
    return divided_files(rows, others, counts, source.seed, names, lambda row: normalised(row.question))
