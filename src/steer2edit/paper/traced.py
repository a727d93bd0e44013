"""How many traces a recipe has and how long they are, before any is made: what a forecast counts of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..behaviours.base import Item
from ..recipe import Recipe
from .machine import Work

# Characters of English in a token.
_CHARACTERS = 4.2
# Tokens of a chat template after the beginning that all prompts share, and those of the beginning. A bench reads the
# beginning once for all prompts, the probe and training with every trace.
TEMPLATE, PREFIX = 8, 28


def tokens_of(text: str) -> float:
    return len(text) / _CHARACTERS


def mean_tokens(items: Sequence[Item]) -> float:
    return sum(tokens_of(item.text) for item in items) / len(items) if items else 0.0


@dataclass(frozen=True)
class Traced:
    """A recipe's traces.

    Attributes:
        writing: of the answers that the model itself writes. probing: of the pass over all traces.
        positive: the mean tokens of a positive trace, with its prompt.
    """

    writing: Work
    probing: Work
    positive: float


def traced(recipe: Recipe, expected: float | None) -> Traced:
    """What a recipe's traces are.

    Args:
        expected: the mean tokens of an answer, if they are fewer than the most.
    """
    behaviour = recipe.behaviour
    items = behaviour.items(recipe.source, "probe")
    asked = TEMPLATE + tokens_of(behaviour.system or "") + mean_tokens(items)
    most = float(getattr(behaviour, "new_tokens", 64))
    length = most if expected is None else min(most, expected)
    answers, kept = behaviour.answers_wanted(items), behaviour.answers_kept(items)
    if behaviour.traces is not None:  # a file of them
        answers = kept = 0
    positive, negative = behaviour.given_responses(items)
    prompt = PREFIX + asked
    given = sum(map(tokens_of, [*positive, *negative]))
    read = kept * (prompt + length) + (len(positive) + len(negative)) * prompt + given
    # Where only some of the answers are kept, the positive ones are the shortest.
    own = length / 2 if kept < answers else length
    response = sum(map(tokens_of, positive)) / len(positive) if positive else own
    return Traced(Work(answers * length, answers * asked), Work(read=read), prompt + response)
