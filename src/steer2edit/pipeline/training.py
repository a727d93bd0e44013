"""Training in a run: its checkpoints are tried on validation as the edits were, one of each method is chosen by the
same rule, and the chosen ones are measured on test beside the other systems."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..behaviours.base import UTILITY_LOSS
from ..engines.plan import load_section, load_tokenizer
from ..engines.transformers import TransformersEngine
from ..errors import FileError, RecipeError
from ..files.reading import read_json, sha256
from ..files.writing import remove, write_json, write_jsonl
from ..probing.spans import Span
from ..probing.traces import read_traces
from ..progress import say, showing
from ..recipe import Recipe
from ..searching.bench import Bench
from ..searching.candidates import TITLES, Trial
from ..searching.choice import brief, summary
from ..searching.front import choose
from ..searching.study import Discarded, Study
from ..training.course import LOSSES, check_packages, checkpoint, is_whole, train
from ..training.engine import TrainedEngine
from ..training.examples import examples_of
from ..training.plan import Course, courses
from ..training.weights import are_finite
from .answers import answers_on_validation
from .names import (
    TRACES,
    TRAINED_ANSWERS,
    TRAINED_CHOICE,
    TRAINED_DISCARDED,
    TRAINED_STUDY,
    TRAINED_TRIALS,
    TRAINING,
)
from .reporting import read_study
from .run import Run

Placed = list[tuple[Course, Path]]


def check_training(recipe: Recipe) -> None:
    """Looks for what training needs, if the recipe asks for it, before anything is run.

    Raises:
        FileError: a package is not installed.
        RecipeError: the engine is not transformers in this process, whose weights alone can be another model's.
    """
    if not recipe.training.methods:
        return
    check_packages()
    engine = recipe.engine
    if engine.name != "transformers" or engine.distributed is not None:
        raise RecipeError(
            "trained checkpoints are tried with transformers in this process",
            got=f"engine.name {engine.name}"
            + (f", engine.distributed {engine.distributed}" if engine.distributed else ""),
            fix="Leave the recipe's training out, or set engine.name: transformers and engine.distributed: null.",
        )


def require_training(recipe: Recipe) -> None:
    """As `check_training`; a recipe that asks for no training is an error too."""
    if not recipe.training.methods:
        raise RecipeError(
            "the recipe asks for no training", got="no method", fix="Give training.lora or training.full a section: {}."
        )
    check_training(recipe)


def train_stage(run: Run) -> list[str]:
    """Trains, tries every checkpoint on validation, and chooses one of each method."""
    recipe = run.recipe
    searched = read_study(run)
    placed = _placed(run, _edits_tried(searched))
    for folder in run.path(TRAINING).glob("*-*/"):
        if folder not in [wanted for _, wanted in placed]:
            remove(folder)  # of other settings
    _train(run, placed)
    study = _try_all(run, placed, searched)
    shown = summary(study, recipe.aim, recipe.search.method, recipe.evaluation.resamples, recipe.seed)
    chosen = {kind: choose(study.of_kind(kind), recipe.aim) for kind in recipe.training.methods}
    shown |= {kind: None if trial is None else brief(trial) for kind, trial in chosen.items()}
    write_json(run.path(TRAINED_CHOICE), shown)
    ids = [trial.candidate.id if trial else f"no {TITLES[kind]} within the limits" for kind, trial in chosen.items()]
    say(f"  chosen on validation: {', '.join(ids)}")
    _drop_whole_models(placed, {trial.candidate.id for trial in chosen.values() if trial})
    return [TRAINED_TRIALS, TRAINED_DISCARDED, TRAINED_STUDY, TRAINED_CHOICE, TRAINED_ANSWERS]


def _edits_tried(study: Study) -> int:
    """How many edits the search tried, which is how many checkpoints each method may have."""
    return len(study.of_kind("edit")) + sum(row.candidate.kind == "edit" for row in study.discarded)


# Training ----------------------------------------------------------------------------------------------------------


def _placed(run: Run, most: int) -> Placed:
    """The recipe's courses, each with the folder of its checkpoints, which is named after all that they depend on."""
    recipe = run.recipe
    traces = [run.keys["traces"], sha256(run.path(TRACES)), recipe.probe.part, recipe.probe.max_tokens]
    if run.commit is not None:
        traces.append(run.commit)
    placed = []
    for course in courses(recipe.training, most, recipe.seed):
        digest = hashlib.sha256(json.dumps([traces, vars(course)]).encode()).hexdigest()[:12]
        placed.append((course, run.path(f"{TRAINING}/{course.kind}-{course.learning_rate:g}-{digest}")))
    return placed


