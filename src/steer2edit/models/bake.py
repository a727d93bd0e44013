"""Writing edits into a model's weights, and restoring the exact bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EditError, ModelError
from ..method.change import Changes, not_finite, patched
from ..method.fingerprint import QUANTISED_TOLERANCE, TOLERANCE
from ..method.presence import _twice, check_weights
from ..method.site import Site, same_sites
from ..progress import say
from .sites import find_sites
from .weights import quantised, read_weight, weight_of

# Applied edits are recorded on the model object itself, so that the record lives as long as the model.
_MARK = "_steer2edit_applied"


@dataclass(frozen=True)
class Applied:
    """What `apply` did.

    Attributes:
        edit_id: which edit.
        sites, columns: how many weights changed, and how many of their columns.
        rounding_loss: ‖(W' − W) − ΔW‖_F / ‖ΔW‖_F over all sites: the share of the edit that rounding to the weights'
            dtype lost. About 1e-7 in fp32; in bf16 it is large if a change is small compared to the weight.
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


def check_base(edit: Changes, model: nn.Module) -> dict[str, Site]:
    """The model's own sites for those of the edit, by key.

    Raises:
        ModelError, EditError: the model is not the edit's base, or already contains the edit.
    """
    own = own_sites(edit, model)
    if edit.id in carried_edits(model):
        raise _twice()
    coarse = any(quantised(model, site) for site in own.values())
    tolerance = QUANTISED_TOLERANCE if coarse else TOLERANCE
    try:
        with torch.inference_mode():
            check_weights(edit.parts, lambda site: read_weight(model, own[site.key]), tolerance)
    except ModelError:
        refuse_edited(model, "the model already carries another edit, which makes it another base")
        raise
    return own


def carried_edits(model: nn.Module) -> list[str]:
    """The ids of the edits that `apply` has baked into this model object, the first one first."""
    return [kept.report.edit_id for kept in getattr(model, _MARK, [])]


def refuse_edited(model: nn.Module, what: str) -> None:
    """Raises EditError if an edit is baked into this model object."""
    if carried := carried_edits(model):
        raise EditError(
            what,
            got=f"edit {', '.join(carried)}",
            fix="Revert it first. To have both, combine them: combine(a, b).apply(model).",
        )


def own_sites(edit: Changes, model: nn.Module) -> dict[str, Site]:
    """The model's own sites for those of the edit, by key. Raises ModelError if one is missing or of another shape."""
    return same_sites(find_sites(model), [s.site for part in edit.parts for s in part.sites.values()], "the edit")


def apply(edit: Changes, model: nn.Module) -> Applied:
    """Adds ΔW to the weights: in fp32, rounded once to the weights' dtype. All or nothing.

    Raises:
        ModelError: another base, or weights that are quantised or not in memory.
        EditError: the model already contains the edit.
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
            wanted = change.delta(columns=chosen.cpu()).to(weight.device)
            error = (after[key].float() - before[key].float()) - wanted
            lost[key] = (float(error.square().sum()), float(wanted.square().sum()))
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
    if not columns:
        say("  the edit changes no component: the model stays as it is")
    setattr(model, _MARK, [*getattr(model, _MARK, []), _Kept(report, columns, before)])
    return report


def _share(error: float, wanted: float) -> float:
    return (error / wanted) ** 0.5 if wanted else 0.0


def revert(edit: Changes, model: nn.Module) -> None:
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
            fix="Revert the last one first. To undo an edit of another process, load the base.",
        )
    kept = applied[-1]
    own = {site.key: site for site in find_sites(model)}
    with torch.no_grad():
        for key, columns in kept.columns.items():
            weight_of(model, own[key])[:, columns] = kept.bytes[key]
    setattr(model, _MARK, applied[:-1])
