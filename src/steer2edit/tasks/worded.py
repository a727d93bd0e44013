r"""Questions that the model answers in its own words, as the paper asks them: GSM8K, MATH-500, CommonsenseQA, CodeMMLU
and GPQA.

A mathematical question is the whole prompt, and the answer is the last \boxed{…} or else the last number. Multiple
choice asks for \boxed{A}, and the answer is the letter in the last \boxed{…} or else the first lone letter.
"""

from __future__ import annotations

import logging
import random
import re
import string
import threading
from collections.abc import Callable, Mapping, Sequence

from ..behaviours.mathematics import final_answer, is_right, last_boxed
from .base import Hub, Question, Reply, Row, Task, Value, accuracy, each
from .choices import listed

_SECONDS = 5  # for one answer: an expression can take for ever
_LONE_LETTER = re.compile(r"(?<![A-Za-z])[A-Z](?![A-Za-z])")


# Mathematics ---------------------------------------------------------------------------------------------------------


def _problem(row: Row, seed: str) -> Question | None:
    problem, answer = row.get("problem", row.get("question")), row.get("answer")
    if not (isinstance(problem, str) and problem.strip() and isinstance(answer, str) and answer.strip()):
        return None
    return Question(problem, target=answer.rpartition("####")[2].strip())


def same_value(text: str, answer: str) -> bool:
    r"""Whether a solution ends in the answer: the same number to two decimals, or equal as `math-verify` sees it.

    >>> same_value(r"Half of it: \boxed{\frac{1}{2}}", "0.5"), same_value("So 41.", "42")
    (True, False)
    """
    if is_right(text, answer):
        return True
    given = final_answer(text)
    if given is None:
        return False
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # Its limit of time is a signal, which the main thread alone can have.
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    wanted = parse(f"${answer}$", parsing_timeout=seconds)
    parsed = parse(f"${given}$", parsing_timeout=seconds)
    return bool(verify(wanted, parsed, float_rounding=2, timeout_seconds=seconds))


def _mathematics(name: str, title: str, hub: Hub, files: tuple[str, ...], licence: str) -> Task:
    def scored(question: Question, reply: Reply) -> Mapping[str, Value]:
        return {name: float(same_value(reply.text, question.target))}

    return Task(name, "answer", (accuracy(name, title),), _problem, each(scored), hub, files, licence)


# Multiple choice -----------------------------------------------------------------------------------------------------


def chosen_letter(text: str, letters: Sequence[str]) -> str | None:
    r"""The letter that an answer chooses; None if it chooses none of them.

    >>> chosen_letter(r"B? No: \boxed{\text{C}}", "ABCD"), chosen_letter("It is B, not D.", "ABCD")
    ('C', 'B')
    """
    boxed = last_boxed(text)
    if boxed is not None:
        boxed = re.sub(r"\\[a-z]+", " ", boxed)
    alone = [letter for letter in _LONE_LETTER.findall(text if boxed is None else boxed) if letter in letters]
    return alone[0] if alone else None


def _asking_for(letters: Sequence[str]) -> str:
    forms = [rf"\boxed{{{letter}}}" for letter in letters]
    return f"Write your final answer as {', '.join(forms[:-1])} or {forms[-1]}."


def _lettered(question: str, choices: Sequence[str], answer: int) -> Question:
    letters = string.ascii_uppercase[: len(choices)]
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    return Question(f"{question}\n{options}\n{_asking_for(letters)}", target=[letters[answer], letters])


def _commonsense(row: Row, seed: str) -> Question | None:
    of_row, question = listed(row), row.get("question")
    return _lettered(question, *of_row) if of_row is not None and isinstance(question, str) else None


def _code(row: Row, seed: str) -> Question | None:
    question, choices, letter = row.get("question"), row.get("choices"), str(row.get("answer", "")).strip().upper()
    if not isinstance(question, str) or not isinstance(choices, list) or len(letter) != 1:
        return None
    letters = string.ascii_uppercase[: len(choices)]
    if len(choices) < 2 or letter not in letters or not all(isinstance(choice, str) for choice in choices):
        return None
    options = "\n\n".join(f"Option {at}:\n\n{choice}" for at, choice in zip(letters, choices, strict=True))
    # The knowledge questions are whole sentences; those on code are code that goes on.
    asked = question if str(row.get("task_id", "")).startswith("k") else f"Complete this code:\n\n{question}"
    return Question(f"{asked}\n\n{options}\n\n{_asking_for(letters)}", target=[letter, letters])


def _gpqa(row: Row, seed: str) -> Question | None:
    keys = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    choices, question = [row.get(key) for key in keys], row.get("Question")
    if not isinstance(question, str) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        return None
    # The set has the right answer first, so the choices are shuffled, each question in its own way.
    order = list(range(4))
    random.Random(f"{seed} {question}").shuffle(order)
    return _lettered(question.strip(), [str(choices[i]).strip() for i in order], order.index(0))


def _letters(
    name: str,
    title: str,
    read: Callable[[Row, str], Question | None],
    hub: Hub,
    files: tuple[str, ...],
    licence: str,
) -> Task:
    def scored(question: Question, reply: Reply) -> Mapping[str, Value]:
        letter, letters = question.target
        return {name: float(chosen_letter(reply.text, letters) == letter)}

    return Task(name, "answer", (accuracy(name, title),), read, each(scored), hub, files, licence)


WORDED = (
    _mathematics("gsm8k", "GSM8K", Hub("openai/gsm8k", "main", "test"), ("gsm8k_test.jsonl", "gsm8k.jsonl"), "MIT"),
    _mathematics("math500", "MATH-500", Hub("HuggingFaceH4/MATH-500", None, "test"), ("math500.jsonl",), "MIT"),
    _letters(
        "commonsenseqa",
        "CommonsenseQA",
        _commonsense,
        Hub("tau/commonsense_qa", None, "validation"),
        ("commonsenseqa_validation.jsonl", "commonsenseqa.jsonl"),
        "MIT",
    ),
    _letters(
        "codemmlu",
        "CodeMMLU",
        _code,
        Hub("Fsoft-AIC/CodeMMLU", "code_completion", "test"),
        ("codemmlu.jsonl", "code_mmlu_completion.jsonl"),
        "MIT",
    ),
    _letters(
        "codemmlu_knowledge",
        "CodeMMLU, knowledge",
        _code,
        Hub("Fsoft-AIC/CodeMMLU", "programming_syntax", "test"),
        ("code_mmlu_knowledge.jsonl",),
        "MIT",
    ),
    _letters("gpqa", "GPQA diamond", _gpqa, Hub("Idavidrein/gpqa", "gpqa_diamond", "train"), (), "CC BY 4.0"),
)
