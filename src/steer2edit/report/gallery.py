"""What the gallery has: a row for each edit, with what it measured on test prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files.gallery import CHOICE, RESULTS, gallery
from ..files.reading import read_json

# What an edit costs, of which each row has the mean.
COSTS = ("utility_loss", "degenerate")


def gallery_rows() -> list[dict[str, Any]]:
    """For each edit its name and the mean of each of these on test: `attribute`'s of the original, of steering and of
    the edit, with the edit's interval; KL per token; the degenerate share."""
    return [_row(name, folder) for name, folder in gallery().items()]


def _row(name: str, folder: Path) -> dict[str, Any]:
    results = read_json(folder / RESULTS)
    attribute, systems = results["attribute"], results["systems"]
    title = next(measure["title"] for measure in results["measures"] if measure["name"] == attribute)
    edit = systems["edit"]
    row: dict[str, Any] = {"name": name, "attribute": title, "n": edit[attribute]["n"]}
    for kind in ("base", "steering"):
        row[kind] = systems[kind][attribute]["mean"] if kind in systems else None
    row |= {"edit": edit[attribute]["mean"], "low": edit[attribute]["low"], "high": edit[attribute]["high"]}
    row |= {cost: edit[cost]["mean"] for cost in COSTS if cost in edit}
    return row | {"config": read_json(folder / CHOICE)["edit"]["config"]}


def gallery_table(rows: list[dict[str, Any]]) -> Any:
    """The rows as a table of rich."""
    from rich.table import Table

    table = Table("gallery:", "measured on test", "original", "steering", "edit", "n", "KL per token", "degenerate")
    for row in rows:
        table.add_row(
            row["name"],
            row["attribute"],
            _number(row["base"]),
            _number(row["steering"]),
            f"{row['edit']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
            str(row["n"]),
            _number(row.get("utility_loss")),
            _number(row.get("degenerate")),
        )
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
