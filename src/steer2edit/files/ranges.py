"""Ranges of a file's bytes: read, written, and copied to the same place in another file, without its holes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from ..errors import FileError


def memory_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's own memory, as bytes."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data).cast("B")


def read_range(file: int, offset: int, into: memoryview) -> None:
    """Fills `into` from a file's offset. Raises FileError if the file ends before."""
    got = 0
    while got < len(into):
        more = os.preadv(file, [into[got:]], offset + got)
        if not more:
            raise FileError(
                "the base became shorter while it was read", got=f"{got} of {len(into)} bytes", fix="Try again."
            )
        got += more


def write_range(file: int, offset: int, data: memoryview) -> None:
    put = 0
    while put < len(data):
        put += os.pwrite(file, data[put:], offset + put)


def copy_range(source: int, copy: int, offset: int, count: int) -> None:
    """Copies bytes of one file to the same place in another, inside the kernel if possible.

    A hole of the source stays a hole: the caller gives the copy its length.
    """
    for start, end in stored_ranges(source, offset, offset + count):
        _copy_data(source, copy, start, end - start)


def _copy_data(source: int, copy: int, offset: int, count: int) -> None:
    while count:
        try:
            copied = os.copy_file_range(source, copy, count, offset, offset)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            copied = 0  # not between these file systems, or not in this kernel
        if not copied:
            memory = memoryview(bytearray(min(count, 2**23)))
            for at in range(offset, offset + count, len(memory)):
                part = memory[: min(len(memory), offset + count - at)]
                read_range(source, at, part)
                write_range(copy, at, part)
            return
        offset, count = offset + copied, count - copied


def stored_ranges(file: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of a range that the disk holds; the rest are holes, which read as zeros."""
    at = start
    while at < end:
        try:
            data = os.lseek(file, at, os.SEEK_DATA)
            hole = os.lseek(file, data, os.SEEK_HOLE)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENXIO:  # no data from here to the end of the file
                return
            data, hole = at, end  # this file system does not tell
        if data >= end:
            return
        yield data, min(hole, end)
        at = hole


def stored_size(path: Path) -> int:
    """How many of a file's bytes the disk holds: less than its size if it has holes."""
    file = os.open(path, os.O_RDONLY)
    try:
        return sum(end - start for start, end in stored_ranges(file, 0, os.fstat(file).st_size))
    finally:
        os.close(file)


def gaps(taken: Sequence[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file of `size` bytes that lie between those that are taken.

    >>> list(gaps([(6, 8), (2, 4)], 10))
    [(0, 2), (4, 6), (8, 10)]
    """
    at = 0
    for start, end in sorted(taken):
        if start > at:
            yield at, start
        at = end
    if size > at:
        yield at, size
