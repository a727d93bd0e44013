"""How much work a suite is, stage by stage and part by part: tokens that are written, read and scored, steps of
training, loads of the model. `machine.py` says how long a machine takes for it, `traced.py` what the traces are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

from ..behaviours.base import Item
from ..method.variants import PAPERS, SCORED
from ..recipe import Recipe
from ..searching.calibrate import RUNGS
from ..searching.grid import coarse_grid, planned_edits, tried_of_series
from ..searching.plan import AUTO, Range, Search
from ..tasks.known import TASKS
from ..training.plan import courses
from .facts import Profile
from .machine import Speed, Work, edit_numbers, parameters
from .plan import Part, Planned, SuitePlan
from .traced import PREFIX, TEMPLATE, mean_tokens, tokens_of, traced

# Candidates that a calibration measures: of a ladder of edits, and of one of a baseline. Rungs of the first round, and
# those that move in on the targets, as many as the shipped recipes had.
_EDIT_LADDER, _OTHER_LADDER = 2.5 * RUNGS, 7
# The answers on which a calibration measures KL.
_ANSWERS = 4
# A question of a task with its choices, in tokens.
_QUESTION, _CONTINUATION, _CHOICES = 90, 12, 4
_SANITY = 15  # tokens of a simple prompt
# Layers at which each baseline of one layer is tried.
_LAYERS = 3
# How much longer a batch of traces is than its tokens, since it is padded to its longest.
_PADDED = 1.25
# Seconds: of choosing an edit, of a run's report, of scores for each way to score, of importing what trains, and of the
# figures of a part.
_EDIT, _REPORT, _SCORE, _IMPORTS, _FIGURES = 1.0, 5.0, 0.5, 8.0, 4.0
# A journal's characters for each token.
_JOURNAL = 6


# How much work there is -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What a candidate is asked on a split.

    Attributes:
        answers, prompt: open answers, and the tokens of the prompt of one.
        questions, question: items with choices, and the tokens of the prompt of one, which is read once.
        choices, choice: of all of these items, and the tokens of one.
    """

    answers: float
    prompt: float
    questions: float = 0.0
    question: float = 0.0
    choices: float = 0.0
    choice: float = 0.0

    def work(self, new_tokens: float, neutral: int, neutral_tokens: int) -> Work:
        """Of one candidate.

        Args:
            neutral, neutral_tokens: answers on which KL is measured, and their tokens.
        """
        return Work(
            written=self.answers * new_tokens,
            read=(self.answers + neutral) * self.prompt + self.questions * self.question,
            scored=self.choices * self.choice + neutral * neutral_tokens,
        )


def asked_on(recipe: Recipe, split: str, most: int | None = None) -> Asked:
    """What a candidate is asked. Nothing of test is read: its prompts are taken to be like those of validation.

    Args:
        most: at most this many prompts of each kind; None is all.
    """
    validation = recipe.behaviour.items(recipe.source, "validation")
    counts = {name: (getattr(recipe.data, name) or {}).values() for name in ("validation", "test")}
    asked = sum(count if most is None else min(most, count) for count in counts[split])
    factor = asked / sum(counts["validation"]) if sum(counts["validation"]) else 1.0
    open_items = [item for item in validation if not item.choices]
    closed = [item for item in validation if item.choices]
    system = tokens_of(recipe.behaviour.system or "")
    # Answers that behaviours with choices also write are as many on test.
    answers = len(open_items) if closed else len(open_items) * factor
    found = Asked(answers * recipe.evaluation.samples, TEMPLATE + system + mean_tokens(open_items))
    if not closed:
        return found
    each, choice = _choices(recipe, closed, split)
    questions = len(closed) * factor
    return replace(
        found,
        questions=questions,
        question=TEMPLATE + system + mean_tokens(closed),
        choices=each * questions,
        choice=choice,
    )


def _choices(recipe: Recipe, closed: Sequence[Item], split: str) -> tuple[float, float]:
    """How many choices a question has under the split's rules, and the tokens of one."""
    each = sum(len(item.choices) for item in closed) / len(closed)
    if split == "test":  # every answer that the data set has, as the probe's rows tell
        rows = [
            item.target for item in recipe.behaviour.items(recipe.source, "probe") if isinstance(item.target, Mapping)
        ]
        lists = [sum(len(value) for value in row.values() if isinstance(value, list)) for row in rows]
        each = sum(lists) / len(lists) if lists else each
    texts = [choice for item in closed for choice in item.choices]
    return each, sum(map(tokens_of, texts)) / len(texts)


