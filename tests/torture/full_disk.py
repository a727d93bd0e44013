"""c. The disk is full: from the n-th write, sync or rename on, by injection; and on real file systems of few kilobytes.

The command says so in one sentence. With room again, the same command ends as if nothing had been.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torture.ledger import Case, Outcome, miniature, times
from torture.warm import Child, Ended, command, say
from torture.world import World, contents, difference, half_written

# At full scale: the places of injection, of which every distinct one comes first, and the sizes of file systems.
COUNTS = {"run": 60, "apply": 120}
SIZES = {"run": 10, "apply": 20}
_ROOM = 2**16  # kilobytes, when there is room again


class Tap:
    """Counts what writes below a folder, and from some number on lets nothing through.

    Args:
        fail_at: the number of the first write that fails; None only counts.
    """

    def __init__(self, root: Path, fail_at: int | None):
        self.root, self.fail_at = str(root), fail_at
        self.log: list[str] = []

    def hit(self, what: str, path: Any) -> None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        if not str(path).startswith(self.root):
            return
        name = re.sub(r"\.\w{8}\.tmp", ".tmp", str(path).removeprefix(self.root))
        self.log.append(f"{what} {name}")
        if self.fail_at is not None and len(self.log) > self.fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def install(self) -> None:
        """In this process, for good."""
        import safetensors.torch

        for name in ("fsync", "fdatasync", "pwrite", "ftruncate", "mkdir"):
            setattr(os, name, self._tapped(name, getattr(os, name), 0))
        for name in ("rename", "replace"):
            setattr(os, name, self._tapped(name, getattr(os, name), 1))
        os.copy_file_range = self._tapped("copy_file_range", os.copy_file_range, 1)
        os.sendfile = self._tapped("sendfile", os.sendfile, 0)
        real_os_open, real_open, real_save = os.open, io.open, safetensors.torch.save_file

        def os_open(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & os.O_CREAT:
                self.hit("create", path)
            return real_os_open(path, flags, *rest, **more)

        def opened(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if isinstance(path, int) or not set(mode) & set("wax+"):
                return real_open(path, mode, *rest, **more)
            self.hit("open", path)
            return _Tapped(real_open(path, mode, *rest, **more), self, path)

        def save_file(tensors: Any, path: Any, metadata: Any = None) -> None:
            from safetensors import SafetensorError

            try:
                self.hit("save_file", path)
            except OSError:  # as the package says it
                text = "Error while serializing: I/O error: No space left on device (os error 28)"
                raise SafetensorError(text) from None
            real_save(tensors, path, metadata=metadata)

        os.open, io.open, builtins.open, safetensors.torch.save_file = os_open, opened, opened, save_file

    def _tapped(self, name: str, real: Any, at: int) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.hit(name, arguments[at])
            return real(*arguments, **options)

        return call


class _Tapped:
    """A file whose writes are counted."""

    def __init__(self, file: Any, tap: Tap, path: Any):
        self._file, self._tap, self._path = file, tap, path

    def write(self, data: Any) -> int:
        self._tap.hit("write", self._path)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)


def cases(world: World, scale: float) -> Iterator[Case]:
    kinds = ["apply"] if miniature(scale) else list(COUNTS)
    for kind in kinds:
        for number, place in enumerate(_places(world, kind)[: len(times(COUNTS[kind], scale))]):

            def injected(draw: random.Random, folder: Path, kind: str = kind, place: int = place) -> Outcome:
                first = _tapped_run(world, kind, folder, place)
                return _gone_on(world, kind, first, folder / "out", folder)

            yield Case("full disk", f"from the n-th write of {kind}", number, injected)
    if not _can_mount(world.folder):
        return
    for kind in kinds:
        many = times(SIZES[kind], scale)
        for number in many:

            def mounted(
                draw: random.Random, folder: Path, kind: str = kind, share: float = number / len(many)
            ) -> Outcome:
                return _mounted(world, kind, share, folder)

            yield Case("full disk", f"a small file system under {kind}", number, mounted)


def _arguments(world: World, kind: str, out: Path) -> tuple[Any, ...]:
    if kind == "run":
        return "run", world.recipe, "--quiet", "--out", out
    return "apply", world.base, world.file("edit"), "--quiet", "--to", out


def _tapped_run(world: World, kind: str, folder: Path, fail_at: int | None, log: Path | None = None) -> Ended:
    # Such a place has a folder of its own, since what the child prints must go on.
    (folder / "disk").mkdir()
    out = folder / "disk" / "out"

    def work() -> int:
        tap = Tap(folder / "disk", fail_at)
        write = Path.write_bytes
        tap.install()
        code = command(*_arguments(world, kind, out))()
        if log is not None:
            write(log, json.dumps(tap.log).encode())
        return code

    ended = Child(work, folder).wait()
    for path in (folder / "disk").iterdir():
        path.rename(folder / path.name)
    (folder / "disk").rmdir()
    return ended


def _places(world: World, kind: str) -> list[int]:
    """Numbers of writes: the first of each distinct one, then the others in a seeded order."""
    folder = world.folder / "count"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    ended = _tapped_run(world, kind, folder, None, world.folder / "log.json")
    assert ended.code == 0, ended.err
    log = json.loads((world.folder / "log.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    first = {line: number for number, line in reversed(list(enumerate(log)))}
    distinct = sorted(first.values())
    others = [number for number in range(len(log)) if number not in set(distinct)]
    draw = random.Random(0)
    draw.shuffle(distinct)
    draw.shuffle(others)
    return distinct + others


def _gone_on(world: World, kind: str, first: Ended, out: Path, folder: Path) -> Outcome:
    """After the first command met a full disk: what it left, and what the same command makes of it."""
    expected, leave = (world.whole, None) if kind == "run" else (world.edited, set())
    if bad := first.complaint():
        return Outcome("neither", bad)
    if kind == "run" and (bad := half_written(out, expected)):
        return Outcome("half written", bad)
    if kind == "apply" and out.exists() and (bad := difference(out, expected, set())):
        return Outcome("half written", bad)
    if not (kind == "apply" and out.exists()):
        again = say(folder, *_arguments(world, kind, out))
        if again.code:
            return Outcome("not resumed", again.err[-300:])
    bad = difference(out, expected, *([] if leave is None else [leave]))
    left = sorted(path.name for path in out.parent.iterdir() if path != out)
    word = "refused, then the same bytes" if first.code == 2 else "done all the same"
    return Outcome(word, bad or (f"left behind: {left}" if left else ""))


def _can_mount(folder: Path) -> bool:
    place = folder / "mounted"
    place.mkdir(exist_ok=True)
    if not _mount(place, "size=64k"):
        return False
    subprocess.run(["umount", str(place)], check=True)
    return True


def _mount(place: Path, options: str) -> bool:
    if shutil.which("mount") is None:
        return False
    tried = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "torture", str(place)], capture_output=True)
    return tried.returncode == 0


def _mounted(world: World, kind: str, share: float, folder: Path) -> Outcome:
    expected = world.whole if kind == "run" else world.edited
    needed = sum(len(data) + 4096 for data in contents(expected, set()).values()) // 1024
    place = folder / "disk"
    place.mkdir()
    if not _mount(place, f"size={8 + round(share * needed)}k"):
        return Outcome("neither", "it cannot be mounted")
    try:
        first = say(folder, *_arguments(world, kind, place / "out"))
        assert _mount(place, f"remount,size={_ROOM}k")
        return _gone_on(world, kind, first, place / "out", folder)
    finally:
        subprocess.run(["umount", str(place)], check=True)
