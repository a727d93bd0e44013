"""Which bytes of a base's files an edit changes: for each of its sites a piece in each file that holds a part of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import FileError
from ..method.change import Change, Changes, SiteEdit
from ..method.site import Site
from .bases import Base
from .few_bits import WRITTEN
from .formats.base import Packed, Part
from .places import stored_place


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

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The bytes of the file that change."""
        return [(self.start, self.end)] if self.change else []


@dataclass(frozen=True)
class PackedPiece:
    """One edited site's bytes of few bits in a file. Its scales may lie in another one, which has a piece of its own.

    Attributes:
        change: of the weight. parts: the site in each of the edits. packed: all of the weight's tensors.
        file: the one whose part of the weight this is.
    """

    change: Change
    parts: tuple[SiteEdit | None, ...]
    packed: Packed
    file: str

    @property
    def site(self) -> Site:
        return self.change.site

    @property
    def name(self) -> str:
        return self.packed.parts[0].label

    @property
    def reports(self) -> bool:
        """Whether this piece reports the weight: that in the file of its codes does."""
        return self.file == self.packed.parts[0].file

    @property
    def written(self) -> list[Part]:
        """The tensors that change in this file."""
        return [part for part in self.packed.parts if part.role in WRITTEN and part.file == self.file]

    @property
    def spans(self) -> list[tuple[int, int]]:
        return [(part.start, part.end) for part in self.written]


AnyPiece = Piece | PackedPiece


def pieces_of(edit: Changes, base: Base) -> dict[str, list[AnyPiece]]:
    """File → the bytes of each of the edit's sites in it. All of them are checked; the edited ones are changed.

    A site that the edit leaves alone and that is not plain floating point is left out: it is only copied.
    """
    pieces: dict[str, list[AnyPiece]] = {}
    changes = edit.changes()
    for key, site in {key: s.site for part in edit.parts for key, s in part.sites.items()}.items():
        parts = tuple(part.sites.get(key) for part in edit.parts)
        packed = base.packed(site)
        if packed is not None:
            if key in changes:
                for file in dict.fromkeys(part.file for part in packed.parts if part.role in WRITTEN):
                    pieces.setdefault(file, []).append(PackedPiece(changes[key], parts, packed, file))
            continue
        name = base.name(site)
        file, stored = base.held[name]
        if stored.dtype is None and key not in changes:
            continue
        place = stored_place(site, stored, "the edit", base.architecture != "")
        label = f"{name}[{site.expert}]" if place.fused else name
        assert stored.dtype is not None
        piece = Piece(
            changes.get(key), parts, name, label, stored.dtype, place.start, place.end, place.shape, place.turned
        )
        pieces.setdefault(file, []).append(piece)
    _apart(pieces)
    return pieces


def _apart(pieces: Mapping[str, Sequence[AnyPiece]]) -> None:
    """Raises FileError if two sites share bytes that both would change."""
    for file, some in pieces.items():
        spans = sorted((span, piece.name) for piece in some for span in piece.spans)
        for (before, name), (after, other) in itertools.pairwise(spans):
            if after[0] < before[1]:
                raise FileError(
                    f"{name} and {other} share a tensor that both would change",
                    got=f"the same bytes of {file}",
                    fix="Serve the edit as an adapter.",
                )
