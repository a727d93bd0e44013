"""Which part of a checkpoint's file holds a site's weight."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import FileError, ModelError
from ..files.shards import Stored, checkpoint_reader, open_shards
from ..method.site import Site


def stored_name(site: Site, names: Collection[str]) -> str:
    """The name of the site's weight in a checkpoint's files. Raises FileError if they have none of its names."""
    for name in (site.tensor, *site.aliases):
        if name in names:
            return name
    raise FileError(
        f"the checkpoint has no tensor {site.tensor}", got=f"{len(names)} others", fix="Is it the right model?"
    )


def upright(site: Site, part: Tensor, fused: bool) -> Tensor:
    """The site's weight [d, n·c], as a view of a file's tensor or of its expert's part."""
    return part.T if site.transposed and (fused or site.expert is None) else part


def site_reader(folder: Path) -> Callable[[Site], Tensor]:
    """A function that reads one site's weight [d, n·c] from a checkpoint's files.

    It raises ModelError for a weight of another shape, and FileError for one that is missing or not plain floating
    point.
    """
    held = {name: stored for tensors in open_shards(folder).values() for name, stored in tensors.items()}
    read = checkpoint_reader(folder)

    def read_site(site: Site) -> Tensor:
        name = stored_name(site, held)
        place = stored_place(site, held[name], "the probe")
        tensor = read(name, site.expert)
        return upright(site, tensor[0] if place.fused else tensor, place.fused)

    return read_site


@dataclass(frozen=True)
class Place:
    """Where a site's weight lies in a file.

    Attributes:
        start, end: its bytes. shape: its shape in the file, [d, n·c], or [n·c, d] if `turned`.
        fused: it is one expert's part of a 3-D tensor.
    """

    start: int
    end: int
    shape: tuple[int, int]
    turned: bool
    fused: bool


def stored_place(site: Site, stored: Stored, wanted_by: str) -> Place:
    """Where a site's weight lies in a file, given the tensor that holds it.

    Raises:
        FileError: the tensor is not plain floating point. ModelError: it has another shape than the site's weight.
    """
    if stored.dtype is None:
        raise FileError(
            f"{stored.name} is not plain floating point",
            got=stored.dtype_name,
            fix="Use a checkpoint in F32, F16 or BF16 (dequantise this one first); or give the loaded model to "
            "score(), which dequantises it, and serve the edit as an adapter.",
        )
    start, end, shape = stored.start, stored.end, stored.shape
    fused = len(shape) == 3 and site.expert is not None and shape[0] == site.experts
    if fused and site.expert is not None:
        size = (end - start) // shape[0]
        start, end, shape = start + site.expert * size, start + (site.expert + 1) * size, shape[1:]
    turned = site.transposed and (fused or site.expert is None)
    if (shape[::-1] if turned else shape) != (site.d, site.inputs):
        raise ModelError(
            f"{wanted_by} was made for another model: {stored.name} should be {site.d} × {site.inputs}",
            got=stored.shape,
            fix="Use the model that the probe was made on.",
        )
    return Place(start, end, (shape[0], shape[1]), turned, fused)
