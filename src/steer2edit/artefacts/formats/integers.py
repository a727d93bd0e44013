"""W = (code − zero) · scale with unsigned codes, in groups of inputs: what GPTQ and AWQ have in common.

Here codes are [d, groups, size], scales and zeros [d, groups]. An edited group keeps its zero point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Choice, Settled, divided, settle


@dataclass(frozen=True)
class Affine:
    """A weight's codes (uint8), and its scales in the file's dtype; zero points as fp32."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def values(self) -> Tensor:
        return (self.codes.float() - self.zeros[..., None]) * self.scales.float()[..., None]


def requantised(target: Tensor, changed: Tensor, old: Affine, top: int) -> tuple[Affine, Settled]:
    """Codes from 0 to `top`, and scales, that come nearest to `target` [d, groups, size]."""
    zeros = old.zeros
    high, low = target.amax(dim=-1), target.amin(dim=-1)
    scale = old.scales.float()
    # A number fits if it rounds to a code; the scale of one group may be negative.
    ends = torch.stack([divided(high, scale), divided(low, scale)])
    fits = (ends.amax(dim=0) + zeros <= top + 0.5) & (ends.amin(dim=0) + zeros >= -0.5)
    up = divided(high.clamp_min(0), top - zeros)
    down = divided((-low).clamp_min(0), zeros)
    new = torch.maximum(up, down).to(old.scales.dtype)

    def rounded(by: Tensor) -> Choice:
        by = by.float()[..., None]
        codes = torch.round(divided(target, by) + zeros[..., None]).clamp(0, top)
        return Choice(codes.to(torch.uint8), (codes - zeros[..., None]) * by)

    settled = settle(target, changed, old.codes, rounded(old.scales), fits, lambda: rounded(new))
    return Affine(settled.codes, torch.where(settled.renewed, new, old.scales), zeros), settled
