"""The table of results on a terminal: it breaks between words alone, whatever the width."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from steer2edit.behaviours.safety import Safety
from steer2edit.report.page import markdown_table, print_answers, print_results


def _results() -> dict[str, Any]:
    cell = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 80}
    none = {"mean": None, "low": None, "high": None, "n": 0}
    measured = {m.name: none if m.name.startswith("accuracy") else cell for m in Safety().measures}
    configs: dict[str, Any] = {
        "base": {},
        "steering": {"gamma": 0.3182},
        "edit": {"rho_attn": 0.24, "rho_mlp": None, "alpha": 0.4},
    }
    systems = {kind: {"id": kind, "config": config} | measured for kind, config in configs.items()}
    return {"measures": [m.to_json() for m in Safety().measures], "systems": systems}


def _printed(results: dict[str, Any], width: int) -> list[str]:
    out = io.StringIO()
    print_results(Console(width=width, file=out), results)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100, 120, 150, 200])
def test_no_word_and_no_number_is_broken(width: int) -> None:
    lines = _printed(_results(), width)
    assert max(map(len, lines)) <= width
    words = set(" ".join(lines).split())
    assert {"refusal", "(harmful)", "over-refusal", "degenerate", "original", "steering", "[0.25,", "0.75]"} <= words
    assert "80" in words


def test_a_run_of_before_is_shown_by_its_names() -> None:
    old = {"systems": _results()["systems"]}
    assert "utility loss" in "\n".join(_printed(old, 200))
    assert "accuracy" not in "\n".join(_printed(old, 200))


def test_a_loss_that_is_not_finite_is_said_in_its_cell() -> None:
    results = _results()
    results["systems"]["edit"]["utility_loss"] = {"mean": None, "low": None, "high": None, "n": 80, "not_finite": 3}
    assert "not finite in 3" in "\n".join(_printed(results, 200))


def test_nothing_in_a_cell_breaks_a_table() -> None:
    results = _results()
    results["systems"]["steering"]["config"] = {"system": "Be brief.\nAlways | refuse."}
    rows = markdown_table(results).splitlines()
    assert len(rows) == 2 + len(results["systems"]) + 1  # the header, and n below
    columns = {row.replace("\\|", "").count("|") for row in rows}
    assert len(columns) == 1
    assert "“Be brief. Always \\| refuse.”" in rows[3]


def _answered(*systems: str) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{kind} question {i}", "kind": kind} | {system: f"{system} says {i}" for system in systems}
        for kind in ("harmful", "benign")
        for i in range(4)
    ]


def test_answers_stand_beside_their_prompts_a_column_for_each_system() -> None:
    out = io.StringIO()
    print_answers(Console(width=200, file=out), _answered("base", "steering", "edit"))
    lines = out.getvalue().splitlines()
    cells = [[cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")] for line in lines]
    headers = [row for row in cells if row[0] == "prompt"]
    assert headers == [["prompt", "original", "steering", "edit"]] * 2
    rows = [row for row in cells if "question" in row[0]]
    assert rows == [
        [f"{kind} question {i}", f"base says {i}", f"steering says {i}", f"edit says {i}"]
        for kind in ("harmful", "benign")
        for i in range(3)
    ]


def test_the_rows_of_results_name_every_baseline() -> None:
    results = _results()
    measured = dict(results["systems"]["base"])
    results["systems"] = {
        "base": measured,
        "system": measured | {"config": {"system": "Refuse everything."}},
        "layer": measured | {"config": {"layer": 7, "gamma": 0.5}},
        "direction": measured | {"config": {"layer": 9, "gamma": 1.25}},
        "edit": results["systems"]["edit"],
    }
    text = "\n".join(_printed(results, 400))
    for name in (
        "original", "system prompt (“Refuse everything.”)", "one layer (layer 7, γ 0.5)",
        "direction (layer 9, γ 1.25)", "edit (ρ_attn 0.24, ρ_mlp off, α 0.4)",
    ):  # fmt: skip
        assert f"│ {name} " in text
