"""Writing one file of an edited checkpoint: what the edit changes is patched, all else is copied.

No file is held in memory. Copying, patching and syncing run in threads of their own, on the same file.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileError
from ..method.change import Change, Part, SiteEdit, not_finite, patched
from ..method.fingerprint import differing, from_reading, signs
from ..method.presence import Presence
from ..method.scores import Reading, RowSums
from ..method.site import Site

# Small, since a file system lets one writer at a time into a file, and patches should not wait long for a copy.
_CHUNK = 4 * 2**20
_FLUSH = getattr(os, "fdatasync", os.fsync)
_SYNC_EVERY = 256 * 2**20

Finding = dict[str, Any]
Hashes = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Piece:
    """One site's bytes in a file."""

    change: Change | None  # None for a site that is only checked
    parts: tuple[SiteEdit | None, ...]  # the site in each of the edits
    tensor: str
    name: str  # the tensor's, with the expert's number if it holds several
    dtype: torch.dtype
    start: int
    end: int
    shape: tuple[int, int]  # in the file: [d, n·c], or [n·c, d] if `turned`
    turned: bool

    @property
    def site(self) -> Site:
        return next(part.site for part in self.parts if part is not None)


class Shard:
    """One file, copied and patched at the same time.

    Args:
        name: of the file, in the base's folder and in the new one.
        pieces: the sites in it.
        parts: the edits that are written.
        hashes: whether to compute the SHA-256 of each edited tensor, before and after.
        count: called with the number of bytes that were written, from several threads.
        stopped: returns whether the export must end early.
    """

    def __init__(
        self,
        name: str,
        pieces: Sequence[Piece],
        base: Path,
        folder: Path,
        parts: Sequence[Part],
        hashes: bool,
        count: Callable[[int], None],
        stopped: Callable[[], bool],
    ):
        self.name, self.pieces, self.base, self.folder = name, pieces, base, folder
        self.parts, self.hashes, self.count, self.stopped = parts, hashes, count, stopped
        self.size = (base / name).stat().st_size
        self._opening = threading.Lock()
        self._files: list[int] = []
        self._flushed: list[Future[None]] = []

    def files(self) -> tuple[int, int]:
        """Descriptors of the base's file and of the new one, opened when first needed: there may be hundreds."""
        with self._opening:
            if not self._files:
                self._files.append(os.open(self.base / self.name, os.O_RDONLY))
                self._files.append(os.open(self.folder / self.name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666))
            return self._files[0], self._files[1]

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def copy(self, flush: Callable[[Callable[[int], None], int], Future[None]]) -> None:
        """Copies what no edit changes.

        Args:
            flush: runs a function on a descriptor in another thread, so that syncing and copying overlap.
        """
        unsynced = 0
        source, copy = self.files()
        for start, end in _gaps([(p.start, p.end) for p in self.pieces if p.change], self.size):
            for at in range(start, end, _CHUNK):
                if self.stopped():
                    return
                count = min(_CHUNK, end - at)
                _copy(source, copy, at, count)
                self.count(count)
                unsynced += count
                if unsynced >= _SYNC_EVERY:
                    self._flushed.append(flush(_FLUSH, copy))
                    unsynced = 0

    def patch(self, piece: Piece) -> tuple[list[Finding], Hashes]:
        """Checks one site's weight and, if it is edited, writes it patched, a block of rows at a time.

        Returns:
            Each edit's finding, and the weight's hashes before and after.
        """
        site, change, dtype = piece.site, piece.change, piece.dtype
        source, copy = self.files()
        # A change far below bf16's and fp32's largest number keeps a weight finite; fp16 is checked number by number.
        if change and not float(change.u.abs().max()) * float(change.a.abs().max()) < 1e37:
            raise not_finite(change, dtype)
        before, after = hashlib.sha256(), hashlib.sha256()
        columns = change.columns() if change else torch.empty(0)
        left, _ = signs(site.d, site.inputs)
        directions = [torch.zeros(site.d) if part is None else part.u for part in piece.parts]
        sums = RowSums(site.inputs, torch.cat([torch.stack(directions), left]), torch.ones(site.inputs, 1))
        buffer = torch.empty_like(sums.scratch)
        height, width = piece.shape
        # A transposed weight is read at once, any other by blocks of rows; always into the same memory.
        rows = height if piece.turned else min(sums.rows, height)
        memory = torch.empty(rows, width, dtype=dtype)
        for start in range(0, height, rows):
            stored = memory[: min(rows, height - start)]
            offset = piece.start + start * width * dtype.itemsize
            _read(source, offset, _bytes(stored))
            if self.hashes:
                before.update(_bytes(stored))
            part = stored.T.contiguous() if piece.turned else stored  # [rows of the weight, n·c]
            for at in range(0, len(part), sums.rows):
                block = part[at : at + sums.rows]
                sums.add(start + at, buffer[: len(block)].copy_(block))
                if change is None:
                    continue
                span = slice(start + at, start + at + len(block))
                if len(columns) == part.shape[1]:
                    block.copy_(buffer[: len(block)].add_(change.delta(span)))  # as `patched`, without its copies
                else:
                    block[:, columns] = patched(block[:, columns], change, columns, span)
            if change is None:
                continue
            if dtype is torch.float16 and not torch.isfinite(part).all():
                raise not_finite(change, dtype)
            if piece.turned:
                stored.copy_(part.T)
            _write(copy, offset, _bytes(stored))
            self.count(len(_bytes(stored)))
            if self.hashes:
                after.update(_bytes(stored))
        reading = sums.reading()
        if change and not reading.power < float("inf"):
            raise not_finite(change, dtype)
        sketch = from_reading(reading, site.d, site.inputs)
        findings = [self._finding(i, piece, reading, sketch) for i in range(len(piece.parts))]
        hashed = {"before": before.hexdigest(), "after": after.hexdigest()}
        return findings, {piece.name: hashed} if self.hashes and change else {}

    def finish(self, patched_pieces: Sequence[tuple[list[Finding], Hashes]]) -> dict[str, Any] | None:
        """Syncs and closes the file, when all of it is written.

        Returns:
            The file's line for the export's journal; None if the export was stopped.
        """
        if self.stopped():
            return None
        for flushed in self._flushed:
            flushed.result()
        os.fsync(self.files()[1])
        self.close()
        findings: list[Finding] = []
        for i in range(len(self.parts)):
            of_part = [of_piece[i] for of_piece, _ in patched_pieces]
            findings.append(
                {
                    "other": [key for finding in of_part for key in finding["other"]],
                    "moved": sum(finding["moved"] for finding in of_part),
                    "power": sum(finding["power"] for finding in of_part),
                    "rms": max((finding["rms"] for finding in of_part), default=0.0),
                }
            )
        tensors = {name: hashed for _, hashes in patched_pieces for name, hashed in hashes.items()}
        return {"file": self.name, "size": self.size, "tensors": tensors, "parts": findings}

    def _finding(self, i: int, piece: Piece, reading: Reading, sketch: Tensor) -> Finding:
        """Whether a weight is that of the i-th edit's base, and how much of that edit it contains."""
        presence, part, known = Presence(), piece.parts[i], self.parts[i].fingerprint
        key, other = piece.site.key, []
        if part is not None:
            presence.add(part, replace(reading, along=reading.along[i : i + 1]))
            other = differing({key: known[key]} if key in known else {}, {key: sketch})
        return {"other": other, "moved": presence.moved, "power": presence.power, "rms": presence.size}


