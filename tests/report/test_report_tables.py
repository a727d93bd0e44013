"""What the report says of a study: configurations in words, and a row of every method and baseline."""

from __future__ import annotations

from typing import Any

import pytest

from runs import make_scores, tiny_recipe
from steer2edit.behaviours.safety import Safety
from steer2edit.report.page import describe, markdown, markdown_table
from steer2edit.searching.candidates import asked, directed, edited, steered, steered_at


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"gamma": 0.4}, "γ 0.4"),
        ({"rho_attn": 0.2, "rho_mlp": None, "alpha": 0.1}, "ρ_attn 0.2, ρ_mlp off, α 0.1"),
        (edited(None, 0.2, 0.1, "8-20", "k_svd").config, "ρ_attn off, ρ_mlp 0.2, α 0.1, layers 8-20, variant k_svd"),
        ({}, ""),
        (asked(2, "Refuse everything.").config, "“Refuse everything.”"),
        (asked(2, "x" * 40).config, f"“{'x' * 40}”"),
        (asked(2, "x" * 38 + " and more").config, f"“{'x' * 38}…”"),
        (steered_at(7, 0.4).config, "layer 7, γ 0.4"),
        (directed(12, 1.23456).config, "layer 12, γ 1.235"),
    ],
)
def test_a_configuration_is_described_in_words(config: dict[str, Any], words: str) -> None:
    assert describe(config) == words


def _rate(mean: float | None, n: int = 8) -> dict[str, Any]:
    return {"mean": mean, "low": None if mean is None else mean / 2, "high": None if mean is None else 2 * mean, "n": n}


def _results(accuracy: float | None) -> dict[str, Any]:
    numbers = ("refusal", "over_refusal", "over_refusal_borderline", "degenerate", "nll_rise", "utility_loss")
    by_style = ("refusal_request", "refusal_question", "refusal_long")
    measured = {name: _rate(0.25) for name in (*numbers, *by_style)} | {
        "accuracy": _rate(accuracy, 0 if accuracy is None else 4),
        "accuracy_loss": _rate(None, 0),
    }
    configs: dict[str, Any] = {"base": {}, "edit": edited(0.1, None, 0.2, variant="l0").config}
    return {
        "systems": {kind: {"id": kind, "config": config, **measured} for kind, config in configs.items()},
        "attribute": "refusal",
        "measures": [measure.to_json() for measure in Safety().measures],
        "differences": {},
        "agreement": {"not_measured": "quantised."},
    }


def _choice(**changes: Any) -> dict[str, Any]:
    empty = {"mean": 0.0, "low": 0.0, "high": 0.0, "reference": 2.0, "trials": 0}
    return {
        "tried": {"edit": 12, "steering": 3},
        "rule": "the knee",
        "limits": {"over_refusal": 0.2, "accuracy_loss": 0.05, "degenerate": None},
        "evaluations": {"edit": 240, "steering": 60},
        "discarded": 0,
        "refined": None,
        "front": {"edit": ["a", "b"], "steering": []},
        "hypervolume": {"edit": {**empty, "mean": 0.5, "low": 0.4, "high": 0.65, "trials": 9}, "steering": empty},
        "edit": {"id": "a", "config": edited(0.1, None, 0.2).config, "refusal": 0.5, "over_refusal": None},
        "steering": None,
        **changes,
    }


def _report(choice: dict[str, Any], accuracy: float | None = None, results: dict[str, Any] | None = None) -> list[str]:
    recipe = tiny_recipe(
        search__reference=2.0, search__limits={"over_refusal": 0.2, "accuracy_loss": 0.05, "degenerate": None}
    )
    edit = make_scores().edit(rho_attn=0.1, rho_mlp=None, alpha=0.2)
    return markdown(recipe, choice, results or _results(accuracy), edit).splitlines()


def test_the_report_has_a_row_of_the_budget_and_the_hypervolume_for_each_method() -> None:
    lines = _report(_choice())
    at = lines.index("| on validation | tried | evaluations | hypervolume | on the front |")
    assert lines[at + 1 : at + 4] == [
        "| --- | --- | --- | --- | --- |",
        "| steering | 3 | 60 | 0.00 [0.00, 0.00] | 0 |",
        "| edit | 12 | 240 | 0.50 [0.40, 0.65] | 2 |",
    ]
    text = "\n".join(lines)
    assert "refusal (harmful) from worst to best and KL per token from 0 to 2 that" in text
    assert "On validation, of each method: the knee." in text
    assert "Limits: over-refusal (benign) ≤ 0.2, accuracy lost ≤ 0.05." in text
    assert "- steering: none stays within the limits." in text


BASELINE_CONFIGS = {
    "system": asked(1, "Refuse everything.").config,
    "steering": steered(0.4).config,
    "layer": steered_at(7, 0.5).config,
    "direction": directed(9, 1.25).config,
}


