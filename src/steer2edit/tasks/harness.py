"""Any task of lm-eval by its name, under the same interventions: `lm_eval`'s Python API with our engines as its model.

lm-eval makes the prompts and scores the replies; from its samples come the values of single questions, and from those
intervals and paired differences.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..behaviours.base import Measure
from ..errors import FileError
from ..files.reading import read_text
from ..files.schema import nearest
from .asking import Asking, Group
from .base import Metric
from .known import LM_EVAL, TASKS
from .sets import taken, unavailable
from .summary import Measured, Values

# lm-eval's own default, so that its tasks show the same examples.
_FEWSHOT_SEED = 1234


def is_file(name: str) -> bool:
    """Whether a task is given as lm-eval's YAML file, and not by its name."""
    return name.endswith((".yaml", ".yml"))


def check(names: Sequence[str]) -> None:
    """Raises FileError if lm-eval is needed and is not installed, or it has no such task."""
    if not names:
        return
    if importlib.util.find_spec("lm_eval") is None:
        known = nearest(names[0], list(TASKS), "Own tasks")
        raise FileError(
            f"{names[0]} is no task of our own",
            got="lm-eval, which may have it, is not installed",
            fix=f"{known} For lm-eval's tasks: pip install 'steer2edit[eval]'.",
        )
    for name in names:
        if is_file(name):
            _named_in(name)
            continue
        known_names = _manager(None).all_tasks
        if name.removeprefix(LM_EVAL) not in known_names:
            raise FileError(
                f"there is no task {name}",
                got="neither our own nor lm-eval's",
                fix=nearest(name, [*TASKS, *known_names], "Own tasks"),
            )


