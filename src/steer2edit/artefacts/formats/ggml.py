"""The blocks of llama.cpp's GGUF files: 32 or 256 numbers of a row with codes, scales and, in some types, offsets.

A number is step · code + offset. Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 get new scales from the gguf package where the edited
numbers do not fit; the K types keep theirs, and what leaves their range is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Requantised, Tensors, packed, unpacked
from .grid import Choice, divided, in_steps, settle


@dataclass(frozen=True)
class Unpacked:
    """Blocks as numbers [blocks, numbers of a block]: step · codes + offset. Codes are signed 16-bit integers."""

    codes: Tensor
    step: Tensor
    offset: Tensor

    def values(self) -> Tensor:
        return self.step * self.codes.float() + self.offset


@dataclass(frozen=True)
class Kind:
    """A type of block.

    Attributes:
        numbers, size: how many numbers a block holds, in how many bytes. low, high: the range of its codes.
        unpack: blocks [blocks, size] as numbers. pack: the blocks with other codes, and the same scales.
        renews: whether the gguf package can find new scales.
    """

    numbers: int
    size: int
    low: int
    high: int
    unpack: Callable[[Tensor], Unpacked]
    pack: Callable[[Tensor, Tensor], Tensor]
    renews: bool


@dataclass(frozen=True)
class Ggml:
    """A weight in blocks of the type `kind`, such as "Q4_1": bytes [d, bytes of a row]."""

    kind: str

    @property
    def title(self) -> str:
        return f"GGUF {self.kind}"

    def shape(self, tensors: Tensors) -> tuple[int, int]:
        d, size = tensors["codes"].shape
        kind = KINDS[self.kind]
        return d, size // kind.size * kind.numbers

    def unit(self, tensors: Tensors) -> int:
        return 1

    def take(self, tensors: Tensors, start: int, end: int) -> Tensors:
        return {"codes": tensors["codes"][start:end]}

    def dequantise(self, tensors: Tensors) -> Tensor:
        rows = tensors["codes"]
        return self._unpack(rows).values().view(len(rows), -1)

    def around(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        kind, rows = KINDS[self.kind], tensors["codes"]
        some = self._unpack(rows)
        down, up = in_steps(some.codes, some.step, kind.low, kind.high)
        return down.reshape(len(rows), -1), up.reshape(len(rows), -1)

    def requantise(self, target: Tensor, changed: Tensor, tensors: Tensors) -> Requantised:
        kind, rows = KINDS[self.kind], tensors["codes"]
        blocks, old = rows.reshape(-1, kind.size), self._unpack(rows)
        numbers = target.reshape(-1, kind.numbers)
        wanted = torch.round(divided(numbers - old.offset, old.step.expand_as(numbers)))
        codes = wanted.clamp(kind.low, kind.high).to(torch.int16)
        kept = Choice(codes, Unpacked(codes, old.step, old.offset).values())
        fits = (wanted == codes).all(dim=-1) | torch.tensor(not kind.renews)
        anew: list[Tensor] = []

        def fresh() -> Choice:
            anew.append(_by_gguf(numbers, self.kind))
            new = kind.unpack(anew[0])
            return Choice(new.codes, new.values())

        settled = settle(numbers, changed.reshape(-1, kind.numbers), old.codes, kept, fits, fresh)
        out = kind.pack(blocks, settled.codes)
        if anew:
            out = torch.where(settled.renewed[:, None], anew[0], out)
        return Requantised({"codes": out.view(rows.shape)}, settled.groups, int(settled.renewed.sum()))

    def _unpack(self, rows: Tensor) -> Unpacked:
        kind = KINDS[self.kind]
        return kind.unpack(rows.reshape(-1, kind.size))


def _by_gguf(numbers: Tensor, kind: str) -> Tensor:
    """Blocks with scales of their own, as the gguf package finds them."""
    import gguf

    raw = gguf.quants.quantize(numbers.numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(raw).view(len(numbers), -1)


def _half(raw: Tensor, at: int) -> Tensor:
    """The fp16 number in two bytes of each block [blocks, 1], fp32."""
    return raw[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(raw: Tensor, width: int) -> Tensor:
    """[blocks, k] bytes → [blocks, 2k] codes: of every `width` bytes the lower halves, then the higher ones."""
    some = raw.unflatten(1, (-1, 1, width))
    return torch.cat([some & 15, some >> 4], dim=2).flatten(1)


def _joined(codes: Tensor, width: int) -> Tensor:
    """The reverse of `_nibbles`."""
    some = codes.to(torch.uint8).unflatten(1, (-1, 2, width))
    return (some[:, :, 0] | (some[:, :, 1] << 4)).flatten(1)


def _replaced(raw: Tensor, start: int, *parts: Tensor) -> Tensor:
    """The blocks with other bytes from `start` on."""
    changed = torch.cat(parts, dim=1)
    out = raw.clone()
    out[:, start : start + changed.shape[1]] = changed
    return out


def _zero(raw: Tensor) -> Tensor:
    return torch.zeros(len(raw), 1)


def _unpack_q8_0(raw: Tensor) -> Unpacked:
    return Unpacked(raw[:, 2:].contiguous().view(torch.int8).to(torch.int16), _half(raw, 0), _zero(raw))


def _pack_q8_0(raw: Tensor, codes: Tensor) -> Tensor:
    return _replaced(raw, 2, codes.to(torch.int8).view(torch.uint8))


def _four_bits(offset: bool) -> tuple[Callable[[Tensor], Unpacked], Callable[[Tensor, Tensor], Tensor]]:
    """Q4_1, whose blocks have an offset, and Q4_0, whose codes are signed."""
    start, zero = (4, 0) if offset else (2, 8)

    def unpack(raw: Tensor) -> Unpacked:
        codes = _nibbles(raw[:, start:], 16).to(torch.int16) - zero
        return Unpacked(codes, _half(raw, 0), _half(raw, 2) if offset else _zero(raw))

    def pack(raw: Tensor, codes: Tensor) -> Tensor:
        return _replaced(raw, start, _joined(codes + zero, 16))

    return unpack, pack


def _five_bits(offset: bool) -> tuple[Callable[[Tensor], Unpacked], Callable[[Tensor, Tensor], Tensor]]:
    """Q5_1, whose blocks have an offset, and Q5_0, whose codes are signed; the fifth bits stand apart."""
    start, zero = (4, 0) if offset else (2, 16)

    def unpack(raw: Tensor) -> Unpacked:
        fifth = unpacked(raw[:, start : start + 4], 1).to(torch.int16)
        codes = (_nibbles(raw[:, start + 4 :], 16).to(torch.int16) | (fifth << 4)) - zero
        return Unpacked(codes, _half(raw, 0), _half(raw, 2) if offset else _zero(raw))

    def pack(raw: Tensor, codes: Tensor) -> Tensor:
        whole = codes + zero
        return _replaced(raw, start, packed(whole >> 4, 1, torch.uint8), _joined(whole & 15, 16))

    return unpack, pack


def _scales_of_k(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Step and offset of each number of a Q4_K or Q5_K block: 8 scales and 8 minima of 6 bits in 12 bytes."""
    d, m, mixed = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scales = torch.cat([d & 63, (mixed & 15) | ((d >> 2) & 48)], dim=1).float()  # [blocks, 8]
    minima = torch.cat([m & 63, (mixed >> 4) | ((m >> 2) & 48)], dim=1).float()
    step, least = _half(raw, 0) * scales, _half(raw, 2) * minima
    return step.repeat_interleave(32, dim=1), -least.repeat_interleave(32, dim=1)


