"""The export of a checkpoint that is stopped, by a kill or a full disk: what is left, and that it goes on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import steer2edit as s2e
from checkpoint_cases import SHARDED, Case, contents, make_case, names, random_edit
from conftest import make_pico
from steer2edit.artefacts.checkpoint import JOURNAL
from steer2edit.errors import FileError, ModelError


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """A sharded bf16 base with a tokenizer, and an edit of all of its sites."""
    return make_case(tmp_path)


def journal(partial: Path) -> list[dict[str, Any]]:
    """Its whole lines."""
    if not (partial / JOURNAL).is_file():
        return []
    data = (partial / JOURNAL).read_bytes()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def as_left(file: Path) -> tuple[int, int]:
    return file.stat().st_ino, file.stat().st_mtime_ns


# Killed -------------------------------------------------------------------------------------------------------------

# Imports everything once, then forks a process for each line that it is given and says how that one ended.
SERVER = """
import os, sys
import torch
torch.set_num_threads(1)
import steer2edit
from steer2edit.artefacts.checkpoint import export_checkpoint
from steer2edit.edits import load_any
base, edit = sys.argv[1], load_any(sys.argv[2])
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        torch.set_num_threads(2)
        code = 1
        try:
            export_checkpoint(base, edit, line.strip())
            code = 0
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Exporter:
    """A process that exports in children of its own, which can be killed at any moment."""

    def __init__(self, base: Path, edit: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(base), str(edit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def export(self, out: Path, until: Callable[[], bool] | None = None) -> int:
        """How the child ended: 0, or the number of the signal that it got when `until` came true."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{out}\n")
        self.process.stdin.flush()
        pid = int(self._line())
        if until is not None:
            while not until():
                time.sleep(0.001)
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(pid, signal.SIGKILL)
        return int(self._line())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0


@pytest.fixture
def large(tmp_path: Path) -> Iterator[tuple[Path, Exporter]]:
    """A bf16 base of about 80 MB in a dozen shards, and a process that exports it."""
    model = make_pico(
        "llama",
        dtype=torch.bfloat16,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        initializer_range=0.02,
    )
    base = tmp_path / "base"
    model.save_pretrained(base, max_shard_size="8MB")
    (base / "notes").mkdir()
    (base / "notes" / "read me.txt").write_text("ünchanged")
    random_edit(model).save(tmp_path / "edit.safetensors")
    assert sum(f.stat().st_size for f in base.glob("*.safetensors")) > 60e6
    assert len(list(base.glob("*.safetensors"))) >= 8
    exporter = Exporter(base, tmp_path / "edit.safetensors")
    yield base, exporter
    exporter.close()


@pytest.mark.slow
def test_an_export_that_was_killed_goes_on_to_the_same_bytes(large: Any, tmp_path: Path) -> None:
    base, exporter = large
    here = tmp_path / "here"
    here.mkdir()
    out, partial = here / "out", here / ".out.partial"
    before = contents(base)
    assert exporter.export(tmp_path / "warm") == 0
    started = time.monotonic()
    assert exporter.export(tmp_path / "expected") == 0
    usual = time.monotonic() - started
    expected = contents(tmp_path / "expected")
    shards = sorted(name for name in expected if name.endswith(".safetensors"))

    def at(moment: float) -> Callable[[], bool]:
        start = time.monotonic()
        return lambda: time.monotonic() - start >= moment

    def once(count: int) -> Callable[[], bool]:
        return lambda: len(journal(partial)) > count or out.exists()

    draw = random.Random(4)
    kills: list[Any] = [("moment", draw.uniform(0.0, usual)) for _ in range(14)]
    kills += [("shards", count) for count in (1, 2, 3, len(shards) // 2, len(shards) - 2, len(shards) - 1)]
    killed, between = 0, 0
    for how, when in kills:
        ended = exporter.export(out, at(when) if how == "moment" else once(when))
        assert ended in (0, signal.SIGKILL)
        killed += ended != 0
        assert names(here) in (set(), {".out.partial"}, {"out"})
        lines = journal(partial)
        whole = [line["file"] for line in lines[1:]]
        between += 0 < len(whole) < len(shards)
        for name in whole:
            assert (partial / name).read_bytes() == expected[name]
        left = {name: as_left(partial / name) for name in whole}
        if not out.exists():
            assert exporter.export(out) == 0
        assert names(here) == {"out"}
        assert contents(out) == expected
        assert {name: as_left(out / name) for name in whole} == left  # a whole shard is not written again
        shutil.rmtree(out)
    assert killed >= 12
    assert between >= 4
    assert contents(base) == before


@pytest.mark.slow
def test_an_export_that_is_killed_again_and_again_comes_to_its_end(large: Any, tmp_path: Path) -> None:
    _, exporter = large
    assert exporter.export(tmp_path / "expected") == 0
    here = tmp_path / "here"
    here.mkdir()
    out, partial = here / "out", here / ".out.partial"
    kills = 0
    while not out.exists():
        there = len(journal(partial))
        exporter.export(out, lambda there=there: len(journal(partial)) > max(there, 1) or out.exists())
        kills += 1
        assert kills < 30
    if partial.exists():  # killed between the last shard and the end
        assert exporter.export(out) == 0
    assert kills >= 3
    assert contents(out) == contents(tmp_path / "expected")
    assert names(here) == {"out"}


class Stopped(BaseException):
    """As a kill in this process: nothing of ours catches it."""


def stop_after(monkeypatch: pytest.MonkeyPatch, case: Case, out: Path, shards: int, hashes: bool = True) -> Path:
    """Stops an export once so many shards are whole; gives the folder that it leaves."""
    from steer2edit.artefacts import checkpoint

    real, written = checkpoint.append_jsonl, []

    def append(path: Path, row: dict[str, Any]) -> None:
        if "file" in row and len(written) == shards:
            raise Stopped
        real(path, row)
        written.extend([row["file"]] if "file" in row else [])

    monkeypatch.setattr(checkpoint, "append_jsonl", append)
    with pytest.raises(Stopped):
        s2e.export_checkpoint(case.base, case.edit, out, hashes=hashes)
    monkeypatch.undo()
    partial = out.with_name(f".{out.name}.partial")
    assert [line["file"] for line in journal(partial)[1:]] == written
    return partial


def test_only_the_shards_that_are_not_whole_are_written_again(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "expected")
    partial = stop_after(monkeypatch, case, tmp_path / "out", 2)
    whole = {line["file"]: as_left(partial / line["file"]) for line in journal(partial)[1:]}
    assert names(tmp_path) == {"base", "expected", ".out.partial"}
    capsys.readouterr()
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert "2 shards are complete" in capsys.readouterr().err
    assert {name: as_left(tmp_path / "out" / name) for name in whole} == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")  # the manifest too: hashes of all shards


def test_hashes_that_a_stopped_export_did_not_make_are_made(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "expected")
    stop_after(monkeypatch, case, tmp_path / "out", 2, hashes=False)
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize("what", ["other edit", "touched", "grown", "new file"])
def test_what_another_export_left_is_not_gone_on_with(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, what: str
) -> None:
    partial = stop_after(monkeypatch, case, tmp_path / "out", 2)
    kept = journal(partial)[1]["file"]
    (partial / "stranger.txt").write_text("of the other export")
    edit = case.edit
    if what == "other edit":
        edit = edit.with_strength(0.5)
    elif what == "touched":
        os.utime(case.base / kept, ns=(1, 1))
    elif what == "grown":
        (case.base / "tokenizer_config.json").write_text("{}  ")
    else:
        (case.base / "new.txt").write_text("new")
    capsys.readouterr()
    s2e.export_checkpoint(case.base, edit, tmp_path / "out")
    assert "resuming" not in capsys.readouterr().err
    s2e.export_checkpoint(case.base, edit, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert "stranger.txt" not in names(tmp_path / "out")


def test_a_shard_of_new_weights_under_the_old_name_is_read_again(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = stop_after(monkeypatch, case, tmp_path / "out", 3)
    kept = journal(partial)[1]["file"]
    tensors = load_file(case.base / kept)
    save_file({name: -tensor for name, tensor in tensors.items()}, case.base / kept, metadata={"format": "pt"})
    edit = case.edit
    edited = {s.site.tensor for s in edit.edited().values()}
    if edited & tensors.keys():
        with pytest.raises(ModelError, match="not the base"):
            s2e.export_checkpoint(case.base, edit, tmp_path / "out")
        assert names(tmp_path) == {"base"}
    else:
        s2e.export_checkpoint(case.base, edit, tmp_path / "out")
        assert contents(tmp_path / "out")[kept] == contents(case.base)[kept]


def test_a_call_with_another_base_leaves_what_a_kill_left_to_go_on_with(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    stop_after(monkeypatch, case, tmp_path / "out", 2)
    make_pico("llama", dtype=torch.bfloat16, seed=1).save_pretrained(tmp_path / "stranger", max_shard_size=SHARDED)
    with pytest.raises(ModelError, match="not the base"):
        s2e.export_checkpoint(tmp_path / "stranger", case.edit, tmp_path / "out")
    capsys.readouterr()
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert "2 shards are complete" in capsys.readouterr().err


def test_a_file_that_a_kill_left_half_written_does_not_come_along(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "expected")
    partial = stop_after(monkeypatch, case, tmp_path / "out", 2)
    (partial / ".manifest.json.q5jgd_4n.tmp.json").write_text('{"kind"')  # as `write_json` leaves it
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


# The disk is full ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_during_an_export_is_told_in_one_sentence(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_pico("llama", hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    model.save_pretrained(tmp_path / "base", max_shard_size="1MB")
    edit = random_edit(model)
    before = contents(tmp_path / "base")
    assert sum(map(len, before.values())) > 3 * 2**20
    with pytest.raises(FileError, match=r"too little room .*MB free, .*MB needed, 1\.0 MB of them as a reserve"):
        s2e.export_checkpoint(tmp_path / "base", edit, small_disk / "out")
    assert names(small_disk) == set()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)  # another process fills it meanwhile
    with pytest.raises(FileError, match=r"^the disk is full: .*out was not written") as caught:
        s2e.export_checkpoint(tmp_path / "base", edit, small_disk / "out")
    assert "\n" not in str(caught.value)
    assert names(small_disk) <= {".out.partial"}
    assert contents(tmp_path / "base") == before


@pytest.mark.parametrize("call", ["pwrite", "copy_file_range", "fsync"])
def test_no_space_left_is_told_whatever_call_says_it_and_the_export_goes_on_later(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "expected")
    before = contents(case.base)
    real, calls = getattr(os, call), []

    def full(*arguments: Any) -> Any:
        calls.append(call)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(FileError, match=r"the disk is full: .*out was not written .*run it again"):
        s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    monkeypatch.undo()
    assert names(tmp_path) == {"base", "expected", ".out.partial"}
    assert contents(case.base) == before
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_no_space_left_for_the_small_files_is_told_too(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(FileError, match="the disk is full"):
        s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert names(tmp_path) == {"base", ".out.partial"}


def test_too_little_room_is_refused_before_anything_is_written(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(f.stat().st_size for f in case.base.rglob("*"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    opened: list[Any] = []
    real = os.open

    def spy(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        opened.append((path, flags))
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", spy)
    with pytest.raises(FileError, match="the disk has too little room for the edited checkpoint"):
        s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert names(tmp_path) == {"base"}
    assert not [path for path, flags in opened if str(path).endswith(".safetensors") and flags & os.O_RDWR]


# Progress -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [None, 2], ids=["from the start", "gone on with"])
def test_progress_rises_to_the_whole(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int | None
) -> None:
    total = sum(f.stat().st_size for f in case.base.glob("*.safetensors"))
    there = 0
    if after is not None:
        partial = stop_after(monkeypatch, case, tmp_path / "out", after)
        there = sum(line["size"] for line in journal(partial)[1:])
    expected: list[tuple[int, int]] = []
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out", progress=lambda *now: expected.append(now))
    assert {whole for _, whole in expected} == {total}
    done = [now for now, _ in expected]
    assert done == sorted(done)
    assert done[0] > there
    assert done[-1] == total
