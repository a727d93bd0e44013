"""What a run's training left: the checkpoints that were chosen, for the test, and what was tried, for the reports.

In a run without training every function here gives what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..engines.base import Engine
from ..engines.transformers import TransformersEngine
from ..files.reading import read_json, read_jsonl
from ..method.intervention import Intervention
from ..searching.bench import Bench
from ..searching.candidates import Candidate, Trial
from ..searching.study import Discarded, Study
from ..training.engine import TrainedEngine
from .names import TRAINED_ANSWERS, TRAINED_CHOICE, TRAINED_DISCARDED, TRAINED_STUDY, TRAINED_TRIALS
from .run import Run


def is_trained(run: Run) -> bool:
    """Whether the recipe asks for training and all of it is there."""
    return bool(run.recipe.training.methods) and run.is_whole("train")


def engine_on_test(run: Run) -> Engine:
    """The run's engine; after training one that knows the checkpoints too."""
    if not is_trained(run):
        return run.engine
    engine = run.engine
    assert isinstance(engine, TransformersEngine)
    files = read_json(run.path(TRAINED_STUDY))["checkpoints"]
    return TrainedEngine(engine, {id: run.path(file) for id, file in files.items()})


def rounds_on_test(run: Run, bench: Bench) -> dict[str, list[Candidate]]:
    """The rounds in which the chosen checkpoints are tried on test: a journal's name for each → its candidates.

    Args:
        bench: which is prepared for them; with `engine_on_test`, or without an engine if a journal is judged again.
    """
    if not is_trained(run):
        return {}
    choice, rounds = read_json(run.path(TRAINED_CHOICE)), read_json(run.path(TRAINED_STUDY))["rounds"]
    chosen = [Candidate(row["id"], kind, row["config"]) for kind in choice["tried"] if (row := choice[kind])]
    bench.given = {candidate.id: Intervention(candidate.id) for candidate in chosen}
    name_of = {id: name for name, ids in rounds.items() for id in ids}
    return {f"test {name_of[candidate.id]}": [candidate] for candidate in chosen}


def with_training(run: Run, choice: Mapping[str, Any], study: Study) -> tuple[dict[str, Any], Study]:
    """A run's choice and what it tried, and those of its training, as reports show them beside each other."""
    if not is_trained(run):
        return dict(choice), study
    trained, about = read_json(run.path(TRAINED_CHOICE)), read_json(run.path(TRAINED_STUDY))
    both = dict(choice) | {kind: trained[kind] for kind in trained["tried"]}
    for name in ("tried", "evaluations", "front", "hypervolume"):
        both[name] = choice[name] | trained[name]
    both["discarded"] = choice["discarded"] + trained["discarded"]
    return both, Study(
        [*study.trials, *map(Trial.from_json, read_jsonl(run.path(TRAINED_TRIALS)))],
        [*study.discarded, *map(Discarded.from_json, read_jsonl(run.path(TRAINED_DISCARDED)))],
        study.refined,
        study.evaluations | about["evaluations"],
        study.rounds | about["rounds"],
        study.scale,
    )


def tried_answers(run: Run, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `search/answers.jsonl`, with the answers of the checkpoints beside them."""
    if not is_trained(run):
        return list(rows)
    others = read_jsonl(run.path(TRAINED_ANSWERS))
    return [
        row | {name: row[name] | other[name] for name in ("answers", "labels")}
        for row, other in zip(rows, others, strict=True)
    ]
