"""A study: what a search tried and threw out, and at which budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import FileError
from .candidates import Candidate, Trial


@dataclass(frozen=True)
class Discarded:
    """A candidate that is no choice: its answers to simple prompts are degenerate, or a loss is not finite."""

    candidate: Candidate
    why: str

    def to_json(self) -> dict[str, Any]:
        c = self.candidate
        return {"id": c.id, "kind": c.kind, "config": dict(c.config), "why": self.why}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Discarded:
        """Raises FileError if the row is not one."""
        try:
            return cls(Candidate(row["id"], row["kind"], row["config"]), row["why"])
        except KeyError as error:
            got = f"no {error}"
            raise FileError("a row is not a discarded candidate", got=got, fix="Run the stage search again.") from None


@dataclass
class Study:
    """What a search tried.

    Attributes:
        trials: one for each candidate, the base model's first.
        discarded: the candidates that were thrown out, and why.
        refined: what the second grid was laid around, if there was one.
        evaluations: kind → configurations × (answers given + given answers weighed).
        rounds: each round's candidates, by their ids, in the order in which the bench had them.
        scale: what a calibration found, if there was one.
    """

    trials: list[Trial] = field(default_factory=list)
    discarded: list[Discarded] = field(default_factory=list)
    refined: dict[str, Any] | None = None
    evaluations: dict[str, int] = field(default_factory=lambda: {"edit": 0, "steering": 0})
    rounds: dict[str, list[str]] = field(default_factory=dict)
    scale: dict[str, Any] | None = None

    def of_kind(self, kind: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.candidate.kind == kind]

    def known(self) -> set[str]:
        """The ids of all candidates so far."""
        return {t.candidate.id for t in self.trials} | {d.candidate.id for d in self.discarded}
