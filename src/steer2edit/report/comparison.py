"""Several runs on one axis: what each system of each run shows on test and costs, as a figure and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..behaviours.base import UTILITY_LOSS
from ..errors import FileError
from ..searching.candidates import TITLES
from .drawing import LOOKS, SERIES, Label, canvas, darker, label_points, legend_below, save
from .page import describe, interval_cell

MOST = len(SERIES)


@dataclass(frozen=True)
class Compared:
    """A run's name and its `evaluation/results.json`."""

    name: str
    results: Mapping[str, Any]

    @property
    def attribute(self) -> Mapping[str, Any]:
        """The measure that the run was to improve, as the results have it."""
        return next(m for m in self.results["measures"] if m["name"] == self.results["attribute"])


def shares_attribute(runs: Sequence[Compared]) -> bool:
    """Whether all runs should improve the same measure, whose own values are then drawn."""
    first = runs[0].attribute
    return all((run.attribute["title"], run.attribute["scale"]) == (first["title"], first["scale"]) for run in runs)


def comparison_figure(runs: Sequence[Compared], path: Path) -> list[Path]:
    """Each system of each run with its 95 % intervals; a colour a run, a shape a system.

    Runs of different attributes are drawn on each attribute's own scale, from its worst to its best.

    Returns:
        The files written, path + .png, .svg and .pdf.

    Raises:
        FileError: more runs than there are colours, or one without a measured utility loss.
    """
    if len(runs) > MOST:
        raise FileError("too many runs for one figure", got=len(runs), fix=f"Give at most {MOST}.")
    own_values = shares_attribute(runs)
    figure, (axis,) = canvas(7.2, 5.2)
    entries: dict[str, Any] = {}
    labels, points = [], []
    for run, colour in zip(runs, SERIES, strict=False):
        drawn = 0
        for kind, system in run.results["systems"].items():
            cost, shown = system[UTILITY_LOSS.name], system[run.attribute["name"]]
            if cost["mean"] is None or shown["mean"] is None:
                continue
            drawn += 1
            low, mean, high = _on_axis(shown, run.attribute, own_values)
            reach_x = [[max(0.0, cost["mean"] - cost["low"])], [max(0.0, cost["high"] - cost["mean"])]]
            reach_y = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
            look = LOOKS[kind]
            edit = kind == "edit"
            axis.errorbar(
                cost["mean"], mean, xerr=reach_x, yerr=reach_y, fmt=look.marker, ms=look.size + 2 * edit, color=colour,
                mfc=colour if edit else "white", lw=1.3 if edit else 0.6, capsize=2, zorder=4 if edit else 3,
            )  # fmt: skip
            points.append((cost["mean"], mean))
            face = "#444444" if edit else "white"
            entries.setdefault(TITLES[kind], _entry(look.marker, "#444444", face, look.size))
            if edit:
                labels.append(Label(cost["mean"], mean, run.name, darker(colour)))
        if not drawn:
            title = UTILITY_LOSS.title
            raise FileError(f"{run.name} has nothing to draw", got=f"no {title}", fix="Compare runs that measured it.")
    entries |= {run.name: _entry("s", colour, colour, 7) for run, colour in zip(runs, SERIES, strict=False)}
    axis.set_xlabel(f"{UTILITY_LOSS.title} on test")
    title = runs[0].attribute["title"] if own_values else "share of the attribute's scale, from worst to best"
    axis.set_ylabel(title)
    legend_below(figure, entries)
    label_points(axis, labels, points)
    return save(figure, path)


def _entry(marker: str, edge: str, face: str, size: float) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], ls="none", marker=marker, color=edge, mfc=face, ms=size)


def _on_axis(cell: Mapping[str, Any], measure: Mapping[str, Any], own_values: bool) -> tuple[float, float, float]:
    """Low, mean and high of a measure, as they are or on its scale."""
    if own_values:
        return cell["low"], cell["mean"], cell["high"]
    worst, best = measure["scale"]

    def scaled(name: str) -> float:
        return (cell[name] - worst) / (best - worst)

    ends = scaled("low"), scaled("high")  # where lower is better, they change places
    return min(ends), scaled("mean"), max(ends)


def comparison_table(runs: Sequence[Compared]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: run, system, configuration, attribute and utility loss with intervals, n."""
    own_values = shares_attribute(runs)
    header = ["run", "system", "configuration"]
    header += [runs[0].attribute["title"]] if own_values else ["measure", "on test"]
    header += [UTILITY_LOSS.title, "n"]
    rows = []
    for run in runs:
        for kind, system in run.results["systems"].items():
            shown = system[run.attribute["name"]]
            row = [run.name, TITLES[kind], describe(system["config"]) or "–"]
            row += [] if own_values else [run.attribute["title"]]
            rows.append([*row, interval_cell(shown), interval_cell(system[UTILITY_LOSS.name]), str(shown["n"])])
    return header, rows


def comparison_markdown(runs: Sequence[Compared], figure: str) -> str:
    """The table and the figure as a page."""
    header, rows = comparison_table(runs)
    lines = [" | ".join(_cell(text) for text in row) for row in (header, ["---"] * len(header), *rows)]
    table = "\n".join(f"| {line} |" for line in lines)
    note = "Means with 95 % intervals over prompts."
    return f"# Runs compared, on test\n\n{table}\n\n{note}\n\n![runs compared]({figure})\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
