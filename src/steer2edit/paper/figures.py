"""The figures of a suite: the trade-off on test, the ablations as bars, and the sweeps of the budgets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..behaviours.base import UTILITY_LOSS
from ..method.variants import FULL
from ..report.drawing import LOOKS, MUTED, SERIES, canvas, legend_below, save
from ..searching.candidates import BASELINES, TITLES
from .parts import BUDGETS
from .pooling import Number
from .tables import ATTRIBUTE, UTILITY, Line, Table

# A bar for each condition, side by side.
_CONDITIONS = {"same numbers": SERIES[0], "equal budget": SERIES[1], "equal KL": SERIES[2]}


def shown_measure(table: Table) -> tuple[str, str]:
    """The measure on the vertical axis, and its title: the mean of the attacks where they were asked."""
    if ATTRIBUTE in table.columns:
        return ATTRIBUTE, table.columns[ATTRIBUTE]
    return table.attribute.name, table.attribute.title


def trade_off_figure(table: Table, path: Path) -> list[Path]:
    """The attribute against KL and, where tasks were asked, against utility: steering as a curve, the best edits on
    validation as stars, the original model as a point. All on test.

    Returns:
        The files written, path + .png, .svg and .pdf.
    """
    costs = {UTILITY_LOSS.name: UTILITY_LOSS.title}
    if UTILITY in table.columns:
        costs[UTILITY] = table.columns[UTILITY]
    shown, title = shown_measure(table)
    figure, axes = canvas(5.2 * len(costs), 4.4, columns=len(costs))
    entries: dict[str, Any] = {}
    for axis, (cost, label) in zip(axes, costs.items(), strict=True):
        of_method = {
            "base": [line for line in table.lines if line.how == "original"],
            **{kind: [line for line in table.lines if line.method == kind] for kind in BASELINES},
            "edit": [line for line in table.lines if line.method == FULL],
        }
        for kind, lines in of_method.items():
            places = {_place(line, cost, shown): line for line in lines if _place(line, cost, shown) is not None}
            points = [place for place in places if place is not None]
            if not points:
                continue
            look = LOOKS[kind]
            if kind == "steering":
                swept = _by_strength(places)
                axis.plot(*zip(*swept, strict=True), color=look.colour, lw=1.1, ls=look.dash, zorder=2)
            name = "best edits on validation" if kind == "edit" else TITLES[kind]
            style = {"color": look.colour, "marker": look.marker, "ms": look.size, "mec": "white", "mew": 0.5}
            entries[name] = axis.plot(*zip(*points, strict=True), ls="none", zorder=3, **style)[0]
            for line in lines:
                if line.how in ("chosen", "original"):
                    _whiskers(axis, line, cost, shown, look.colour)
        axis.set_xlabel(label)
        axis.set_ylabel(title)
    legend_below(figure, entries)
    figure.suptitle(f"{table.model}, {table.behaviour}: test, 95 % intervals of what was chosen", fontsize=10)
    return save(figure, path)


def _place(line: Line, cost: str, shown: str) -> tuple[float, float] | None:
    x, y = (line.numbers[name].mean if name in line.numbers else None for name in (cost, shown))
    return None if x is None or y is None else (x, y)


def _by_strength(places: Any) -> list[tuple[float, float]]:
    """The points of a sweep in the order of their strengths."""
    return [place for place, _ in sorted(places.items(), key=lambda pair: pair[1].config["gamma"])]


def _whiskers(axis: Any, line: Line, cost: str, shown: str, colour: str) -> None:
    place = _place(line, cost, shown)
    if place is not None:
        reach = [_reach(line.numbers[name]) for name in (cost, shown)]
        axis.errorbar(*place, xerr=reach[0], yerr=reach[1], color=colour, lw=0.9, capsize=2, zorder=2)


def _reach(number: Number) -> list[list[float]] | None:
    """How far an interval reaches below and above its mean [2, 1]; None without one."""
    if number.mean is None or number.low is None or number.high is None:
        return None
    return [[max(0.0, number.mean - number.low)], [max(0.0, number.high - number.mean)]]


def ablation_figure(table: Table, path: Path) -> list[Path]:
    """A group of bars for each method, one for each condition, with 95 % intervals; the paper's numbers as diamonds.

    Returns:
        The files written, path + .png, .svg and .pdf.
    """
    shown, title = shown_measure(table)
    panels = {shown: title, UTILITY_LOSS.name: UTILITY_LOSS.title}
    if UTILITY in table.columns:
        panels[UTILITY] = table.columns[UTILITY]
    methods = list(dict.fromkeys(line.method for line in table.lines if line.how in _CONDITIONS))
    figure, axes = canvas(1.5 + 0.62 * len(methods), 2.7 * len(panels), rows=len(panels), sharex=True)
    entries: dict[str, Any] = {}
    width = 0.8 / len(_CONDITIONS)
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        for at, (how, colour) in enumerate(_CONDITIONS.items()):
            for line in table.lines:
                if line.how != how or name not in line.numbers or line.numbers[name].mean is None:
                    continue
                x = methods.index(line.method) + (at - 1) * width
                bar = axis.bar(
                    x, line.numbers[name].mean, width, color=colour, yerr=_reach(line.numbers[name]), ecolor=MUTED
                )
                entries.setdefault(how, bar)
                if name in line.published:
                    mark = axis.plot(x, line.published[name], "D", ms=5, mfc="white", mec="black", zorder=4)[0]
                    entries.setdefault("published", mark)
        original = table.lines[0].numbers.get(name)
        if original is not None and original.mean is not None:
            entries.setdefault("original", axis.axhline(original.mean, color="black", lw=0.9, ls=":"))
        axis.set_ylabel(label, fontsize=8)
    titles = [next(line.title for line in table.lines if line.method == method) for method in methods]
    axes[-1].set_xticks(range(len(methods)), titles, rotation=35, ha="right")
    legend_below(figure, entries)
    figure.suptitle(f"{table.model}, {table.behaviour}: test, 95 % intervals", fontsize=10)
    return save(figure, path)


def sensitivity_figure(table: Table, path: Path) -> list[Path]:
    """The attribute and KL along each budget, with ρ = ∞ for the other; the original model as a line.

    Returns:
        The files written, path + .png, .svg and .pdf.
    """
    shown, title = shown_measure(table)
    panels = {shown: title, UTILITY_LOSS.name: UTILITY_LOSS.title}
    if UTILITY in table.columns:
        panels[UTILITY] = table.columns[UTILITY]
    budgets = list(dict.fromkeys(line.method for line in table.lines if line.how == "swept"))
    figure, axes = canvas(4.2 * max(1, len(budgets)), 2.6 * len(panels), columns=max(1, len(budgets)), rows=len(panels))
    for row, (name, label) in enumerate(panels.items()):
        for column, budget in enumerate(budgets):
            axis = axes[row * len(budgets) + column]
            lines = sorted((line for line in table.lines if line.method == budget), key=_budget)
            _curve(axis, lines, name, SERIES[column])
            original = table.lines[0].numbers.get(name)
            if original is not None and original.mean is not None:
                axis.axhline(original.mean, color="black", lw=0.9, ls=":")
            axis.set_xlabel(f"{budget} (larger is a smaller edit)", fontsize=8)
            axis.set_ylabel(label, fontsize=8)
    figure.suptitle(f"{table.model}, {table.behaviour}: test; dotted is the original model", fontsize=10)
    return save(figure, path)


def _curve(axis: Any, lines: Sequence[Line], name: str, colour: str) -> None:
    known = [line for line in lines if name in line.numbers and line.numbers[name].mean is not None]
    for line in known:
        axis.errorbar(
            _budget(line), line.numbers[name].mean, yerr=_reach(line.numbers[name]), color=colour, capsize=2, lw=0.9
        )
    axis.plot([_budget(line) for line in known], [line.numbers[name].mean for line in known], "o-", color=colour, ms=4)


def _budget(line: Line) -> float:
    """The number of the budget that is swept."""
    return line.config[f"rho_{next(block for block, name in BUDGETS.items() if name == line.method)}"]


_FIGURES = {"trade_off": trade_off_figure, "ablations": ablation_figure, "sensitivity": sensitivity_figure}


def figure_of(table: Table, path: Path) -> list[Path]:
    """The figure of a part; none of a part that has none, or whose only line is the original model."""
    draw = _FIGURES.get(table.part)
    if draw is None or len(table.lines) < 2:
        return []
    return draw(table, path)
