"""Writing files completely or not at all.

A write goes to a temporary name in the same folder, is synced, and is renamed over the old file, so a reader never sees
half a file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import FileError, is_full
from .seals import sealed

# Ours, and those of the safetensors package, which writes to a temporary file of its own.
_TEMPORARY = re.compile(r"\..+\.\w{8}\.tmp(\.\w+)?|\.tmp\w{6}")
# What `replacing_folder` has moved aside for a new one.
_MOVED = re.compile(r"\.(.+)\.\w{8}\.tmp\.old")


def make_folder(path: str | Path) -> None:
    """Makes a folder and those above it, where they are missing.

    Raises:
        FileError: nothing can be written there.
    """
    with _in_one_sentence(Path(path)):
        Path(path).mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _in_one_sentence(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_full(error):  # the callers say what a full disk means for them
            raise
        raise FileError(f"nothing can be written to {folder}", got=error.strerror, fix="Give another path.") from None


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path. On a clean exit the file written there is synced and renamed to `path`.

    Raises:
        FileError: nothing can be written to its folder.
    """
    path = Path(path)
    make_folder(path.parent)
    with _in_one_sentence(path.parent):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".tmp{path.suffix}", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | Path, ours: str) -> Iterator[Path]:
    """Like `replacing`, for a folder: its files are synced, then the folder replaces the old one.

    Args:
        ours: a file that shows that steer2edit wrote the old folder.

    Raises:
        FileError: the old folder holds other things, or nothing can be written beside it.
    """
    path = Path(path)
    if path.exists() and not (path / ours).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise FileError(f"{path} holds other things", got=f"no {ours} in it", fix="Give a new or an empty folder.")
    make_folder(path.parent)
    with _in_one_sentence(path.parent):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    old = temporary.with_name(temporary.name.removesuffix(".tmp") + ".tmp.old")
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())
                sync(file)
        if path.exists():
            path.replace(old)
        try:
            temporary.replace(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise FileError(
                "another process has just written this folder", got=path, fix="Give another folder, or write it again."
            ) from None
        sync(path.parent)
    finally:
        if old.exists() and not path.exists():  # stopped between the two renames
            old.replace(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def claimed(folder: Path, output: Path) -> Iterator[None]:
    """Makes a folder, if there is none, in which no other process works while the context lasts.

    The lock is on the folder itself, so that nothing is left of it: not after a kill, and not after a rename. On
    Windows nothing keeps another process out.

    Args:
        output: what is written there, for the error.

    Raises:
        FileError: another process works there, or has just ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows has no locks on folders
        yield
        return
    taken = FileError(
        "another steer2edit process is writing this output", got=output, fix="Wait for it, or give another output."
    )
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        raise taken from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken from None
        except OSError as error:  # some network file systems know no locks
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                raise
        if not folder.is_dir() or not os.path.samestat(os.fstat(handle), folder.stat()):
            raise taken
        yield
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def append_jsonl(path: str | Path, row: Mapping[str, Any]) -> None:
    """Adds one line, with a checksum, and syncs it. A kill in the middle leaves an incomplete line, which
    `read_journal` removes."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(sealed(json.dumps(row, ensure_ascii=False, allow_nan=False)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def clear_temporaries(folder: str | Path) -> None:
    """Removes what `replacing` and `replacing_folder` left in a folder when their process was killed.

    A folder that was moved aside, and for which no new one came, goes back to its place.
    """
    for path in [*Path(folder).glob(".*.tmp*"), *Path(folder).glob(".tmp*")]:
        moved = _MOVED.fullmatch(path.name)
        if moved and not (place := path.with_name(moved[1])).exists():
            path.replace(place)
        elif _TEMPORARY.fullmatch(path.name):
            remove(path)


def remove(path: str | Path) -> None:
    """Removes a file or a folder, if there is one."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
