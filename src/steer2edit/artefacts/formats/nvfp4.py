"""NVFP4: fp4 codes, an fp8 scale for every 16 of them in a row, and one fp32 scale for the tensor.

compressed-tensors stores `weight_packed`, `weight_scale` and `weight_global_scale`, by which it divides; modelopt
`weight`, `weight_scale` and `weight_scale_2`, by which it multiplies. The tensor's own scale is always kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import fp4
from .base import Found, Held, Requantised, Settings, Tensors, dtype_name

_SCALE = torch.float8_e4m3fn


@dataclass(frozen=True)
class Nvfp4:
    """Codes of 4 bits, E4M3 scales, and a scale of the tensor; `divided`: by that one, not times it."""

    divided: bool

    @property
    def title(self) -> str:
        return "NVFP4"

    def shape(self, tensors: Tensors) -> tuple[int, int]:
        d, groups = tensors["scales"].shape
        return d, 16 * groups

    def unit(self, tensors: Tensors) -> int:
        return 1

    def take(self, tensors: Tensors, start: int, end: int) -> Tensors:
        return tensors | {role: tensors[role][start:end] for role in ("codes", "scales")}

    def dequantise(self, tensors: Tensors) -> Tensor:
        return fp4.dequantised(tensors["codes"], self._numbers(tensors["scales"], tensors))

    def around(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        return fp4.around(tensors["codes"], self._numbers(tensors["scales"], tensors))

    def requantise(self, target: Tensor, changed: Tensor, tensors: Tensors) -> Requantised:
        stored, factor = tensors["scales"], self._factor(tensors)
        largest = target.unflatten(1, (stored.shape[1], -1)).abs().amax(dim=-1)
        info = torch.finfo(_SCALE)
        new = (largest / fp4.LARGEST / factor).clamp(info.smallest_normal / 8, info.max).to(_SCALE)
        codes, settled = fp4.requantised(
            target, changed, tensors["codes"], self._numbers(stored, tensors), lambda _: self._numbers(new, tensors)
        )
        scales = torch.where(settled.renewed, new.view(torch.uint8), stored.view(torch.uint8)).view(_SCALE)
        return Requantised(tensors | {"codes": codes, "scales": scales}, settled.groups, int(settled.renewed.sum()))

    def _factor(self, tensors: Tensors) -> Tensor:
        scale = tensors["scale of all"].float().reshape(())
        return 1 / scale if self.divided else scale

    def _numbers(self, scales: Tensor, tensors: Tensors) -> Tensor:
        if self.divided:  # as compressed-tensors computes it
            return scales.float() / tensors["scale of all"].float().reshape(())
        return scales.float() * self._factor(tensors)


def find(name: str, held: Held, settings: Settings) -> Found | None:
    """The tensors of an NVFP4 weight, if there are any under that name."""
    if dtype_name(held, f"{name}_scale") != "F8_E4M3":
        return None
    for codes, scale_of_all, divided in (("_packed", "_global_scale", True), ("", "_scale_2", False)):
        if dtype_name(held, name + codes) == "U8" and dtype_name(held, name + scale_of_all) == "F32":
            names = {"codes": name + codes, "scales": f"{name}_scale", "scale of all": name + scale_of_all}
            return Nvfp4(divided), names
    return None
