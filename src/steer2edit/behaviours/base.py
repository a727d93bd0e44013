"""What a behaviour is to everything that searches, measures and reports: measures, items and outcomes.

The search, the fronts, the rules, the tables and the figures know these types alone, never a behaviour's own words. A
behaviour is a section of the recipe, so that its options are checked when the recipe is read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..engines.base import Engine, Progress
from ..files.schema import Section, Text
from ..probing.traces import Trace
from .degenerate import degenerate

Split = Literal["probe", "validation", "test"]
SPLITS: tuple[Split, ...] = ("probe", "validation", "test")
Prompt = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Measure:
    """A mean over items that every trial has: the attribute, or a cost.

    Attributes:
        name: the key in trials, in `search.limits` and in results.json.
        title: the column of a table, the label of an axis.
        better: whether a higher or a lower mean is better.
        worst, best: what maps to 0 and to 1 when a trade-off is drawn to scale.
        limit: what a configuration may cost if `search.limits` does not say it; None is no limit.
        rate: whether each item counts as yes or no (a Wilson interval), or as a number (a bootstrap).
        column: whether it has a column in tables.

    >>> Measure("refusal", "refusal", better="higher", worst=0.0, best=1.0).scaled(0.25)
    0.25
    >>> Measure("tokens", "tokens", worst=200.0, best=0.0, rate=False).scaled(50.0)
    0.75
    """

    name: str
    title: str
    better: Literal["higher", "lower"] = "lower"
    worst: float = 1.0
    best: float = 0.0
    limit: float | None = None
    rate: bool = True
    column: bool = True

    def scaled(self, value: float) -> float:
        """clip((value − worst)/(best − worst)) to [0, 1]: 1 is best, whichever direction is better."""
        return min(1.0, max(0.0, (value - self.worst) / (self.best - self.worst)))

    def gain(self, value: float) -> float:
        """The value with the sign that makes more of it better."""
        return value if self.better == "higher" else -value

    def allows(self, value: float | None, limit: float | None) -> bool:
        """Whether a mean is within a limit; a mean that was not measured is within none."""
        if limit is None:
            return True
        return value is not None and self.gain(value) >= self.gain(limit)

    def to_json(self) -> dict[str, Any]:
        """What reports need of it, so that they need no behaviour."""
        known = {"name": self.name, "title": self.title, "better": self.better, "column": self.column}
        return known | {"scale": [self.worst, self.best]}


# What every behaviour has beside its own measures.
DEGENERATE = Measure("degenerate", "degenerate", limit=0.1)
UTILITY_LOSS = Measure("utility_loss", "KL per token", rate=False)
NLL_RISE = Measure("nll_rise", "NLL rise per token", rate=False)
ACCURACY = Measure("accuracy", "accuracy (choices)", better="higher", worst=0.0, best=1.0)
ACCURACY_LOSS = Measure("accuracy_loss", "accuracy lost", rate=False, column=False)
COMMON = (DEGENERATE, NLL_RISE, UTILITY_LOSS, ACCURACY, ACCURACY_LOSS)


@dataclass(frozen=True)
class Item:
    """One thing that every candidate is asked.

    Attributes:
        kind: what the recipe's counts of a split count.
        prompt: a text, or chat messages.
        choices: empty if the model is to answer in its own words; else texts, of which the likeliest per token counts.
        target: what the behaviour or the choices compare with, like the number of the right choice.
    """

    kind: str
    prompt: Prompt
    choices: tuple[str, ...] = ()
    target: Any = None

    @property
    def text(self) -> str:
        """The prompt as one text: that of the last message."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]

    def messages(self, system: str | None) -> list[dict[str, str]]:
        """The prompt as chat messages, after the system text if there is one."""
        return Trace(self.prompt, "", "positive", system).messages()


