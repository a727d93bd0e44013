"""An edited checkpoint, written from the base's files: the edited tensors are patched, every other byte is copied.

No model is built and no file is held in memory. Copying, patching and syncing overlap. An unfinished export is a hidden
folder beside the output, with a journal of its complete shards, from which a killed export resumes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import EditError, FileError, ModelError, is_full
from ..files.ranges import stored_size
from ..files.reading import read_journal
from ..files.writing import append_jsonl, claimed, clear_temporaries, remove, sync
from ..method.change import Changes
from ..method.fingerprint import QUANTISED_TOLERANCE, TOLERANCE
from ..method.presence import Presence, check_weights, decide
from ..models.embedded import checkpoint_folder
from ..parallel import in_parallel, pool
from ..progress import say
from .bases import open_base
from .few_bits import Rounding, described, edited, is_lost, read_tensors, refuse_lost, together
from .patching import Patched, Shard
from .pieces import AnyPiece, PackedPiece, pieces_of
from .places import site_reader

JOURNAL = "steer2edit-export.jsonl"

MANIFEST = "manifest.json"

# Weights in other formats, which would stay unedited.
OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}

Progress = Callable[[int, int], None]

# How many weights are rounded for trial before an export.
_TRIED = 4


def export_checkpoint(
    base: str | Path,
    edit: Changes,
    out: str | Path,
    *,
    hashes: bool = True,
    accept_rounding: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes `out`, a copy of the checkpoint `base` with the edit in it; no model is built.

    The edited tensors are bit for bit what `apply` and `save_pretrained` would give in the files' own dtype. Weights of
    few bits are dequantised, edited and rounded again in their own format. The output appears complete or not at all.
    After a kill, the same call resumes after the last complete shard.

    Args:
        base: a folder, or a GGUF file; then `out` is a GGUF file too.
        hashes: put the SHA-256 of each edited tensor, before and after, into the manifest.
        accept_rounding: write the output also if rounding keeps less than half of the edit, or drowns it in noise.
        progress: called with (bytes done, bytes in total).

    Raises:
        FileError: `base` is no checkpoint or holds two, `out` exists already, an edited weight is in an unknown format,
            or the disk has too little room.
        ModelError: `base` is another model. EditError: `base` already contains the edit, the edit changes nothing, or
            rounding loses it.

    >>> out = s2e.export_checkpoint(base, edit, f"{folder}/edited")
    >>> (out / "model.safetensors").is_file(), (out / "manifest.json").is_file()
    (True, True)
    """
    base, out = checkpoint_folder(base), Path(out)
    partial = out.with_name(f".{out.name}.partial")
    if out.exists():
        if partial.is_dir() and not (partial / JOURNAL).exists():  # a kill left it after all was written
            shutil.rmtree(partial, ignore_errors=True)
        raise _exists(out)
    if not edit.changes():
        raise EditError("the edit changes nothing", got="λ = 0 everywhere", fix="Lower ρ or α.")
    if out.resolve().is_relative_to(base.resolve()):
        raise FileError("the output folder lies inside the base", got=out, fix="Give a folder elsewhere.")
    opened = open_base(base)
    pieces = pieces_of(edit, opened)
    one_file = opened.architecture != ""
    files = {base.name: base.stat().st_size} if one_file else checkpoint_files(base)
    if not one_file and "model.safetensors" in files and "model.safetensors" not in opened.shards:
        raise FileError(
            f"{base} holds two checkpoints",
            got="model.safetensors, which transformers loads, beside shards with an index",
            fix="Remove one of them.",
        )
    compare(edit, base)
    if not accept_rounding:
        foresee(pieces, opened.folder)
    shards = opened.shards
    rest = [name for name in files if name not in shards and Path(name).suffix not in OTHER_WEIGHTS]
    left_out = sorted(set(files) - set(rest) - set(shards))
    if MANIFEST in rest:
        say(f"  the export's {MANIFEST} replaces the base's own")
        rest.remove(MANIFEST)

    with claimed(partial, out):
        if out.exists():  # another process has just written it
            shutil.rmtree(partial)
            raise _exists(out)
        done = _resume(partial, _key(edit, base, opened.folder, files, hashes))
        try:
            _room(partial, sum(stored_size(opened.folder / name) for name in (*rest, *shards) if name not in done))
            work = _Work(edit, opened.folder, partial, hashes, progress, sum(files[name] for name in shards))
            work.checked(done)
            work.run({name: pieces.get(name, []) for name in shards if name not in done})
            decide(edit.parts, work.presence, work.other)
            if not accept_rounding:
                refuse_lost(work.rounding)
            for name in rest:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(base / name, partial / name)
                sync(partial / name)
            text = json.dumps(_manifest(edit, base, work, left_out), indent=2) + "\n"
            (partial / MANIFEST).write_text(text, encoding="utf-8")
            sync(partial / MANIFEST)
            (partial / JOURNAL).unlink()
            if one_file:
                (partial / MANIFEST).replace(manifest_beside(out))
                (partial / base.name).replace(out)
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.rename(out)
            sync(out.parent)
        except (EditError, ModelError):
            shutil.rmtree(partial, ignore_errors=True)
            raise
        except OSError as error:
            if not is_full(error):
                raise
            raise FileError(
                f"the disk is full: {out} was not written",
                got="no space left",
                fix=f"Free some space and run it again, or remove {partial} to give it up.",
            ) from None
    if work.rounding:
        say(f"  {described(work.rounding)}")
    if left_out:
        say(f"  not copied, since they hold the base's weights in another form: {', '.join(left_out)}")
    return out


