"""What a suite took, beside what was estimated before it: a file for scripts, a table for its page, a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.writing import write_json
from ..report.page import _markdown
from .clock import ALL_RUNS
from .forecast import Forecast, duration

COST = "cost.json"
Parts = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Spent:
    """Seconds of a suite.

    Attributes:
        estimated: run → stage or part → what was estimated before it. taken: the same of what it really took, over all
            the times that it was stopped and went on.
    """

    estimated: Parts
    taken: Parts

    def rows(self) -> list[tuple[str, float | None, float | None]]:
        """Part, what was estimated and what it took, over all runs; in the order of the work."""
        names = dict.fromkeys(
            part for of_all in (self.estimated, self.taken) for run in of_all.values() for part in run
        )
        return [(part, _sum(self.estimated, part), _sum(self.taken, part)) for part in names]

    @property
    def totals(self) -> tuple[float, float] | None:
        """Estimated and taken, of all parts; None if a run has no estimate."""
        if not self.estimated or not all(self.estimated.values()):
            return None
        return _whole(self.estimated), _whole(self.taken)


def _whole(of_all: Parts) -> float:
    return sum(sum(run.values()) for run in of_all.values())


def _sum(of_all: Parts, part: str) -> float | None:
    known = [run[part] for run in of_all.values() if part in run]
    return sum(known) if known else None


def spent_of(forecasts: Sequence[Forecast], taken: Parts) -> Spent:
    """The estimates of a suite's runs beside what the clock counted; other suites in its folder are left out.

    Args:
        taken: run → part → seconds; under `ALL_RUNS` what belongs to no run.
    """
    if not forecasts:
        return Spent({}, taken)
    estimated = {one.cost.planned.name: dict(one.parts) for one in forecasts}
    parts = {part for run in estimated.values() for part in run}
    kept = {
        name: {part: seconds for part, seconds in run.items() if part in parts}
        for name, run in taken.items()
        if name in estimated or name == ALL_RUNS
    }
    return Spent(estimated, kept)


def write_spent(spent: Spent, out: Path) -> Path:
    """Writes `cost.json`: seconds estimated and taken, of each run and part, of each part, and of all."""
    parts = [{"part": part, "estimated": a, "taken": b} for part, a, b in spent.rows()]
    totals = spent.totals
    whole: Any = None
    if totals is not None:
        whole = {"estimated": totals[0], "taken": totals[1], "ratio": totals[1] / totals[0]}
    path = out / COST
    write_json(path, {"estimated": spent.estimated, "taken": spent.taken, "parts": parts, "all": whole})
    return path


def said_of(spent: Spent) -> str:
    """One sentence: what it took, and what was estimated."""
    took = _whole(spent.taken)
    totals = spent.totals
    if totals is None:
        return f"It took {duration(took)}; no time was estimated before it."
    return (
        f"It took {duration(took)}; {duration(totals[0])} were estimated before it, a factor of {took / totals[0]:.2f}."
    )


def spent_markdown(spent: Spent) -> str:
    """The sentence, and a row for each part."""
    rows = [
        [
            part.replace("_", " "),
            "–" if estimated is None else duration(estimated),
            "–" if taken is None else duration(taken),
            f"{taken / estimated:.2f}" if estimated and taken is not None else "–",
        ]
        for part, estimated, taken in spent.rows()
    ]
    return f"{said_of(spent)}\n\n{_markdown(['stage or part', 'estimated', 'taken', 'factor'], rows)}\n"
