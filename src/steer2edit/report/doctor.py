"""What `steer2edit doctor` shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .visible import in_markup


def show(console: Any, findings: Mapping[str, Any]) -> None:
    """`examine`'s findings as text and tables."""
    from rich.table import Table

    tested = "tested" if findings["tested"] else "not among the tested families"
    model, family = in_markup(findings["model"]), in_markup(findings["family"])
    console.print(f"[bold]{model}[/bold]: {family}, {tested}", highlight=False)
    tables = {
        "What is edited": findings["sites"],
        "How it is stored": findings.get("stored", []),
        "What is not": findings["not edited"],
        "Memory": [{"for": stage, "needs": _size(size)} for stage, size in findings["memory"].items()],
    }
    for title, rows in tables.items():
        if not rows:
            continue
        table = Table(title=title, title_justify="left")
        for column in rows[0]:
            table.add_column(
                column, justify="right" if column in ("count", "layers", "parameters", "needs") else "left"
            )
        for row in rows:
            table.add_row(*(f"{x:,}" if isinstance(x, int) else in_markup(x) for x in row.values()))
        console.print(table)
    for remark in findings["remarks"]:
        console.print(f"- {in_markup(remark)}", highlight=False)
    if health := findings.get("self-check"):
        for line in _health_lines(health):
            console.print(f"- {in_markup(line)}", highlight=False)
    else:
        console.print(
            "- The self-check was not run: `--weights` loads the weights and runs the model on a few tokens.",
            highlight=False,
        )


def _health_lines(health: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Self-check passed: {health['interventions']} interventions, one at each site (a layer's experts together), "
        f"move the logits by {health['least_moved']:.2g} or more of their spread; zeros move them by "
        f"{health['moved_by_nothing']:.1g}."
    )
    yield f"A component acts through its own columns alone: largest difference {health['heads']:.1g} of its effect."
    yield f"What a layer adds differs from what its sites write by at most {health['unaccounted']:.1g} of it."
    for block, ratio in health["norms"].items():
        yield f"The norm after the {block} block makes an edit {ratio:.2g} times its size (median over the layers)."


def _size(size: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000  # type: ignore[assignment]
    return f"{size:.3g} {unit}"
