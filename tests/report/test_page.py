"""The table of results on a terminal: it breaks between words alone, whatever the width."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from steer2edit.behaviours.safety import Safety
from steer2edit.report.page import print_results


def _results() -> dict[str, Any]:
    cell = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 80}
    none = {"mean": None, "low": None, "high": None, "n": 0}
    measured = {m.name: none if m.name.startswith("accuracy") else cell for m in Safety.measures()}
    configs: dict[str, Any] = {
        "base": {},
        "steering": {"gamma": 0.3182},
        "edit": {"rho_attn": 0.24, "rho_mlp": None, "alpha": 0.4},
    }
    systems = {kind: {"id": kind, "config": config} | measured for kind, config in configs.items()}
    return {"measures": [m.to_json() for m in Safety.measures()], "systems": systems}


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
