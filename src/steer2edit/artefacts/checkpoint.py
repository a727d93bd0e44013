"""An edited checkpoint, written from the base's files: the edited tensors are patched, every other byte is copied.

No model is built and no file is held in memory. Copying, patching and syncing overlap. What is under way stands in a
hidden folder beside the output, with a journal of the shards that are whole: a killed export goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import EditError, FileError, ModelError
from ..files.reading import read_journal
from ..files.shards import Stored, open_shards
from ..files.writing import append_jsonl, clear_temporaries, sync
from ..method.change import Change, Changes, SiteEdit, not_finite, patched
from ..method.fingerprint import differing, from_reading, signs
from ..method.presence import Presence, check_weights, decide
from ..method.scores import Reading, RowSums
from ..method.site import Site
from ..models.embedded import checkpoint_folder
from ..parallel import pool
from ..progress import say
from .places import site_reader, stored_name, stored_place

JOURNAL = "steer2edit-export.jsonl"

MANIFEST = "manifest.json"

# Weights in other formats, which would stay the base's.
OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}

# Small, since a file system lets one writer at a time into a file: patches need not wait long for a copy.
_CHUNK = 4 * 2**20

_FLUSH = getattr(os, "fdatasync", os.fsync)

_SYNC_EVERY = 256 * 2**20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Piece:
    """One site's bytes in a file."""

    change: Change | None  # None where a site is only looked at
    parts: tuple[SiteEdit | None, ...]  # what each of the edits says of it
    tensor: str
    name: str  # the tensor's, with the expert's number where it holds several
    dtype: torch.dtype
    start: int
    end: int
    shape: tuple[int, int]  # as it lies in the file: [d, n·c], or [n·c, d] if `turned`
    turned: bool

    @property
    def site(self) -> Site:
        return next(part.site for part in self.parts if part is not None)


def export_checkpoint(
    base: str | Path, edit: Changes, out: str | Path, *, hashes: bool = True, progress: Progress | None = None
) -> Path:
    """Writes `out`, a copy of the checkpoint folder `base` with the edit in it; no model is built.

    The edited tensors are bit for bit what `apply` and `save_pretrained` would give in the files' own dtype. The folder
    appears whole or not at all; the same call after a kill goes on from the last whole shard.

    Args:
        hashes: put the SHA-256 of each edited tensor, before and after, into `out/manifest.json`.
        progress: called with (bytes done, bytes in all).

    Raises:
        FileError: `base` is not a `safetensors` checkpoint, `out` exists already, a tensor's dtype is not F32, F16 or
            BF16, or the disk is too small.
        ModelError: `base` is another model. EditError: the edit is in it already, or changes nothing.
    """
    base, out = checkpoint_folder(base), Path(out)
    if out.exists():
        raise FileError("the output folder exists already", got=out, fix="Give a new folder, or remove that one.")
    if not edit.changes():
        raise EditError("the edit changes nothing", got="λ = 0 everywhere", fix="Lower ρ or α.")
    if out.resolve().is_relative_to(base.resolve()):
        raise FileError("the output folder lies inside the base", got=out, fix="Give a folder elsewhere.")
    shards = open_shards(base)
    pieces = pieces_of(edit, shards)
    files = checkpoint_files(base)
    compare(edit, base)
    rest = [name for name in files if name not in shards and Path(name).suffix not in OTHER_WEIGHTS]
    left_out = sorted(set(files) - set(rest) - set(shards))
    if MANIFEST in rest:
        say(f"  the base's own {MANIFEST} gives way to the export's")
        rest.remove(MANIFEST)

    partial = out.with_name(f".{out.name}.partial")
    done = _resume(partial, _key(edit, base, files))
    try:
        _room(partial, sum(files[name] for name in (*rest, *shards) if name not in done))
        work = _Work(edit, base, partial, hashes, progress, sum(files[name] for name in shards))
        work.checked(done)
        work.run({name: pieces.get(name, []) for name in shards if name not in done})
        decide(edit.parts, work.presence, work.other)
        for name in rest:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / name, partial / name)
            sync(partial / name)
        text = json.dumps(_manifest(edit, base, work, left_out), indent=2) + "\n"
        (partial / MANIFEST).write_text(text, encoding="utf-8")
        sync(partial / MANIFEST)
        (partial / JOURNAL).unlink()
        partial.rename(out)
        sync(out.parent)
    except (EditError, ModelError):
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        if error.errno != 28:
            raise
        raise FileError(
            f"the disk is full: {out} was not written",
            got="no space left",
            fix=f"Free some space and run it again, or remove {partial} to give it up.",
        ) from None
    if left_out:
        say(f"  not copied, since they hold the base's weights in another form: {', '.join(left_out)}")
    return out


