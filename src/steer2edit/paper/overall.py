"""The paper's table 3: each variant's attribute, utility and their product, averaged over models and then behaviours.

The paper's averages are taken over the same models, those that were measured here.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..method.variants import FULL, PAPERS
from ..report.page import _markdown, interval_cell
from .facts import BEHAVIOURS, published
from .pooling import NONE, Draws, Number
from .rows import Tried
from .tables import TITLES, Of, of_other_sets, shown_draws, utility_draws

_HOW = "same numbers"


@dataclass(frozen=True)
class Average:
    """A variant. numbers, published: column → number; a column is a behaviour, "utility, BEHAVIOUR", or an average."""

    variant: str
    numbers: Mapping[str, Number]
    published: Mapping[str, float]


def averages_of(ablations: Sequence[Of]) -> list[Average]:
    """One row for each variant that every model has.

    Args:
        ablations: the ablations of each model and behaviour.
    """
    by_variant = {variant: _draws(ablations, variant) for variant in PAPERS}
    return [
        Average(variant, {name: d.number() for name, d in of_variant.items()}, _published(ablations, variant))
        for variant, of_variant in by_variant.items()
        if of_variant
    ]


def _draws(ablations: Sequence[Of], variant: str) -> dict[str, Draws]:
    """Column → its bootstrap; empty if a model does not have the variant."""
    columns: dict[str, Draws] = {}
    for behaviour in BEHAVIOURS:
        of_behaviour = [of for of in ablations if of.planned[0].behaviour == behaviour]
        shown = [_shown(of, variant) for of in of_behaviour]
        used = [utility_draws(of, _rows(of, variant)) for of in of_behaviour]
        if None in shown:
            return {}
        if shown:
            columns[behaviour] = _mean([draws for draws in shown if draws is not None])
        if used and None not in used:
            columns[f"utility, {behaviour}"] = _mean([draws for draws in used if draws is not None])
    shown_columns = [columns[name] for name in BEHAVIOURS if name in columns]
    used_columns = [columns[f"utility, {name}"] for name in BEHAVIOURS if f"utility, {name}" in columns]
    if shown_columns:
        columns["attribute"] = _mean(shown_columns)
    if used_columns and len(used_columns) == len(shown_columns):
        columns["utility"] = _mean(used_columns)
        columns["attribute × utility"] = _product(columns["attribute"], columns["utility"])
    return columns


def _rows(of: Of, variant: str) -> list[Tried]:
    return [row for row, _ in of.rows(variant, _HOW, 0)]


def _shown(of: Of, variant: str) -> Draws | None:
    """The attribute; of a length the score min(1, length of the full method / length of the variant)."""
    shown = shown_draws(of, _rows(of, variant))
    if shown is None or of.recipe.behaviour.attribute.better == "higher":
        return shown
    full = shown_draws(of, _rows(of, FULL))
    if full is None or shown.mean <= 0 or (shown.drawn <= 0).any():
        return None
    score = np.minimum(1.0, full.drawn / shown.drawn)
    return Draws(min(1.0, full.mean / shown.mean), score, shown.n, shown.seeds)


def _mean(several: Sequence[Draws]) -> Draws:
    """Of as many resamples as each of them has."""
    mean = float(np.mean([draws.mean for draws in several]))
    resamples = min(len(draws.drawn) for draws in several)
    drawn = np.mean([draws.drawn[:resamples] for draws in several], axis=0)
    return Draws(mean, drawn, sum(draws.n for draws in several), min(draws.seeds for draws in several))


def _product(one: Draws, other: Draws) -> Draws:
    resamples = min(len(one.drawn), len(other.drawn))
    drawn = one.drawn[:resamples] * other.drawn[:resamples]
    return Draws(one.mean * other.mean, drawn, min(one.n, other.n), min(one.seeds, other.seeds))


def _published(ablations: Sequence[Of], variant: str) -> dict[str, float]:
    """The paper's averages over the measured models; nothing if a model or a set is not the paper's."""
    if any(of.planned[0].facts is None for of in ablations):
        return {}
    if any(of_other_sets(of, published().models[str(of.planned[0].paper)][FULL]) for of in ablations):
        return {}
    columns: dict[str, float] = {}
    for behaviour in BEHAVIOURS:
        names = [str(of.planned[0].paper) for of in ablations if of.planned[0].behaviour == behaviour]
        if not names:
            continue
        rows = [(published().models[name][variant], published().models[name][FULL]) for name in names]
        if behaviour == "efficiency":
            scores = [min(1.0, full["attribute"] / row["attribute"]) for row, full in rows]
        else:
            scores = [row["attribute"] for row, _ in rows]
        columns[behaviour] = float(np.mean(scores))
        columns[f"utility, {behaviour}"] = float(np.mean([row["utility"] for row, _ in rows]))
    columns["attribute"] = float(np.mean([columns[name] for name in BEHAVIOURS if name in columns]))
    columns["utility"] = float(np.mean([value for name, value in columns.items() if name.startswith("utility, ")]))
    columns["attribute × utility"] = columns["attribute"] * columns["utility"]
    return columns


# As files ----------------------------------------------------------------------------------------------------------


def averages_csv(averages: Sequence[Average]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "column", "mean", "low", "high", "n", "published"])
    for average in averages:
        for name, number in average.numbers.items():
            cells = ["" if x is None else f"{x:.6g}" for x in (number.mean, number.low, number.high)]
            paper = average.published.get(name)
            writer.writerow(
                [
                    TITLES.get(average.variant, average.variant),
                    name,
                    *cells,
                    number.n,
                    "" if paper is None else f"{paper:.6g}",
                ]
            )
    return out.getvalue()


def averages_markdown(averages: Sequence[Average], models: Sequence[str]) -> str:
    """The table, and over which models it averages."""
    columns = list(dict.fromkeys(name for average in averages for name in average.numbers))
    rows = [
        [TITLES.get(average.variant, average.variant), *(_cell(average, name) for name in columns)]
        for average in averages
    ]
    note = (
        f"Averages over {', '.join(models)}, with the same numbers for every variant. The efficiency score is the full"
        " method's length by the variant's, at most 1."
    )
    return f"{_markdown(['method', *columns], rows)}\n\n{note}\n"


def _cell(average: Average, name: str) -> str:
    number = average.numbers.get(name, NONE)
    text = interval_cell({"mean": number.mean, "low": number.low, "high": number.high})
    return text + (f" (paper {average.published[name]:.4g})" if name in average.published else "")
