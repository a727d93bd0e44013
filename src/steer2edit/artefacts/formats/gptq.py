"""GPTQ: integers of 2, 4 or 8 bits, packed along the inputs, with a scale and a zero point per group and output.

`qweight` [n·c / per, d] int32, `scales` [groups, d], `qzeros` [groups, d / per] int32, and `g_idx` [n·c], the group of
each input. Version 1 of the format stores zero points minus 1, version 2 (`gptq_v2`) as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import FileError
from .base import Found, Held, Requantised, Settings, Tensors, dtype_name, packed, unpacked
from .grid import in_steps
from .integers import Affine, requantised


@dataclass(frozen=True)
class Gptq:
    """Codes of `bits` bits; `offset` is what the files' zero points lack."""

    bits: int
    offset: int

    @property
    def title(self) -> str:
        return f"GPTQ, {self.bits} bits"

    @property
    def _per(self) -> int:
        return 32 // self.bits

    def shape(self, tensors: Tensors) -> tuple[int, int]:
        words, d = tensors["codes"].shape
        return d, words * self._per

    def unit(self, tensors: Tensors) -> int:
        return self._per

    def take(self, tensors: Tensors, start: int, end: int) -> Tensors:
        of_words = slice(start // self._per, -(-end // self._per))
        some = {"codes": tensors["codes"][:, start:end], "scales": tensors["scales"][:, start:end]}
        return tensors | some | {"zeros": tensors["zeros"][:, of_words]}

    def dequantise(self, tensors: Tensors) -> Tensor:
        order = self._order(tensors)
        grouped = self._affine(tensors, order).values().flatten(1)
        weight = torch.empty_like(grouped)
        weight[:, order] = grouped
        return weight

    def around(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        codes = unpacked(tensors["codes"].T.contiguous(), self.bits)
        step = tensors["scales"].float().T[:, self._groups(tensors).long()]
        return in_steps(codes, step, 0, 2**self.bits - 1)

    def requantise(self, target: Tensor, changed: Tensor, tensors: Tensors) -> Requantised:
        order = self._order(tensors)
        old = self._affine(tensors, order)
        grouped = old.codes.shape[1:]
        now, settled = requantised(
            target[:, order].unflatten(1, grouped), changed[:, order].unflatten(1, grouped), old, 2**self.bits - 1
        )
        codes = torch.empty_like(now.codes.flatten(1))
        codes[:, order] = now.codes.flatten(1)
        new = {
            "codes": packed(codes, self.bits, torch.int32).T.contiguous(),
            "scales": now.scales.T.contiguous(),
        }
        return Requantised(tensors | new, settled.groups, int(settled.renewed.sum()))

    def _groups(self, tensors: Tensors) -> Tensor:
        if "groups" in tensors:
            return tensors["groups"]
        inputs, count = tensors["codes"].shape[0] * self._per, tensors["scales"].shape[0]
        return torch.arange(inputs) // -(-inputs // count)

    def _order(self, tensors: Tensors) -> Tensor:
        """The inputs group by group: with activation order a group's inputs lie apart."""
        groups = self._groups(tensors)
        count = tensors["scales"].shape[0]
        sizes = torch.bincount(groups.long(), minlength=count) if int(groups.min()) >= 0 else torch.zeros(1)
        if len(sizes) != count or not bool((sizes == sizes[0]).all()):
            raise FileError(
                "a GPTQ weight has groups of unequal sizes",
                got=f"{int(sizes.min())} to {int(sizes.max())} inputs a group",
                fix="Serve the edit as an adapter.",
            )
        return torch.argsort(groups, stable=True)

    def _affine(self, tensors: Tensors, order: Tensor) -> Affine:
        codes = unpacked(tensors["codes"].T.contiguous(), self.bits)  # [d, n·c]
        zeros = unpacked(tensors["zeros"], self.bits).T[: len(codes)].float() + self.offset  # [d, groups]
        return Affine(
            codes[:, order].unflatten(1, (zeros.shape[1], -1)), tensors["scales"].T.contiguous(), zeros.contiguous()
        )


def find(name: str, held: Held, settings: Settings) -> Found | None:
    """The tensors of a GPTQ weight, if there are any under that name."""
    stem = name.removesuffix(".weight")
    names = {"codes": f"{stem}.qweight", "scales": f"{stem}.scales", "zeros": f"{stem}.qzeros"}
    if settings.get("quant_method") != "gptq" or any(name not in held for name in names.values()):
        return None
    bits = settings.get("bits")
    if bits not in (2, 4, 8) or dtype_name(held, names["codes"]) != "I32":
        raise FileError(
            f"{names['codes']} is stored in a way that is not known",
            got=f"bits {bits}, {dtype_name(held, names['codes'])}",
            fix="GPTQ with 2, 4 or 8 bits in int32 is known. Serve the edit as an adapter.",
        )
    if f"{stem}.g_idx" in held:
        names["groups"] = f"{stem}.g_idx"
    second = "gptq_v2" in (settings.get("checkpoint_format"), settings.get("format"))
    return Gptq(bits, 0 if second else 1), names
