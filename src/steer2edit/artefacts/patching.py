"""Writing one file of an edited checkpoint: what the edit changes is patched, all else is copied.

No file is held in memory. Copying, patching and syncing run in threads of their own, on the same file.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.ranges import copy_range, gaps, memory_of, read_range, write_range
from ..method.change import Part as EditPart
from ..method.change import not_finite, patched
from ..method.fingerprint import QUANTISED_TOLERANCE, TOLERANCE, differing, from_reading, signs
from ..method.presence import Presence
from ..method.scores import Reading, RowSums
from .few_bits import edited, read_tensors
from .pieces import PackedPiece, Piece

# Small, since a file system lets one writer at a time into a file, and patches should not wait long for a copy.
_CHUNK = 4 * 2**20
_FLUSH = getattr(os, "fdatasync", os.fsync)
_SYNC_EVERY = 256 * 2**20

Finding = dict[str, Any]
Hashes = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Patched:
    """What is known of a site after it was checked or edited.

    Attributes:
        findings: one for each edit. hashes: of each edited tensor, before and after. rounding: for a weight of few
            bits, its name and what rounding kept of the edit (`Rounding.to_json`).
    """

    findings: list[Finding]
    hashes: Hashes
    rounding: dict[str, dict[str, Any]] = field(default_factory=dict)


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
        pieces: Sequence[Piece | PackedPiece],
        base: Path,
        folder: Path,
        parts: Sequence[EditPart],
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
        for start, end in gaps([span for piece in self.pieces for span in piece.spans], self.size):
            for at in range(start, end, _CHUNK):
                if self.stopped():
                    return
                count = min(_CHUNK, end - at)
                copy_range(source, copy, at, count)
                self.count(count)
                unsynced += count
                if unsynced >= _SYNC_EVERY:
                    self._flushed.append(flush(_FLUSH, copy))
                    unsynced = 0

    def patch(self, piece: Piece | PackedPiece) -> Patched:
        """Checks one site's weight and, if it is edited, writes it patched, a block of rows at a time."""
        return self._requantise(piece) if isinstance(piece, PackedPiece) else self._patch(piece)

    def _patch(self, piece: Piece) -> Patched:
        site, change, dtype = piece.site, piece.change, piece.dtype
        source, copy = self.files()
        # A change far below bf16's and fp32's largest number keeps a weight finite; fp16 is checked number by number.
        if change and not float(change.u.abs().max()) * float(change.a.abs().max()) < 1e37:
            raise not_finite(change, dtype)
        before, after = hashlib.sha256(), hashlib.sha256()
        columns = change.columns() if change else torch.empty(0)
        sums = _sums(piece)
        buffer = torch.empty_like(sums.scratch)
        height, width = piece.shape
        # A transposed weight is read at once, any other by blocks of rows; always into the same memory.
        rows = height if piece.turned else min(sums.rows, height)
        memory = torch.empty(rows, width, dtype=dtype)
        for start in range(0, height, rows):
            stored = memory[: min(rows, height - start)]
            offset = piece.start + start * width * dtype.itemsize
            read_range(source, offset, memory_of(stored))
            if self.hashes:
                before.update(memory_of(stored))
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
            write_range(copy, offset, memory_of(stored))
            self.count(len(memory_of(stored)))
            if self.hashes:
                after.update(memory_of(stored))
        reading = sums.reading()
        if change and not reading.power < float("inf"):
            raise not_finite(change, dtype)
        sketch = from_reading(reading, site.d, site.inputs)
        findings = [self._finding(i, piece, reading, sketch, TOLERANCE) for i in range(len(piece.parts))]
        hashed = {"before": before.hexdigest(), "after": after.hexdigest()}
        return Patched(findings, {piece.name: hashed} if self.hashes and change else {})

    def _requantise(self, piece: PackedPiece) -> Patched:
        """Writes a weight of few bits with the edit in it, in its own format."""
        site = piece.site
        tensors = read_tensors(piece.packed, self.base, site, "the edit")
        sums = _sums(piece)
        hashes: Hashes = {}
        if self.hashes:
            hashes = {part.label: {"before": _sha256(tensors[part.role])} for part in piece.written}

        def on_rows(start: int, weight: Tensor) -> None:
            for at in range(0, len(weight), sums.rows):
                sums.add(start + at, weight[at : at + sums.rows])

        rounding = edited(piece.packed, tensors, site, piece.change, on_rows)
        _, copy = self.files()
        for part in piece.written:
            memory = memory_of(tensors[part.role])
            write_range(copy, part.start, memory)
            self.count(len(memory))
            if self.hashes:
                hashes[part.label]["after"] = _sha256(tensors[part.role])
        if not piece.reports:
            nothing = {"other": [], "moved": 0.0, "power": 0.0, "rms": 0.0}
            return Patched([nothing for _ in piece.parts], hashes)
        reading = sums.reading()
        sketch = from_reading(reading, site.d, site.inputs)
        findings = [self._finding(i, piece, reading, sketch, QUANTISED_TOLERANCE) for i in range(len(piece.parts))]
        return Patched(findings, hashes, {piece.name: rounding.to_json()})

    def finish(self, patched_pieces: Sequence[Patched]) -> dict[str, Any] | None:
        """Syncs and closes the file, when all of it is written.

        Returns:
            The file's line for the export's journal; None if the export was stopped.
        """
        if self.stopped():
            return None
        for flushed in self._flushed:
            flushed.result()
        os.ftruncate(self.files()[1], self.size)  # a hole at the end was not written
        os.fsync(self.files()[1])
        self.close()
        findings: list[Finding] = []
        for i in range(len(self.parts)):
            of_part = [piece.findings[i] for piece in patched_pieces]
            findings.append(
                {
                    "other": [key for finding in of_part for key in finding["other"]],
                    "moved": sum(finding["moved"] for finding in of_part),
                    "power": sum(finding["power"] for finding in of_part),
                    "rms": max((finding["rms"] for finding in of_part), default=0.0),
                }
            )
        tensors = {name: hashed for piece in patched_pieces for name, hashed in piece.hashes.items()}
        rounding = {name: row for piece in patched_pieces for name, row in piece.rounding.items()}
        return {"file": self.name, "size": self.size, "tensors": tensors, "rounding": rounding, "parts": findings}

    def _finding(
        self, i: int, piece: Piece | PackedPiece, reading: Reading, sketch: Tensor, tolerance: float
    ) -> Finding:
        """Whether a weight is that of the i-th edit's base, and how much of that edit it contains."""
        presence, part, known = Presence(), piece.parts[i], self.parts[i].fingerprint
        key, other = piece.site.key, []
        if part is not None:
            presence.add(part, replace(reading, along=reading.along[i : i + 1]))
            other = differing({key: known[key]} if key in known else {}, {key: sketch}, tolerance)
        return {"other": other, "moved": presence.moved, "power": presence.power, "rms": presence.size}


def _sums(piece: Piece | PackedPiece) -> RowSums:
    """Sums over a weight's rows that show whether it is the base's and what it contains of each edit."""
    site = piece.site
    left, _ = signs(site.d, site.inputs)
    directions = [torch.zeros(site.d) if part is None else part.u for part in piece.parts]
    return RowSums(site.inputs, torch.cat([torch.stack(directions), left]), torch.ones(site.inputs, 1))


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(memory_of(tensor)).hexdigest()
