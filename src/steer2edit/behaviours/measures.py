"""What a behaviour of one's own is measured by: a pattern, phrases, the length, a classifier, a judge, or a function of
the user's."""

from __future__ import annotations

import importlib.util
import math
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from ..engines.base import Progress
from ..errors import RecipeError
from ..files.schema import Positive, Section, Text, nearest, parse
from .base import Item, Measure, Outcome
from .degenerate import degenerate
from .judges import Classifier, Endpoint, LocalChat

Asked = tuple[Item, Outcome]
PREFERENCE = "preference"
MARGIN = Measure("margin", "margin (nats)", better="higher", worst=-1.0, best=1.0, rate=False)


def _is_regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"The pattern is no regular expression: {error}") from None
    if "\b" in text:  # it would be looked for, and be found in no answer
        raise ValueError(
            "The pattern holds a backspace: in YAML write \\b within single quotes, or \\\\b within double ones"
        )
    return text


class Score(Section):
    """How an open answer counts: as a number, or as yes (1) or no (0)."""

    def measure(self, title: str) -> Measure:
        """The behaviour's attribute. A rate, unless a kind of score says otherwise."""
        return Measure("shown", title, better="higher", worst=0.0, best=1.0)

    @abstractmethod
    def counted(self, asked: Sequence[Asked], progress: Progress | None = None) -> list[float]:
        """A number for each answer; an answer that is no language counts for nothing."""


def _of_each(asked: Sequence[Asked], shows: Callable[[Item, Outcome], bool]) -> list[float]:
    return [float(shows(item, outcome) and not degenerate(outcome.answer)) for item, outcome in asked]


class Pattern(Score):
    """Answers in which a regular expression is found."""

    pattern: Annotated[Text, AfterValidator(_is_regex)]

    def counted(self, asked: Sequence[Asked], progress: Progress | None = None) -> list[float]:
        regex = re.compile(self.pattern)
        return _of_each(asked, lambda _, outcome: regex.search(outcome.answer) is not None)


class Phrases(Score):
    """Answers in which one of several phrases stands, in upper or lower case."""

    phrases: Annotated[list[Text], Field(min_length=1)]

    def counted(self, asked: Sequence[Asked], progress: Progress | None = None) -> list[float]:
        phrases = [phrase.casefold() for phrase in self.phrases]
        return _of_each(asked, lambda _, outcome: any(phrase in outcome.answer.casefold() for phrase in phrases))


class Length(Score):
    """The tokens of an answer.

    Attributes:
        length: which is better, "lower" or "higher".
        longest: the length that stands at the end of the scale from worst to best.
    """

    length: Literal["lower", "higher"]
    longest: Positive = 128.0

    def measure(self, title: str) -> Measure:
        worst, best = (self.longest, 0.0) if self.length == "lower" else (0.0, self.longest)
        return Measure("tokens", f"{title} (tokens)", better=self.length, worst=worst, best=best, rate=False)

    def counted(self, asked: Sequence[Asked], progress: Progress | None = None) -> list[float]:
        return [float(outcome.tokens - outcome.thinking) for _, outcome in asked]


class Judged(Score):
    """Answers of which a judge says yes: a chat model here or on a server."""

    judge: Endpoint | LocalChat

    def counted(self, asked: Sequence[Asked], progress: Progress | None = None) -> list[float]:
        yes = self.judge.judged([(item.text, outcome.answer) for item, outcome in asked], progress)
        return [float(p >= 0.5 and not degenerate(o.answer)) for p, (_, o) in zip(yes, asked, strict=True)]


class Classified(Score):
    """Answers that a Hugging Face text classifier gives a label.

    Attributes:
        classifier, label, format: of `judges.Classifier`.
    """

    classifier: Text
    label: Text
    format: Text = "response"

    @model_validator(mode="after")
    def _is_a_classifier(self) -> Classified:
        assert self._judge
        return self

    @cached_property
    def _judge(self) -> Classifier:
        return parse(Classifier, self.model_dump(), under="behaviour.score")

    def counted(self, asked: Sequence[Asked], progress: Progress | None = None) -> list[float]:
        yes = self._judge.judged([(item.text, outcome.answer) for item, outcome in asked], progress)
        return [float(p >= 0.5 and not degenerate(o.answer)) for p, (_, o) in zip(yes, asked, strict=True)]


