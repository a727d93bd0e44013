"""Utility tasks and attacks in a run: what a recipe names is asked of every chosen system, and joins the results."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..behaviours.prompts import data_path
from ..engines.base import Sampling
from ..engines.plan import load_sampling
from ..errors import FileError, Steer2EditError
from ..method.intervention import NOTHING
from ..progress import say, showing
from ..recipe import Recipe
from ..searching.candidates import Candidate, intervention_of
from ..searching.journal import Journal
from ..tasks.asking import Asking, Group, groups
from ..tasks.attacks import attack_task, load_attacks
from ..tasks.base import Task
from ..tasks.bench import TaskBench
from ..tasks.harness import check, measured
from ..tasks.known import TASKS, known, others
from ..tasks.sets import Set, load_set, local_file
from ..tasks.summary import Measured, add_to, values_of
from .run import Run

# Own tasks whose answers are compared as mathematics.
_MATHEMATICS = ("gsm8k", "math500")


def check_tasks(recipe: Recipe) -> None:
    """Looks for what the tasks need, without reading a question.

    Raises:
        FileError: no such task, a file that is not there, or a package that is not installed.
    """
    data = recipe.data
    for task in known(data.utility):
        local = local_file(task, data.sets)
        needed = [
            name for name, needs in (("datasets", local is None), ("math_verify", task.name in _MATHEMATICS)) if needs
        ]
        for package in needed:
            if importlib.util.find_spec(package) is None:
                raise FileError(
                    f"the task {task.name} needs the package {package.replace('_', '-')}",
                    got="it is not installed",
                    fix="pip install 'steer2edit[eval]'",
                )
    check(others(data.utility))
    for of_set in data.attacks.values():
        data_path(of_set.file)


def measure_tasks(run: Run, tried: Sequence[Candidate], results: dict[str, Any]) -> Steer2EditError | None:
    """Asks every task of every candidate and adds its numbers to the results.

    A task that cannot be measured says why in one sentence, and the others go on.

    Returns:
        The first task's error, or None.
    """
    recipe = run.recipe
    if not recipe.data.utility and not recipe.data.attacks:
        return None
    run.require_choice()
    asking, of_candidates = _asking(run, tried, replay=False)
    failure: Steer2EditError | None = None
    for name, of_task in each_task(run, asking, of_candidates):
        if isinstance(of_task, Steer2EditError):
            results.setdefault("tasks", {})[name] = {"not_measured": str(of_task)}
            failure = failure or of_task
            continue
        add_to(results, name, [c.kind for c in tried], of_task, recipe.evaluation, recipe.seed)
    return failure


def each_task(
    run: Run, asking: Asking, of_candidates: Sequence[Group]
) -> Iterator[tuple[str, Measured | Steer2EditError]]:
    """Every attack and task of a run's recipe: its name, and what it gave or the error why it has no numbers."""
    work: list[tuple[str, Callable[[], Measured]]] = [
        *(
            (f"attack {name}", lambda name=name: _attack(run, name, asking, of_candidates))
            for name in run.recipe.data.attacks
        ),
        *((name, lambda name=name: _utility(run, name, asking, of_candidates)) for name in run.recipe.data.utility),
    ]
    for name, measure in work:
        try:
            yield name, measure()
        except Steer2EditError as error:
            say(f"  {name} is not measured: {error}")
            yield name, error


