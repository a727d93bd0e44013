"""Edits that fire where they should: beyond the paper, whose k̂ fires on whatever excites a component along v.

The probe may keep *evidence*: the mean inputs of attention heads over three parts of every positive response, and of
every response to prompts on which the model should stay as it is. Two closed forms read it: `quiet_row` turns the
paper's row a₀ of a site into the row that fires evenly on the first, hardly on the second, aims below zero before the
answer to a prompt of the second, and otherwise stays near a₀; `quiet_direction` takes out of v̂ most of what the site
writes anyway where the model should stay as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from ..errors import EditError
from ..files.tensors import BYTES
from .change import SiteEdit
from .site import Site

# How near the paper's row and direction the quiet ones stay. It was chosen on validation prompts: docs/preserve.md.
EPSILON = 0.1
# How hard the last token of a preserved prompt is pushed the other way, as a share of the push on positive responses.
# Some harmless prompts give way to a weak push: this leaves them room. Chosen by how answers open: docs/preserve.md,
# "What repelling adds".
REPEL = 0.5

# The parts of a response of which each has a mean: the prompt's last position, which predicts the first token; the
# positions that predict the next five; and all later ones.
PARTS = ("last prompt token", "first tokens", "rest")
FIRST = 6

# Below this ε both closed forms lose their digits in fp32.
SMALLEST_EPSILON = 1e-4
# Mean outputs whose spread along a direction is below this share of the largest one span no direction of their own, and
# a v̂ of which no more than this is left is all shared.
_SAME = 1e-5
# Rows of a weight that are taken to fp64 at once.
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class EvidenceRow:
    """What one row of the evidence is the mean of: a part of the response to one prompt."""

    label: str
    group: str
    response: int
    part: int


_ROWS = TypeAdapter(list[EvidenceRow])
_FIELDS = [field.name for field in fields(EvidenceRow)]


@dataclass(frozen=True, repr=False)
class Evidence:
    """Mean inputs of attention heads over parts of single responses.

    Attributes:
        rows: what each row is the mean of. inputs: site key → h [rows, n·c] in bytes, int8. scales: site key → what one
            step of each row stands for [rows].
    """

    rows: Sequence[EvidenceRow]
    inputs: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]

    def __repr__(self) -> str:
        return f"Evidence({len(self.rows)} rows of {len(self.inputs)} sites)"

    def of(self, key: str) -> Tensor | None:
        """A site's h [rows, n·c] fp32; None if the probe kept none of it."""
        return self.inputs[key].float() * self.scales[key][:, None] if key in self.inputs else None

    def tensors(self) -> dict[str, Tensor]:
        """As tensors of a file; `rows_to_json` gives what its header needs."""
        scales = {f"{key}.evidence_scale": scale for key, scale in self.scales.items()}
        return {f"{key}{BYTES}": h for key, h in self.inputs.items()} | scales

    def rows_to_json(self) -> list[list[Any]]:
        return [[row.label, row.group, row.response, row.part] for row in self.rows]

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], rows: Any, sites: Sequence[Site]) -> Evidence | None:
        """What `tensors` and `rows_to_json` gave; None without rows. Raises ValueError if they do not fit the sites."""
        if rows is None:
            return None
        parsed = _ROWS.validate_python([dict(zip(_FIELDS, row, strict=True)) for row in rows])
        labels, parts = {row.label for row in parsed}, {row.part for row in parsed}
        if labels != {"positive", "negative"} or not parts <= set(range(len(PARTS))):
            raise ValueError("evidence of other labels or parts")
        inputs = {s.key: tensors[f"{s.key}{BYTES}"] for s in sites if f"{s.key}{BYTES}" in tensors}
        scales = {key: tensors[f"{key}.evidence_scale"] for key in inputs}
        widths = {s.key: s.inputs for s in sites}
        shapes = {key: (h.shape, scales[key].shape) for key, h in inputs.items()}
        if any(shape != ((len(parsed), widths[key]), (len(parsed),)) for key, shape in shapes.items()):
            raise ValueError("evidence of another shape")
        return cls(parsed, inputs, scales)

    @cached_property
    def positive(self) -> Tensor:
        """Which rows are of positive responses [rows]."""
        return torch.tensor([row.label == "positive" for row in self.rows])

    def wanted(self, repel: float) -> Tensor:
        """The push that each row is to get, as a share of the one on positive rows [rows]: 1 on these, −β at the last
        token of a preserved prompt, and 0 on the response to it."""
        before = torch.tensor([PARTS[row.part] == PARTS[0] for row in self.rows])
        return torch.where(self.positive, 1.0, torch.where(before, -repel, 0.0))

    @cached_property
    def weights(self) -> Tensor:
        """What each row weighs [rows]: the positive ones together one half, as do the others. Within a side every part
        of every group weighs alike, so that one position before the answer counts as much as all of its rest."""
        sets: dict[tuple[str, str, int], list[int]] = {}
        for i, row in enumerate(self.rows):
            sets.setdefault((row.label, row.group, row.part), []).append(i)
        weights = torch.zeros(len(self.rows))
        for members in sets.values():
            weights[members] = 1 / len(members)
        for side in (self.positive, ~self.positive):
            weights[side] /= 2 * weights[side].sum()
        return weights