class Python(Score):
    """A function of the user's: (prompt, response) → a number, or True and False.

    Attributes:
        python: FILE.py:FUNCTION. A recipe with it runs code, so that --trust-recipe-code is needed.
        better: whether higher or lower numbers are better.
        worst, best: the ends of the scale.
    """

    python: Annotated[str, Field(pattern=r"^.+\.py:[A-Za-z_]\w*$")]
    better: Literal["higher", "lower"] = "higher"
    worst: float = 0.0
    best: float = 1.0

    def measure(self, title: str) -> Measure:
        rate = (self.worst, self.best) == (0.0, 1.0)
        return Measure("shown", title, better=self.better, worst=self.worst, best=self.best, rate=rate)

    def counted(self, asked: Sequence[Asked], progress: Progress | None = None) -> list[float]:
        function = _function(self.python)
        return [_number(function(item.text, outcome.answer), self.python) for item, outcome in asked]


class Callback(Score):
    """As `Python`, for a function that is given in Python and not in a file; a recipe cannot hold it."""

    function: Callable[[str, str], float]

    def counted(self, asked: Sequence[Asked], progress: Progress | None = None) -> list[float]:
        return [_number(self.function(item.text, outcome.answer), "the score") for item, outcome in asked]

    def measure(self, title: str) -> Measure:
        return Measure("shown", title, better="higher", worst=0.0, best=1.0, rate=False)


# The key that a score is known by.
SCORES: Mapping[str, type[Score]] = {
    "pattern": Pattern,
    "phrases": Phrases,
    "length": Length,
    "judge": Judged,
    "classifier": Classified,
    "python": Python,
    "function": Callback,
}


def score_of(value: Any) -> Any:
    """The score that a recipe describes: "preference", or a mapping whose key says which it is.

    Raises:
        RecipeError: there is no such score.
    """
    if value == PREFERENCE or isinstance(value, Score):
        return value
    if callable(value):
        return Callback(function=value)
    keys = [str(key) for key in (value if isinstance(value, dict) else [value])]
    kinds = [key for key in keys if key in SCORES]
    if len(kinds) > 1:
        raise RecipeError("the recipe's behaviour.score names two scores", got=", ".join(kinds), fix="Write one.")
    if len(kinds) != 1 or not isinstance(value, dict):
        known = [PREFERENCE, *(kind for kind in SCORES if kind != "function")]
        wrong = next((key for key in keys if key not in SCORES), keys[0] if keys else "nothing")
        raise RecipeError(
            "the recipe's behaviour.score is not known", got=wrong, fix=nearest(str(wrong), known, "Known scores")
        )
    judge = value.get("judge")
    if isinstance(judge, dict) and "local" in judge:  # so that an error is of the judge that was meant
        return Judged(judge=parse(LocalChat, judge, under="behaviour.score.judge"))
    if isinstance(judge, dict):
        return Judged(judge=parse(Endpoint, judge, under="behaviour.score.judge"))
    return parse(SCORES[kinds[0]], value, under="behaviour.score")


@lru_cache
def _function(place: str) -> Callable[[str, str], Any]:
    path, _, name = place.rpartition(":")
    if not Path(path).is_file():
        raise RecipeError("the file of the score is not there", got=path, fix="Check behaviour.score.python.")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(
            f"{path} cannot be run", got=f"{type(error).__name__}: {error}", fix="Mend the file."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RecipeError(f"{path} has no function {name}", got=function, fix="Check behaviour.score.python.")
    return function


def _number(value: Any, source: str) -> float:
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise RecipeError(
            "the score of an answer is no number", got=f"{value!r} from {source}", fix="Return a finite number."
        )
    return float(value)