def edits_of(search: Search) -> int:
    """How many edits a search tries."""
    if AUTO not in (search.rho_attn, search.rho_mlp):
        return planned_edits(search, coarse_grid(search))
    ladders = _kinds(search) * len(search.alpha) * len(search.layers) * len(search.variants)
    return tried_of_series(search, [search.points] * ladders)


def _kinds(search: Search) -> int:
    """How many ladders of edits there are for each α, layers and variant: each block type alone, and both."""
    if search.rho_attn == search.rho_mlp == AUTO:
        return 3
    return len(search.rho_mlp if search.rho_attn == AUTO else search.rho_attn)


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


# An ordinary run ---------------------------------------------------------------------------------------------------


def run_work(recipe: Recipe, expected: float | None = None, size: float = 0.0) -> dict[str, Work]:
    """Stage → its work.

    Args:
        expected: the mean tokens of an answer, if they are fewer than the most. size: the model's parameters.
    """
    plan, search = recipe.evaluation, recipe.search
    validation = _of(asked_on(recipe, "validation"), recipe, expected)
    test = _of(asked_on(recipe, "test"), recipe, expected)
    edits = edits_of(search)
    # The answers on which KL is measured.
    own = Work(plan.utility_prompts * plan.utility_tokens, plan.utility_prompts * asked_on(recipe, "validation").prompt)
    of_traces = traced(recipe, expected)
    work = {
        "traces": replace(of_traces.writing, loads=1),
        "probe": of_traces.probing,
        "score": Work(fixed=_SCORE * len(search.variants)),
        "search": own
        + _calibration(recipe, *_ladders(search))
        + Work(edits * search.sanity * _length(recipe, expected), edits * search.sanity * _SANITY)
        + validation.times(1 + edits + steering_of(search, edits) + baselines_of(recipe, edits)),
        "edit": Work(fixed=_EDIT),
        "export": Work(),
        "evaluate": own + (test + _tasks(recipe, expected)).times(3 + len(search.baselines)),
        "report": Work(fixed=_REPORT),
    }
    if recipe.training.methods:
        work["train"] = _training(recipe, of_traces.positive, edits, validation, size)
        work["evaluate"] += test.times(len(recipe.training.methods))
    return work


def _of(asked: Asked, recipe: Recipe, expected: float | None) -> Work:
    plan = recipe.evaluation
    return asked.work(_length(recipe, expected), plan.utility_prompts, plan.utility_tokens)


def _length(recipe: Recipe, expected: float | None) -> float:
    most = recipe.evaluation.new_tokens
    return most if expected is None else min(most, expected)


def _ladders(search: Search) -> tuple[int, int]:
    """How many ladders of edits a search measures, and how many of baselines."""
    edits = 0
    if AUTO in (search.rho_attn, search.rho_mlp):
        edits = _kinds(search) * len(search.alpha) * len(search.layers) * len(search.variants)
    layered = sum(kind in ("layer", "direction") for kind in search.baselines)
    return edits, (search.steering == AUTO) + layered * _LAYERS


def _calibration(recipe: Recipe, edits: int, others: int) -> Work:
    """Ladders, whose KL is measured on a few answers."""
    plan = recipe.evaluation
    candidates = edits * _EDIT_LADDER + others * _OTHER_LADDER
    answers = candidates * min(_ANSWERS, plan.utility_prompts)
    return Work(read=answers * (TEMPLATE + PREFIX / 2), scored=answers * plan.utility_tokens)


def _training(recipe: Recipe, tokens: float, edits: int, validation: Work, size: float) -> Work:
    """Every course of training, and its checkpoints on validation.

    Args:
        tokens: of a positive trace. edits: how many checkpoints each method may have. validation: of one candidate.
    """
    work = Work(fixed=_IMPORTS, loads=1)
    for course in courses(recipe.training, edits, recipe.seed):
        steps = course.steps[-1] * course.batch * tokens * _PADDED
        work += Work(loads=1) + (Work(lora=steps) if course.kind == "lora" else Work(full=steps))
        work += validation.times(len(course.steps))
        if course.kind != "lora":  # the weights in fp32 and, of the trainer's state, again with two moments of each
            work += Work(stored=len(course.steps) * 16.0 * size)
    return work