@dataclass(frozen=True, repr=False)
class Shared:
    """The part of v̂ that a site's outputs on preserved prompts share.

    Attributes:
        part: Π v̂ [d], where Π projects on the span of the mean outputs there, one mean for each part of the responses.
        along: W_iᵀ Π v̂ [n, c].
    """

    part: Tensor
    along: Tensor


def check_preserving(epsilon: float, repel: float) -> None:
    """Raises EditError unless ε is at least `SMALLEST_EPSILON`, β at least 0, and both are finite."""
    if not (isinstance(epsilon, int | float) and SMALLEST_EPSILON <= epsilon < math.inf):
        raise EditError(
            f"preserve must be at least {SMALLEST_EPSILON:g} and finite",
            got=epsilon,
            fix="Use None for the paper's edit.",
        )
    if not (isinstance(repel, int | float) and 0 <= repel < math.inf):
        raise EditError(
            "repel must be at least 0 and finite", got=repel, fix="With 0 no prompt is pushed the other way."
        )


def in_bytes(h: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as int8 with a scale each, to within 0.4 % of a row's largest number."""
    scale = h.abs().amax(dim=1) / 127
    steps = torch.where(scale[:, None] > 0, h / scale[:, None], 0.0)
    return steps.round().to(torch.int8), scale


def quiet_row(a0: Tensor, h: Tensor, weights: Tensor, positive: Tensor, wanted: Tensor, epsilon: float) -> Tensor:
    """The row near the paper's that fires as much on the positive rows, evenly, and as wanted on the others.

        a = argmin_a  E[(aᵀh − y t)²] + ε s̄ ‖a − a₀‖²,      t = E₊[a₀ᵀh]
          = (S + ε s̄ I)⁻¹ (t E[y h] + ε s̄ a₀),      S = E[h hᵀ],  s̄ = tr S / (n·c)

    Here E = E₊ + E₋, in which each side weighs one half; t is the mean over the positive rows alone. The row is a ridge
    regression around a₀ (docs/preserve.md has the proof). It is linear in a₀, so that a strength scales both rows
    alike; ε → ∞ gives a₀, the paper's edit. With fewer rows than columns the system is solved for the rows.

    Args:
        a0: [n·c] fp32. h: [rows, n·c]. weights: [rows]. positive: [rows] bool. epsilon: above 0.
        wanted: y [rows], the firing on each row as a share of t: 1 on the positive ones.
    """
    h, weights = h.float(), weights[:, None]
    scale = float((weights * h.square()).sum()) / h.shape[1]
    if scale == 0:
        return a0
    target = float((weights * h * positive[:, None]).sum(dim=0) @ a0) / float(weights[positive].sum())
    ridge = epsilon * scale
    pull = target * (weights * h * wanted[:, None]).sum(dim=0) + ridge * a0  # [n·c]
    return ridge_solution(h, weights, ridge, pull)


def ridge_solution(h: Tensor, weights: Tensor, ridge: float, pull: Tensor) -> Tensor:
    """(E[h hᵀ] + r I)⁻¹ b [n·c].

    Args:
        h: [rows, n·c]. weights: [rows, 1]. ridge: r. pull: b [n·c].
    """
    if len(h) >= h.shape[1]:
        return torch.linalg.solve(h.T @ (weights * h) + ridge * torch.eye(h.shape[1]), pull)
    # Woodbury: (BᵀB + r I)⁻¹ = (I − Bᵀ(B Bᵀ + r I)⁻¹B) / r with B = √w h.
    root = weights.sqrt() * h
    inner = torch.linalg.solve(root @ root.T + ridge * torch.eye(len(h)), root @ pull)
    return (pull - root.T @ inner) / ridge


def preserved_outputs(W: Tensor, h: Tensor, evidence: Evidence) -> Tensor:
    """W E₋ₚ[h] for every part p of preserved responses: the site's mean outputs there [d, parts].

    A projection's bias is left out, as it is in the scores: it is no component's output. The products are summed in
    fp64 (fp32 on MPS), so that means that are alike stay so.

    Args:
        W: [d, n·c], any floating dtype. h: the site's evidence [rows, n·c].
    """
    means = []
    for part in range(len(PARTS)):
        mine = ~evidence.positive & torch.tensor([row.part == part for row in evidence.rows])
        if mine.any():  # short responses have no rest
            weights = evidence.weights[mine]
            means.append(weights @ h[mine] / weights.sum())
    exact = torch.float32 if W.device.type == "mps" else torch.float64
    M = torch.stack(means, dim=1).to(W.device, exact)  # [n·c, parts]
    return torch.cat([rows.to(exact) @ M for rows in W.detach().split(_ROWS_AT_ONCE)]).cpu()


def shared_part(v: Tensor, outputs: Tensor) -> Tensor:
    """Π v̂ [d] fp32, where Π projects on the span of the columns of `outputs`.

    Args:
        v: v̂ [d]. outputs: [d, parts].
    """
    outputs = outputs.double()
    size = torch.linalg.vector_norm(outputs, dim=0)
    basis, spread, _ = torch.linalg.svd(outputs[:, size > 0] / size[size > 0], full_matrices=False)
    basis = basis[:, spread > _SAME * spread.max()] if len(spread) else basis
    return (basis @ (basis.T @ v.double())).float()


def quiet_direction(v: Tensor, along: Tensor, shared: Shared, epsilon: float) -> tuple[Tensor, Tensor]:
    """The direction near v̂ that writes little along what the site writes anyway on preserved prompts.

        u ∝ argmin_w  ‖w − v̂‖² + ‖Π w‖² / ε  =  v̂ − Π v̂ / (1 + ε),      ‖u‖ = 1

    ε → ∞ gives v̂, the paper's direction; ε → 0 the unit vector nearest to v̂ in the complement of the span. A v̂ that is
    all shared stays: nothing is left to take its place.

    Args:
        v: v̂ [d]. along: W_iᵀv̂ [n, c]. epsilon: at least `SMALLEST_EPSILON`.

    Returns:
        u [d] and W_iᵀu [n, c].
    """
    part = shared.part.double()
    own = v.double() - part
    if not float(torch.linalg.vector_norm(own)) > _SAME:
        return v, along
    w = own + epsilon / (1 + epsilon) * part
    size = torch.linalg.vector_norm(w)
    along_w = along.double() - shared.along.double() / (1 + epsilon)
    return (w / size).float(), (along_w / size).float()


def quieted(site: SiteEdit, evidence: Evidence, epsilon: float, repel: float, shared: Shared | None) -> SiteEdit:
    """A site's edit with the quiet row over the components that it edits, and with the quiet direction.

    |λ_i| becomes the length of the component's part of the row, its sign stays, and k̂_i takes the direction.

    Args:
        epsilon: ε. repel: β, at least 0.
        shared: what v̂ shares with preserved outputs. Without it and without evidence a site stays as it was: no
            neurons have any.
    """
    h = evidence.of(site.site.key)
    edited = site.lam != 0
    if h is None or shared is None or not edited.any():
        return site
    columns = edited.repeat_interleave(site.site.width)
    row = torch.zeros_like(site.row)
    a0, weights, wanted = site.row[columns], evidence.weights, evidence.wanted(repel)
    row[columns] = quiet_row(a0, h[:, columns], weights, evidence.positive, wanted, epsilon)
    parts = row.view(site.site.n, site.site.width)
    lam = torch.copysign(torch.linalg.vector_norm(parts, dim=1), site.lam) * edited
    k = torch.where(lam[:, None] != 0, parts / lam[:, None], site.k)
    u, along = quiet_direction(site.u, site.reach[:, None] * site.k, shared, epsilon)
    return SiteEdit(site.site, u, k, site.g, (along * k).sum(dim=1), lam)
