"""fp8 (E4M3, E5M2): a number times the scale of its tensor, its row, or its block of rows and columns.

DeepSeek and Qwen3 store the block's scale as `weight_scale_inv`, compressed-tensors, fbgemm and modelopt theirs as
`weight_scale`. Both are factors: W = codes · scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import FileError
from .base import Found, Held, Requantised, Settings, Tensors, dtype_name, exponent_above, power_of_2
from .grid import ROOM, Choice, in_table, settle


@dataclass(frozen=True)
class Fp8:
    """Codes [d, n·c] in fp8 and scales for blocks of `rows` × `columns` of them; 0 is all of them."""

    rows: int
    columns: int
    kind: str  # the codes' dtype in the file

    @property
    def title(self) -> str:
        per = {(0, 0): "tensor", (1, 0): "row"}.get((self.rows, self.columns), f"block {self.rows} × {self.columns}")
        return f"fp8 {self.kind.removeprefix('F8_')}, a scale per {per}"

    def shape(self, tensors: Tensors) -> tuple[int, int]:
        d, columns = tensors["codes"].shape
        return d, columns

    def unit(self, tensors: Tensors) -> int:
        return self.rows

    def take(self, tensors: Tensors, start: int, end: int) -> Tensors:
        if not self.rows:
            return tensors
        scales = tensors["scales"]
        return {"codes": tensors["codes"][start:end], "scales": scales[start // self.rows : -(-end // self.rows)]}

    def dequantise(self, tensors: Tensors) -> Tensor:
        codes = tensors["codes"]
        return codes.float() * self._spread(_numbers(tensors["scales"]), codes.shape)

    def around(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        codes = tensors["codes"]
        numbers = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
        table = torch.unique(numbers[numbers.isfinite()])
        scales = self._spread(_numbers(tensors["scales"]), codes.shape)
        down, up = in_table(codes.float(), table)
        return down * scales, up * scales

    def requantise(self, target: Tensor, changed: Tensor, tensors: Tensors) -> Requantised:
        codes, stored = tensors["codes"], tensors["scales"]
        largest = torch.finfo(codes.dtype).max
        scales = _numbers(stored).reshape(self._grid(codes.shape))
        blocks = self._blocks(target)
        old = scales[..., None]
        fits = blocks.abs().amax(dim=-1) <= ROOM * largest * scales
        renewed_scales = _as_stored(blocks.abs().amax(dim=-1) / largest, stored.dtype)

        def rounded(by: Tensor) -> Choice:
            to = (blocks / by.clamp_min(torch.finfo(torch.float32).tiny)).clamp(-largest, largest).to(codes.dtype)
            return Choice(to.view(torch.uint8), to.float() * by)

        settled = settle(
            blocks,
            self._blocks(changed),
            self._blocks(codes.view(torch.uint8)),
            rounded(old),
            fits,
            lambda: rounded(_numbers(renewed_scales)[..., None]),
        )
        scales_now = torch.where(settled.renewed, _bits(renewed_scales), _bits(stored).reshape(scales.shape))
        return Requantised(
            {
                "codes": self._unblocked(settled.codes, codes.shape).view(codes.dtype),
                "scales": scales_now.reshape(stored.shape).view(stored.dtype),
            },
            settled.groups,
            int(settled.renewed.sum()),
        )

    def _size(self, shape: torch.Size) -> tuple[int, int]:
        return self.rows or shape[0], self.columns or shape[1]

    def _grid(self, shape: torch.Size) -> tuple[int, int]:
        """How many blocks there are, down and across."""
        rows, columns = self._size(shape)
        return -(-shape[0] // rows), -(-shape[1] // columns)

    def _spread(self, scales: Tensor, shape: torch.Size) -> Tensor:
        """A block's scale at each of its numbers [d, n·c]."""
        rows, columns = self._size(shape)
        grid = scales.reshape(self._grid(shape))
        return grid.repeat_interleave(rows, dim=0)[: shape[0]].repeat_interleave(columns, dim=1)[:, : shape[1]]

    def _blocks(self, matrix: Tensor) -> Tensor:
        """[d, n·c] → [blocks down, blocks across, numbers of a block]; the last ones are filled up with zeros."""
        rows, columns = self._size(matrix.shape)
        down, across = self._grid(matrix.shape)
        whole = matrix
        if (down * rows, across * columns) != tuple(matrix.shape):
            whole = matrix.new_zeros(down * rows, across * columns)
            whole[: matrix.shape[0], : matrix.shape[1]] = matrix
        return whole.view(down, rows, across, columns).transpose(1, 2).reshape(down, across, rows * columns)

    def _unblocked(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        rows, columns = self._size(shape)
        down, across = self._grid(shape)
        whole = blocks.view(down, across, rows, columns).transpose(1, 2).reshape(down * rows, across * columns)
        return whole[: shape[0], : shape[1]].contiguous()


def find(name: str, held: Held, settings: Settings) -> Found | None:
    """The tensors of an fp8 weight, if `name` is one that has scales."""
    kind = dtype_name(held, name)
    if kind not in ("F8_E4M3", "F8_E5M2"):
        return None
    scales = next((scale_name for suffix in ("_scale_inv", "_scale") if (scale_name := name + suffix) in held), None)
    if scales is None:
        return None
    shape, grid = held[name][1].shape[-2:], held[scales][1].shape
    if len(held[name][1].shape) == 3 and len(grid) in (1, 2) and grid != (1,):
        raise FileError(
            f"the scales of {name} are in a layout that is not known",
            got=list(grid),
            fix="Serve the edit as an adapter.",
        )
    # Experts in one tensor have a grid of scales each.
    grid = grid[1:] if len(held[name][1].shape) == 3 else grid
    return Fp8(*_block(name, shape, grid, settings), kind), {"codes": name, "scales": scales}


def _block(name: str, shape: tuple[int, ...], grid: tuple[int, ...], settings: Settings) -> tuple[int, int]:
    if grid in ((), (1,), (1, 1)):
        return 0, 0
    if grid in ((shape[0],), (shape[0], 1)):
        return 1, 0
    given = settings.get("weight_block_size") or (128, 128)
    if len(grid) == 2 and len(shape) == 2 and grid == (-(-shape[0] // given[0]), -(-shape[1] // given[1])):
        return given[0], given[1]
    if len(grid) == 2 and len(shape) == 2 and not shape[0] % grid[0] and not shape[1] % grid[1]:
        return shape[0] // grid[0], shape[1] // grid[1]
    raise FileError(
        f"the scales of {name} do not belong to its shape",
        got=f"scales {grid}, weight {shape}",
        fix="Download it again; or serve the edit as an adapter.",
    )


def _numbers(scales: Tensor) -> Tensor:
    """Scales as fp32; bytes are exponents of 2 (E8M0)."""
    if scales.dtype is torch.uint8:
        return power_of_2(scales)
    return scales.float()


def _as_stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 scales in the file's dtype, rounded up, so that the largest number still fits."""
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        return exponent_above(scales).view(dtype)
    rounded = scales.to(dtype)
    if dtype is torch.float32:
        return rounded
    return torch.where(rounded.float() < scales, (scales * (1 + torch.finfo(dtype).eps)).to(dtype), rounded)


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as plain integers, which torch can choose from whatever the dtype."""
    plain = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(plain[tensor.element_size()])
