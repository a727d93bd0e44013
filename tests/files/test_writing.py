"""Files are written whole or not at all, and what cannot be written is said in one sentence."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from steer2edit.errors import FileError
from steer2edit.files.writing import (
    append_jsonl,
    clear_temporaries,
    make_folder,
    replacing,
    replacing_folder,
    write_json,
    write_text,
)


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("mine", encoding="utf-8")
    return folder / "file" / "below"


def in_the_kernels_own(folder: Path) -> Path:
    if not Path("/proc").is_dir():
        pytest.skip("there is no /proc here")
    return Path("/proc/nowhere")


@pytest.mark.parametrize("place", [below_a_file, in_the_kernels_own])
def test_where_nothing_can_be_written_one_sentence_says_so(place: Callable[[Path], Path], tmp_path: Path) -> None:
    nowhere = place(tmp_path)
    for write in (
        lambda: make_folder(nowhere),
        lambda: write_text(nowhere / "a.txt", "a"),
        lambda: write_json(nowhere.parent / "a.json", 1),
        lambda: replacing_folder(nowhere / "a", ours="a").__enter__(),
    ):
        with pytest.raises(FileError, match=r"nothing can be written to .*\)\. Give another path\.") as caught:
            write()
        assert str(nowhere.parent) in caught.value.what
        assert "\n" not in str(caught.value)


def test_a_folder_that_is_replaced_is_never_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between the two renames: by Ctrl-C, and by a kill, after which the next process tidies up."""
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "note").write_text("old", encoding="utf-8")
    rename, renames = Path.replace, []

    def stopped(self: Path, target: Path) -> Path:
        renames.append(target)
        if len(renames) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt), replacing_folder(folder, ours="note") as temporary:
        (temporary / "note").write_text("new", encoding="utf-8")
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["kept", "kept/note"]
    rename(folder, tmp_path / ".kept.abcd1234.tmp.old")
    (tmp_path / ".kept.abcd1234.tmp").mkdir()
    clear_temporaries(tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["kept", "kept/note"]
    assert (folder / "note").read_text(encoding="utf-8") == "old"


def test_a_full_disk_is_left_for_the_caller_to_explain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left"):
        make_folder(tmp_path / "new")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    def stopped() -> None:
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise KeyboardInterrupt

    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {"a.txt": "old"}


def test_numbers_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"loss": None})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "loss": null\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_jsonl(tmp_path / "journal.jsonl", {"loss": float("inf")})


def test_only_what_a_kill_left_is_cleared(tmp_path: Path) -> None:
    kept = ["a.tmp", ".a.txt", ".a.tmp.txt", "a.txt"]
    for name in [".a.txt.abcd1234.tmp.txt", ".a.abcd1234.tmp", *kept]:
        (tmp_path / name).write_text("", encoding="utf-8")
    (tmp_path / ".b.abcd1234.tmp").mkdir()
    clear_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


def test_a_file_is_synced_before_it_takes_the_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []
    fsync, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(("sync", os.fstat(fd).st_ino)), fsync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (done.append(("rename", a.stat().st_ino)), rename(a, b))[1])
    write_text(tmp_path / "a.txt", "a")
    file = (tmp_path / "a.txt").stat().st_ino
    assert done == [("sync", file), ("rename", file), ("sync", tmp_path.stat().st_ino)]
    done.clear()
    with replacing_folder(tmp_path / "b", ours="note") as temporary:
        (temporary / "note").write_text("b", encoding="utf-8")
    note, folder = ((tmp_path / place).stat().st_ino for place in ("b/note", "b"))
    assert done == [("sync", note), ("rename", folder), ("sync", tmp_path.stat().st_ino)]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_what_is_written_has_the_mode_that_the_umask_gives(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        write_text(tmp_path / "a.txt", "a")
        with replacing_folder(tmp_path / "b", ours="note") as temporary, replacing(temporary / "note") as note:
            note.write_text("b", encoding="utf-8")
            (temporary / "plain").touch(0o600)
    finally:
        os.umask(old)
    for place in ("a.txt", "b/note", "b/plain"):
        assert stat.S_IMODE((tmp_path / place).stat().st_mode) == 0o666 & ~mask, place
