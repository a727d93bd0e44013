"""The tables of a suite, as data: every method with its intervals, what it cost to find, and the paper's number.

`writing.py` makes CSV and Markdown of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..behaviours.base import UTILITY_LOSS, Measure
from ..method.variants import FULL, PAPERS
from ..recipe import Recipe
from ..report.page import describe
from ..searching.candidates import TITLES as KINDS
from ..tasks.known import TASKS
from .facts import published
from .plan import Planned
from .pooling import NONE, Draws, Number, Point, at_equal_cost, difference, draws, pooled, product
from .rows import PartResult, Tried

ATTRIBUTE, UTILITY, PRODUCT, PER_TOKENS = "attribute", "utility", "product", "utility_per_100_tokens"
# What is chosen on validation: only these tell whether a method moves the attribute.
CHOSEN = ("chosen", "equal budget")
# Conditions whose rows are ranked among each other.
_RANKED = ("chosen", "same numbers", "equal budget", "equal KL")
TITLES = {**KINDS, FULL: "edit", "original": "original model"}


@dataclass(frozen=True)
class Line:
    """A method under one condition.

    Attributes:
        config: the first seed's configuration. configuration: in words, of several seeds each that differs.
        numbers: measure → its number on test. differences: measure → from the original model on the same prompts.
        published: measure → the paper's number. target: the KL for which it was found.
        rank: of the lines under the same condition, if any method moves the attribute at all.
    """

    method: str
    how: str
    config: Mapping[str, Any]
    configuration: str
    numbers: Mapping[str, Number]
    differences: Mapping[str, Number]
    published: Mapping[str, float]
    target: float | None = None
    rank: int | None = None

    @property
    def title(self) -> str:
        return TITLES.get(self.method, self.method)


@dataclass(frozen=True)
class Table:
    """A part of one model and behaviour.

    Attributes:
        columns: measure → title. attribute: the measure to improve.
        moves: whether a method that validation chose moves the attribute beyond its interval.
        budgets: method → configurations, evaluations, hypervolume, why there is none. notes: sentences below it.
        seeds: how many runs it is pooled from.
    """

    part: str
    model: str
    behaviour: str
    attribute: Measure
    columns: Mapping[str, str]
    lines: tuple[Line, ...]
    moves: bool
    budgets: tuple[Mapping[str, Any], ...]
    seeds: int
    notes: tuple[str, ...] = ()
    headline: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class Of:
    """A part's results of every seed of one model and behaviour."""

    planned: tuple[Planned, ...]
    results: tuple[PartResult, ...]

    @property
    def recipe(self) -> Recipe:
        return self.planned[0].recipe

    def rows(self, method: str, how: str, number: int) -> list[tuple[Tried, Tried]]:
        """Of every seed that has it the `number`-th row of a method under a condition, and the original model's."""
        pairs = []
        for result in self.results:
            some = [row for row in result.rows if (row.method, row.how) == (method, how)]
            pairs += [(row, result.base) for row in some[number : number + 1]]
        return pairs


def table_of(part: str, of: Of) -> Table:
    """The table of a part."""
    lines = [_line(of, *place) for place in _places(of)]
    base = of.results[0].base
    measures = [m for m in of.recipe.behaviour.measures if m.column and base.values.get(m.name)]
    columns = {m.name: m.title for m in measures} | _task_titles(of)
    known = {name for line in lines for name, number in line.numbers.items() if number.known}
    columns = {name: title for name, title in columns.items() if name in known}
    attribute = of.recipe.behaviour.attribute
    moves = any(_moves(line, of) for line in lines if line.how in CHOSEN)
    first = of.planned[0]
    return Table(
        part,
        first.model,
        first.behaviour,
        attribute,
        columns,
        tuple(_ranked(lines, attribute) if moves else lines),
        moves,
        tuple(_budgets(of)),
        len(of.results),
        tuple(_notes(of)),
        _headline(of) if part == "trade_off" else {},
    )


def _places(of: Of) -> list[tuple[str, str, int]]:
    """Method, condition and number of every line, in the order of the first seed that has it."""
    places: dict[tuple[str, str, int], None] = {}
    for result in of.results:
        counts: dict[tuple[str, str], int] = {}
        for row in result.rows:
            at = counts.get((row.method, row.how), 0)
            counts[row.method, row.how] = at + 1
            places.setdefault((row.method, row.how, at))
    return list(places)


