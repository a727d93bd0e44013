"""What a task is: questions, what the engine replied to them, and the numbers that a reply counts for.

A task is data. `known.py` lists the tasks, `sets.py` reads their questions, `bench.py` asks every candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..behaviours.base import Measure, Prompt

# choices: continuations are scored. document: a whole text is scored, window by window. answer: the model writes.
Form = Literal["choices", "document", "answer"]
Row = Mapping[str, Any]
# A number for one question; a pair (a sum, how many it is the sum over) for a mean over tokens or words.
Value = float | tuple[float, float]


@dataclass(frozen=True)
class Question:
    """One thing that every candidate is asked.

    Attributes:
        prompt: a text or chat messages; of a document the text itself.
        continuations: texts whose log-probability after the prompt is measured, with their leading space.
        target: what the scoring compares with, like the number of the right choice.
    """

    prompt: Prompt
    continuations: tuple[str, ...] = ()
    target: Any = None


@dataclass(frozen=True)
class Reply:
    """What a candidate replied.

    Attributes:
        text: the answer, without any thinking. early: what it was after the first few tokens, if the task asks for it.
        log_p: the log-probability of each continuation, or of the document, in nats; NaN where it is not finite.
        greedy: of each continuation whether the model would write it.
    """

    text: str = ""
    early: str = ""
    log_p: tuple[float, ...] = ()
    greedy: tuple[bool, ...] = ()


Asked = Sequence[tuple[Question, Reply]]


@dataclass(frozen=True)
class Metric:
    """A number that a task reports.

    Attributes:
        measure: its name, its title, and which direction is better.
        aggregate: the values of all questions → the number; None is their mean.
    """

    measure: Measure
    aggregate: Callable[[np.ndarray], float] | None = None

    @property
    def name(self) -> str:
        return self.measure.name


@dataclass(frozen=True)
class Hub:
    """Where on the Hugging Face Hub a task's set is."""

    path: str
    config: str | None
    split: str


@dataclass(frozen=True)
class Task:
    """A test set and how it is asked and scored.

    Attributes:
        name: its key in recipes and in results.
        form: how the engine is asked.
        metrics: what it reports; the first one is the task's number.
        questions: a row of the set → its question; None if the row is not in a known layout. `seed` orders choices
            that the set does not order.
        score: questions with replies → for each of them, metric → value.
        hub: the set on the Hub. files: the names of the same set in a local folder, the first that is there counts.
        licence: of the set, as its card or its repository says.
        tokens: the most tokens of an answer; None takes `evaluation.task_tokens`.
        early: how many tokens of an answer the reply's `early` holds; 0 is none.
    """

    name: str
    form: Form
    metrics: tuple[Metric, ...]
    questions: Callable[[Row, str], Question | None]
    score: Callable[[Asked], list[Mapping[str, Value]]]
    hub: Hub | None = None
    files: tuple[str, ...] = ()
    licence: str = ""
    tokens: int | None = None
    early: int = 0


def each(score: Callable[[Question, Reply], Mapping[str, Value]]) -> Callable[[Asked], list[Mapping[str, Value]]]:
    """A score of one reply as a score of many."""
    return lambda asked: [score(question, reply) for question, reply in asked]


def accuracy(name: str, title: str, column: bool = True) -> Metric:
    """The share of questions that are answered rightly."""
    return Metric(Measure(name, title, better="higher", worst=0.0, best=1.0, column=column))


def perplexity(values: np.ndarray) -> float:
    """exp of the mean NLL. For pairs (NLL, count) the mean is the sum of the NLLs divided by the sum of the counts.

    >>> round(perplexity(np.array([[4.0, 2.0], [2.0, 4.0]])), 4) == round(math.exp(6 / 6), 4)
    True
    """
    mean = values.mean() if values.ndim == 1 else values[:, 0].sum() / values[:, 1].sum()
    return math.exp(min(float(mean), 700.0))


def bits(values: np.ndarray) -> float:
    """Bits for each thing that is counted, from pairs (NLL in nats, count).

    >>> bits(np.array([[math.log(2) * 6, 3.0]]))
    2.0
    """
    return float(values[:, 0].sum() / values[:, 1].sum() / math.log(2))
