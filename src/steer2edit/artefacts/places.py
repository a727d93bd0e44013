"""Which part of a checkpoint's file holds a site's weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FileError
from ..files.ranges import memory_of, read_range
from ..files.shards import Stored, checkpoint_reader
from ..method.site import Site
from .bases import open_base
from .few_bits import dequantised, other_shape

KNOWN_FORMATS = (
    "Known are F32, F16 and BF16; fp8, MXFP4, NVFP4, GPTQ, AWQ and bitsandbytes with their scales; and GGUF's Q8_0, "
    "Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K."
)


def upright(site: Site, part: Tensor, fused: bool) -> Tensor:
    """The site's weight [d, n·c], as a view of a file's tensor or of its expert's part."""
    return part.T if site.transposed and (fused or site.expert is None) else part


def site_reader(base: Path) -> Callable[[Site], Tensor]:
    """A function that reads one site's weight [d, n·c] from a base's files; one of few bits is dequantised to fp32.

    It raises ModelError for a weight of another shape, and FileError for one that is missing or in an unknown format.
    """
    opened = open_base(base)
    read = None if opened.architecture else checkpoint_reader(base)

    def read_site(site: Site) -> Tensor:
        packed = opened.packed(site)
        if packed is not None:
            return dequantised(packed, opened.folder, site, "the probe")
        name = opened.name(site)
        file, stored = opened.held[name]
        place = stored_place(site, stored, "the probe", opened.architecture != "")
        if read is None:
            return _read_place(opened.folder / file, place, stored)
        tensor = read(name, site.expert)
        return upright(site, tensor[0] if place.fused else tensor, place.fused)

    return read_site


def _read_place(path: Path, place: Place, stored: Stored) -> Tensor:
    memory = torch.empty(place.end - place.start, dtype=torch.uint8)
    with open(path, "rb") as file:
        read_range(file.fileno(), place.start, memory_of(memory))
    assert stored.dtype is not None
    return memory.view(stored.dtype).view(place.shape)


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


def stored_place(site: Site, stored: Stored, wanted_by: str, gguf: bool = False) -> Place:
    """Where a site's weight lies in a file, given the tensor that holds it as plain numbers.

    Args:
        gguf: whether it is a GGUF file's, where no weight is transposed.

    Raises:
        FileError: the tensor is not plain floating point. ModelError: it has another shape than the site's weight.
    """
    if stored.dtype is None:
        raise FileError(
            f"{stored.name} is not plain floating point",
            got=stored.dtype_name,
            fix=f"{KNOWN_FORMATS} Others: dequantise the checkpoint first; or give the loaded model to score(), which "
            "dequantises it, and serve the edit as an adapter.",
        )
    start, end, shape = stored.start, stored.end, stored.shape
    fused = len(shape) == 3 and site.expert is not None and shape[0] == site.experts
    if fused and site.expert is not None:
        size = (end - start) // shape[0]
        start, end, shape = start + site.expert * size, start + (site.expert + 1) * size, shape[1:]
    turned = not gguf and site.transposed and (fused or site.expert is None)
    if (shape[::-1] if turned else shape) != (site.d, site.inputs):
        raise other_shape(site, stored.name, stored.shape, wanted_by)
    return Place(start, end, (shape[0], shape[1]), turned, fused)