def _train(run: Run, placed: Placed) -> None:
    recipe = run.recipe
    left = [(course, folder) for course, folder in placed if not is_whole(course, folder)]
    if not left:
        return
    examples = _examples(run)
    tokens = sum(span.last - span.first for span in examples)
    say(f"  training on {len(examples)} positive traces, {tokens} tokens of their responses")
    # What is trained is another copy of the model, in fp32: the engine's makes room for it.
    run.close()
    section = recipe.model.model_copy(update={"dtype": "float32", "device_map": None, "offload_folder": None})
    for course, folder in left:
        with showing(f"{TITLES[course.kind]} at {course.learning_rate:g}") as progress:
            train(partial(load_section, section), course, examples, folder, progress)


def _examples(run: Run) -> list[Span]:
    model, probe = run.recipe.model, run.recipe.probe
    return examples_of(
        load_tokenizer(model),
        read_traces(run.path(TRACES)),
        chat=model.chat,
        part=probe.part,
        max_tokens=probe.max_tokens,
    )


def _drop_whole_models(placed: Placed, chosen: set[str]) -> None:
    """Removes the checkpoints of full fine-tuning that were not chosen: each is as large as the model."""
    for course, folder in placed:
        for steps in course.steps:
            if course.kind == "fine_tuning" and course.candidate(steps).id not in chosen:
                checkpoint(folder, steps).unlink(missing_ok=True)


# On validation -----------------------------------------------------------------------------------------------------


def _try_all(run: Run, placed: Placed, searched: Study) -> Study:
    """Every checkpoint on validation, after the run's own journal of the base model; writes what it gave."""
    study = Study(evaluations={})
    for course, folder in placed:
        for steps in course.steps:
            if not are_finite(checkpoint(folder, steps)):
                study.discarded.append(Discarded(course.candidate(steps), "its weights are not finite"))
    astray = study.known()
    engine = _engine(run, placed)
    bench = run.bench("validation", run.journal("validation"), engine)
    bench.given = engine.interventions()
    bench.base = _base_outcomes(bench, searched)
    for kind in run.recipe.training.methods:
        every = [candidate for course, _ in placed if course.kind == kind for candidate in course.candidates()]
        tried = [candidate for candidate in every if candidate.id not in astray]
        name = _round(placed, kind)
        study.evaluations[kind] = len(tried) * bench.evaluations
        if not tried:
            continue
        study.rounds[name] = [candidate.id for candidate in tried]
        with showing(f"{TITLES[kind]} on validation") as progress:
            _take(study, bench, bench.run(tried, name, progress))
    for row in study.discarded:
        say(f"  discarded: {row.candidate.id}, {row.why}")
    write_jsonl(run.path(TRAINED_TRIALS), (trial.to_json() for trial in study.trials))
    write_jsonl(run.path(TRAINED_DISCARDED), (row.to_json() for row in study.discarded))
    files = {id: str(path.relative_to(run.folder)) for id, path in engine.checkpoints.items()}
    about = {"courses": [_about(course, folder) for course, folder in placed], "checkpoints": files}
    write_json(run.path(TRAINED_STUDY), {"evaluations": study.evaluations, "rounds": study.rounds, **about})
    write_jsonl(run.path(TRAINED_ANSWERS), answers_on_validation(bench, study))
    return study


def _take(study: Study, bench: Bench, trials: Sequence[Trial]) -> None:
    for trial in trials:
        if bench.own and trial.mean(UTILITY_LOSS.name) is None:
            study.discarded.append(Discarded(trial.candidate, "its losses are not finite"))
        else:
            study.trials.append(trial)


def _about(course: Course, folder: Path) -> dict[str, Any]:
    losses = read_json(folder / LOSSES)
    return {"kind": course.kind, "learning_rate": course.learning_rate, "steps": list(course.steps), "losses": losses}


def _engine(run: Run, placed: Placed) -> TrainedEngine:
    engine = run.engine
    assert isinstance(engine, TransformersEngine)
    paths = {course.candidate(n).id: checkpoint(folder, n) for course, folder in placed for n in course.steps}
    return TrainedEngine(engine, paths)


def _round(placed: Placed, kind: str) -> str:
    """A journal's name for the answers of a method: other settings or traces are another round."""
    folders = [folder.name for course, folder in placed if course.kind == kind]
    return f"{kind} {hashlib.sha256(json.dumps(folders).encode()).hexdigest()[:12]}"


def _base_outcomes(bench: Bench, searched: Study) -> Any:
    """What the base model answered in the search, from the journal."""
    if not searched.rounds:
        raise FileError(
            "the search does not say in which rounds it tried what",
            got="a search of an older version",
            fix="Run the stage search again.",
        )
    name, ids = next(iter(searched.rounds.items()))
    every = [trial.candidate for trial in searched.trials] + [row.candidate for row in searched.discarded]
    known = {candidate.id: candidate for candidate in every}
    return bench.outcomes([known[id] for id in ids], name)[ids.index("base")]
