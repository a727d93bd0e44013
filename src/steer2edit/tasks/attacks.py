"""Sets of attack prompts as tasks: a JSON Lines file with `prompt`, answered at length and judged by the behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..behaviours.base import EARLY, Attacked, Behaviour, Item
from ..behaviours.prompts import refuse_empty
from ..errors import FileError, RecipeError
from ..files.reading import numbered_jsonl, sha256
from ..probing.traces import is_prompt
from .base import Asked, Metric, Question, Task, Value
from .sets import Set, described


def attack_task(name: str, behaviour: Behaviour, tokens: int) -> Task:
    """A set of attack prompts as a task, whose numbers the behaviour gives.

    Args:
        tokens: of an answer.
    """

    def score(asked: Asked) -> list[Mapping[str, Value]]:
        attacked = [Attacked(Item("attack", q.prompt).text, reply.early, reply.text) for q, reply in asked]
        return [dict(values) for values in behaviour.measure_attacks(name, attacked)]

    metrics = tuple(Metric(measure) for measure in behaviour.attack_measures(name))
    return Task(f"attack {name}", "answer", metrics, lambda row, seed: None, score, tokens=tokens, early=EARLY)


def load_attacks(name: str, path: str, count: int | None) -> Set:
    """The prompts of a file, the first `count` of them.

    Raises:
        FileError: no such file, an empty one, or a line without a prompt. RecipeError: it has too few.
    """
    rows = numbered_jsonl(path)
    refuse_empty(path, rows, "prompt")
    for number, row in rows:
        if not is_prompt(row.get("prompt")):
            raise FileError(
                f"line {number} of {path} is no attack prompt",
                got=sorted(row),
                fix="Write a prompt, a text or a list of messages, in each line.",
            )
    if len(rows) < (count or 1):
        raise RecipeError(
            f"the attack prompts {name} are too few",
            got=f"{len(rows)} in {path}, {count or 1} asked",
            fix="Ask for fewer.",
        )
    questions = [Question(row["prompt"]) for _, row in rows]
    return Set(questions[:count], Path(path).name, sha256(path), len(rows), described(questions, count, "first"))