def compare(edit: Changes, base: Path) -> None:
    """Refuses another base by the smallest weight that each part of the edit changes: a glance before the work, which
    looks at all of them.

    Raises:
        ModelError: `base` is another model. EditError: the edit is in it already.
        FileError: it is no `safetensors` checkpoint, or those weights are not plain floating point.
    """
    smallest: list[list[str]] = []
    for part in edit.parts:
        edited = part.edited()
        by_size = sorted(edited, key=lambda key: edited[key].site.d * edited[key].site.inputs)
        smallest.append(by_size[:1])
    read = site_reader(base)
    try:
        check_weights(edit.parts, read, keys=smallest)
    except EditError:  # the edit seems to be in it: one weight of another base may look so, all of them do not
        check_weights(edit.parts, read)


def pieces_of(edit: Changes, shards: Mapping[str, Mapping[str, Stored]]) -> dict[str, list[Piece]]:
    """File → the bytes of each of the edit's sites in it. All of them are looked at, the edited ones changed.

    Left out are sites that the edit leaves alone and that are not plain floating point: those are only copied.
    """
    tensors = {name: (file, stored) for file, held in shards.items() for name, stored in held.items()}
    found: dict[str, list[Piece]] = {}
    changes = edit.changes()
    for key, site in {key: s.site for part in edit.parts for key, s in part.sites.items()}.items():
        name = stored_name(site, tensors)
        file, stored = tensors[name]
        if stored.dtype is None and key not in changes:
            continue
        place = stored_place(site, stored, "the edit")
        label = f"{name}[{site.expert}]" if place.fused else name
        parts = tuple(part.sites.get(key) for part in edit.parts)
        assert stored.dtype is not None
        piece = Piece(
            changes.get(key), parts, name, label, stored.dtype, place.start, place.end, place.shape, place.turned
        )
        found.setdefault(file, []).append(piece)
    return found


def checkpoint_files(base: Path) -> dict[str, int]:
    """Name → size of every file of the checkpoint. Raises FileError for a link that leads away."""
    root = base.resolve()
    homes = (root, root.parent.parent / "blobs")  # where the Hub's cache keeps what its snapshots link to
    found: dict[str, int] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in (".git", ".cache"))
        for name in (*sorted(names), *(f for f in folders if (Path(folder) / f).is_symlink())):
            path = Path(folder) / name
            if not path.is_file() or not any(path.resolve().is_relative_to(home) for home in homes):
                raise FileError(
                    f"{path.relative_to(root)} in the checkpoint is no file of its own",
                    got=f"a link to {path.resolve()}" if path.is_symlink() else "not a file",
                    fix="Replace it by a copy.",
                )
            found[str(path.relative_to(root))] = path.stat().st_size
    return found


def _key(edit: Changes, base: Path, files: Mapping[str, int]) -> str:
    """What the output depends on: the edit and the base's files, by their sizes and times."""
    depends_on: list[Any] = [edit.id, importlib.metadata.version("steer2edit"), str(base.resolve())]
    depends_on += [[name, size, (base / name).stat().st_mtime_ns] for name, size in sorted(files.items())]
    return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()


