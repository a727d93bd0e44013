"""Items from files: multiple-choice sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steer2edit.behaviours.base import QUESTION, Item
from steer2edit.behaviours.prompts import load_questions
from steer2edit.errors import FileError, RecipeError

# Multiple choice ----------------------------------------------------------------------------------------------------


def _questions(folder: Path, *rows: Any) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_questions_are_those_from_a_number_on(tmp_path: Path) -> None:
    rows = [{"question": f"Q{i}?", "choices": ["a", "b", "c"][: 2 + i % 2], "answer": i % 2} for i in range(5)]
    path = _questions(tmp_path, *rows)
    asked = [Item(QUESTION, f"Q{i}?", ("a", "b", "c")[: 2 + i % 2], i % 2) for i in range(5)]
    assert load_questions(path, 0, 2) == asked[:2]
    assert load_questions(str(path), 2, 3) == asked[2:]
    assert load_questions(path, 5, 0) == []


@pytest.mark.parametrize(
    "row",
    [
        {"choices": ["a", "b"], "answer": 0},
        {"question": "Q?", "answer": 0},
        {"question": "Q?", "choices": "ab", "answer": 0},
        {"question": "Q?", "choices": [], "answer": 0},
        {"question": "Q?", "choices": ["a", 2], "answer": 0},
        {"question": "Q?", "choices": ["a", " "], "answer": 0},
        {"question": " ", "choices": ["a", "b"], "answer": 0},
        {"question": 7, "choices": ["a", "b"], "answer": 0},
        {"question": "Q?", "choices": ["a", "b"]},
        {"question": "Q?", "choices": ["a", "b"], "answer": 2},
        {"question": "Q?", "choices": ["a", "b"], "answer": -1},
        {"question": "Q?", "choices": ["a", "b"], "answer": True},
        {"question": "Q?", "choices": ["a", "b"], "answer": "a"},
        {"question": "Q?", "choices": ["a", "b"], "answer": 1.0},
    ],
)
def test_a_row_that_is_no_question_is_refused_with_its_line(row: dict[str, Any], tmp_path: Path) -> None:
    path = _questions(tmp_path, {"question": "Q?", "choices": ["a"], "answer": 0}, row)
    with pytest.raises(FileError, match=r"line 2 of .*questions\.jsonl is not a question .* Write a question, its"):
        load_questions(path, 0, 1)


def test_too_few_questions_are_refused_with_both_numbers(tmp_path: Path) -> None:
    path = _questions(tmp_path, *[{"question": "Q?", "choices": ["a", "b"], "answer": 1}] * 3)
    with pytest.raises(RecipeError, match=r"has too few questions \(got: 3, 4 asked\)\. Ask for fewer"):
        load_questions(path, 2, 2)


def test_questions_that_are_nowhere_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no such file \(got: .*none\.jsonl"):
        load_questions(tmp_path / "none.jsonl", 0, 1)
