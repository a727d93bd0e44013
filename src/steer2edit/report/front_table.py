"""Trials as a table that fits the terminal: a configuration, what it showed and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_lowercase
from typing import Any

from ..behaviours.base import Measure
from ..searching.candidates import Trial
from .page import describe
from .visible import one_line

# The narrowest column in which a configuration can still be read.
_CONFIG = 18


def shown_measures(trials: Sequence[Trial], measures: Sequence[Measure]) -> list[Measure]:
    """The measures that have a column and were measured."""
    return [m for m in measures if m.column and any(trial.count(m.name) for trial in trials)]


def front_table(
    trials: Sequence[Trial],
    measures: Sequence[Measure],
    width: int,
    *,
    title: str | None = None,
    numbered: bool = False,
    remarks: Mapping[str, str] | None = None,
) -> Any:
    """A row for each trial. Where the titles of the measures find no room, letters stand for them, with a legend.

    Args:
        width: of the terminal.
        numbered: put the row's number, from 1 on, before it.
        remarks: trial's id → what stands below its configuration.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    shown = shown_measures(trials, measures)
    titles = [one_line(measure.title) for measure in shown]
    needed = sum(max(map(len, title.split())) + 2 for title in titles)
    lettered = needed + _CONFIG + (4 if numbered else 0) > width
    legend = None
    if lettered:
        letters = ascii_lowercase[: len(titles)]
        legend = ", ".join(f"{letter}\u00a0{title}" for letter, title in zip(letters, titles, strict=True))
        titles = list(letters)
    table = Table(
        title=None if title is None else Text(title),
        caption=None if legend is None else Text(legend),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    if numbered:
        table.add_column("", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for title in titles:
        table.add_column(Text(title), justify="right", min_width=max(4, *map(len, title.split())))
    for number, trial in enumerate(trials, start=1):
        means = [trial.mean(measure.name) for measure in shown]
        cells = [Text(str(number))] if numbered else []
        config = Text(one_line(describe(trial.candidate.config)))
        if remark := (remarks or {}).get(trial.candidate.id):
            config.append(f"\n{remark}", "italic")
        cells.append(config)
        table.add_row(*cells, *("–" if mean is None else f"{mean:.2f}" for mean in means))
    return table
