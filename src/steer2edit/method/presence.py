"""Whether weights are an edit's base, and whether they hold the edit already."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ..errors import EditError, ModelError
from .change import Part, SiteEdit
from .fingerprint import TOLERANCE, differing, from_reading, signs
from .scores import Reading, read
from .site import Site


def check_weights(
    parts: Sequence[Part],
    read: Callable[[Site], Tensor],
    tolerance: float = TOLERANCE,
    keys: Sequence[Collection[str]] | None = None,
) -> None:
    """As `check_base`, for weights that come from anywhere, one at a time.

    Args:
        read: gives a site's weight [d, n·c].
        tolerance: by how much of its norm a weight may differ from the one that was scored.
        keys: of each part the sites to compare; all if None.
    """
    others: list[list[str]] = []
    presences: list[Presence] = []
    for part, chosen in zip(parts, keys or [part.sites for part in parts], strict=True):
        other: list[str] = []
        presence = Presence()
        for key in chosen:
            site = part.sites[key]
            reading = read_for(site, read(site.site))
            if key in part.fingerprint:
                found = from_reading(reading, site.site.d, site.site.inputs)
                other += differing({key: part.fingerprint[key]}, {key: found}, tolerance)
            presence.add(site, reading)
        others.append(other)
        presences.append(presence)
    decide(parts, presences, others)


def decide(parts: Sequence[Part], presences: Sequence[Presence], others: Sequence[Sequence[str]]) -> None:
    """Raises EditError if a part of the edit is in the weights already, ModelError if they are another base's.

    Args:
        presences, others: for each part what of it is in the weights, and at which sites they differ from its base's.
    """
    if any(presence.of(part.strength) for part, presence in zip(parts, presences, strict=True)):
        raise _twice()
    for part, other in zip(parts, others, strict=True):
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
        # Loaded in bf16 a weight has moved by about 0.001 of its size; an edit below that cannot be seen beside it.
        if not abs(strength) * self.power**0.5 > 0.01 * self.size:
            return False
        return abs(self.share - strength) < 0.25 * abs(strength)


def _twice() -> EditError:
    return EditError(
        "the edit is already in this model",
        got="an edit applied twice",
        fix="Revert it first, or load the base again.",
    )
