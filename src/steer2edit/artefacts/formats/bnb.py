"""bitsandbytes: codes of a table (nf4, fp4) in blocks of the flattened weight, and int8 with a scale per row.

With 4 bits `weight` holds two codes in a byte, the higher bits first, and `weight.absmax` each block's largest number;
it is itself in 8 bits if the weight was quantised twice. With 8 bits W = codes · SCB / 127.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import FileError
from .base import Found, Held, Requantised, Settings, Tensors, dtype_name, packed, unpacked
from .grid import ROOM, Choice, divided, in_steps, in_table, nearest, settle


@dataclass(frozen=True)
class Bnb4:
    """Codes of 4 bits for a table of 16 numbers, `kind` "nf4" or "fp4"; `twice`: its scales are in 8 bits."""

    kind: str
    twice: bool

    @property
    def title(self) -> str:
        return f"bitsandbytes {self.kind}{', quantised twice' if self.twice else ''}"

    def shape(self, tensors: Tensors) -> tuple[int, int]:
        state = _state(tensors)
        d, columns = state["shape"]
        block = state["blocksize"]
        if 2 * tensors["codes"].numel() != d * columns or tensors["scales"].numel() != -(-d * columns // block):
            raise FileError(
                "a bitsandbytes weight does not have the size that its state says",
                got=f"{tensors['codes'].numel()} bytes for {d} × {columns}",
                fix="Download it again.",
            )
        return d, columns

    def unit(self, tensors: Tensors) -> int:
        state = _state(tensors)
        together = state["blocksize"] * (state["nested_blocksize"] if self.twice else 1)
        return together // math.gcd(together, state["shape"][1])

    def take(self, tensors: Tensors, start: int, end: int) -> Tensors:
        state = _state(tensors)
        columns = state["shape"][1]
        first, last = start * columns, end * columns
        block = state["blocksize"]
        some = {
            "codes": tensors["codes"].view(-1)[first // 2 : last // 2],
            "scales": tensors["scales"][first // block : -(-last // block)],
        }
        if self.twice:
            outer = block * state["nested_blocksize"]
            some["scales of scales"] = tensors["scales of scales"][first // outer : -(-last // outer)]
        return tensors | some

    def dequantise(self, tensors: Tensors) -> Tensor:
        codes = self._blocks(_codes(tensors), tensors)
        return self._rows(tensors["table"].float()[codes.long()] * self._scales(tensors)[:, None], tensors)

    def around(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        numbers = tensors["table"].float()[self._blocks(_codes(tensors), tensors).long()]
        scales = self._scales(tensors)[:, None]
        down, up = in_table(numbers, torch.unique(tensors["table"].float()))
        below, above = torch.where(scales < 0, up, down), torch.where(scales < 0, down, up)
        return self._rows(below * scales.abs(), tensors), self._rows(above * scales.abs(), tensors)

    def requantise(self, target: Tensor, changed: Tensor, tensors: Tensors) -> Requantised:
        numbers = self._blocks(target.flatten(), tensors)
        table, order = _sorted(tensors["table"])
        scales, largest = self._scales(tensors), numbers.abs().amax(dim=-1)
        stored, new_scales = self._renewed(largest, tensors)

        def rounded(by: Tensor) -> Choice:
            ranks = nearest(divided(numbers, by[:, None]), table)
            return Choice(order[ranks].to(torch.uint8), table[ranks] * by[:, None])

        settled = settle(
            numbers,
            self._blocks(changed.flatten(), tensors),
            self._blocks(_codes(tensors), tensors),
            rounded(scales),
            largest <= ROOM * scales.abs(),
            lambda: rounded(new_scales),
        )
        codes = settled.codes.flatten()[: target.numel()].view(-1, 2).flip(-1).flatten()
        new = {
            "codes": packed(codes, 4, torch.uint8).view(tensors["codes"].shape),
            "scales": torch.where(settled.renewed, stored, tensors["scales"]),
        }
        return Requantised(tensors | new, settled.groups, int(settled.renewed.sum()))

    def _blocks(self, flat: Tensor, tensors: Tensors) -> Tensor:
        """A flattened weight in blocks [blocks, size]; the last one is filled up with zeros."""
        size = _state(tensors)["blocksize"]
        missing = -len(flat) % size
        if missing:
            flat = torch.cat([flat, flat.new_zeros(missing)])
        return flat.view(-1, size)

    def _rows(self, blocks: Tensor, tensors: Tensors) -> Tensor:
        count = 2 * tensors["codes"].numel()
        return blocks.flatten()[:count].view(-1, _state(tensors)["shape"][1])

    def _scales(self, tensors: Tensors) -> Tensor:
        if not self.twice:
            return tensors["scales"].float()
        outer, offset = self._outer(tensors)
        return tensors["table of scales"].float()[tensors["scales"].long()] * outer + offset

    def _outer(self, tensors: Tensors) -> tuple[Tensor, float]:
        """The scale of each block's scale, and what is added to the product."""
        state = _state(tensors)
        spread = tensors["scales of scales"].float().repeat_interleave(state["nested_blocksize"])
        return spread[: tensors["scales"].numel()], float(state["nested_offset"])

    def _renewed(self, largest: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """The scales for blocks whose largest numbers are given, as stored and as numbers."""
        if not self.twice:
            return largest.to(tensors["scales"].dtype), largest
        outer, offset = self._outer(tensors)
        table, order = _sorted(tensors["table of scales"].float())
        ranks = nearest(divided(largest - offset, outer), table)
        return order[ranks].to(torch.uint8), table[ranks] * outer + offset


@dataclass(frozen=True)
class Bnb8:
    """Codes in int8 and the largest number of each row."""

    @property
    def title(self) -> str:
        return "bitsandbytes int8"

    def shape(self, tensors: Tensors) -> tuple[int, int]:
        d, columns = tensors["codes"].shape
        return d, columns

    def unit(self, tensors: Tensors) -> int:
        return 1

    def take(self, tensors: Tensors, start: int, end: int) -> Tensors:
        return {role: tensor[start:end] for role, tensor in tensors.items()}

    def dequantise(self, tensors: Tensors) -> Tensor:
        return tensors["codes"].float() * (tensors["scales"].float() / 127)[:, None]

    def around(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        return in_steps(tensors["codes"], (tensors["scales"].float() / 127)[:, None], -127, 127)

    def requantise(self, target: Tensor, changed: Tensor, tensors: Tensors) -> Requantised:
        stored, largest = tensors["scales"], target.abs().amax(dim=1)

        def rounded(by: Tensor) -> Choice:
            step = (by.float() / 127)[:, None]
            codes = torch.round(divided(target, step)).clamp(-127, 127)
            return Choice(codes.to(torch.int8), codes * step)

        new = largest.to(stored.dtype)
        settled = settle(
            target, changed, tensors["codes"], rounded(stored), largest <= ROOM * stored.float(), lambda: rounded(new)
        )
        scales = torch.where(settled.renewed, new, stored)
        return Requantised({"codes": settled.codes, "scales": scales}, settled.groups, int(settled.renewed.sum()))


def find(name: str, held: Held, settings: Settings) -> Found | None:
    """The tensors of a weight that bitsandbytes quantised, if `name` is one."""
    kind = dtype_name(held, name)
    if kind == "U8" and f"{name}.absmax" in held:
        state = next((k for k in ("nf4", "fp4") if f"{name}.quant_state.bitsandbytes__{k}" in held), None)
        if state is None:
            return None
        names = {
            "codes": name,
            "scales": f"{name}.absmax",
            "table": f"{name}.quant_map",
            "state": f"{name}.quant_state.bitsandbytes__{state}",
        }
        twice = f"{name}.nested_absmax" in held
        if twice:
            names |= {"scales of scales": f"{name}.nested_absmax", "table of scales": f"{name}.nested_quant_map"}
        return Bnb4(state, twice), names
    scales = f"{name.removesuffix('.weight')}.SCB"
    if kind == "I8" and scales in held:
        return Bnb8(), {"codes": name, "scales": scales}
    return None


def _state(tensors: Tensors) -> dict[str, Any]:
    """What bitsandbytes keeps as JSON beside the tensors: the weight's shape and the sizes of the blocks."""
    try:
        state = json.loads(tensors["state"].numpy().tobytes())
        sizes = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
        if len(state["shape"]) != 2 or any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError("the sizes are no positive numbers")
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(
            "the state of a bitsandbytes weight cannot be read", got=repr(error), fix="Download it again."
        ) from None
    return state


def _codes(tensors: Tensors) -> Tensor:
    """One code for each number of the flattened weight."""
    return unpacked(tensors["codes"].view(-1, 1), 4).view(-1, 2).flip(-1).flatten()


def _sorted(table: Tensor) -> tuple[Tensor, Tensor]:
    """The table's numbers in ascending order, and the code of each."""
    numbers, order = torch.sort(table.float(), stable=True)
    return numbers, order
