"""What the test shows, as `evaluation/results.json` holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..recipe import Recipe
from ..searching.candidates import TITLES, Trial
from ..searching.statistics import interval, paired_difference


def results_of(trials: Sequence[Trial], recipe: Recipe) -> dict[str, Any]:
    """Every system's measures with intervals, and how the edit's attribute differs from each other system's.

    Returns:
        attribute: its name. measures: what reports need of each. systems: kind → id, config, and for each measure mean,
        low, high, n and method. differences: "edit - KIND" → the paired difference of the attribute.
    """
    plan, seed, attribute = recipe.evaluation, recipe.seed, recipe.behaviour.attribute
    measures = recipe.behaviour.measures
    systems: dict[str, Any] = {}
    for trial in sorted(trials, key=lambda trial: list(TITLES).index(trial.candidate.kind)):
        c = trial.candidate
        systems[c.kind] = {"id": c.id, "config": dict(c.config)} | {
            m.name: interval(trial.values[m.name], m.rate, plan.resamples, seed, plan.samples) for m in measures
        }
    values = {trial.candidate.kind: trial.values[attribute.name] for trial in trials}
    differences = {
        f"edit - {other}": paired_difference(values["edit"], values[other], plan.resamples, seed)
        for other in systems
        if other != "edit" and "edit" in values
    }
    return {
        "split": "test",
        "attribute": attribute.name,
        "measures": [measure.to_json() for measure in measures],
        "systems": systems,
        "differences": differences,
    }
