"""The numbers of `results.json` from trials that were written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from runs import tiny_recipe
from steer2edit.pipeline.results import results_of
from steer2edit.searching.candidates import Candidate, Trial

RECIPE = tiny_recipe(evaluation__resamples=200)


def trial(kind: str, refused: int, config: dict[str, Any] | None = None) -> Trial:
    """One that refuses some of four harmful prompts."""
    empty: dict[str, tuple[float, ...]] = {measure.name: () for measure in RECIPE.behaviour.measures}
    shown = {"refusal": (1.0,) * refused + (0.0,) * (4 - refused), "utility_loss": (0.1, 0.3)}
    return Trial(Candidate(f"{kind}-1", kind, config or {}), empty | shown, "test")


def test_a_difference_is_the_edits_less_the_others() -> None:
    trials = [trial("edit", 3, {"alpha": 0.4}), trial("steering", 4, {"gamma": 0.2}), trial("base", 1)]
    results = results_of(trials, RECIPE)
    assert (results["split"], results["attribute"]) == ("test", "refusal")
    assert list(results["systems"]) == ["base", "steering", "edit"]  # in the order of tables
    assert set(results["differences"]) == {"edit - base", "edit - steering"}
    means = {name: row["mean"] for name, row in results["differences"].items()}
    assert means == {"edit - base": 0.5, "edit - steering": -0.25}
    edit = results["systems"]["edit"]
    assert (edit["id"], edit["config"]) == ("edit-1", {"alpha": 0.4})
    assert (edit["refusal"]["mean"], edit["refusal"]["n"], edit["refusal"]["method"]) == (0.75, 4, "wilson")
    assert (edit["utility_loss"]["mean"], edit["utility_loss"]["n"]) == (pytest.approx(0.2), 2)
    assert edit["utility_loss"]["method"] == "bootstrap"
    none = {"mean": None, "low": None, "high": None, "n": 0, "method": "none"}
    assert edit["over_refusal"] == none  # nothing of that kind was asked


def test_without_an_edit_there_is_no_difference() -> None:
    assert results_of([trial("base", 1), trial("steering", 2)], RECIPE)["differences"] == {}
