"""A kill costs a run nothing, and one directory belongs to one process."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from run_files import UNDRAWN, _bytes
from runs import tiny_recipe
from steer2edit.errors import FileError
from steer2edit.files.reading import read_json, read_jsonl
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import run_all, run_stage
from steer2edit.recipe import Recipe

pytestmark = pytest.mark.usefixtures("quiet")


def _in_another_process(folder: Path, recipe: Recipe, syncs: int | None) -> Any:
    """Starts a run; with `syncs` it kills itself when it has synced so many times, mostly before it renames a file."""

    def work() -> None:
        left, sync = [syncs], os.fsync

        def counted(descriptor: int) -> None:
            sync(descriptor)
            if left[0] is not None:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = counted
        run_all(Run(folder, recipe))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def _assert_same_in_the_end(folder: Path, tiny_run: Path, recipe: Recipe) -> None:
    run_all(Run(folder, recipe))
    assert _bytes(folder, UNDRAWN) == _bytes(tiny_run, UNDRAWN)
    assert [file for file in folder.rglob("*") if ".tmp" in file.name] == []
    journals = [str(f.relative_to(tiny_run)) for f in tiny_run.rglob("journal-*")]
    assert _bytes(folder, journals) == _bytes(tiny_run, journals)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("syncs", [2, *random.Random(6).sample(range(5, 45), 4)])
def test_a_run_killed_while_it_writes_ends_with_the_same_bytes(
    syncs: int, tiny_run: Path, recipe: Recipe, tmp_path: Path
) -> None:
    process = _in_another_process(tmp_path / "run", recipe, syncs)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    _assert_same_in_the_end(tmp_path / "run", tiny_run, recipe)


@pytest.mark.usefixtures("undrawn")
def test_what_a_kill_leaves_is_cleared_by_the_next_run(tiny_run: Path, recipe: Recipe, tmp_path: Path) -> None:
    left = []
    for syncs in range(1, 9):
        _in_another_process(tmp_path / "run", recipe, syncs).join(60)
        left.append([file.name for file in tmp_path.rglob("*.tmp*")])
    assert any(left)
    assert all(len(names) <= 1 for names in left)
    _assert_same_in_the_end(tmp_path / "run", tiny_run, recipe)


@pytest.mark.usefixtures("undrawn")
def test_a_run_killed_at_any_moment_ends_with_the_same_bytes(tiny_run: Path, recipe: Recipe, tmp_path: Path) -> None:
    for seconds in (0.1, 0.25, 0.5):
        process = _in_another_process(tmp_path / "run", recipe, None)
        time.sleep(seconds)
        process.kill()
        process.join(60)
        assert process.exitcode in (-signal.SIGKILL, 0)
    _assert_same_in_the_end(tmp_path / "run", tiny_run, recipe)


def test_files_of_others_that_look_like_temporary_ones_are_left_alone(run_copy: Path, recipe: Recipe) -> None:
    theirs = [
        run_copy / ".notes.tmp",
        run_copy / ".backup" / ".a.json.abcdefgh.tmp",
        run_copy / "mine.json.abcdefgh.tmp",
    ]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text("theirs", encoding="utf-8")
    run_all(Run(run_copy, recipe))
    assert all(path.is_file() for path in theirs)


# One directory, one process -----------------------------------------------------------------------------------------


def test_a_second_process_in_a_run_directory_gets_one_sentence(run_copy: Path, recipe: Recipe) -> None:
    before = {file: file.read_bytes() for file in run_copy.rglob("*") if file.is_file()}
    other = tiny_recipe(recipe.model.name, search__rho_attn=[0.2])
    with Run(run_copy, recipe).working():
        for work in (
            lambda: run_all(Run(run_copy, other)),
            lambda: run_stage(Run(run_copy, recipe), "report", "tiny.yaml"),
        ):
            with pytest.raises(FileError, match="another steer2edit process is working in this run directory"):
                work()
    assert {file: file.read_bytes() for file in run_copy.rglob("*") if file.is_file()} == before


def test_traces_of_a_stage_that_was_killed_are_not_taken_for_hand_made(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            run_stage(Run(tmp_path, recipe), "traces", "tiny.yaml")
    more = tiny_recipe(recipe.model.name, data__probe={"harmful": 5, "benign": 5})
    run_stage(Run(tmp_path, more), "traces", "tiny.yaml")
    assert "by_hand" not in read_json(tmp_path / "manifest.json")["stages"]["traces"]
    assert len(read_jsonl(tmp_path / "traces.jsonl")) > 10
