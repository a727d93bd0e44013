"""A miniature of the torture: every part does a case or a few of it, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torture.__main__ import PARTS, main
from torture.ledger import Case, Ledger, Outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all parts find the same world."""
    return tmp_path_factory.mktemp("torture")


@pytest.mark.parametrize("part", PARTS)
def test_a_miniature_of_every_part_loses_nothing(part: str, folder: Path, capsys: Any) -> None:
    assert main(["--out", str(folder), "--scale", "0.0001", "--only", part]) == 0, capsys.readouterr().err
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    assert len({row["part"] for row in rows}) >= 1
    assert all(row["lost"] == [] and row["times"] for row in rows)
    assert not (folder / "bad").exists()


def test_a_torture_that_was_stopped_goes_on_and_what_is_lost_is_kept_and_counted(tmp_path: Path) -> None:
    done = []

    def run(_: Any, folder: Path) -> Outcome:
        done.append(folder)
        (folder / "left").touch()
        return Outcome("lost", "a byte") if len(done) == 2 else Outcome("kept")

    cases = [Case("part", "kind", number, run) for number in range(3)]
    assert Ledger(tmp_path).run(cases[:2], loud=False)
    with open(tmp_path / "cases.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": "part/kind/2", "pa')  # as a kill leaves it
    ledger = Ledger(tmp_path)
    assert not ledger.run(cases, seconds=-1, loud=False)
    assert ledger.run(cases, loud=False)
    assert len(done) == 3
    (row,) = ledger.summary()
    assert (row["times"], row["outcomes"], row["lost"]) == (3, {"kept": 2, "lost": 1}, ["part/kind/1: a byte"])
    assert (tmp_path / "bad/part-kind-1/left").is_file()
    assert "| part: kind | 3 | kept 2, lost 1 | 1 |" in ledger.write().read_text(encoding="utf-8")
