"""The front of a search as a numbered table, and the point that a person picks from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import EditError
from ..files.reading import read_jsonl
from ..pipeline.names import TRIED_ANSWERS
from ..pipeline.reporting import read_study
from ..pipeline.run import Run
from ..report.front_table import front_table
from ..report.page import describe_limits
from ..report.visible import one_line
from ..searching.candidates import Trial, of_kind
from ..searching.choice import offered, picked
from ..searching.front import Aim, choose
from .questions import Questions

# What stands for the rule among the answers, and on the command line.
RULE = "rule"
_SAMPLES = 3
# How much of an answer is shown, in characters.
_SHOWN = 300


def ask_pick(run: Run, ask: Questions) -> str | None:
    """The id of the edit that a person picks; None leaves the choice to the rule.

    Raises:
        EditError: no edit is left to pick from.
    """
    trials, aim = read_study(run).trials, run.recipe.aim
    front = offered(trials, aim)
    if not front:
        raise EditError("no edit is left to choose from", got="all discarded", fix="Raise ρ or α (smaller edits).")
    by_rule = choose(of_kind(trials, "edit"), aim)
    show_front(trials, run, ask)
    default = None if by_rule is None else str(1 + _place(front, by_rule))
    ask.say("Enter takes what stands in brackets; a 2 shows answers of number 2.")

    def chosen(answer: str) -> Trial | None:
        word, _, rest = answer.partition(" ")
        if word in ("a", "answers"):
            show_answers(run, picked(trials, aim, rest.strip()), ask)
            return None
        if answer == RULE and by_rule is not None:
            return by_rule
        return picked(trials, aim, answer)

    trial = None
    while trial is None:
        trial = ask.checked("Which one", chosen, default)
    if by_rule is not None and trial.candidate.id == by_rule.candidate.id:
        return None
    return trial.candidate.id


def _place(front: Sequence[Trial], trial: Trial) -> int:
    return [one.candidate.id for one in front].index(trial.candidate.id)


def show_front(trials: Sequence[Trial], run: Run, ask: Questions) -> None:
    """The numbered table, with the original model above it, the rule's choice and what misses the limits."""
    aim, measures = run.recipe.aim, run.recipe.behaviour.measures
    front = offered(trials, aim)
    ask.say(f"On validation, by rising cost. The rule takes: {aim.describe_rule()}. Limits: {describe_limits(aim)}.")
    for base in of_kind(trials, "base"):
        means = [(measure, base.mean(measure.name)) for measure in measures if measure.column]
        shown = ", ".join(f"{measure.title} {mean:.2f}" for measure, mean in means if mean is not None)
        ask.say(f"The original model: {shown}.")
    ask.show(front_table(front, measures, ask.console.width, numbered=True, remarks=_remarks(trials, front, aim)))


def _remarks(trials: Sequence[Trial], front: Sequence[Trial], aim: Aim) -> dict[str, str]:
    remarks = {t.candidate.id: f"misses a limit: {'; '.join(missed)}" for t in front if (missed := aim.missed(t))}
    chosen = choose(of_kind(trials, "edit"), aim)
    return remarks if chosen is None else remarks | {chosen.candidate.id: "the rule's choice"}


def show_answers(run: Run, trial: Trial, ask: Questions) -> None:
    """The first answers that an edit gave on validation."""
    rows: Sequence[Mapping[str, Any]] = read_jsonl(run.path(TRIED_ANSWERS))
    for row in [row for row in rows if trial.candidate.id in row["answers"]][:_SAMPLES]:
        answer = row["answers"][trial.candidate.id]
        first = answer[0] if isinstance(answer, list) else answer
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        ask.say(f"  > {one_line(prompt, _SHOWN)}")
        ask.say(f"    {one_line(first, _SHOWN) or '(empty)'}")
