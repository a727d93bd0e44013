"""MXFP4: fp4 codes, and a power of 2 for every 32 of them in a row.

gpt-oss stores the experts of a layer in `…_blocks` [experts, d, n·c / 32, 16] and `…_scales` [experts, d, n·c / 32],
compressed-tensors a map in `weight_packed` [d, n·c / 2] and `weight_scale` [d, n·c / 32].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import fp4
from .base import Found, Held, Requantised, Settings, Tensors, dtype_name, exponent_above, power_of_2


@dataclass(frozen=True)
class Mxfp4:
    """Codes of 4 bits and exponents of 2 with an offset of 127."""

    @property
    def title(self) -> str:
        return "MXFP4"

    def shape(self, tensors: Tensors) -> tuple[int, int]:
        d, groups = tensors["scales"].shape
        return d, 32 * groups

    def unit(self, tensors: Tensors) -> int:
        return 1

    def take(self, tensors: Tensors, start: int, end: int) -> Tensors:
        return {role: tensor[start:end] for role, tensor in tensors.items()}

    def dequantise(self, tensors: Tensors) -> Tensor:
        return fp4.dequantised(tensors["codes"], _numbers(tensors["scales"]))

    def around(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        return fp4.around(tensors["codes"], _numbers(tensors["scales"]))

    def requantise(self, target: Tensor, changed: Tensor, tensors: Tensors) -> Requantised:
        stored = tensors["scales"]
        largest = target.unflatten(1, (stored.shape[1], -1)).abs().amax(dim=-1)
        # The smallest power of 2 under which no number is cut by more than rounding moves it: 7 rounds to 6.
        new = exponent_above(largest / 7)
        codes, settled = fp4.requantised(target, changed, tensors["codes"], _numbers(stored), lambda _: power_of_2(new))
        scales = torch.where(settled.renewed, new, stored.view(torch.uint8)).view(stored.dtype)
        return Requantised({"codes": codes, "scales": scales}, settled.groups, int(settled.renewed.sum()))


def _numbers(scales: Tensor) -> Tensor:
    return power_of_2(scales.view(torch.uint8))


def find(name: str, held: Held, settings: Settings) -> Found | None:
    """The tensors of an MXFP4 weight, if there are any under that name."""
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    if dtype_name(held, blocks) == "U8" and dtype_name(held, scales) == "U8":
        return Mxfp4(), {"codes": blocks, "scales": scales}
    codes, scales = f"{name}_packed", f"{name}_scale"
    if dtype_name(held, codes) == "U8" and dtype_name(held, scales) in ("U8", "F8_E8M0"):
        return Mxfp4(), {"codes": codes, "scales": scales}
    return None
