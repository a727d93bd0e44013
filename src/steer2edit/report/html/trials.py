"""The trials of a search as the page's chart and tables have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...behaviours.base import UTILITY_LOSS, Measure
from ...recipe import Recipe
from ...searching.candidates import TITLES, Trial
from ...searching.front import pareto
from ...searching.statistics import interval
from ...searching.study import Study
from ..page import describe


def chart_of(study: Study, recipe: Recipe, choice: Mapping[str, Any] | None) -> dict[str, Any]:
    """Every trial with its means, each method's front, what was chosen, and the limits.

    Returns:
        measures: those that a trial has. trials: of each its id, kind, configuration in words, and means.
        intervals: of what was chosen and what lies on a front, measure → [low, high].
    """
    behaviour = recipe.behaviour
    measures = [m for m in behaviour.measures if m.column and any(trial.count(m.name) for trial in study.trials)]
    fronts = _fronts(study, recipe, choice)
    chosen = _chosen(choice)
    shown = {*chosen.values(), *(id for ids in fronts.values() for id in ids), "base"}
    return {
        "attribute": behaviour.attribute.name,
        "cost": UTILITY_LOSS.name,
        "measures": [_measure_row(m, study.trials[0]) for m in measures],
        "limits": {m.name: limit for m, limit in recipe.aim.limits.items() if limit is not None},
        "trials": [_trial_row(trial, measures) for trial in study.trials],
        "intervals": {
            trial.candidate.id: {m.name: _interval(trial, m, recipe) for m in measures}
            for trial in study.trials
            if trial.candidate.id in shown
        },
        "fronts": fronts,
        "chosen": chosen,
        "titles": {kind: TITLES[kind] for kind in TITLES if study.of_kind(kind)},
        "discarded": [
            {"kind": TITLES[row.candidate.kind], "config": describe(row.candidate.config), "why": row.why}
            for row in study.discarded
        ],
    }


def wanted_first(study: Study, recipe: Recipe, choice: Mapping[str, Any] | None) -> list[str]:
    """The ids of the trials, in the order in which their answers are wanted: chosen, on a front, the others."""
    fronts = _fronts(study, recipe, choice)
    on_a_front = [id for kind in reversed(list(TITLES)) for id in fronts.get(kind, [])]
    every = [trial.candidate.id for trial in study.trials]
    return list(dict.fromkeys(["base", *reversed(list(_chosen(choice).values())), *on_a_front, *every]))


def _chosen(choice: Mapping[str, Any] | None) -> dict[str, str]:
    return {kind: choice[kind]["id"] for kind in TITLES if choice and choice.get(kind)}


def _fronts(study: Study, recipe: Recipe, choice: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """Those of the choice; without one, of all trials whatever the limits."""
    if choice is not None:
        return {kind: list(ids) for kind, ids in choice["front"].items()}
    kinds = [kind for kind in TITLES if kind != "base" and study.of_kind(kind)]
    return {kind: [t.candidate.id for t in pareto(study.of_kind(kind), recipe.aim)] for kind in kinds}


def _measure_row(measure: Measure, first: Trial) -> dict[str, Any]:
    return measure.to_json() | {"rate": measure.rate, "n": first.count(measure.name)}


def _trial_row(trial: Trial, measures: list[Measure]) -> dict[str, Any]:
    c = trial.candidate
    row = {"id": c.id, "kind": c.kind, "config": describe(c.config) or TITLES[c.kind], "round": trial.round}
    return row | {"means": {m.name: trial.mean(m.name) for m in measures}}


def _interval(trial: Trial, measure: Measure, recipe: Recipe) -> list[float | None]:
    plan = recipe.evaluation
    shown = interval(trial.values.get(measure.name, ()), measure.rate, plan.resamples, recipe.seed, plan.samples)
    return [shown["low"], shown["high"]]