def _gaps(changed: Sequence[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file of `size` bytes that lie between those that are changed."""
    at = 0
    for start, end in sorted(changed):
        if start > at:
            yield at, start
        at = end
    if size > at:
        yield at, size


def _copy(source: int, copy: int, offset: int, count: int) -> None:
    """Copies bytes of one file to the same place in another, inside the kernel if possible."""
    while count:
        try:
            copied = os.copy_file_range(source, copy, count, offset, offset)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno == 28:
                raise
            copied = 0  # not between these file systems, or not in this kernel
        if not copied:
            memory = memoryview(bytearray(min(count, 2**23)))
            for at in range(offset, offset + count, len(memory)):
                part = memory[: min(len(memory), offset + count - at)]
                _read(source, at, part)
                _write(copy, at, part)
            return
        offset, count = offset + copied, count - copied


def _bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's own memory."""
    return memoryview(tensor.view(torch.uint8).numpy().data).cast("B")


def _read(file: int, offset: int, into: memoryview) -> None:
    got = 0
    while got < len(into):
        more = os.preadv(file, [into[got:]], offset + got)
        if not more:
            raise FileError(
                "the base became shorter while it was read", got=f"{got} of {len(into)} bytes", fix="Try again."
            )
        got += more


def _write(file: int, offset: int, data: memoryview) -> None:
    put = 0
    while put < len(data):
        put += os.pwrite(file, data[put:], offset + put)