def _unpack_q4_k(raw: Tensor) -> Unpacked:
    return Unpacked(_nibbles(raw[:, 16:], 32).to(torch.int16), *_scales_of_k(raw))


def _pack_q4_k(raw: Tensor, codes: Tensor) -> Tensor:
    return _replaced(raw, 16, _joined(codes, 32))


def _unpack_q5_k(raw: Tensor) -> Unpacked:
    fifth = (raw[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1  # [blocks, 8, 32]
    codes = _nibbles(raw[:, 48:], 32).to(torch.int16) | (fifth.flatten(1).to(torch.int16) << 4)
    return Unpacked(codes, *_scales_of_k(raw))


def _pack_q5_k(raw: Tensor, codes: Tensor) -> Tensor:
    fifth = (codes >> 4).unflatten(1, (8, 32)) << torch.arange(8, dtype=torch.int16)[:, None]
    return _replaced(raw, 16, fifth.sum(dim=1).to(torch.uint8), _joined(codes & 15, 32))


def _unpack_q6_k(raw: Tensor) -> Unpacked:
    high = raw[:, 128:192].unflatten(1, (2, 1, 32)) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    codes = (_nibbles(raw[:, :128], 64).to(torch.int16) | ((high & 3).flatten(1).to(torch.int16) << 4)) - 32
    scales = raw[:, 192:208].contiguous().view(torch.int8).float()
    return Unpacked(codes, (_half(raw, 208) * scales).repeat_interleave(16, dim=1), _zero(raw))


def _pack_q6_k(raw: Tensor, codes: Tensor) -> Tensor:
    whole = codes + 32
    high = (whole >> 4).unflatten(1, (2, 4, 32)) << torch.tensor([0, 2, 4, 6], dtype=torch.int16)[:, None]
    return _replaced(raw, 0, _joined(whole & 15, 64), high.sum(dim=2).flatten(1).to(torch.uint8))


KINDS = {
    "Q8_0": Kind(32, 34, -128, 127, _unpack_q8_0, _pack_q8_0, True),
    "Q4_0": Kind(32, 18, -8, 7, *_four_bits(False), True),
    "Q4_1": Kind(32, 20, 0, 15, *_four_bits(True), True),
    "Q5_0": Kind(32, 22, -16, 15, *_five_bits(False), True),
    "Q5_1": Kind(32, 24, 0, 31, *_five_bits(True), True),
    "Q4_K": Kind(256, 144, 0, 15, _unpack_q4_k, _pack_q4_k, False),
    "Q5_K": Kind(256, 176, 0, 31, _unpack_q5_k, _pack_q5_k, False),
    "Q6_K": Kind(256, 210, -32, 31, _unpack_q6_k, _pack_q6_k, False),
}
