"""A weight of few bits as numbers, and edited: dequantised, changed and rounded again, a block of rows at a time.

Rounding may keep all of a change, a part of it, or nothing: what it keeps is measured on every number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import EditError, ModelError
from ..method.change import Change, not_finite
from ..method.site import Site
from .formats.base import Format, Packed, Tensors

# The roles of the tensors that an edit may change; the others are only read.
WRITTEN = ("codes", "scales")

# How many numbers are turned into fp32 at once, if the format allows.
_AT_ONCE = 2**20


@dataclass(frozen=True)
class Rounding:
    """What rounding kept of the change ΔW of one weight. ΔW' is the change of the dequantised weight.

    Attributes:
        along: ⟨ΔW', ΔW⟩. wanted: ‖ΔW‖². got: ‖ΔW'‖².
        groups: how many groups with a common scale the edit touches; renewed: how many of these got a new scale.
    """

    title: str
    along: float
    wanted: float
    got: float
    groups: int
    renewed: int

    @property
    def kept(self) -> float:
        """The share of ΔW that is in the weight: ⟨ΔW', ΔW⟩ / ‖ΔW‖². 1 is all of it."""
        return self.along / self.wanted if self.wanted else 1.0

    @property
    def noise(self) -> float:
        """What else changed, relative to the edit: ‖ΔW' − kept · ΔW‖ / ‖ΔW‖."""
        if not self.wanted:
            return 0.0
        return max(0.0, self.got / self.wanted - self.kept**2) ** 0.5

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.title,
            "kept": self.kept,
            "noise": self.noise,
            "groups": self.groups,
            "groups_with_new_scales": self.renewed,
            "sums": [self.along, self.wanted, self.got],
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Rounding:
        along, wanted, got = row["sums"]
        return cls(row["format"], along, wanted, got, row["groups"], row["groups_with_new_scales"])


def together(roundings: Iterable[Rounding]) -> Rounding:
    """Several weights' roundings as one: the shares of the whole edit."""
    rows = list(roundings)
    titles = sorted({row.title for row in rows})
    return Rounding(
        ", ".join(titles),
        sum(row.along for row in rows),
        sum(row.wanted for row in rows),
        sum(row.got for row in rows),
        sum(row.groups for row in rows),
        sum(row.renewed for row in rows),
    )


def dequantised(packed: Packed, folder: Path, site: Site, wanted_by: str) -> Tensor:
    """The site's weight [d, n·c], fp32. Raises ModelError if it has another shape."""
    tensors = read_tensors(packed, folder, site, wanted_by)
    weight = torch.empty(site.d, site.inputs)
    for start, end, some in row_blocks(packed.format, tensors, site):
        weight[start:end] = packed.format.dequantise(some)
    return weight


def read_tensors(packed: Packed, folder: Path, site: Site, wanted_by: str) -> Tensors:
    """The weight's tensors. Raises ModelError if it does not have the site's shape."""
    tensors = packed.read(folder)
    shape = packed.format.shape(tensors)
    if shape != (site.d, site.inputs):
        raise other_shape(site, packed.parts[0].label, shape, wanted_by)
    return tensors


def other_shape(site: Site, name: str, shape: tuple[int, ...], wanted_by: str) -> ModelError:
    return ModelError(
        f"{wanted_by} was made for another model: {name} should be {site.d} × {site.inputs}",
        got=shape,
        fix="Use the model that the probe was made on.",
    )