def judged_again(run: Run, tried: Sequence[Candidate], before: Mapping[str, Any], results: dict[str, Any]) -> None:
    """Adds what a run's tasks gave to results that were judged again: attacks by the journal, all else as it was."""
    asking, of_candidates = _asking(run, tried, replay=True)
    for name, about in before.get("tasks", {}).items():
        attack = name.removeprefix("attack ")
        if attack != name and "not_measured" not in about:
            of_task = _attack(run, attack, asking, of_candidates)
            add_to(results, name, [c.kind for c in tried], of_task, run.recipe.evaluation, run.recipe.seed)
            continue
        results.setdefault("tasks", {})[name] = about
        for measure in before.get("task_measures", []):
            if measure["task"] != name:
                continue
            results.setdefault("task_measures", []).append(measure)
            for kind, system in before["systems"].items():
                if measure["name"] in system:  # trained checkpoints are not asked
                    results["systems"][kind][measure["name"]] = system[measure["name"]]
            for pair, differences in before.get("task_differences", {}).items():
                of_pair = results.setdefault("task_differences", {}).setdefault(pair, {})
                of_pair[measure["name"]] = differences[measure["name"]]


def tasks_journal(run: Run) -> Path:
    """The journal of what the tasks asked of a run's chosen systems."""
    return run.on_basis("evaluation/tasks-{}.jsonl", "task answers", "evaluate")


def _asking(run: Run, tried: Sequence[Candidate], replay: bool) -> tuple[Asking, list[Group]]:
    journal = Journal(tasks_journal(run), replay)
    asking = Asking(None if replay else run.engine, journal, tried, run.recipe.evaluation.rows)
    if replay:  # what the candidates do inside the model is not needed to read what they gave
        return asking, groups(tried, lambda candidate: NOTHING)
    return asking, groups(tried, lambda candidate: intervention_of(candidate, run.scores, run.probe, run.rivals))


def _utility(run: Run, name: str, asking: Asking, of_candidates: Sequence[Group]) -> Measured:
    recipe, data, evaluation = run.recipe, run.recipe.data, run.recipe.evaluation
    if name not in TASKS:
        say(f"  {name}:")
        return measured(
            name, asking, of_candidates, items=data.utility_items, order=data.utility_order, seed=recipe.seed
        )
    task = TASKS[name]
    of_task = load_set(task, data.sets, data.utility_items, data.utility_order, recipe.seed)
    sampling, samples = Sampling(), evaluation.task_samples
    if task.form == "answer" and evaluation.task_sampling == "model":
        sampling = load_sampling(recipe.model)
        if sampling.temperature == 0 and samples > 1:
            say(f"  {name}: the model's generation_config does not sample: one answer to each question is enough")
            samples = 1
    bench = TaskBench(
        asking,
        of_candidates,
        tokens=evaluation.task_tokens,
        sampling=sampling,
        samples=samples if task.form == "answer" else 1,
        seed=recipe.seed,
    )
    return _measured(task, of_task, bench)


def _attack(run: Run, name: str, asking: Asking, of_candidates: Sequence[Group]) -> Measured:
    """Asked as the behaviour's own prompts are: under its system prompt, and with its sampling."""
    recipe, evaluation = run.recipe, run.recipe.evaluation
    of_set = recipe.data.attacks[name]
    bench = TaskBench(
        asking,
        of_candidates,
        system=recipe.behaviour.system,
        sampling=Sampling(evaluation.temperature, evaluation.top_p, evaluation.top_k),
        samples=evaluation.samples,
        seed=recipe.seed,
    )
    task = attack_task(name, recipe.behaviour, evaluation.attack_tokens)
    return _measured(task, load_attacks(name, of_set.file, of_set.count), bench)


def _measured(task: Task, of_task: Set, bench: TaskBench) -> Measured:
    with showing(task.name) as progress:
        replies = bench.replies(task, of_task.questions, progress)
    about: dict[str, Any] = {
        "title": task.metrics[0].measure.title,
        "source": of_task.source,
        "revision": of_task.revision,
        "taken": of_task.taken,
        "n": len(replies.questions),
        "left_out": replies.left_out,
        "licence": task.licence,
    }
    if task.form == "answer":
        s = bench.sampling
        about |= {"tokens": task.tokens or bench.tokens, "samples": bench.samples}
        about["sampling"] = {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k}
    return Measured(task.metrics, values_of(task, replies), bench.samples, about)