def _resume(partial: Path, key: str) -> dict[str, Any]:
    """The journal's lines of the shards that are whole, by name; none of another export's."""
    lines = read_journal(partial / JOURNAL)
    if not lines or lines[0].get("key") != key:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        append_jsonl(partial / JOURNAL, {"key": key})
        return {}
    clear_temporaries(partial)
    whole = {line["file"]: line for line in lines[1:]}
    if whole:
        say(f"  going on with an export that was stopped: {len(whole)} shards are there")
    return whole


# What is left free on the disk beside the checkpoint: for its manifest, and for others.
_SPARE = 2**20


def _room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    asked = needed + _SPARE
    if free < asked:
        folder_is_new = len(list(folder.iterdir())) <= 1
        if folder_is_new:
            shutil.rmtree(folder)
        raise FileError(
            "the disk has too little room for the edited checkpoint",
            got=f"{free / 1e6:.1f} MB free, {asked / 1e6:.1f} MB needed, {_SPARE / 1e6:.1f} MB of them to spare",
            fix="Free some space, or give an output folder on another disk.",
        )


class _Work:
    """Copies and patches shards in a few threads: the kernel copies, torch adds, the disk syncs, all at once."""

    def __init__(self, edit: Changes, base: Path, partial: Path, hashes: bool, progress: Progress | None, total: int):
        self.edit, self.base, self.partial, self.hashes = edit, base, partial, hashes
        self.progress, self.total, self.bytes = progress, total, 0
        self.counting = threading.Lock()
        self.presence = [Presence() for _ in edit.parts]
        self.other: list[list[str]] = [[] for _ in edit.parts]
        self.tensors: dict[str, dict[str, str]] = {}
        self.stopped = False

    def checked(self, done: Mapping[str, Any]) -> None:
        """Takes over what an export that was stopped had found in its whole shards."""
        for line in done.values():
            self._take(line)
            self.bytes += line["size"]

    def _take(self, line: Mapping[str, Any]) -> None:
        self.tensors |= line["tensors"]
        for presence, other, found in zip(self.presence, self.other, line["parts"], strict=True):
            other += found["other"]
            presence.moved += found["moved"]
            presence.power += found["power"]
            presence.size = max(presence.size, found["rms"])

    def run(self, shards: Mapping[str, Sequence[Piece]]) -> None:
        # Threads for the copies, the patches, the syncs of what is half done, the ends of the shards.
        with contextlib.ExitStack() as opened:
            made = (ThreadPoolExecutor(1), pool(), ThreadPoolExecutor(1), ThreadPoolExecutor(1))
            pools = [opened.enter_context(threads) for threads in made]
            finished = [self._shard(name, pieces, pools, opened) for name, pieces in shards.items()]
            try:
                for future in finished:
                    future.result()
            except BaseException:
                self.stopped = True
                for threads in pools:
                    threads.shutdown(wait=True, cancel_futures=True)
                raise

    def _shard(
        self, name: str, pieces: Sequence[Piece], pools: Sequence[ThreadPoolExecutor], opened: contextlib.ExitStack
    ) -> Future[None]:
        copying, patching, syncing, ending = pools
        size = (self.base / name).stat().st_size
        held: list[int] = []
        opening = threading.Lock()
        synced: list[Future[None]] = []

        def files() -> tuple[int, int]:
            # Opened when first needed, and closed when the shard is whole: a checkpoint may have hundreds.
            with opening:
                if not held:
                    held.append(os.open(self.base / name, os.O_RDONLY))
                    held.append(os.open(self.partial / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666))
                return held[0], held[1]

        def close() -> None:
            while held:
                os.close(held.pop())

        opened.callback(close)

        def verbatim() -> None:
            unsynced = 0
            source, copy = files()
            for start, end in _gaps([(p.start, p.end) for p in pieces if p.change], size):
                for at in range(start, end, _CHUNK):
                    if self.stopped:
                        return
                    count = min(_CHUNK, end - at)
                    _copy(source, copy, at, count)
                    self._count(count)
                    unsynced += count
                    if unsynced >= _SYNC_EVERY:
                        synced.append(syncing.submit(_FLUSH, copy))
                        unsynced = 0

        copied = copying.submit(verbatim)
        patched_all = [patching.submit(self._patch, piece, files) for piece in pieces]

        def end() -> None:
            copied.result()
            found = [piece.result() for piece in patched_all]
            if self.stopped:
                return
            for flushed in synced:
                flushed.result()
            os.fsync(files()[1])
            close()
            parts = [
                {
                    "other": [key for piece in column for key in piece["other"]],
                    "moved": sum(piece["moved"] for piece in column),
                    "power": sum(piece["power"] for piece in column),
                    "rms": max((piece["rms"] for piece in column), default=0.0),
                }
                for column in [[parts[i] for parts, _ in found] for i in range(len(self.edit.parts))]
            ]
            tensors = {k: v for _, tensors in found for k, v in tensors.items()}
            line = {"file": name, "size": size, "tensors": tensors, "parts": parts}
            append_jsonl(self.partial / JOURNAL, line)
            self._take(line)

        return ending.submit(end)

    def _count(self, count: int) -> None:
        with self.counting:  # the shards are written by several threads
            self.bytes += count
            done = min(self.bytes, self.total)
        if self.progress:
            self.progress(done, self.total)

    def _patch(
        self, piece: Piece, files: Callable[[], tuple[int, int]]
    ) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]]]:
        """Looks at one site's weight and, where it is edited, writes it patched, a block of rows at a time.

        Returns:
            What each of the edits finds in it, and its hashes before and after.
        """
        site, change, dtype = piece.site, piece.change, piece.dtype
        source, copy = files()
        # Far from bf16's and fp32's end, a finite weight stays finite; fp16 is looked at number by number.
        if change and not float(change.u.abs().max()) * float(change.a.abs().max()) < 1e37:
            raise not_finite(change, dtype)
        before, after = hashlib.sha256(), hashlib.sha256()
        columns = change.columns() if change else torch.empty(0)
        left, _ = signs(site.d, site.inputs)
        directions = [torch.zeros(site.d) if part is None else part.u for part in piece.parts]
        sums = RowSums(site.inputs, torch.cat([torch.stack(directions), left]), torch.ones(site.inputs, 1))
        buffer = torch.empty_like(sums.scratch)
        height, width = piece.shape
        # A weight that lies the other way is taken at once, else a block of rows; in the same memory every time.
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
            self._count(len(_bytes(stored)))
            if self.hashes:
                after.update(_bytes(stored))
        reading = sums.reading()
        if change and not reading.power < float("inf"):
            raise not_finite(change, dtype)
        found = from_reading(reading, site.d, site.inputs)
        seen = [self._seen(i, piece, reading, found) for i in range(len(piece.parts))]
        hashed = {"before": before.hexdigest(), "after": after.hexdigest()}
        return seen, {piece.name: hashed} if self.hashes and change else {}

    def _seen(self, i: int, piece: Piece, reading: Reading, found: Tensor) -> dict[str, Any]:
        """What the i-th of the edits finds in a weight: whether it is its base's, and how much of the edit is in it."""
        presence, part, known = Presence(), piece.parts[i], self.edit.parts[i].fingerprint
        key, other = piece.site.key, []
        if part is not None:
            presence.add(part, replace(reading, along=reading.along[i : i + 1]))
            other = differing({key: known[key]} if key in known else {}, {key: found})
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
    """Bytes of one file to the same place of another, inside the kernel where it can."""
    while count:
        try:
            copied = os.copy_file_range(source, copy, count, offset, offset)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno == 28:
                raise
            copied = 0  # another file system, or none of this kernel's
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


def _manifest(edit: Changes, base: Path, work: _Work, left_out: Sequence[str]) -> dict[str, Any]:
    return {
        "kind": "export",
        "base": base.resolve().name,
        "edit": edit.id,
        "parts": [{"id": p.id, "config": dict(p.config), "strength": p.strength} for p in edit.parts],
        "tensors": dict(sorted(work.tensors.items())),
        "left_out": list(left_out),
        "versions": {name: importlib.metadata.version(name) for name in ("steer2edit", "torch", "safetensors")},
    }
