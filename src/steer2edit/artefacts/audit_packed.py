"""Comparing bases that hold weights of few bits, or that are GGUF files: what `verify` and `diff` need for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FileError
from ..files.ranges import gaps, memory_of, read_range
from ..files.shards import Stored, checkpoint_reader
from ..method.site import Site
from ..parallel import in_parallel
from .bases import Base
from .few_bits import dequantised, edited, read_tensors, steps
from .formats.base import Part, read_part
from .pieces import PackedPiece

# How many bytes of metadata are compared at once.
_AT_ONCE = 2**24


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Byte for byte: a NaN is itself, and 0 is not −0."""
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def same_kind(base: Base, other: Base) -> None:
    """Raises FileError if one is a GGUF file and the other a folder."""
    if bool(base.architecture) != bool(other.architecture):
        raise FileError(
            "a GGUF file and a folder cannot be compared",
            got=f"{'a GGUF file' if base.architecture else 'a folder'} as the base",
            fix="Give two GGUF files or two folders.",
        )


def tensor_reader(base: Base) -> Callable[[str], Tensor]:
    """A function that reads a base's tensor by its name; a GGUF file's blocks are given as bytes."""
    if not base.architecture:
        return checkpoint_reader(base.folder)

    def read(name: str) -> Tensor:
        file, stored = base.held[name]
        raw = _raw(base.folder, file, stored)
        return raw if stored.dtype is None else raw.view(stored.dtype).view(stored.shape)

    return read


def _raw(folder: Path, file: str, stored: Stored) -> Tensor:
    """A tensor's bytes."""
    size = stored.end - stored.start
    return read_part(folder, Part("", stored.name, stored.name, file, stored.start, stored.end, (size,), torch.uint8))


def verify_packed(pieces: Sequence[PackedPiece], base: Base, other: Base) -> dict[str, str]:
    """Tensor name → "edited as expected", "equal" or "foreign", for the tensors of edited weights of few bits.

    Tensors that the other base lacks, or has in another shape, are left out.
    """
    expected: dict[str, bool] = {}
    spans: dict[str, list[tuple[int, int]]] = {}

    def one(piece: PackedPiece) -> dict[str, bool]:
        tensors = read_tensors(piece.packed, base.folder, piece.site, "the edit")
        edited(piece.packed, tensors, piece.site, piece.change)
        return {part.tensor: _holds(part, tensors[part.role], base, other) for part in piece.packed.parts}

    comparable = [piece for piece in pieces if all(_alike(part.tensor, base, other) for part in piece.packed.parts)]
    for piece, verdicts in zip(comparable, in_parallel(one, comparable), strict=True):
        for part in piece.packed.parts:
            expected[part.tensor] = expected.get(part.tensor, True) and verdicts[part.tensor]
            start = base.held[part.tensor][1].start
            spans.setdefault(part.tensor, []).append((part.start - start, part.end - start))
    words = {}
    for name, holds in expected.items():
        mine = _raw(base.folder, *base.held[name])
        theirs = _raw(other.folder, *other.held[name])
        rest = all(torch.equal(mine[a:b], theirs[a:b]) for a, b in gaps(spans[name], len(mine)))
        if torch.equal(mine, theirs) and holds:
            words[name] = "equal"
        else:
            words[name] = "edited as expected" if holds and rest else "foreign"
    return words


def _alike(name: str, base: Base, other: Base) -> bool:
    if name not in other.held:
        return False
    a, b = base.held[name][1], other.held[name][1]
    return (a.shape, a.dtype_name) == (b.shape, b.dtype_name)


def _holds(part: Part, tensor: Tensor, base: Base, other: Base) -> bool:
    """Whether the other base holds these bytes where the base holds the part."""
    file, stored = other.held[part.tensor]
    start = stored.start + part.start - base.held[part.tensor][1].start
    in_other = Part(
        part.role, part.tensor, part.label, file, start, start + part.end - part.start, part.shape, part.dtype
    )
    return same_bytes(tensor, read_part(other.folder, in_other))


def both_dequantised(site: Site, base: Base, other: Base) -> tuple[Tensor, Tensor, Tensor] | None:
    """A weight of few bits in two bases, and the larger distance between possible numbers; None if formats differ."""
    mine = base.packed(site)
    try:
        theirs = other.packed(site)
    except FileError:
        return None
    if mine is None or theirs is None or mine.format != theirs.format:
        return None
    weights = [dequantised(p, b.folder, site, "the base") for p, b in ((mine, base), (theirs, other))]
    distances = [
        steps(p, read_tensors(p, b.folder, site, "the base"), site) for p, b in ((mine, base), (theirs, other))
    ]
    return weights[0], weights[1], torch.maximum(*distances)


def same_metadata(base: Base, other: Base) -> bool:
    """Whether two GGUF files are equal outside their tensors, byte for byte."""
    files = []
    for opened in (base, other):
        (name,) = opened.shards
        files.append(opened.folder / name)
    sizes = [path.stat().st_size for path in files]
    (tensors,) = base.shards.values()
    spans = [(stored.start, stored.end) for stored in tensors.values()]
    if sizes[0] != sizes[1]:
        return False
    opened_files = [os.open(path, os.O_RDONLY) for path in files]
    try:
        for start, end in gaps(spans, sizes[0]):
            for at in range(start, end, _AT_ONCE):
                parts = [torch.empty(min(_AT_ONCE, end - at), dtype=torch.uint8) for _ in opened_files]
                for file, part in zip(opened_files, parts, strict=True):
                    read_range(file, at, memory_of(part))
                if not torch.equal(*parts):
                    return False
    finally:
        for file in opened_files:
            os.close(file)
    return True
