"""Multiple choice by log-probability, as lm-eval asks and scores it: ARC, OpenBookQA, PIQA and HellaSwag.

Two numbers each: the accuracy of the choice with the highest log-probability, and that of the highest per character.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

from .base import Hub, Metric, Question, Reply, Row, Task, Value, accuracy, each

_BRACKETS = re.compile(r"\[.*?\]")


def _metrics(name: str, title: str, normalised: bool) -> tuple[Metric, Metric]:
    """Accuracy, and accuracy by log-probability per character; the one that is usually quoted has the column."""
    return (
        accuracy(name, title, column=not normalised),
        accuracy(f"{name}_norm", f"{title} (per character)", column=normalised),
    )


def _scored(name: str, question: Question, reply: Reply) -> Mapping[str, Value]:
    lengths = [len(continuation) - 1 for continuation in question.continuations]  # without the leading space
    per_character = [log_p / length for log_p, length in zip(reply.log_p, lengths, strict=True)]
    return {
        name: float(likeliest(reply.log_p) == question.target),
        f"{name}_norm": float(likeliest(per_character) == question.target),
    }


def likeliest(log_p: Sequence[float]) -> int:
    """The number of the highest log-probability, the first of equals; −1 if one is not a number.

    >>> likeliest((-3.0, -1.0, -1.0)), likeliest((float("nan"), -1.0))
    (1, -1)
    """
    if any(math.isnan(x) for x in log_p):
        return -1
    return list(log_p).index(max(log_p))


def _task(
    name: str,
    title: str,
    read: Callable[[Row, str], Question | None],
    hub: Hub,
    licence: str,
    normalised: bool = False,
) -> Task:
    return Task(
        name,
        "choices",
        _metrics(name, title, normalised),
        read,
        each(lambda question, reply: _scored(name, question, reply)),
        hub,
        (f"{name}.jsonl",),
        licence,
    )


def listed(row: Row) -> tuple[list[str], int] | None:
    """The choices of a row and the number of the right one, from either layout: a list and a number from 0 on, or the
    Hub's `choices.text`, `choices.label` and `answerKey`."""
    choices, answer = row.get("choices"), row.get("answer")
    if isinstance(choices, Mapping):
        labels, key = list(choices.get("label", ())), str(row.get("answerKey", "")).strip()
        choices, answer = list(choices.get("text", ())), labels.index(key) if key in labels else None
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        return None
    if type(answer) is not int or not 0 <= answer < len(choices):
        return None
    return choices, answer


def _question(row: Row, prompt: object, choices: Sequence[object], answer: object) -> Question | None:
    texts = [text for text in (prompt, *choices) if isinstance(text, str) and text.strip()]
    if len(texts) != 1 + len(choices) or type(answer) is not int or not 0 <= answer < len(choices):
        return None
    return Question(texts[0], tuple(f" {choice}" for choice in texts[1:]), answer)


def _arc(row: Row, seed: str) -> Question | None:
    of_row, question = listed(row), row.get("question")
    if of_row is None:
        return None
    return _question(row, f"Question: {question}\nAnswer:" if question else None, *of_row)


def _openbook(row: Row, seed: str) -> Question | None:
    of_row = listed(row)
    return None if of_row is None else _question(row, row.get("question_stem", row.get("question")), *of_row)


def _piqa(row: Row, seed: str) -> Question | None:
    goal = row.get("goal", row.get("question"))
    choices, answer = row.get("choices"), row.get("answer")
    if "sol1" in row:
        choices, answer = [row["sol1"], row.get("sol2")], row.get("label")
    if not isinstance(choices, list) or not goal:
        return None
    return _question(row, f"Question: {goal}\nAnswer:", choices, answer)


def _hellaswag(row: Row, seed: str) -> Question | None:
    endings, context, answer = row.get("endings"), row.get("context"), row.get("answer")
    if "ctx_a" in row:
        label = str(row.get("label", ""))
        answer = int(label) if label.isdecimal() else None
        context = f"{row.get('activity_label')}: {row['ctx_a']} {str(row.get('ctx_b', '')).capitalize()}"
    if not isinstance(endings, list) or not isinstance(context, str):
        return None
    return _question(row, _without_marks(context), [_without_marks(str(ending)) for ending in endings], answer)


def _without_marks(text: str) -> str:
    """The text without the marks of WikiHow's pages, which the set was made from."""
    return _BRACKETS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _arc_hub(config: str) -> Hub:
    return Hub("allenai/ai2_arc", config, "test")


CHOICES = (
    _task("arc_easy", "ARC-Easy", _arc, _arc_hub("ARC-Easy"), "CC BY-SA 4.0"),
    _task("arc_challenge", "ARC-Challenge", _arc, _arc_hub("ARC-Challenge"), "CC BY-SA 4.0", normalised=True),
    _task(
        "openbookqa",
        "OpenBookQA",
        _openbook,
        Hub("allenai/openbookqa", "main", "test"),
        "Apache-2.0",
        normalised=True,
    ),
    _task("piqa", "PIQA", _piqa, Hub("baber/piqa", None, "validation"), "AFL-3.0"),
    _task("hellaswag", "HellaSwag", _hellaswag, Hub("Rowan/hellaswag", None, "validation"), "MIT", normalised=True),
)
