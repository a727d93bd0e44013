"""Rounding groups of numbers to codes: under the old scales where the numbers fit, under new ones where that is better.

Here a group's numbers are the last dimension of a tensor: [.., size], and what belongs to the group is [..].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# The largest number of a group still fits if its product with a scale was rounded up.
ROOM = 1 + 1e-6


@dataclass(frozen=True)
class Choice:
    """Codes for every number [.., size], and the numbers that they stand for, fp32."""

    codes: Tensor
    values: Tensor


@dataclass(frozen=True)
class Settled:
    """Codes [.., size]; which groups [..] got new scales; how many groups hold a changed number."""

    codes: Tensor
    renewed: Tensor
    groups: int


def settle(
    target: Tensor, changed: Tensor, old: Tensor, kept: Choice, fits: Tensor, fresh: Callable[[], Choice]
) -> Settled:
    """Takes, for each group, the codes under its old scale, or those under a new one.

    A number that does not change keeps its code unless its group gets a new scale.

    Args:
        target: the numbers to come near. changed: which of them differ from the stored ones. old: the stored codes.
        kept: the nearest codes under the old scales. fits: the groups whose numbers are in the old scale's range.
        fresh: gives the codes under new scales. It is called only if a changed group does not fit.
    """
    touched = changed.any(dim=-1)
    codes = torch.where(changed, kept.codes, old)
    renewed = touched & ~fits
    if bool(renewed.any()):
        anew = fresh()
        renewed = renewed & (_error(anew.values, target) < _error(kept.values, target))
        codes = torch.where(renewed[..., None], anew.codes, codes)
    return Settled(codes, renewed, int(touched.sum()))


def _error(values: Tensor, target: Tensor) -> Tensor:
    return (values - target).square().sum(dim=-1)


def nearest(numbers: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest number of an ascending table, int64; the lower one of two that are equally near."""
    return torch.bucketize(numbers.contiguous(), (table[1:] + table[:-1]) / 2)


def in_table(numbers: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The distances from numbers of an ascending table to the next lower and the next higher one; 0 at its ends."""
    gaps = table[1:] - table[:-1]
    none = gaps.new_zeros(1)
    at = torch.searchsorted(table, numbers.contiguous()).clamp_max(len(table) - 1)  # a NaN is beyond the end
    return torch.cat([none, gaps])[at], torch.cat([gaps, none])[at]


def in_steps(codes: Tensor, step: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The same for numbers step · code + offset with codes from `low` to `high`; the step may be negative."""
    less = torch.where(codes > low, step.abs(), 0.0)
    more = torch.where(codes < high, step.abs(), 0.0)
    return torch.where(step < 0, more, less), torch.where(step < 0, less, more)


def divided(numbers: Tensor, scale: Tensor) -> Tensor:
    """numbers / scale, and 0 where the scale is 0."""
    return torch.where(scale != 0, numbers / torch.where(scale != 0, scale, 1.0), 0.0)