def _exists(out: Path) -> FileError:
    return FileError("the output folder exists already", got=out, fix="Give a new folder, or remove that one.")


def compare(edit: Changes, base: Path) -> None:
    """Checks the base by the smallest weight that each part of the edit changes. The export then checks every weight.

    Raises:
        ModelError: `base` is another model. EditError: `base` already contains the edit.
        FileError: `base` is not a `safetensors` checkpoint, or those weights are not plain floating point.
    """
    smallest: list[list[str]] = []
    for part in edit.parts:
        edited = part.edited()
        by_size = sorted(edited, key=lambda key: edited[key].site.d * edited[key].site.inputs)
        smallest.append(by_size[:1])
    read = site_reader(base)
    opened = open_base(base)
    rounded = any(opened.packed(change.site) is not None for change in edit.changes().values())
    tolerance = QUANTISED_TOLERANCE if rounded else TOLERANCE
    try:
        check_weights(edit.parts, read, tolerance, smallest)
    except EditError:  # one weight of another base may look edited, but not all of them
        check_weights(edit.parts, read, tolerance)


def manifest_beside(out: Path) -> Path:
    """Where the manifest of an export that is one file lies."""
    return out.with_name(f"{out.name}.{MANIFEST}")


def foresee(pieces: Mapping[str, Sequence[AnyPiece]], folder: Path) -> None:
    """Raises EditError if rounding loses the edit, before anything is copied.

    A few weights are tried first. Only if these lose it, all of them are tried.
    """
    packed = [p for some in pieces.values() for p in some if isinstance(p, PackedPiece) and p.reports]
    packed.sort(key=lambda piece: piece.site.d * piece.site.inputs)

    def one(piece: PackedPiece) -> Rounding:
        return edited(
            piece.packed, read_tensors(piece.packed, folder, piece.site, "the edit"), piece.site, piece.change
        )

    tried = {piece.name: one(piece) for piece in packed[:: max(1, len(packed) // _TRIED)]}
    if not is_lost(together(tried.values())):
        return
    others = [piece for piece in packed if piece.name not in tried]
    tried |= dict(zip((piece.name for piece in others), in_parallel(one, others), strict=True))
    refuse_lost(tried)


def checkpoint_files(base: Path) -> dict[str, int]:
    """Name → size of every file of the checkpoint. Raises FileError for a link out of it."""
    root = base.resolve()
    homes = (root, root.parent.parent / "blobs")  # where the Hub's cache keeps what its snapshots link to
    sizes: dict[str, int] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in (".git", ".cache"))
        for name in (*sorted(names), *(f for f in folders if (Path(folder) / f).is_symlink())):
            path = Path(folder) / name
            if not path.is_file() or not any(path.resolve().is_relative_to(home) for home in homes):
                raise FileError(
                    f"{path.relative_to(root)} is not a file inside the checkpoint",
                    got=f"a link to {path.resolve()}" if path.is_symlink() else "not a file",
                    fix="Replace it by a copy.",
                )
            sizes[str(path.relative_to(root))] = path.stat().st_size
    return sizes


def _key(edit: Changes, base: Path, folder: Path, files: Mapping[str, int], hashes: bool) -> str:
    """What the output depends on: the edit, the base's files, by their sizes and times, and whether it has hashes."""
    depends_on: list[Any] = [edit.id, hashes, importlib.metadata.version("steer2edit"), str(base.resolve())]
    depends_on += [[name, size, (folder / name).stat().st_mtime_ns] for name, size in sorted(files.items())]
    return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()


def _resume(partial: Path, key: str) -> dict[str, Any]:
    """The journal's lines of complete shards, by file name. Another export's journal and shards are deleted."""
    lines = read_journal(partial / JOURNAL)
    if not lines or lines[0].get("key") != key:
        for path in partial.iterdir():  # the folder itself stays: it is what keeps other processes out
            remove(path)
        append_jsonl(partial / JOURNAL, {"key": key})
        return {}
    clear_temporaries(partial)
    whole = {line["file"]: line for line in lines[1:]}
    if whole:
        say(f"  resuming an export that was stopped: {len(whole)} shards are complete")
    return whole


# Space that stays free on the disk, for the manifest and for other programs.
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
            got=f"{free / 1e6:.1f} MB free, {asked / 1e6:.1f} MB needed, {_SPARE / 1e6:.1f} MB of them as a reserve",
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
        self.rounding: dict[str, Rounding] = {}
        self.stopped = False

    def checked(self, done: Mapping[str, Any]) -> None:
        """Takes over what a stopped export found in its complete shards."""
        for line in done.values():
            self._take(line)
            self.bytes += line["size"]

    def _take(self, line: Mapping[str, Any]) -> None:
        self.tensors |= line["tensors"]
        self.rounding |= {name: Rounding.from_json(row) for name, row in line["rounding"].items()}
        for presence, other, finding in zip(self.presence, self.other, line["parts"], strict=True):
            other += finding["other"]
            presence.moved += finding["moved"]
            presence.power += finding["power"]
            presence.size = max(presence.size, finding["rms"])

    def run(self, shards: Mapping[str, Sequence[AnyPiece]]) -> None:
        """Writes all shards. Copying, patching, syncing and finishing have threads of their own."""
        with contextlib.ExitStack() as opened:
            copying = opened.enter_context(ThreadPoolExecutor(1))
            patching = opened.enter_context(pool())
            syncing = opened.enter_context(ThreadPoolExecutor(1))
            ending = opened.enter_context(ThreadPoolExecutor(1))
            finished: list[Future[None]] = []
            for name, pieces in shards.items():
                shard = Shard(
                    name,
                    pieces,
                    self.base,
                    self.partial,
                    self.edit.parts,
                    self.hashes,
                    self._count,
                    lambda: self.stopped,
                )
                opened.callback(shard.close)
                copied = copying.submit(shard.copy, syncing.submit)
                patches = [patching.submit(shard.patch, piece) for piece in pieces]
                finished.append(ending.submit(self._end, shard, copied, patches))
            try:
                for future in finished:
                    future.result()
            except BaseException:
                self.stopped = True
                for threads in (copying, patching, syncing, ending):
                    threads.shutdown(wait=True, cancel_futures=True)
                raise

    def _end(self, shard: Shard, copied: Future[None], patches: Sequence[Future[Patched]]) -> None:
        """Waits until a shard is complete, then adds its line to the journal."""
        copied.result()
        if line := shard.finish([patch.result() for patch in patches]):
            append_jsonl(self.partial / JOURNAL, line)
            self._take(line)

    def _count(self, count: int) -> None:
        with self.counting:  # the shards are written by several threads
            self.bytes += count
            done = min(self.bytes, self.total)
        if self.progress:
            self.progress(done, self.total)


def _manifest(edit: Changes, base: Path, work: _Work, left_out: Sequence[str]) -> dict[str, Any]:
    manifest = {
        "kind": "export",
        "base": base.resolve().name,
        "edit": edit.id,
        "parts": [{"id": p.id, "config": dict(p.config), "strength": p.strength} for p in edit.parts],
        "tensors": dict(sorted(work.tensors.items())),
        "left_out": list(left_out),
        "versions": {name: importlib.metadata.version(name) for name in ("steer2edit", "torch", "safetensors")},
    }
    if work.rounding:
        whole = together(work.rounding.values())
        each = {name: work.rounding[name].to_json() for name in sorted(work.rounding)}
        manifest["rounding"] = {"kept": whole.kept, "noise": whole.noise, "tensors": each}
    return manifest
