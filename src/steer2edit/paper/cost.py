"""How much work a suite is, in tokens: those that are written, those of prompts that are read before them, and those of
given texts that are scored. `machine.py` says how long a machine takes for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..behaviours.base import Item
from ..method.variants import PAPERS, SCORED
from ..recipe import Recipe
from ..searching.calibrate import RUNGS
from ..searching.grid import coarse_grid, planned_edits
from ..searching.plan import AUTO, Range, Search
from ..tasks.known import TASKS
from .facts import Profile
from .machine import Speed, Work, edit_numbers
from .plan import Part, Planned, SuitePlan

# Characters of English in a token, and the tokens that a chat template adds.
_CHARACTERS, _TEMPLATE = 4.2, 12
# A calibration's rounds, on average, and the answers on which it measures KL.
_ROUNDS, _ANSWERS = 2.5, 4
# A question of a task with its choices, in tokens.
_QUESTION, _CONTINUATION, _CHOICES = 90, 12, 4
_SANITY = 15  # tokens of a simple prompt
# Files beside the journals: scores of four ways to score, edits, figures. A journal's characters for each token.
_JOURNAL = 6


# How much work there is -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A candidate on a split: open answers with their prompts' tokens, and choices that are scored."""

    answers: float
    prompt: float
    choices: float
    choice: float

    def work(self, new_tokens: float, neutral: int, neutral_tokens: int) -> Work:
        """Of one candidate.

        Args:
            neutral, neutral_tokens: answers on which KL is measured, and their tokens.
        """
        scored = self.choices * self.choice + neutral * (self.prompt + neutral_tokens)
        return Work(self.answers * new_tokens, self.answers * self.prompt, scored)


def tokens_of(text: str) -> float:
    return len(text) / _CHARACTERS


def asked_on(recipe: Recipe, split: str) -> Asked:
    """What a candidate is asked. Nothing of test is read: its prompts are taken to be like those of validation."""
    validation = recipe.behaviour.items(recipe.source, "validation")
    counts = {name: sum((getattr(recipe.data, name) or {}).values()) for name in ("validation", "test")}
    factor = 1.0
    if split == "test" and counts["validation"]:
        factor = counts["test"] / counts["validation"]
    open_items = [item for item in validation if not item.choices]
    closed = [item for item in validation if item.choices]
    system = tokens_of(recipe.behaviour.system or "")
    choices, choice = _choices(recipe, closed, split)
    # Answers that behaviours with choices also write are as many on test.
    answers = len(open_items) if closed else len(open_items) * factor
    return Asked(answers * recipe.evaluation.samples, _TEMPLATE + system + _mean(open_items), choices * factor, choice)


def _choices(recipe: Recipe, closed: Sequence[Item], split: str) -> tuple[float, float]:
    """How many choices validation's questions have under the split's rules, and the tokens of one with its question."""
    if not closed:
        return 0.0, 0.0
    each = sum(len(item.choices) for item in closed) / len(closed)
    if split == "test":  # every answer that the data set has, as the probe's rows tell
        rows = [
            item.target for item in recipe.behaviour.items(recipe.source, "probe") if isinstance(item.target, Mapping)
        ]
        lists = [sum(len(value) for value in row.values() if isinstance(value, list)) for row in rows]
        each = sum(lists) / len(lists) if lists else each
    texts = [choice for item in closed for choice in item.choices]
    choice = sum(map(tokens_of, texts)) / len(texts)
    return each * len(closed), _TEMPLATE + _mean(closed) + choice


def _mean(items: Sequence[Item]) -> float:
    return sum(tokens_of(item.text) for item in items) / len(items) if items else 0.0


def edits_of(search: Search) -> int:
    """How many edits a search tries."""
    if AUTO not in (search.rho_attn, search.rho_mlp):
        return planned_edits(search, coarse_grid(search))
    if search.rho_attn == search.rho_mlp == AUTO:
        kinds = 3
    else:
        kinds = len(search.rho_mlp if search.rho_attn == AUTO else search.rho_attn)
    return kinds * len(search.alpha) * len(search.layers) * len(search.variants) * search.points


def steering_of(search: Search, edits: int) -> int:
    """How many steering strengths a search tries."""
    if isinstance(search.steering, Range) or search.steering == AUTO:
        return edits
    return len(set(search.steering))


def baselines_of(recipe: Recipe, edits: int) -> int:
    """How many candidates the other baselines have: the system prompts, and of the others as many as edits."""
    kinds = recipe.search.baselines
    prompts = len(recipe.behaviour.asking()) if "system" in kinds else 0
    return prompts + edits * sum(kind != "system" for kind in kinds)