def _line(of: Of, method: str, how: str, number: int) -> Line:
    both = of.rows(method, how, number)
    rows = [row for row, _ in both]
    plan, seed = of.recipe.evaluation, of.recipe.seed
    numbers: dict[str, Number] = {}
    differences: dict[str, Number] = {}
    for m in of.recipe.behaviour.measures:
        values = [row.values.get(m.name, ()) for row in rows]
        if all(values):
            samples = plan.samples if m.name != UTILITY_LOSS.name else 1
            numbers[m.name] = pooled(values, m.rate, plan.resamples, seed, samples)
            if how != "original":
                pairs = [(row.values[m.name], base.values[m.name]) for row, base in both]
                differences[m.name] = difference(pairs, plan.resamples, seed)
    for name in _firsts(of):
        values = [row.tasks.get(name, ()) for row in rows]
        if all(values):
            numbers[name] = pooled(values, True, plan.resamples, seed, max(plan.samples, plan.task_samples))
            if how != "original":
                pairs = [(row.tasks[name], base.tasks[name]) for row, base in both]
                differences[name] = difference(pairs, plan.resamples, seed)
    numbers |= _composed(of, rows)
    configs = list(dict.fromkeys(describe(row.config) or "–" for row in rows))
    paper = _published(of, method, how)
    others = of_other_sets(of, paper)
    shown = {name: paper[name] for name in numbers if name in paper and name not in others}
    return Line(method, how, rows[0].config, "; ".join(configs), numbers, differences, shown, rows[0].target)


def of_other_sets(of: Of, paper: Mapping[str, float]) -> set[str]:
    """The means that were taken over other sets here than in the paper, so that they cannot stand beside its own."""
    own = {ATTRIBUTE, UTILITY, PRODUCT, "per_100_tokens", of.recipe.behaviour.attribute.name}
    utilities = {name for name in paper if name in TASKS}
    attacks = {name for name in paper if name not in own | utilities and not name.startswith("tokens_")}
    others = set()
    if attacks != set(_attacks(of)):
        others |= {ATTRIBUTE, PRODUCT}
    if utilities != set(_utilities(of)):
        others |= {UTILITY, PRODUCT}
    return others


def _attacks(of: Of) -> list[str]:
    return [name for task, name in of.results[0].task_first.items() if task.startswith("attack ")]


def _utilities(of: Of) -> list[str]:
    return [name for task, name in of.results[0].task_first.items() if not task.startswith("attack ")]


def _firsts(of: Of) -> list[str]:
    return [*_attacks(of), *_utilities(of)]


def shown_draws(of: Of, rows: Sequence[Tried]) -> Draws | None:
    """The attribute as the paper has it: the mean over the attacks where they were asked, else the behaviour's own."""
    plan, attacks = of.recipe.evaluation, _attacks(of)
    own = of.recipe.behaviour.attribute.name
    strata = [[row.tasks.get(name, ()) for name in attacks] or [row.values.get(own, ())] for row in rows]
    return draws(strata, plan.resamples, of.recipe.seed)


def utility_draws(of: Of, rows: Sequence[Tried]) -> Draws | None:
    names = _utilities(of)
    strata = [[row.tasks.get(name, ()) for name in names] for row in rows]
    return draws(strata, of.recipe.evaluation.resamples, of.recipe.seed + 1) if names else None


def _composed(of: Of, rows: Sequence[Tried]) -> dict[str, Number]:
    """What the paper makes of several sets: the mean attribute, the mean utility, and their product."""
    shown, utility = shown_draws(of, rows), utility_draws(of, rows)
    numbers = {}
    if shown is not None and _attacks(of):
        numbers[ATTRIBUTE] = shown.number()
    if utility is None:
        return numbers
    numbers[UTILITY] = utility.number()
    if of.recipe.behaviour.attribute.better == "higher":
        numbers[PRODUCT] = product(shown, utility)
    else:
        per_token = product(utility, shown, divide=True)
        ends = [None if x is None else 100 * x for x in (per_token.mean, per_token.low, per_token.high)]
        numbers[PER_TOKENS] = replace(per_token, mean=ends[0], low=ends[1], high=ends[2])
    return numbers


