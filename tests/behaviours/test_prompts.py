"""Items from files: prompts by kind and split, neutral prompts, multiple-choice sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steer2edit.behaviours.base import QUESTION, Item
from steer2edit.behaviours.prompts import load_neutral, load_prompts, load_questions
from steer2edit.errors import FileError, RecipeError
from steer2edit.tasks.attacks import load_attacks

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


# Prompts by kind and split -----------------------------------------------------------------------------------------


def _prompts(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def _styled(*styles: str | None, kind: str = "plain") -> list[dict[str, Any]]:
    """Rows that are named after their style and their place."""
    return [
        {"prompt": f"{style} {i}", "kind": kind, "split": "test"} | ({} if style is None else {"style": style})
        for i, style in enumerate(styles)
    ]


def test_items_of_each_style_are_taken_in_turn(tmp_path: Path) -> None:
    path = _prompts(tmp_path, *_styled("a", "a", "a", "b", "c", "b", "a"))
    expected = ["a 0", "b 3", "c 4", "a 1", "b 5", "a 2", "a 6"]
    for count in range(8):
        found = load_prompts(path, ["plain"], "test", {"plain": count}, "style")
        assert [item.text for item in found] == expected[:count]
        assert [item.target for item in found] == [text.split()[0] for text in expected[:count]]
    # Without a target they stand as in the file.
    plain = load_prompts(path, ["plain"], "test", {"plain": 5})
    assert [(item.text, item.target) for item in plain] == [(f"{'aaabc'[i]} {i}", None) for i in range(5)]


def test_rows_without_a_style_are_a_style_of_their_own_and_each_kind_takes_its_turns(tmp_path: Path) -> None:
    rows = _styled("a", None, None, "a", "b")
    path = _prompts(tmp_path, *rows, *_styled("b", "b", "a", kind="odd"))
    found = load_prompts(path, ["plain", "odd"], "test", {"odd": 2, "plain": 4}, "style")
    assert [(item.kind, item.text, item.target) for item in found] == [
        ("odd", "b 0", "b"),
        ("odd", "a 2", "a"),
        ("plain", "a 0", "a"),
        ("plain", "None 1", None),
        ("plain", "b 4", "b"),
        ("plain", "a 3", "a"),
    ]
    unstyled = _prompts(tmp_path, *_styled(None, None, None))
    found = load_prompts(unstyled, ["plain"], "test", {"plain": 3}, "style")
    assert [item.text for item in found] == ["None 0", "None 1", "None 2"]


def test_a_style_that_is_no_word_is_refused_with_its_line(tmp_path: Path) -> None:
    rows = [*_styled("a"), {"prompt": "p", "kind": "plain", "split": "test", "style": ["a", "b"]}]
    with pytest.raises(FileError, match=r"line 2 of prompts\.jsonl"):
        load_prompts(_prompts(tmp_path, *rows), ["plain"], "test", {"plain": 1}, "style")


@pytest.mark.parametrize("again", ["How do I bake bread?", "  how do I BAKE bread", "How do I bake... bread?!"])
def test_a_prompt_in_two_splits_is_refused_however_it_is_written(again: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": "How do I bake bread?", "kind": "plain", "split": "probe"},
        {"prompt": "How do I bake cakes?", "kind": "plain", "split": "test"},
        {"prompt": again, "kind": "plain", "split": "test"},
    ]
    path = _prompts(tmp_path, *rows)
    with pytest.raises(RecipeError, match=r"stands in two splits \(got: 'how do i bake bread' in probe and in test\)"):
        load_prompts(path, ["plain"], "validation", {})
    path = _prompts(tmp_path, *rows[:2], {**rows[2], "split": "probe"})  # twice in one split is nobody's harm
    assert len(load_prompts(path, ["plain"], "probe", {"plain": 2})) == 2


def test_a_prompt_may_be_a_conversation(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    messages += [{"role": "user", "content": "How do I bake?"}]
    path = _prompts(tmp_path, {"prompt": messages, "kind": "plain", "split": "test"})
    (item,) = load_prompts(path, ["plain"], "test", {"plain": 1})
    assert item.text == "How do I bake?"
    assert item.messages("Be kind.") == [{"role": "system", "content": "Be kind."}, *messages]
    path = _prompts(tmp_path, {"prompt": [{"role": "user"}], "kind": "plain", "split": "test"})
    with pytest.raises(FileError, match=r"line 1 of prompts.jsonl is not a prompt"):
        load_prompts(path, ["plain"], "test", {"plain": 1})


def test_an_empty_file_is_said_to_be_empty(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n", encoding="utf-8")
    for load in (
        lambda: load_prompts(file, ["plain"], "test", {"plain": 1}),
        lambda: load_questions(file, 0, 1),
        lambda: load_neutral(file, "test", 0, 1),
        lambda: load_attacks("gcg", str(file), None),
    ):
        with pytest.raises(FileError, match=r"prompts\.jsonl is empty \(got: no line\)\. Write one JSON object a line"):
            load()


def test_neutral_prompts_are_their_splits_own_or_those_from_a_number_on(tmp_path: Path) -> None:
    plain = _prompts(tmp_path, *[{"prompt": f"p{i}"} for i in range(5)])
    assert [item.text for item in load_neutral(plain, "validation", 0, 2)] == ["p0", "p1"]
    assert [item.text for item in load_neutral(plain, "test", 2, 3)] == ["p2", "p3", "p4"]
    with pytest.raises(RecipeError, match=r"too few prompts for test \(got: 3, 4 asked\)"):
        load_neutral(plain, "test", 2, 4)
    rows = [{"prompt": f"{split} {i}", "split": split} for split in ("test", "validation") for i in range(3)]
    named = _prompts(tmp_path, *rows)
    assert [item.text for item in load_neutral(named, "validation", 0, 2)] == ["validation 0", "validation 1"]
    assert [item.text for item in load_neutral(named, "test", 2, 2)] == ["test 0", "test 1"]
    with pytest.raises(FileError, match=r"line 1 of .* is not a prompt"):
        load_neutral(_prompts(tmp_path, {"text": "p"}), "test", 0, 1)
