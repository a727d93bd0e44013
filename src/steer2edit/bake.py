"""Edits written into a model's weights, and taken out again to the exact byte."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .edit import Change, Reading, SiteEdit, Verbs, read
from .errors import EditError, ModelError
from .fingerprint import QUANTISED_TOLERANCE, TOLERANCE, differing, from_reading, signs
from .sites import Site, find_sites, same_sites
from .weights import quantised, read_weight, weight_of

# What is baked into a model is remembered on the model itself, so that it lives and dies with it.
_MARK = "_steer2edit_applied"


@dataclass(frozen=True)
class Applied:
    """What `apply` did.

    Attributes:
        edit_id: which edit.
        sites, columns: how many weights, and columns of them, changed.
        rounding_loss: ‖(W' − W) − ΔW‖_F / ‖ΔW‖_F over all sites: the share of the edit that rounding to the weights'
            dtype lost. About 1e-7 in fp32; in bf16 it is large where a change is small beside the weight.
        worst: the site that lost most, and its share.
    """

    edit_id: str
    sites: int
    columns: int
    rounding_loss: float
    worst: tuple[str, float]


@dataclass(frozen=True)
class _Kept:
    report: Applied
    columns: Mapping[str, Tensor]  # [m], which columns
    bytes: Mapping[str, Tensor]  # [d, m], as they were


def patched(part: Tensor, change: Change, columns: Tensor, rows: slice = slice(None)) -> Tensor:
    """W + ΔW for some of a weight's columns: added in fp32, rounded once.

    Args:
        part: [d, m] of the weight, in its own dtype; or only its `rows`.
        columns: [m], their numbers.
    """
    return (part.float() + change.delta(rows, columns.cpu()).to(part.device)).to(part.dtype)


def not_finite(change: Change, dtype: torch.dtype) -> EditError:
    return EditError(
        f"the edited weight of {change.site.place} is not finite in {dtype}",
        got=f"a change of up to {float(change.delta().abs().max()):g}",
        fix="Lower the strength, or use bf16 or fp32.",
    )


def check_base(edit: Verbs, model: nn.Module) -> dict[str, Site]:
    """The model's own sites, by key, of the edit's.

    Raises:
        ModelError, EditError: the model is not the edit's base, or has the edit in it.
    """
    own = own_sites(edit, model)
    if any(kept.report.edit_id == edit.id for kept in getattr(model, _MARK, [])):
        raise _twice()
    coarse = any(quantised(model, site) for site in own.values())
    with torch.inference_mode():
        check_weights(
            edit, lambda site: read_weight(model, own[site.key]), QUANTISED_TOLERANCE if coarse else TOLERANCE
        )
    return own


def own_sites(edit: Verbs, model: nn.Module) -> dict[str, Site]:
    """The model's own sites, by key, of the edit's. Raises ModelError if it has not each of them in the same shape."""
    return same_sites(find_sites(model), [s.site for part in edit.parts for s in part.sites.values()], "the edit")


def check_weights(edit: Verbs, read: Callable[[Site], Tensor], tolerance: float = TOLERANCE) -> None:
    """As `check_base`, for weights that come from anywhere, one at a time.

    Args:
        read: gives a site's weight [d, n·c].
        tolerance: by how much of its norm a weight may differ from the one that was scored.
    """
    others: list[list[str]] = []
    presences: list[Presence] = []
    for part in edit.parts:
        other: list[str] = []
        presence = Presence()
        for key, site in part.sites.items():
            reading = read_for(site, read(site.site))
            if key in part.fingerprint:
                found = from_reading(reading, site.site.d, site.site.inputs)
                other += differing({key: part.fingerprint[key]}, {key: found}, tolerance)
            presence.add(site, reading)
        others.append(other)
        presences.append(presence)
    decide(edit, presences, others)


def decide(edit: Verbs, presences: Sequence[Presence], others: Sequence[Sequence[str]]) -> None:
    """Raises EditError if a part of the edit is in the weights already, ModelError if they are another base's.

    Args:
        presences, others: for each part what of it is in the weights, and at which sites they differ from its base's.
    """
    if any(presence.of(part.strength) for part, presence in zip(edit.parts, presences, strict=True)):
        raise _twice()
    for part, other in zip(edit.parts, others, strict=True):
        if other:
            raise ModelError(
                "the model is not the base that the edit was made for",
                got=f"other weights at {len(other)} of {len(part.fingerprint)} sites, first {other[0]}",
                fix="Use the model, and the revision, that the probe was made on.",
            )


def read_for(site: SiteEdit, weight: Tensor) -> Reading:
    """A reading that says whether a weight is the base's, and whether it has the edit in it."""
    left, _ = signs(site.site.d, site.site.inputs)
    return read(weight, torch.cat([site.u[None], left]), torch.ones(site.site.inputs, 1))


class Presence:
    """Whether weights hold an edit already, whatever process or file they come from.

    The scores keep v̂ᵀW_i k̂_i = ‖W_iᵀv̂‖; an edit of strength s moves it by s·λ_i, so the least-squares slope of what
    moved on λ is 0 in the base and s where the edit was baked in.
    """

    def __init__(self) -> None:
        self.moved = self.power = self.size = 0.0

    def add(self, site: SiteEdit, reading: Reading) -> None:
        if not bool((site.lam != 0).any()):
            return
        along = (reading.along[0].cpu().view_as(site.k) * site.k).sum(dim=1)  # [n]
        self.moved += float((site.lam.double() * (along - site.reach).double()).sum())
        self.power += float(site.lam.double().square().sum())
        self.size = max(self.size, (reading.power / (site.site.d * site.site.inputs)) ** 0.5)

    @property
    def share(self) -> float:
        """How much of the edit is in the weights: 0 in the base."""
        return self.moved / self.power if self.power else 0.0

    def of(self, strength: float) -> bool:
        # Loaded in bf16 a weight has moved by about 0.001 of its size; an edit below that cannot be told from it.
        if not abs(strength) * self.power**0.5 > 0.01 * self.size:
            return False
        return abs(self.share - strength) < 0.25 * abs(strength)


def _twice() -> EditError:
    return EditError(
        "the edit is already in this model",
        got="an edit applied twice",
        fix="Revert it first, or load the base again.",
    )


def apply(edit: Verbs, model: nn.Module) -> Applied:
    """Adds ΔW to the weights: in fp32, rounded once to the weights' dtype. All or nothing.

    Raises:
        ModelError: another base, or weights that are quantised or not in memory.
        EditError: the edit is in the model already.
    """
    own, changes = own_sites(edit, model), edit.changes()
    for key in changes:
        weight_of(model, own[key])  # refuses what cannot be written before anything is read
    check_base(edit, model)
    columns: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    lost: dict[str, tuple[float, float]] = {}
    with torch.no_grad():
        for key, change in changes.items():
            weight = weight_of(model, own[key])
            chosen = change.columns().to(weight.device)
            columns[key], before[key] = chosen, weight[:, chosen].clone()
            after[key] = patched(before[key], change, chosen)
            if not torch.isfinite(after[key]).all():
                raise not_finite(change, weight.dtype)
            told = change.delta(columns=chosen.cpu()).to(weight.device)
            error = (after[key].float() - before[key].float()) - told
            lost[key] = (float(error.square().sum()), float(told.square().sum()))
        for key in columns:
            weight_of(model, own[key])[:, columns[key]] = after[key]
    worst = max(lost, key=lambda key: _share(*lost[key]), default="")
    report = Applied(
        edit.id,
        len(columns),
        sum(len(c) for c in columns.values()),
        _share(sum(e for e, _ in lost.values()), sum(t for _, t in lost.values())),
        (worst, _share(*lost[worst]) if worst else 0.0),
    )
    setattr(model, _MARK, [*getattr(model, _MARK, []), _Kept(report, columns, before)])
    return report


def _share(error: float, told: float) -> float:
    return (error / told) ** 0.5 if told else 0.0


def revert(edit: Verbs, model: nn.Module) -> None:
    """Puts back the columns that `apply` kept.

    Raises:
        EditError: the edit was not applied to this model object, or another one was applied after it.
    """
    applied: list[_Kept] = getattr(model, _MARK, [])
    if not applied or applied[-1].report.edit_id != edit.id:
        known: Any = [kept.report.edit_id for kept in applied]
        raise EditError(
            f"edit {edit.id} is not the last one applied to this model",
            got=f"applied here: {known or 'none'}",
            fix="Revert the last one first; a model edited in another process is undone by loading its base.",
        )
    kept = applied[-1]
    own = {site.key: site for site in find_sites(model)}
    with torch.no_grad():
        for key, columns in kept.columns.items():
            weight_of(model, own[key])[:, columns] = kept.bytes[key]
    setattr(model, _MARK, applied[:-1])
