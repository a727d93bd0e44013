"""The suite `all` of a tiny model, and the tables that a suite leaves."""

from __future__ import annotations

import csv
from pathlib import Path

from steer2edit.paper.plan import SuitePlan, plan_suite

# Answers to attacks are a hundred tokens long at least: one prompt of each is enough here.
FAST = ["evaluation.resamples=60"]


def everything(model: str, out: Path) -> SuitePlan:
    return plan_suite("all", out, model=model, profile="smoke", changes=FAST)


NAMES = ("safety", "truthfulness", "efficiency")


def rows_of(out: Path, part: str) -> list[dict[str, str]]:
    with open(out / "tables" / f"{part}.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tables_of(out: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted((out / "tables").iterdir())}