@lru_cache(maxsize=4)
def _manager(folder: str | None) -> Any:
    """lm-eval's index of tasks: its own, or those of a folder; reading its own takes some seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager() if folder is None else TaskManager(include_path=folder, include_defaults=False)


def _named_in(path: str) -> str:
    """The name of the task that a YAML file describes."""
    lines = [line for line in read_text(path).splitlines() if "!function" not in line]
    try:
        name = yaml.safe_load("\n".join(lines)).get("task")
    except (yaml.YAMLError, AttributeError, LookupError, RecursionError, ValueError) as error:
        raise FileError(f"{path} is no task of lm-eval", got=str(error).splitlines()[0], fix="Mend it.") from None
    if not isinstance(name, str):
        raise FileError(f"{path} is no task of lm-eval", got=f"task: {name}", fix="Give the task its name.")
    return name


def measured(
    name: str,
    asking: Asking,
    groups: Sequence[Group],
    *,
    items: int | None,
    order: str,
    seed: int,
) -> Measured:
    """One of lm-eval's tasks under every candidate.

    Args:
        name: the task's or the group's, perhaps after `lm_eval:`, or a YAML file.
        items: at most this many questions of each of its tasks. order: the first ones, or sampled by the seed.

    Raises:
        FileError: the task or its set cannot be loaded.
    """
    from lm_eval.evaluator import evaluate

    from .engine_lm import EngineLM

    loaded = _loaded(name)
    runs: dict[int, Mapping[str, Any]] = {}
    chosen = _chosen(loaded["tasks"], items, order, seed)
    for group in groups:
        model = EngineLM(asking, group, name, seed)
        for at, candidate in enumerate(group.candidates):
            model.at = at
            with _quiet():
                runs[candidate] = evaluate(
                    lm=model,
                    task_dict=loaded,
                    samples=chosen,
                    bootstrap_iters=0,
                    log_samples=True,
                    system_instruction=group.system,
                )
    metrics, values = _values(name, loaded["tasks"], [runs[i] for i in range(len(runs))])
    asked = len(next(iter(values[0].values()), []))
    about = {
        "title": name,
        "source": f"lm-eval {importlib.metadata.version('lm_eval')}",
        "revision": str(runs[0]["versions"].get(next(iter(loaded["tasks"])))),
        "taken": f"{'all' if items is None else f'at most {items} of each set'}, {order}",
        "n": asked,
        "left_out": 0,
        "licence": "see its task's page in lm-eval",
    }
    return Measured(metrics, values, 1, about)


def _loaded(name: str) -> Mapping[str, Any]:
    """The tasks and groups of a name, with their sets."""
    folder = str(Path(name).parent) if is_file(name) else None
    spec = _named_in(name) if is_file(name) else name.removeprefix(LM_EVAL)
    try:
        with _quiet():
            loaded = _manager(folder).load([spec])
    except Exception as error:  # the sets' loaders raise what their many parts raise
        raise unavailable(name, "lm-eval", error, has_files=False) from None
    for task in loaded["tasks"].values():  # as lm-eval's own command does
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


def _chosen(tasks: Mapping[str, Any], items: int | None, order: str, seed: int) -> dict[str, list[int]] | None:
    """For each task the numbers of the questions that are asked; None is all of them."""
    if items is None:
        return None
    sizes = {name: len(list(task.eval_docs)) for name, task in tasks.items()}
    return {name: taken(size, items, order, f"{seed} {name}") for name, size in sizes.items()}


def _values(
    name: str, tasks: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]
) -> tuple[tuple[Metric, ...], list[dict[str, Values]]]:
    """The metrics, and each candidate's values of them. The questions of several tasks are put together.

    The first metric has the task's name; each other one has its own behind it, and its filter if there are several.
    """
    filters = {row["filter"]: None for rows in runs[0]["samples"].values() for row in rows}
    metrics: dict[tuple[str, str], Metric] = {}
    values: list[dict[str, Values]] = [{} for _ in runs]
    for task_name, task in tasks.items():
        for c, run in enumerate(runs):
            for row in sorted(run["samples"].get(task_name, []), key=lambda row: row["doc_id"]):
                for measure in row["metrics"]:
                    key = (measure, row["filter"])
                    if key not in metrics:
                        metrics[key] = _metric(name, measure, row["filter"], not metrics, len(filters) > 1, task)
                    values[c].setdefault(metrics[key].name, []).append(_kept(row[measure]))
    shown = tuple(_with_rate(metric, [of_run[metric.name] for of_run in values]) for metric in metrics.values())
    return shown, values


def _kept(value: Any) -> Any:
    """A question's value: a number, None if it is not finite, or whatever else lm-eval's own mean takes."""
    if isinstance(value, list | tuple):
        return tuple(value)
    if isinstance(value, str):
        return value
    return float(value) if np.isfinite(value) else None


def _metric(name: str, measure: str, filtered: str, first: bool, several: bool, task: Any) -> Metric:
    titles = [name, measure, filtered] if several else [name, measure]
    parts = [name] if first else titles
    better = "higher" if task.higher_is_better().get(measure, True) else "lower"
    aggregate = task.aggregation().get(measure)
    is_mean = getattr(aggregate, "__name__", "mean") == "mean"
    return Metric(
        Measure(
            "_".join(parts),
            " ".join(titles),
            better,  # type: ignore[arg-type]
            *((0.0, 1.0) if better == "higher" else (1.0, 0.0)),
            rate=False,
            column=first,
        ),
        None if is_mean else _of_array(aggregate),
    )


def _of_array(aggregate: Any) -> Callable[[np.ndarray], float]:
    return lambda array: float(aggregate([tuple(x) if np.ndim(x) else x for x in array]))


def _with_rate(metric: Metric, values: Sequence[Values]) -> Metric:
    """The metric, as a share of questions if every value is 0 or 1."""
    if metric.aggregate is not None or not all(value in (0.0, 1.0) for some in values for value in some):
        return metric
    m = metric.measure
    return Metric(Measure(m.name, m.title, m.better, m.worst, m.best, rate=True, column=m.column))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's log; its warnings are about the model's name and the like."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