def _task_titles(of: Of) -> dict[str, str]:
    behaviour = of.recipe.behaviour
    titles = {m.measure.name: m.measure.title for task in TASKS.values() for m in task.metrics}
    for name in of.recipe.data.attacks:
        titles |= {m.name: m.title for m in behaviour.attack_measures(name)}
    shown = {name: titles.get(name, name) for name in _firsts(of)}
    whole = {
        ATTRIBUTE: "mean of the attacks",
        UTILITY: "utility (mean accuracy)",
        PRODUCT: "attribute × utility",
        PER_TOKENS: "utility per 100 tokens",
    }
    return shown | whole


def _published(of: Of, method: str, how: str) -> Mapping[str, float]:
    """The paper's numbers of a line: of the method and its variants as it chose them, no other baselines."""
    planned = of.planned[0]
    if planned.facts is None or method not in PAPERS or how not in ("chosen", "same numbers"):
        return {}
    return published().models.get(planned.paper or "", {}).get(method, {})


# Whether there is anything to rank -----------------------------------------------------------------------------------


def _moves(line: Line, of: Of) -> bool:
    """Whether the line's attribute, or what it shows under an attack, is better than the original model's beyond the
    interval of the difference."""
    attribute = of.recipe.behaviour.attribute
    for name in (attribute.name, *_attacks(of)):
        gained = line.differences.get(name, NONE)
        if gained.low is None or gained.high is None:
            continue
        if (gained.low > 0) if attribute.better == "higher" or name != attribute.name else (gained.high < 0):
            return True
    return False


def _ranked(lines: Sequence[Line], attribute: Measure) -> list[Line]:
    """The lines with their ranks under each condition: by attribute × utility where it is known, else the attribute."""
    ranks: dict[int, int] = {}
    for how in _RANKED:
        places = [i for i, line in enumerate(lines) if line.how == how]
        known = [(key, i) for i in places if (key := _key(lines[i], attribute)) is not None]
        for rank, (_, i) in enumerate(sorted(known, key=lambda pair: -pair[0]), start=1):
            ranks[i] = rank
    return [replace(line, rank=ranks.get(i)) for i, line in enumerate(lines)]


def _key(line: Line, attribute: Measure) -> float | None:
    for name in (PRODUCT, PER_TOKENS, ATTRIBUTE):
        if (number := line.numbers.get(name, NONE)).mean is not None:
            return number.mean
    mean = line.numbers.get(attribute.name, NONE).mean
    return None if mean is None else attribute.gain(mean)


# What stands below a table -----------------------------------------------------------------------------------------


def _budgets(of: Of) -> Iterator[dict[str, Any]]:
    for planned, result in zip(of.planned, of.results, strict=True):
        for front in result.fronts:
            volume = front.hypervolume or {}
            yield {
                "method": TITLES.get(front.method, front.method),
                "seed": planned.seed,
                "configurations": front.tried,
                "evaluations": front.evaluations,
                **{name: volume.get(name) for name in ("mean", "low", "high", "reference")},
                "why": front.why,
            }


def _notes(of: Of) -> Iterator[str]:
    notes: dict[str, None] = dict.fromkeys(note for planned in of.planned for note in planned.notes)
    for result in of.results:
        for name, about in result.task_about.items():
            if "not_measured" in about:
                notes.setdefault(f"{name} is not measured: {about['not_measured']}")
            elif about.get("left_out"):
                notes.setdefault(
                    f"{name}: {about['left_out']} questions are longer than the model reads and are left out"
                )
    yield from notes


def _headline(of: Of) -> dict[str, Number]:
    """The chosen edit less steering at the edit's KL: on the attribute, along the front of validation, on test.

    Of a length, where lower is better, it is the relative change, as in the paper.
    """
    measure = of.recipe.behaviour.attribute
    attribute = measure.name
    of_seeds = []
    for result in of.results:
        edit = next((row for row in result.rows if (row.method, row.how) == (FULL, "chosen")), None)
        ids = {id for front in result.fronts if front.method == "steering" for id in front.ids}
        curve = [row for row in result.rows if row.how == "original" or (row.how == "swept" and row.id in ids)]
        if edit is None:
            return {}
        of_seeds.append((_point(edit, attribute), [_point(row, attribute) for row in curve]))
    plan = of.recipe.evaluation
    relative = measure.better == "lower"
    return {UTILITY_LOSS.name: at_equal_cost(of_seeds, plan.resamples, of.recipe.seed, relative)}


def _point(row: Tried, attribute: str) -> Point:
    return Point(row.values.get(UTILITY_LOSS.name, ()), row.values.get(attribute, ()))