def _tasks(recipe: Recipe, expected: float | None) -> Work:
    """One candidate on every task and attack."""
    plan, data = recipe.evaluation, recipe.data
    length = plan.task_tokens if expected is None else min(plan.task_tokens, expected)
    work = Work()
    for name in data.utility:
        questions = data.utility_items or 1000
        if name in TASKS and TASKS[name].form != "answer":  # choices after the same prompt, which is read once
            work += Work(read=questions * _QUESTION / 2, scored=questions * _CHOICES * _CONTINUATION)
        else:
            answers = questions * plan.task_samples
            work += Work(answers * length, answers * _QUESTION)
    for attack in data.attacks.values():
        answers = (attack.count or 100) * plan.samples
        work += Work(answers * plan.attack_tokens, answers * 150)
    return work


# The parts beside it ------------------------------------------------------------------------------------------------


def part_work(part: Part, recipe: Recipe, profile: Profile, expected: float | None = None) -> Work:
    """A part of a run: what is asked on test beside what the stage `evaluate` asked, and what that takes before it."""
    tasks = _tasks(recipe, expected)
    edits = edits_of(recipe.search)
    if part == "trade_off":
        test = _of(asked_on(recipe, "test"), recipe, expected) + tasks
        swept = steering_of(recipe.search, edits)
        swept = swept if profile.swept is None else min(swept, profile.swept)
        # The choice is a star and a strength of the sweep, which are known.
        return test.times(max(0, min(profile.stars, edits) - 1) + max(0, swept - 1))
    if part == "ablations":
        sizes = profile.ablations
        test = _of(asked_on(recipe, "test", sizes.prompts), recipe, expected) + tasks
        methods = len(PAPERS) + 3  # each block type alone, and steering
        tried = _of(asked_on(recipe, "validation"), recipe, expected).times(1 + methods * sizes.points)
        # Of each variant the same numbers; of every method its choice, and at equal KL another one in half of cases.
        on_test = len(PAPERS) - 1 + methods * (1 if sizes.points == 1 else 1.5) + 2 * (sizes.prompts is not None)
        scores = Work(fixed=_SCORE * len(SCORED))
        return scores + _calibration(recipe, methods - 1, 1) + tried + test.times(on_test)
    if part == "sensitivity":
        budgets = profile.sensitivity
        test = _of(asked_on(recipe, "test", budgets.prompts), recipe, expected) + tasks
        numbers = len(budgets.values) or budgets.points
        work = test.times(2 * numbers + (budgets.prompts is not None))
        return work if budgets.values else work + _calibration(recipe, 2, 0)
    return Work()  # training: the run's own test asked everything


# What belongs to no run.
SIDE_EFFECTS, TABLES = "side effects", "tables and figures"


@dataclass(frozen=True)
class Cost:
    """Of one run with its parts.

    Attributes:
        parts: stage or part → its work. disk: bytes that are kept.
    """

    planned: Planned
    parts: Mapping[str, Work]
    disk: float

    @property
    def work(self) -> Work:
        return reduce(add, self.parts.values())

    def seconds(self, speed: Speed) -> float:
        return speed.seconds(self.work)


def cost_of(planned: Planned, plan: SuitePlan, expected: float | None = None, size: float | None = None) -> Cost:
    """What a run with its parts costs.

    Args:
        expected: the mean tokens of an answer, if they were measured; else the paper's where it has them.
        size: the model's parameters, if they are known; else those of the paper's model.
    """
    facts, recipe = planned.facts, planned.recipe
    if expected is None and facts is not None:
        expected = float(facts.answer_tokens)
    if size is None:
        size = 0.0 if facts is None else float(parameters(facts.shape))
    parts = run_work(recipe, expected, size)
    for number, part in enumerate(plan.parts):
        # The parts of a run share one model in memory.
        parts[part] = part_work(part, recipe, plan.profile, expected) + Work(loads=float(number == 0))
    others = len({run.behaviour for run in plan.runs if run.model == planned.model}) - 1
    if plan.suite == "all" and others:  # their edits on this one's items
        test = _of(asked_on(recipe, "test"), recipe, expected)
        parts[SIDE_EFFECTS] = test.times(others) + Work(loads=1 / (1 + others), fixed=1.0)
    parts[TABLES] = Work(fixed=_FIGURES * (1 + len(plan.parts)))
    scores = 0.0
    if facts is not None:
        scores = (1 + len(SCORED)) * 4.0 * edit_numbers(facts.shape)
    # Of full fine-tuning the one checkpoint that was chosen stays.
    trained = 4.0 * size * ("fine_tuning" in recipe.training.methods)
    cost = Cost(planned, parts, 0.0)
    return replace(cost, disk=scores + trained + _JOURNAL * cost.work.tokens)
