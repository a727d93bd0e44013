"""A miniature of the torture: every part does a case or a few of it, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torture.__main__ import PARTS, main
from torture.ledger import Case, Ledger, Outcome
from torture.world import make_world


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


def test_two_processes_share_the_cases_and_their_counts_are_one_table(tmp_path: Path, capsys: Any) -> None:
    arguments = ["--out", str(tmp_path), "--scale", "0.0001", "--only", "texts", "--lanes", "2"]
    assert main(arguments) == 0, capsys.readouterr()
    counted = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    journals = sorted(tmp_path.glob("cases-*.jsonl"))
    ids = [json.loads(line)["id"] for path in journals for line in path.read_text(encoding="utf-8").splitlines()]
    every = [case.id for case in PARTS["texts"].cases(make_world(tmp_path / "world"), 0.0001)]
    assert sorted(ids) == sorted(every)
    assert sum(row["times"] for row in counted) == len(every)


def test_what_one_process_has_taken_another_one_leaves(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path), Ledger(tmp_path, lane=1)
    done: list[int] = []

    def case(number: int) -> Case:
        def run(_: Any, folder: Path) -> Outcome:
            done.append(number)
            if number == 0:
                assert second.run(cases, loud=False)  # while the first one is at its first case
            return Outcome("kept")

        return Case("part", "kind", number, run)

    cases = [case(number) for number in range(3)]
    assert first.run(cases, loud=False)
    assert done == [0, 1, 2]
    assert len(first.rows) == 1
    assert len(second.rows) == 2
    assert len(Ledger(tmp_path).rows) == 3


def test_a_torture_that_was_stopped_goes_on_and_what_is_lost_is_kept_and_counted(tmp_path: Path) -> None:
    done = []

    def run(_: Any, folder: Path) -> Outcome:
        done.append(folder)
        (folder / "left").touch()
        return Outcome("lost", "a byte") if len(done) == 2 else Outcome("kept")

    cases = [Case("part", "kind", number, run) for number in range(3)]
    assert Ledger(tmp_path).run(cases[:2], loud=False)
    with open(tmp_path / "cases-0.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": "part/kind/2", "pa')  # as a kill leaves it
    ledger = Ledger(tmp_path)
    assert not ledger.run(cases, seconds=-1, loud=False)
    assert ledger.run(cases, loud=False)
    assert len(done) == 3
    (row,) = ledger.summary()
    assert (row["times"], row["outcomes"], row["lost"]) == (3, {"kept": 2, "lost": 1}, ["part/kind/1: a byte"])
    assert (tmp_path / "bad/part-kind-1/left").is_file()
    assert "| part: kind | 3 | kept 2, lost 1 | 1 |" in ledger.write().read_text(encoding="utf-8")
