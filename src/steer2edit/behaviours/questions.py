"""Small multiple-choice sets whose accuracy is measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import FileError, RecipeError
from ..files.reading import numbered_jsonl


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
