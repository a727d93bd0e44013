"""fp4 (E2M1) codes, two in a byte with the lower bits first: what MXFP4 and NVFP4 have in common.

Groups of `size` numbers in a row share a scale. Codes are [d, n·c / 2] bytes, scales as numbers [d, n·c / size].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import packed, unpacked
from .grid import ROOM, Choice, Settled, in_table, nearest, settle

_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

LARGEST = 6.0


def dequantised(codes: Tensor, scales: Tensor) -> Tensor:
    """[d, n·c], fp32."""
    numbers = _values(unpacked(codes.flatten(1), 4))
    return (numbers.unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)


def around(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """As `Format.around`."""
    table = torch.cat([-_MAGNITUDES[1:].flip(0), _MAGNITUDES])
    groups = (scales.shape[1], -1)
    down, up = in_table(_values(unpacked(codes.flatten(1), 4)), table)
    return tuple((distance.unflatten(1, groups) * scales[..., None]).flatten(1) for distance in (down, up))


def requantised(
    target: Tensor, changed: Tensor, codes: Tensor, scales: Tensor, fresh: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Settled]:
    """The codes, in the shape of the old ones, and which groups got a scale of `fresh`.

    Args:
        fresh: new scales, as numbers, from each group's largest number. Both are [d, n·c / size].
    """
    groups = (scales.shape[1], -1)
    numbers = target.unflatten(1, groups)
    largest = numbers.abs().amax(dim=-1)

    def rounded(by: Tensor) -> Choice:
        whole = by[..., None]
        magnitude = nearest(torch.where(whole > 0, numbers.abs() / whole.clamp_min(2.0**-140), 0.0), _MAGNITUDES)
        sign = (numbers < 0) & (magnitude > 0)
        to = magnitude.to(torch.uint8) | (sign.to(torch.uint8) << 3)
        return Choice(to, _values(to) * whole)

    settled = settle(
        numbers,
        changed.unflatten(1, groups),
        unpacked(codes.flatten(1), 4).unflatten(1, groups),
        rounded(scales),
        largest <= ROOM * LARGEST * scales,
        lambda: rounded(fresh(largest)),
    )
    return packed(settled.codes.flatten(1), 4, torch.uint8).reshape(codes.shape), settled


def _values(codes: Tensor) -> Tensor:
    numbers = _MAGNITUDES[(codes & 7).long()]
    return torch.where(codes >= 8, -numbers, numbers)