def run_work(recipe: Recipe, expected: float | None = None) -> Work:
    """An ordinary run.

    Args:
        expected: the mean tokens of an answer, if they are fewer than the most.
    """
    plan, search = recipe.evaluation, recipe.search
    validation, test = asked_on(recipe, "validation"), asked_on(recipe, "test")
    new_tokens = _length(recipe, expected)
    edits = edits_of(search)
    tried = 1 + edits + steering_of(search, edits) + baselines_of(recipe, edits)
    work = _traces(recipe, expected) + _of(validation, recipe, new_tokens).times(tried)
    if search.automatic:
        work += _calibration(recipe, 3 + search.points // 2 + len(search.baselines))
    work += Work(edits * search.sanity * new_tokens, edits * search.sanity * _SANITY)
    return (
        work
        + (_of(test, recipe, new_tokens) + _tasks(recipe, expected)).times(3 + len(search.baselines))
        + Work(plan.utility_prompts * plan.utility_tokens * 2)
    )


def _of(asked: Asked, recipe: Recipe, new_tokens: float) -> Work:
    plan = recipe.evaluation
    return asked.work(new_tokens, plan.utility_prompts, plan.utility_tokens)


def _length(recipe: Recipe, expected: float | None) -> float:
    most = recipe.evaluation.new_tokens
    return most if expected is None else min(most, expected)


def _traces(recipe: Recipe, expected: float | None) -> Work:
    """Own answers to the probe's prompts, and the pass over them."""
    items = recipe.behaviour.items(recipe.source, "probe")
    prompt = _TEMPLATE + _mean(items) + tokens_of(recipe.behaviour.system or "")
    most = float(getattr(recipe.behaviour, "new_tokens", 64))
    length = most if expected is None else min(most, expected)
    answers = [item for item in items if not isinstance(item.target, Mapping)]
    texts = [item.target for item in items if isinstance(item.target, Mapping)]
    given = sum(len(value) for row in texts for value in row.values() if isinstance(value, list))
    written = Work(len(answers) * length, len(answers) * prompt)
    return written + Work(scored=len(answers) * (prompt + length) + given * (prompt + 12))


def _calibration(recipe: Recipe, ladders: float) -> Work:
    plan = recipe.evaluation
    candidates = ladders * RUNGS * _ROUNDS
    return Work(scored=candidates * min(_ANSWERS, plan.utility_prompts) * (30 + plan.utility_tokens))


def _tasks(recipe: Recipe, expected: float | None) -> Work:
    """One candidate on every task and attack."""
    plan, data = recipe.evaluation, recipe.data
    length = plan.task_tokens if expected is None else min(plan.task_tokens, expected)
    work = Work()
    for name in data.utility:
        questions = data.utility_items or 1000
        if name in TASKS and TASKS[name].form != "answer":
            work += Work(scored=questions * _CHOICES * (_QUESTION / 2 + _CONTINUATION))
        else:
            answers = questions * plan.task_samples
            work += Work(answers * length, answers * _QUESTION)
    for attack in data.attacks.values():
        answers = (attack.count or 100) * plan.samples
        work += Work(answers * plan.attack_tokens, answers * 150)
    return work


def part_work(part: Part, recipe: Recipe, profile: Profile, expected: float | None) -> Work:
    """A part of a run. The training baselines are not counted: what trains says what it costs."""
    test = _of(asked_on(recipe, "test"), recipe, _length(recipe, expected)) + _tasks(recipe, expected)
    edits = edits_of(recipe.search)
    if part == "trade_off":
        return test.times(1 + min(profile.stars, edits) + steering_of(recipe.search, edits))
    if part == "ablations":
        methods = len(PAPERS) + 3  # each block type alone, and steering
        on_validation = _of(asked_on(recipe, "validation"), recipe, _length(recipe, expected))
        tried = 1 + methods * profile.ablations.points
        # Of each variant the same numbers; of every method one that is both its choice and at equal KL, or two.
        on_test = 1 + len(PAPERS) + 1.5 * methods
        return _calibration(recipe, methods) + on_validation.times(tried) + test.times(on_test)
    if part == "sensitivity":
        numbers = profile.sensitivity.values
        swept = 2 * (len(numbers) or profile.sensitivity.points)
        work = test.times(1 + swept)
        return work if numbers else work + _calibration(recipe, 2)
    return Work()


@dataclass(frozen=True)
class Cost:
    """Of one run with its parts.

    Attributes:
        loads: how often the model is loaded. disk: bytes that are written.
    """

    planned: Planned
    work: Work
    loads: int
    disk: float

    def seconds(self, speed: Speed) -> float:
        return speed.seconds(self.work) + self.loads * speed.load


def cost_of(planned: Planned, plan: SuitePlan, expected: float | None = None) -> Cost:
    """What a run with its parts costs.

    Args:
        expected: the mean tokens of an answer, if they were measured; else the paper's where it has them.
    """
    facts = planned.facts
    if expected is None and facts is not None:
        expected = float(facts.answer_tokens)
    work = run_work(planned.recipe, expected)
    for part in plan.parts:
        work += part_work(part, planned.recipe, plan.profile, expected)
    if plan.suite == "all":  # the other behaviours' edits on this one's items
        others = len({run.behaviour for run in plan.runs if run.model == planned.model})
        if others > 1:
            test = _of(asked_on(planned.recipe, "test"), planned.recipe, _length(planned.recipe, expected))
            work += test.times(1 + others)
    scores = 0.0
    if facts is not None:
        scores = (1 + len(SCORED)) * 4.0 * edit_numbers(facts.shape)
    return Cost(planned, work, 2, scores + _JOURNAL * work.tokens)
