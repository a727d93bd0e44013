"""What candidates answered and what each answer counted for, as rows for people: `answers.jsonl` of search and test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..searching.bench import Bench
from ..searching.candidates import Candidate
from ..searching.study import Study


def answers_on_test(bench: Bench, rounds: Mapping[str, Sequence[Candidate]]) -> Iterator[dict[str, Any]]:
    """One row for each open test prompt: prompt, kind, each system's answer under its kind, and `labels`.

    `labels` has kind → measure → what the answer counted for. With several samples the answer is a list, and a label
    their mean.

    Args:
        rounds: a journal's name → the systems that were tried under it.
    """
    outcomes = {
        candidate: of_candidate
        for name, tried in rounds.items()
        for candidate, of_candidate in zip((c.id for c in tried), bench.outcomes(tried, name), strict=True)
    }
    systems = [candidate for tried in rounds.values() for candidate in tried]
    for i, item in enumerate(bench.open):
        row: dict[str, Any] = {"prompt": item.prompt, "kind": item.kind}
        row |= {c.kind: _texts(bench, outcomes[c.id][i]) for c in systems}
        yield row | {"labels": {c.kind: bench.labels[c.id][i] for c in systems}}


def answers_on_validation(bench: Bench, study: Study) -> Iterator[dict[str, Any]]:
    """One row for each open validation prompt: prompt, kind, and trial's id → its answer (`answers`) and `labels`."""
    every = [*(trial.candidate for trial in study.trials), *(row.candidate for row in study.discarded)]
    known = {candidate.id: candidate for candidate in every}
    wanted = {trial.candidate.id for trial in study.trials}
    answers: list[dict[str, Any]] = [{} for _ in bench.open]
    for name, ids in study.rounds.items():
        for id, rows in zip(ids, bench.outcomes([known[id] for id in ids], name), strict=True):
            if id in wanted:
                for i, outcomes in enumerate(rows):
                    answers[i][id] = _texts(bench, outcomes)
    for i, item in enumerate(bench.open):
        labels = {id: bench.labels[id][i] for id in answers[i]}
        yield {"prompt": item.prompt, "kind": item.kind, "answers": answers[i], "labels": labels}


def _texts(bench: Bench, outcomes: Sequence[Any]) -> str | list[str]:
    texts = [outcome.text for outcome in outcomes]
    return texts if bench.plan.samples > 1 else texts[0]