@dataclass(frozen=True)
class Source:
    """Where a behaviour's items come from, and how many of them each split takes.

    Attributes:
        prompts: the recipe's `data.prompts`; None if the behaviour has its items elsewhere.
        counts: split → kind → how many; None where the recipe leaves it to the behaviour.
        seed: by which a file without splits is divided.
        test_prompts: the recipe's `data.test_prompts`: another file, from which the test split is taken.
    """

    prompts: str | None
    counts: Mapping[Split, Mapping[str, int] | None] = field(default_factory=dict)
    seed: int = 0
    test_prompts: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What the engine gave for an item; the journal stores exactly this.

    Attributes:
        text: what was generated. answer_start: where in it the answer starts, after any thinking.
        tokens: how many were generated. thinking: how many of them stand before the answer.
        ended: whether the model ended its turn.
        nll: of each choice its negative log-likelihood per token, in nats. lengths: of each choice its tokens.
    """

    text: str = ""
    answer_start: int = 0
    tokens: int = 0
    ended: bool = True
    nll: tuple[float, ...] = ()
    thinking: int = 0
    lengths: tuple[int, ...] = ()

    @property
    def answer(self) -> str:
        """The text without the thinking: what a model thinks is not what it answers."""
        return self.text[self.answer_start :]


# How many tokens of an answer to an attack are looked at by themselves, as well as the whole.
EARLY = 24


@dataclass(frozen=True)
class Attacked:
    """An attack prompt and its answer: the first `EARLY` tokens, and the whole."""

    prompt: str
    early: str
    whole: str


class Behaviour(Section):
    """A behaviour, as the recipe's section of that name describes it.

    A subclass adds its options as fields and registers itself in `behaviours/known.py`.

    Attributes:
        attribute: the measure that edits should improve.
        costs: measures of what the behaviour itself may cost, beside `COMMON`.
        kinds: the kinds of prompts that validation and test may have. required: those that they must have.
        probe_kinds: the kinds that the probe may have.
        neutral: the kind whose base answers give KL and the rise of their NLL; None if no kind is neutral.
        neutral_prompts: the default of `utility.prompts`, which gives them if it is there.
        prompts, probe, validation, test: defaults of the recipe's `data`; None if the recipe has to say it.
        evaluation, search, limits: defaults of the recipe's `evaluation`, `search` and `search.limits`.
        remark: what a model card says of the behaviour's limits.
        divides: whether it divides a file by itself where the recipe gives no counts or no prompts.
        second_file: whether it reads `data.test_prompts`.
        completes: whether `completed` has anything to do.
        takes_attacks: whether it reads `data.attacks`, prompts that are made to break the behaviour.
        system: a system prompt for traces and answers.
        traces: a file of traces in place of those that the behaviour makes.
        instructions: system prompts that ask for the behaviour, a baseline; None takes the behaviour's own.
    """

    kinds: ClassVar[tuple[str, ...]]
    required: ClassVar[tuple[str, ...]]
    probe_kinds: ClassVar[tuple[str, ...]]
    neutral: ClassVar[str | None] = None
    neutral_prompts: ClassVar[str | None] = None
    prompts: ClassVar[str | None] = None
    probe: ClassVar[Mapping[str, int] | None] = None
    validation: ClassVar[Mapping[str, int] | None] = None
    test: ClassVar[Mapping[str, int] | None] = None
    evaluation: ClassVar[Mapping[str, Any]] = {}
    limits: ClassVar[Mapping[str, float]] = {}
    search: ClassVar[Mapping[str, Any]] = {}
    remark: ClassVar[str] = ""
    divides: ClassVar[bool] = False
    second_file: ClassVar[bool] = False
    completes: ClassVar[bool] = False
    takes_attacks: ClassVar[bool] = False

    name: str
    system: str | None = None
    traces: str | None = None
    instructions: list[Text] | None = None

    @property
    @abstractmethod
    def attribute(self) -> Measure:
        """The measure that edits should improve."""

    @property
    def costs(self) -> tuple[Measure, ...]:
        """Measures of what the behaviour itself may cost."""
        return ()

    @property
    def ranked(self) -> Measure:
        """The measure by which edits are ranked: the attribute, or a finer one where that is a share of few items."""
        return self.attribute

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Every measure that a trial has: the attribute first."""
        return (self.attribute, *self.costs, *COMMON)

    @property
    def preserved(self) -> tuple[str, ...]:
        """The groups of negative traces on whose prompts the model should stay as it is."""
        return ()

    @property
    def files(self) -> tuple[str, ...]:
        """The files that the section names, whose contents a run depends on."""
        return () if self.traces is None else (self.traces,)

    @abstractmethod
    def items(self, source: Source, split: Split) -> list[Item]:
        """The items of one split, the first of each kind; those of the other splits are not returned.

        Raises:
            FileError: the source is not what the behaviour reads. RecipeError: the split has too few of a kind.
        """

    def completed(self, engine: Engine, items: Sequence[Item], progress: Progress | None = None) -> list[Item]:
        """The items with what a model has to write first, such as choices to compare; most behaviours need nothing."""
        return list(items)

    @property
    def runs_code(self) -> bool:
        """Whether the section names a Python file that is run."""
        return False

    def asking(self) -> list[str]:
        """System prompts that ask for the behaviour: the baseline that costs nothing; empty if there are none."""
        return self.instructions or []

    @abstractmethod
    def make_traces(self, engine: Engine, items: Sequence[Item], progress: Progress | None = None) -> list[Trace]:
        """Traces of both labels for the probe."""

    def answers_wanted(self, items: Sequence[Item]) -> int:
        """How many answers are written by models to make traces of these items: what an estimate counts.

        With none, `make_traces` asks no model.
        """
        return len(items)

    def answers_kept(self, items: Sequence[Item]) -> int:
        """How many of these answers become traces: what an estimate counts."""
        return self.answers_wanted(items)

    def given_responses(self, items: Sequence[Item]) -> tuple[list[str], list[str]]:
        """The responses, positive and negative, of traces that no model writes for these items: for an estimate."""
        return [], []

    def choices_of(self, item: Item) -> int:
        """How many choices an item has to compare, those that are still to be written among them."""
        return len(item.choices)

    def check_contrast(self, agreement: float) -> None:
        """Raises TraceError if the two sides of the traces differ too little to be searched; most behaviours go on.

        Args:
            agreement: the cosine between the steering vectors of two halves of the traces.
        """

    @abstractmethod
    def measure(self, item: Item, outcome: Outcome, base: Outcome) -> Mapping[str, float]:
        """What one outcome counts for: measure → number. Pure, so that a journal can be judged again without a model.

        Args:
            base: the original model's outcome on the same item.
        """

    def attack_measures(self, name: str) -> tuple[Measure, ...]:
        """What is reported of a set of attack prompts, apart from the behaviour's own measures."""
        return ()

    def measure_attacks(
        self, name: str, asked: Sequence[Attacked], progress: Progress | None = None
    ) -> list[Mapping[str, float]]:
        """What the answers to a set of attack prompts count for: of each of them, measure → number."""
        return [{} for _ in asked]

    def measure_all(
        self, asked: Sequence[tuple[Item, Outcome, Outcome]], progress: Progress | None = None
    ) -> list[Mapping[str, float]]:
        """`measure` of many outcomes (item, outcome, base): a behaviour with a judge asks about all of them at once."""
        return [self.measure(item, outcome, base) for item, outcome, base in asked]


