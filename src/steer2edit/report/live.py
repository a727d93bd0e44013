"""What a study shows while it runs: trials done, the front so far, the time left. A live table on a terminal, plain
lines elsewhere, nothing when quiet."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..behaviours.base import UTILITY_LOSS, Measure
from ..progress import Progress, columns, is_quiet, say, showing
from ..searching.candidates import BASELINES, TITLES, Trial
from ..searching.front import Aim, pareto
from ..searching.study import Study
from .page import describe

OnRound = Callable[[Study], None]
_LABEL = "search"
# Rows of the front that are shown, spread evenly over it.
_ROWS = 8


@contextlib.contextmanager
def watching(measures: Sequence[Measure], aim: Aim) -> Iterator[tuple[Progress, OnRound]]:
    """Gives what to call with (steps done, in all), and what to call with the study after each round.

    Args:
        measures: the table's columns, those of them that were measured.
    """
    if is_quiet() or not sys.stderr.isatty():
        with showing(_LABEL) as progress:
            yield progress, lambda study: say(f"  {_line(study, aim)}")
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import Progress as Bar

    bar = Bar(*columns(), console=Console(stderr=True))
    task = bar.add_task(f"  {_LABEL}", total=None)
    with Live(bar, console=bar.console, refresh_per_second=4) as live:
        yield (
            lambda done, total: bar.update(task, completed=done, total=total),
            lambda study: live.update(Group(bar, _table(study, measures, aim))),
        )


def _line(study: Study, aim: Aim) -> str:
    """What was tried, and the far end of the edits' front."""
    edits = front(study, "edit", aim)
    if not edits:
        return _counts(study)
    word = "highest" if aim.attribute.better == "higher" else "lowest"
    attribute, cost = edits[-1].mean(aim.attribute.name), edits[-1].mean(UTILITY_LOSS.name)
    return f"{_counts(study)}; {word} {aim.attribute.title} {attribute:.2f} at {UTILITY_LOSS.title} {cost:.2f}"


def _counts(study: Study) -> str:
    tried = [f"{len(some)} {TITLES[kind]}" for kind in TITLES if kind != "base" and (some := study.of_kind(kind))]
    return f"tried {', '.join(reversed(tried)) or 'nothing'}; {len(study.discarded)} discarded"


def front(study: Study, kind: str, aim: Aim) -> list[Trial]:
    """Its Pareto front so far, whatever the limits, at most so many rows of it."""
    whole = pareto(study.of_kind(kind), aim)
    if len(whole) <= _ROWS:
        return whole
    return [whole[round(i * (len(whole) - 1) / (_ROWS - 1))] for i in range(_ROWS)]


def _table(study: Study, measures: Sequence[Measure], aim: Aim) -> Any:
    from rich.table import Table

    shown = [m for m in measures if m.column and any(trial.count(m.name) for trial in study.trials)]
    table = Table(title=f"Front on validation: {_counts(study)}", title_justify="left")
    table.add_column("")
    for measure in shown:
        table.add_column(measure.title, justify="right")
    for trial in [trial for kind in ("edit", *BASELINES) for trial in front(study, kind, aim)]:
        means = [trial.mean(measure.name) for measure in shown]
        table.add_row(describe(trial.candidate.config), *("–" if x is None else f"{x:.2f}" for x in means))
    return table