def row_blocks(stored_format: Format, tensors: Tensors, site: Site) -> Iterator[tuple[int, int, Tensors]]:
    """The weight's tensors for some rows at a time: (first row, end, views of the tensors)."""
    unit = stored_format.unit(tensors)
    rows = site.d
    if unit:
        rows = unit * max(1, _AT_ONCE // (unit * site.inputs))
    for start in range(0, site.d, rows):
        end = min(start + rows, site.d)
        yield start, end, stored_format.take(tensors, start, end) if rows < site.d else tensors


def edited(
    packed: Packed,
    tensors: Tensors,
    site: Site,
    change: Change,
    on_rows: Callable[[int, Tensor], None] = lambda start, weight: None,
) -> Rounding:
    """Writes W + ΔW into the weight's own `tensors`, which `read_tensors` gave.

    Args:
        on_rows: called with the number of the first row and the weight of some rows, fp32, before they are changed.

    Raises:
        EditError: the edited weight is not finite.
    """
    stored_format = packed.format
    along = wanted = got = 0.0
    groups = renewed = 0
    for start, end, some in row_blocks(stored_format, tensors, site):
        weight = stored_format.dequantise(some)
        on_rows(start, weight)
        delta = change.delta(slice(start, end))
        target = spread(weight, delta, stored_format.around(some), start)
        if not bool(torch.isfinite(target).all()):
            raise not_finite(change, torch.float32)
        result = stored_format.requantise(target, delta != 0, some)
        for role in WRITTEN:
            if role in some:
                some[role].view(result.tensors[role].dtype).copy_(result.tensors[role])
        moved = stored_format.dequantise(some).sub_(weight).double()
        delta = delta.double()
        along += float((moved * delta).sum())
        wanted += float(delta.square().sum())
        got += float(moved.square().sum())
        groups, renewed = groups + result.groups, renewed + result.renewed
    return Rounding(stored_format.title, along, wanted, got, groups, renewed)


def spread(weight: Tensor, delta: Tensor, around: tuple[Tensor, Tensor], start: int) -> Tensor:
    """The numbers to round to: W + ΔW, and where ΔW is below a step, either a whole step or none.

    The numbers of W are those that codes can say. To the nearest of these, a change of less than half a step would be
    lost everywhere. Instead a change of a tenth of a step moves every tenth number by a step, so that sums over many
    numbers change as they would under ΔW. Which numbers these are is a fixed pattern, without order in rows or columns
    and the same on every machine.

    Args:
        weight, delta: some rows [rows, n·c]. around: the distances to their neighbours. start: the first row's number.
    """
    down, up = around
    step = torch.where(delta > 0, up, down)
    rows = torch.arange(start, start + len(delta), dtype=torch.int64)[:, None]
    columns = torch.arange(delta.shape[1], dtype=torch.int64)
    # Multiples of two numbers modulo 1, as integers: they fill the unit square evenly (Roberts' R2 sequence).
    pattern = (rows * 3242174889 + columns * 2447445414) & 0xFFFFFFFF
    threshold = (pattern >> 8).float() / 2**24  # [0, 1), exactly
    moved = torch.where(delta.abs() > threshold * step, torch.copysign(step, delta), 0.0)
    return weight + torch.where(delta.abs() < step, moved, delta)


def steps(packed: Packed, tensors: Tensors, site: Site) -> Tensor:
    """The distance between a weight's possible numbers, at each of them [d, n·c]."""
    whole = torch.empty(site.d, site.inputs)
    for start, end, some in row_blocks(packed.format, tensors, site):
        whole[start:end] = torch.maximum(*packed.format.around(some))
    return whole


# An edit of which rounding keeps less, or to which it adds more noise, is refused: an adapter keeps all and adds none.
LEAST_KEPT, MOST_NOISE = 0.5, 4.0


def is_lost(rounding: Rounding) -> bool:
    """Whether rounding leaves too little of an edit, or drowns it."""
    return not (rounding.kept >= LEAST_KEPT and rounding.noise <= MOST_NOISE)


def described(roundings: Mapping[str, Rounding]) -> str:
    """What rounding kept of an edit, in a sentence."""
    whole = together(roundings.values())
    worst = min(roundings, key=lambda name: roundings[name].kept)
    return (
        f"rounding to {whole.title} keeps {whole.kept:.0%} of the edit (least at {worst}: {roundings[worst].kept:.0%}) "
        f"and adds noise of {whole.noise:.2f} of its size; {whole.renewed} of {whole.groups} groups got new scales"
    )


def refuse_lost(roundings: Mapping[str, Rounding]) -> None:
    """Raises EditError if rounding keeps less than half of the edit, or adds noise of several times its size."""
    if not roundings:
        return
    whole = together(roundings.values())
    if is_lost(whole):
        worst = min(roundings, key=lambda name: roundings[name].kept)
        raise EditError(
            f"rounding to {whole.title} loses the edit: {whole.kept:.0%} of it would be in the weights, among noise of "
            f"{whole.noise:.1f} times its size",
            got=f"{len(roundings)} weights, least at {worst}: {roundings[worst].kept:.0%}",
            fix="Serve the edit as an adapter, which keeps all of it (`steer2edit apply BASE EDIT --as adapter`, or "
            "edit.save_adapter); or write it anyway with --accept-rounding (accept_rounding=True).",
        )
