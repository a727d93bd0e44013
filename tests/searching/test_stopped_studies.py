"""A study that is stopped ends as an unbroken one, and what it tells meanwhile."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ruled_study import SPACE, a_recipe, an_engine, answer, losses, rounds, run, written
from runs import FakeEngine


class Slow(FakeEngine):
    """Takes its time, so that a kill finds it in the middle."""

    def generate(self, *args: Any, **more: Any) -> Any:
        time.sleep(0.02)
        return super().generate(*args, **more)

    def losses(self, *args: Any, **more: Any) -> Any:
        time.sleep(0.02)
        return super().losses(*args, **more)


# A kill costs nothing -----------------------------------------------------------------------------------------------

STUDIES: dict[str, dict[str, Any]] = {
    "grid": {},
    "grid, sanity and refine": {"sanity": 2, "refine": 2, "steering": {"low": 0.1, "high": 1.0}},
    "tpe": {**SPACE, "trials": 10, "at_once": 4, "sanity": 1},
}


@pytest.mark.parametrize("name", STUDIES)
def test_a_journal_cut_after_any_line_gives_the_table_of_an_unbroken_study(name: str, tmp_path: Path) -> None:
    recipe = a_recipe(**STUDIES[name])
    whole = tmp_path / "whole"
    expected = written(run(recipe, whole))
    assert written(run(recipe, tmp_path / "again")) == expected
    lines = whole.read_bytes().splitlines(keepends=True)
    assert (tmp_path / "again").read_bytes() == whole.read_bytes()
    assert len(lines) > 5
    for kept in range(len(lines) + 1):
        journal = tmp_path / f"cut-{kept}"
        # Half of the next line is there too, as a kill may leave it.
        rest = lines[kept][: len(lines[kept]) // 2] if kept < len(lines) else b""
        journal.write_bytes(b"".join(lines[:kept]) + rest)
        engine = an_engine()
        assert written(run(recipe, journal, engine)) == expected
        assert journal.read_bytes() == whole.read_bytes()
        if kept == len(lines):
            assert (engine.asked, engine.scored) == ([], [])


def test_a_study_writes_its_journal_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run(a_recipe(**STUDIES["tpe"]), tmp_path / "run" / "journal.jsonl")
    assert [file.name for file in tmp_path.rglob("*")] == ["run", "journal.jsonl"]
    for line in (tmp_path / "run" / "journal.jsonl").read_text(encoding="utf-8").splitlines():
        assert {"round", "what", "batch"} < set(json.loads(line))


@pytest.mark.parametrize("name", ["grid, sanity and refine", "tpe"])
def test_a_study_killed_at_any_moment_ends_with_the_same_table(name: str, tmp_path: Path) -> None:
    recipe = a_recipe(**STUDIES[name])
    whole, journal = tmp_path / "whole", tmp_path / "broken"
    expected = written(run(recipe, whole))
    draw, killed = random.Random(4), 0

    def lines() -> int:
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    for _ in range(4):
        before = lines()
        process = multiprocessing.get_context("fork").Process(target=run, args=(recipe, journal, Slow(answer, losses)))
        process.start()
        while lines() <= before + 1 and process.is_alive():
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))
        process.kill()
        process.join(60)
        assert process.exitcode in (-signal.SIGKILL, 0)
        assert lines() >= before
        killed += process.exitcode != 0
    assert killed >= 2
    assert written(run(recipe, journal)) == expected
    assert journal.read_bytes() == whole.read_bytes()


# What is told meanwhile ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDIES)
def test_the_studys_progress_only_rises_and_ends_at_its_total(name: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    recipe = a_recipe(**STUDIES[name])
    run(recipe, tmp_path / "j", progress=lambda done, total: seen.append((done, total)))
    done = [now for now, _ in seen]
    assert len({total for _, total in seen}) == 1
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1]
    assert len(set(done)) > 40


def test_a_grids_progress_counts_every_answer_and_every_loss(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    run(a_recipe(), tmp_path / "j", progress=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {(1 + 2 + 6) * (16 + 4)}


def test_the_study_so_far_is_told_after_each_round(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    recipe = a_recipe(**STUDIES["grid, sanity and refine"])
    study = run(
        recipe, tmp_path / "j", on_round=lambda study: seen.append((len(study.trials), study.evaluations["steering"]))
    )
    edits = {name: len(ids) for name, ids in rounds(study, "edit").items()}
    steered = len(rounds(study)["steering"])
    assert seen == [
        (1 + edits["0"], 0),
        (1 + edits["0"] + edits["1"], 0),
        (1 + edits["0"] + edits["1"] + steered, 16 * steered),
    ]