def test_the_report_has_rows_of_every_baseline_in_one_order() -> None:
    choice, results = _choice(), _results(None)
    empty = choice["hypervolume"]["steering"]
    measured = dict(results["systems"]["base"])
    results["systems"] = {"base": measured}
    for number, (kind, config) in enumerate(BASELINE_CONFIGS.items(), start=2):
        choice["tried"][kind], choice["evaluations"][kind] = number, 20 * number
        choice["front"][kind], choice["hypervolume"][kind] = ["x"] * number, {**empty, "mean": number / 10}
        choice[kind] = {"id": "x", "config": config, "refusal": number / 8, "over_refusal": 0.25}
        results["systems"][kind] = measured | {"id": "x", "config": config}
        results["differences"][f"edit - {kind}"] = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 8}
    choice["layer"] = None
    del results["systems"]["layer"]
    results["systems"]["edit"] = measured | {"config": edited(0.1, None, 0.2).config}
    lines = _report(choice, results=results)
    at = lines.index("| on validation | tried | evaluations | hypervolume | on the front |")
    assert lines[at + 2 : at + 7] == [
        "| system prompt | 2 | 40 | 0.20 [0.00, 0.00] | 2 |",
        "| steering | 3 | 60 | 0.30 [0.00, 0.00] | 3 |",
        "| one layer | 4 | 80 | 0.40 [0.00, 0.00] | 4 |",
        "| direction | 5 | 100 | 0.50 [0.00, 0.00] | 5 |",
        "| edit | 12 | 240 | 0.50 [0.40, 0.65] | 2 |",
    ]
    chosen = [line for line in lines if line.startswith("- ") and ("; on validation" in line or "none" in line)]
    assert chosen == [
        "- system prompt: “Refuse everything.”; on validation refusal (harmful) 0.25, over-refusal (benign) 0.25.",
        "- steering: γ 0.4; on validation refusal (harmful) 0.38, over-refusal (benign) 0.25.",
        "- one layer: none stays within the limits.",
        "- direction: layer 9, γ 1.25; on validation refusal (harmful) 0.62, over-refusal (benign) 0.25.",
        "- edit: ρ_attn 0.1, ρ_mlp off, α 0.2; on validation refusal (harmful) 0.50.",
    ]
    names = [line.split(" | ")[0].removeprefix("| ") for line in markdown_table(results).splitlines()[2:]]
    assert names == [
        "original",
        "system prompt (“Refuse everything.”)",
        "steering (γ 0.4)",
        "direction (layer 9, γ 1.25)",
        "edit (ρ_attn 0.1, ρ_mlp off, α 0.2)",
        "n",
    ]
    expected = [line for line in lines if line.startswith("- refusal (harmful), edit - ")]
    assert expected == [
        f"- refusal (harmful), edit - {kind}: +0.50 [+0.25, +0.75], same 8 prompts." for kind in BASELINE_CONFIGS
    ]


def test_a_baseline_that_was_not_tried_has_no_row() -> None:
    text = "\n".join(_report(_choice()))
    assert "| steering |" in text
    for title in ("system prompt", "one layer", "direction"):
        assert title not in text


@pytest.mark.parametrize(("mean", "said"), [(0.95, True), (0.9, True), (0.85, False), (None, False)])
def test_where_the_original_model_shows_the_behaviour_already_the_report_says_so(mean: Any, said: bool) -> None:
    results = _results(None)
    results["systems"]["base"]["refusal"] = _rate(mean)
    text = "\n".join(_report(_choice(), results=results))
    remark = f"The original model shows it already: its refusal (harmful) is {mean or 0:.2f}, so that little is left"
    assert (remark in text) == said
    assert ("shows it already" in text) == said


def test_the_report_says_what_was_discarded_and_refined_only_where_something_was() -> None:
    plain = "\n".join(_report(_choice()))
    assert "discarded" not in plain
    assert "second grid" not in plain
    expected = "\n".join(_report(_choice(discarded=4, refined={"around": "edit-0.3-off-0.2"})))
    assert "4 configurations were discarded." in expected
    assert "The second grid was laid around edit-0.3-off-0.2." in expected


def test_the_table_has_an_accuracy_column_only_where_it_was_measured() -> None:
    without, measured = markdown_table(_results(None)), markdown_table(_results(0.5))
    assert "accuracy" not in without
    header, _, base, edit, n = measured.splitlines()
    assert header.endswith("| KL per token | accuracy (choices) |")
    assert base.endswith("| 0.25 [0.12, 0.50] | 0.50 [0.25, 1.00] |")
    assert edit.startswith("| edit (ρ_attn 0.1, ρ_mlp off, α 0.2, variant l0) | 0.25")
    assert n.endswith("| 8 | 4 |")
    assert "accuracy (choices)" in "\n".join(_report(_choice(), 0.5))
