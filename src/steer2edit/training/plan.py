"""The recipe's section on training, and the courses of training that it asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field, field_validator

from ..files.schema import Many, Positive, Section
from ..searching.candidates import Candidate
from ..searching.grid import evenly

# A method's key in the recipe → the kind of its candidates.
KINDS = {"lora": "lora", "full": "fine_tuning"}


class Schedule(Section):
    """How strongly a method trains: with each learning rate, and after each number of steps a checkpoint."""

    learning_rate: list[Positive] = Field(min_length=1)
    steps: list[Many] = Field(min_length=1)

    @field_validator("learning_rate", "steps")
    @classmethod
    def _rising(cls, values: list[Any]) -> list[Any]:
        return sorted(set(values))


class Lora(Schedule):
    """Rank-1 LoRA on every linear map of the layers: learning rates, and after how many steps a checkpoint is kept."""

    learning_rate: list[Positive] = Field([3e-3], min_length=1)
    steps: list[Many] = Field([2, 4, 8, 16, 32], min_length=1)


class Full(Schedule):
    """Full fine-tuning, of every weight: learning rates, and after how many steps a checkpoint is kept."""

    learning_rate: list[Positive] = Field([1e-5], min_length=1)
    steps: list[Many] = Field([2, 4, 8, 16, 32], min_length=1)


class Training(Section):
    """Training on the positive traces, as a baseline; off unless a method has a section.

    Each step takes the mean loss per token of `batch` traces. The learning rate is constant, so that a checkpoint after
    few steps is what a shorter course would end with.
    """

    lora: Lora | None = None
    full: Full | None = None
    batch: Many = 8

    @property
    def methods(self) -> dict[str, Schedule]:
        """Kind → schedule of the methods that are asked for."""
        schedules = {KINDS["lora"]: self.lora, KINDS["full"]: self.full}
        return {kind: schedule for kind, schedule in schedules.items() if schedule is not None}


@dataclass(frozen=True)
class Course:
    """One course of training, from the base model on: at one learning rate, with a checkpoint after some of its steps.

    Attributes:
        kind: "lora" or "fine_tuning". steps: after how many of them there is a checkpoint, rising; 0 is the base model.
        batch: how many traces a step takes. seed: of LoRA's first weights and of the order of the traces.

    >>> [candidate.id for candidate in Course("lora", 0.001, (4, 8), batch=8, seed=0).candidates()]
    ['lora-0.001-4', 'lora-0.001-8']
    """

    kind: str
    learning_rate: float
    steps: tuple[int, ...]
    batch: int
    seed: int

    def candidate(self, steps: int) -> Candidate:
        config = {"learning_rate": self.learning_rate, "steps": steps}
        return Candidate(f"{self.kind}-{self.learning_rate:g}-{steps}", self.kind, config)

    def candidates(self) -> list[Candidate]:
        return [self.candidate(steps) for steps in self.steps]


def courses(training: Training, most: int, seed: int) -> list[Course]:
    """The courses of each method, which together have at most `most` checkpoints: the recipe's, thinned evenly.

    >>> training = Training(lora=Lora(learning_rate=[0.001], steps=[1, 2, 4, 8, 16]))
    >>> [course.steps for course in courses(training, 3, seed=0)]
    [(1, 4, 16)]
    """
    planned = []
    for kind, schedule in training.methods.items():
        every = [(rate, steps) for rate in schedule.learning_rate for steps in schedule.steps]
        kept = evenly(every, most)
        for rate in dict.fromkeys(rate for rate, _ in kept):
            steps = tuple(number for other, number in kept if other == rate)
            planned.append(Course(kind, rate, steps, training.batch, seed))
    return planned
