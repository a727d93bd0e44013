"""What a study shows while it runs: trials done, the front so far, the time left. A live table on a terminal, plain
lines elsewhere, nothing when quiet."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..progress import Progress, columns, is_quiet, say, showing
from ..search.front import pareto
from .page import describe

if TYPE_CHECKING:
    from ..search.study import Study

Told = Callable[["Study"], None]

_LABEL = "search"

# Rows of the front that are shown, spread evenly over it.
_ROWS = 8


@contextlib.contextmanager
def watching() -> Iterator[tuple[Progress, Told]]:
    """Gives what to call with (steps done, in all), and what to call with the study after each round."""
    if is_quiet() or not sys.stderr.isatty():
        with showing(_LABEL) as progress:
            yield progress, _line
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import Progress as Bar

    bar = Bar(*columns(), console=Console(stderr=True))
    task = bar.add_task(f"  {_LABEL}", total=None)
    with Live(bar, console=bar.console, refresh_per_second=4) as live:
        yield (
            lambda done, total: bar.update(task, completed=done, total=total),
            lambda study: live.update(Group(bar, _table(study))),
        )


def _line(study: Study) -> None:
    best = front(study, "edit")[-1:]
    told = "".join(f"; highest refusal {t['refusal']:.2f} at KL {t['utility_loss']:.2f}" for t in best)
    say(f"  {_counts(study)}{told}")


def _counts(study: Study) -> str:
    edits, steered = (sum(t["kind"] == kind for t in study.trials) for kind in ("edit", "steering"))
    return f"{edits} edits and {steered} steering strengths tried, {len(study.discarded)} discarded"


def front(study: Study, kind: str) -> list[Any]:
    """Its Pareto front so far, whatever the limits, at most so many rows of it."""
    found = pareto([t for t in study.trials if t["kind"] == kind])
    if len(found) <= _ROWS:
        return found
    return [found[round(i * (len(found) - 1) / (_ROWS - 1))] for i in range(_ROWS)]


def _table(study: Study) -> Any:
    from rich.table import Table

    table = Table(title=f"Front on validation: {_counts(study)}", title_justify="left")
    for name in ("", "refusal", "over-refusal", "degenerate", "KL per token"):
        table.add_column(name, justify="right" if name else "left")
    for trial in (*front(study, "edit"), *front(study, "steering")):
        numbers = (trial[k] for k in ("refusal", "over_refusal", "degenerate", "utility_loss"))
        table.add_row(describe(trial["config"]), *("–" if x is None else f"{x:.2f}" for x in numbers))
    return table