def judge(
    behaviour: Behaviour, asked: Sequence[tuple[Item, Outcome, Outcome]], progress: Progress | None = None
) -> list[dict[str, float]]:
    """The behaviour's own measures of outcomes, and those of every behaviour.

    Open answers count for `degenerate`; questions with a known answer for `accuracy`.

    Args:
        asked: item, outcome, and the original model's outcome on the same item.
    """
    own = [i for i, (item, _, _) in enumerate(asked) if item.kind != QUESTION]
    measured = dict(zip(own, behaviour.measure_all([asked[i] for i in own], progress), strict=True))
    values: list[dict[str, float]] = []
    for i, (item, outcome, base) in enumerate(asked):
        if i not in measured:
            right = float(_likeliest(outcome.nll) == item.target)
            base_right = float(_likeliest(base.nll) == item.target)
            values.append({ACCURACY.name: right, ACCURACY_LOSS.name: base_right - right})
            continue
        values.append(dict(measured[i]))
        if not item.choices:
            values[i][DEGENERATE.name] = float(degenerate(outcome.answer))
    return values


# Steering vectors of two halves of the traces whose cosine is below this agree hardly more than by chance.
WEAK_AGREEMENT = 0.3

# What a search tries where the recipe says nothing. At equal KL, edits of attention in the middle or in the upper half
# of the model move a behaviour furthest; the first layers cost the most KL and add the least (docs/recipes.md). Which
# of the two depends on the behaviour: one strength of each shows it. The last strength lies beyond the limit of the KL:
# no rule takes it, but the trade-off shows what more strength would give.
AUTOMATIC: Mapping[str, Any] = {
    "rho_mlp": [None],
    "layers": ["33%-83%", "50%-100%"],
    "span": [0.1, 0.65],
    "points": 5,
    "narrow": True,
}


def search_defaults(own: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """A behaviour's keys of the section `search` beside those that are written.

    Whoever writes how many points there are wants them all, as do recipes from before `narrow`.
    """
    return {key: value for key, value in own.items() if key != "narrow" or "points" not in written}


# The kind of a multiple-choice question from `data.questions`, whatever the behaviour.
QUESTION = "multiple choice"


def _likeliest(nll: Sequence[float]) -> int:
    """Number of the choice with the smallest NLL, the first of equals; −1 if none is finite."""
    smallest = min(nll, default=float("inf"))
    return list(nll).index(smallest) if smallest < float("inf") else -1
