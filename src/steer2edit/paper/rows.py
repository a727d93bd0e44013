"""What a part of a suite measured: candidates by method and condition, as a file in the run's directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from ..errors import FileError
from ..files.reading import read_json
from ..files.writing import write_json
from ..searching.candidates import Values

# Under which condition a row stands. "same numbers": with the (ρ, α) that the full method chose, as in the paper.
# "equal budget": what the rule takes of as many configurations as every other method has. "equal KL": at the KL of the
# full method's choice. "swept" and "star" are points of a curve.
Condition = Literal["original", "chosen", "swept", "star", "same numbers", "equal budget", "equal KL"]


@dataclass(frozen=True)
class Tried:
    """A candidate on test.

    Attributes:
        method: whose it is: a variant's name, "steering", "attention alone" …
        values: measure → a number for each item. tasks: task's measure → a number for each question.
        target: the KL per token, in nats, that it was found for on validation.
    """

    method: str
    how: Condition
    id: str
    config: Mapping[str, Any]
    values: Mapping[str, Values]
    tasks: Mapping[str, Values] = field(default_factory=dict)
    target: float | None = None


@dataclass(frozen=True)
class Front:
    """What a method's strengths cover on validation.

    Attributes:
        tried: configurations. evaluations: what they gave and weighed in all. hypervolume: mean, low, high, reference.
        ids: the candidates on it. why: why there is none of them, if there is none.
    """

    method: str
    tried: int
    evaluations: int
    hypervolume: Mapping[str, float] | None = None
    why: str = ""
    ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class PartResult:
    """A part of one run.

    Attributes:
        key: of what it depends on. rows: on test, the original model's first. fronts: on validation.
        task_about: task → what `results.json` says of a task, or why it was not measured.
        task_first: the measures that a table shows: attacks' and tasks' first ones, by task.
    """

    part: str
    key: str
    rows: tuple[Tried, ...]
    fronts: tuple[Front, ...] = ()
    task_about: Mapping[str, Any] = field(default_factory=dict)
    task_first: Mapping[str, str] = field(default_factory=dict)

    @property
    def base(self) -> Tried:
        return self.rows[0]

    def save(self, path: Path) -> None:
        write_json(path, _PART.dump_python(self, mode="json"))

    @classmethod
    def load(cls, path: Path) -> PartResult:
        """Raises FileError if the file is not a part's."""
        try:
            return _PART.validate_python(read_json(path))
        except ValidationError as error:
            got = str(error).splitlines()[0]
            raise FileError(
                f"{path} is no part of a suite", got=got, fix="Delete it and run the suite again."
            ) from None


_PART = TypeAdapter(PartResult)
