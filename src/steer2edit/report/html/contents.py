"""What a run directory holds for its page. What the run has not made is None; the page says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...edits import Edit, Scores
from ...recipe import Recipe
from ...searching.study import Study

State = Literal["whole", "missing", "stale", "changed"]

# What a reader is told of a stage that is not whole.
REASONS: dict[State, str] = {
    "whole": "is there",
    "missing": "has not been run, or did not finish",
    "stale": "was run with another recipe",
    "changed": "left files that were changed or lost since",
}


@dataclass(frozen=True)
class StageState:
    """One stage of a run.

    Attributes:
        state: whether what it made is there and is this recipe's.
        entry: what the manifest says of it: seconds, files and their SHA-256.
    """

    name: str
    state: State
    entry: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    """What a run directory holds.

    Attributes:
        stages: every stage, in order; that of the report left out.
        answers: rows of `evaluation/answers.jsonl`. tried_answers: rows of `search/answers.jsonl`.
        results: `evaluation/results.json`. choice: `choice.json`.
        scores: only read if there is no edit, which holds them too.
    """

    recipe: Recipe
    manifest: Mapping[str, Any]
    stages: Sequence[StageState]
    study: Study | None = None
    choice: Mapping[str, Any] | None = None
    results: Mapping[str, Any] | None = None
    answers: Sequence[Mapping[str, Any]] = ()
    tried_answers: Sequence[Mapping[str, Any]] = ()
    edit: Edit | None = None
    scores: Scores | None = None

    @property
    def unfinished(self) -> list[StageState]:
        """The stages that are not whole."""
        return [stage for stage in self.stages if stage.state != "whole"]
