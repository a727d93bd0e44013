"""Whether weights are an edit's base, and whether they already contain the edit."""

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
    """Compares weights from any source with those that an edit was made for, one at a time.

    Args:
        read: returns a site's weight [d, n·c].
        tolerance: how far a weight may differ from the scored one, as a share of its norm.
        keys: for each part the sites to compare; all if None.

    Raises:
        EditError, ModelError: as `decide`.
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
                sketch = from_reading(reading, site.site.d, site.site.inputs)
                other += differing({key: part.fingerprint[key]}, {key: sketch}, tolerance)
            presence.add(site, reading)
        others.append(other)
        presences.append(presence)
    decide(parts, presences, others)


def decide(parts: Sequence[Part], presences: Sequence[Presence], others: Sequence[Sequence[str]]) -> None:
    """Raises EditError if the weights already contain a part of the edit, ModelError if they are another base's.

    Args:
        presences: for each part, how much of it the weights contain.
        others: for each part, the sites whose weights are not its base's.
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
    """The reading that shows whether a weight is the base's, and whether it contains the edit."""
    left, _ = signs(site.site.d, site.site.inputs)
    return read(weight, torch.cat([site.u[None], left]), torch.ones(site.site.inputs, 1))


class Presence:
    """Measures whether weights already contain an edit, whatever process or file they come from.

    An edit keeps uᵀW_i k_i of its base, which is ‖W_iᵀv̂‖ in the paper's. A strength of s moves it by s·λ_i, so the
    least-squares slope of these movements on λ is 0 in the base and s in the edited model.
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
        # Rounding to bf16 moves a weight by about 0.001 of its size and hides an edit that is smaller.
        if not abs(strength) * self.power**0.5 > 0.01 * self.size:
            return False
        return abs(self.share - strength) < 0.25 * abs(strength)


def _twice() -> EditError:
    return EditError(
        "the edit is already in this model",
        got="an edit applied twice",
        fix="Revert it first, or load the base again.",
    )
