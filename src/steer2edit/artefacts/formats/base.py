"""What a format of few bits per weight is, and which tensors of a checkpoint hold a weight in it.

A weight is several tensors: codes, scales, and what else the format needs. An edited weight keeps their names, shapes
and dtypes, so that its bytes go to the place of the old ones and no header changes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import FileError
from ...files.ranges import memory_of, read_range
from ...files.shards import Stored

# The tensors of one weight, by what they are: "codes", "scales" and so on.
Tensors = dict[str, Tensor]

# The file's own names of dtypes, with those that hold codes and scales.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class Requantised:
    """A weight's tensors after an edit.

    Attributes:
        groups: how many groups of numbers that share a scale the edit touches.
        renewed: how many of these got a new scale, since the edited numbers leave the old one's range.
    """

    tensors: Tensors
    groups: int
    renewed: int


class Format(Protocol):
    """How a weight [d, n·c] is stored in tensors of few bits.

    Attributes:
        title: its name for people.
    """

    @property
    def title(self) -> str: ...

    def shape(self, tensors: Tensors) -> tuple[int, int]:
        """[d, n·c] of the weight."""
        ...

    def unit(self, tensors: Tensors) -> int:
        """How many rows must be taken together, since they share codes or scales; 0 for all of them."""
        ...

    def take(self, tensors: Tensors, start: int, end: int) -> Tensors:
        """The tensors of some rows, as views: writing to them changes the weight's own tensors."""
        ...

    def dequantise(self, tensors: Tensors) -> Tensor:
        """The weight [d, n·c], fp32."""
        ...

    def around(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """How far the next lower and the next higher number is that a code could say, at each number [d, n·c].

        fp32; 0 where the code is the last one under its scale.
        """
        ...

    def requantise(self, target: Tensor, changed: Tensor, tensors: Tensors) -> Requantised:
        """The tensors that come nearest to `target`.

        A group of numbers keeps its scale if the edited numbers fit; else it gets a new one if that comes nearer. A
        group without a changed number keeps its bytes.

        Args:
            target: [d, n·c], fp32. changed: which of its numbers differ from the stored ones.
        """
        ...


@dataclass(frozen=True)
class Part:
    """One tensor of a weight, or an expert's part of it.

    Attributes:
        role: what it is to its format. label: its name, with the expert's number if the tensor holds several.
        start, end: its bytes in `file`.
    """

    role: str
    tensor: str
    label: str
    file: str
    start: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Packed:
    """A weight of few bits: its format, and where its tensors are. The first one holds the codes."""

    format: Format
    parts: tuple[Part, ...]

    def read(self, folder: Path) -> Tensors:
        """The tensors, read from the files of a checkpoint."""
        return {part.role: read_part(folder, part) for part in self.parts}


def read_part(folder: Path, part: Part) -> Tensor:
    memory = torch.empty(part.end - part.start, dtype=torch.uint8)
    file = os.open(folder / part.file, os.O_RDONLY)
    try:
        read_range(file, part.start, memory_of(memory))
    finally:
        os.close(file)
    return memory.view(part.dtype).reshape(part.shape)


# A format, and the names of the tensors that hold a weight in it.
Found = tuple[Format, dict[str, str]]

# Tensor name → the file that holds it, and the place in it.
Held = Mapping[str, tuple[str, Stored]]

Settings = Mapping[str, Any]


def dtype_name(held: Held, name: str) -> str | None:
    """The file's name of a tensor's dtype; None if there is no such tensor."""
    return held[name][1].dtype_name if name in held else None


def part_of(role: str, name: str, held: Held, expert: int | None, experts: int | None) -> Part:
    """A tensor of a weight; of a tensor that holds all experts of a layer, the one expert's part."""
    file, stored = held[name]
    dtype = DTYPES.get(stored.dtype_name)
    if dtype is None:
        raise FileError(
            f"{name} has a dtype that its format does not know", got=stored.dtype_name, fix="Download it again."
        )
    start, end, shape, label = stored.start, stored.end, stored.shape, name
    if expert is not None and len(shape) >= 2 and shape[0] == experts and len(shape) > 2:
        size = (end - start) // shape[0]
        start, end, shape = start + expert * size, start + (expert + 1) * size, shape[1:]
        label = f"{name}[{expert}]"
    if math.prod(shape) * dtype.itemsize != end - start:
        raise FileError(f"{name} has another size than its shape says", got=end - start, fix="Download it again.")
    return Part(role, name, label, file, start, end, shape, dtype)


def power_of_2(exponents: Tensor) -> Tensor:
    """2 ** (byte − 127), exactly, on every machine."""
    whole = exponents.to(torch.int32)
    return torch.where(whole > 0, (whole << 23).view(torch.float32), 2.0**-127)


def exponent_above(numbers: Tensor) -> Tensor:
    """The byte of the smallest power of 2 that is not below each number: the reverse of `power_of_2`."""
    mantissa, exponent = torch.frexp(numbers.clamp_min(2.0**-126))
    return (torch.where(mantissa > 0.5, exponent, exponent - 1) + 127).clamp(0, 254).to(torch.uint8)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The unsigned numbers in a tensor's integers, the lowest bits first: [.., k] → [.., k · (width / bits)], uint8."""
    width = 8 * words.element_size()
    shifts = torch.arange(0, width, bits, dtype=words.dtype)
    return ((words[..., None] >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(-2)


def packed(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The reverse of `unpacked`."""
    per = 8 * dtype.itemsize // bits
    shifts = torch.arange(0, per * bits, bits, dtype=torch.int64)
    words = (codes.to(torch.int64).unflatten(-1, (-1, per)) << shifts).sum(dim=-1)
    if dtype is torch.int32:
        words = torch.where(words >= 2**31, words - 2**32, words)
    return words.to(dtype)
