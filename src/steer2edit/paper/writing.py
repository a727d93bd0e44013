"""The tables of a suite as CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from ..report.page import _markdown, interval_cell
from .facts import published
from .pooling import NONE
from .tables import CHOSEN, Line, Table

FIELDS = (
    "part", "model", "behaviour", "method", "condition", "configuration", "measure", "mean", "low", "high", "n",
    "seeds", "published", "difference", "difference_low", "difference_high", "found_for_kl", "rank", "configurations",
    "evaluations",
)  # fmt: skip


def csv_of(tables: Sequence[Table]) -> str:
    """One row for each measure of each line; `published` is empty where the paper has no number."""
    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
    writer.writeheader()
    for table in tables:
        budgets = {budget["method"]: budget for budget in table.budgets}
        for line in table.lines:
            budget = budgets.get(line.title, {})
            for name, number in line.numbers.items():
                apart = line.differences.get(name, NONE)
                writer.writerow(
                    {
                        "part": table.part,
                        "model": table.model,
                        "behaviour": table.behaviour,
                        "method": line.title,
                        "condition": line.how,
                        "configuration": line.configuration,
                        "measure": name,
                        "mean": _plain(number.mean),
                        "low": _plain(number.low),
                        "high": _plain(number.high),
                        "n": number.n,
                        "seeds": number.seeds,
                        "published": _plain(line.published.get(name)),
                        "difference": _plain(apart.mean),
                        "difference_low": _plain(apart.low),
                        "difference_high": _plain(apart.high),
                        "found_for_kl": _plain(line.target),
                        "rank": "" if line.rank is None else line.rank,
                        "configurations": budget.get("configurations", ""),
                        "evaluations": budget.get("evaluations", ""),
                    }
                )
    return out.getvalue()


def _plain(x: float | None) -> str:
    return "" if x is None else f"{x:.6g}"


def markdown_of(table: Table) -> str:
    """A table for people: means with intervals, the paper's number in brackets, and below it n, budgets and remarks."""
    header = ["method", "condition", "configuration", *table.columns.values(), "rank"]
    rows = [
        [
            line.title,
            line.how,
            line.configuration,
            *(_cell(line, name) for name in table.columns),
            "" if line.rank is None else str(line.rank),
        ]
        for line in table.lines
    ]
    first = table.lines[0]
    rows.append(["n", "", "", *(str(first.numbers.get(name, NONE).n) for name in table.columns), ""])
    text = [f"## {table.model}, {table.behaviour}", "", _verdict(table), "", _markdown(header, rows), ""]
    text += [*_headline_lines(table), *_budget_lines(table)]
    text += [f"- {note}" for note in table.notes]
    return "\n".join(text).rstrip() + "\n"


def _cell(line: Line, name: str) -> str:
    number = line.numbers.get(name, NONE)
    text = interval_cell({"mean": number.mean, "low": number.low, "high": number.high})
    return text + (f" (paper {line.published[name]:.4g})" if name in line.published else "")


def _verdict(table: Table) -> str:
    chosen = [line for line in table.lines if line.how in CHOSEN]
    if not chosen:
        return f"Means with 95 % intervals over prompts{_of_seeds(table)}, on test."
    if table.moves:
        return f"Means with 95 % intervals over prompts{_of_seeds(table)}, on test. Ranks are within a condition."
    return (
        f"No method moves {table.attribute.title} beyond its interval, so nothing is ranked: the differences below are "
        f"not told apart from chance. Means with 95 % intervals over prompts{_of_seeds(table)}, on test."
    )


def _of_seeds(table: Table) -> str:
    return f" and {table.seeds} seeds" if table.seeds > 1 else ""


def _headline_lines(table: Table) -> list[str]:
    lines = []
    for number in table.headline.values():
        paper = published().headline.get(table.behaviour)
        beside = "" if paper is None else f" (the paper, at matched utility over its two models: {paper:+.3g})"
        relative = ", relative change" if table.attribute.better == "lower" else ""
        if number.mean is None:
            said = "not reached: steering has no point on both sides of the edit's KL"
        elif number.low is None or number.high is None:
            said = f"{number.mean:+.2f}, without an interval: most resamples do not reach the edit's KL"
        else:
            said = f"{number.mean:+.2f} [{number.low:+.2f}, {number.high:+.2f}]"
        lines += [
            f"- {table.attribute.title}, edit less steering at the edit's KL per token{relative}: {said}{beside}."
        ]
    return lines


def _budget_lines(table: Table) -> list[str]:
    lines = []
    for budget in table.budgets:
        seed = f", seed {budget['seed']}" if table.seeds > 1 else ""
        if budget["why"] and not budget["configurations"]:
            lines.append(f"- {budget['method']}{seed}: not tried: {budget['why']}.")
            continue
        text = f"- {budget['method']}{seed}: {budget['configurations']} configurations"
        if budget["evaluations"]:
            text += f", {budget['evaluations']} answers on validation"
        if budget["mean"] is not None:
            text += f"; hypervolume {budget['mean']:.2f} [{budget['low']:.2f}, {budget['high']:.2f}]"
            text += f" up to a KL of {budget['reference']:g}"
        if budget["why"]:
            text += f"; {budget['why']}"
        lines.append(text + ".")
    return lines
