"""What an edit does to one weight, ΔW = u aᵀ, and the protocols of edits, `Part` and `Changes`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import EditError
from .site import Site


@dataclass(frozen=True, repr=False)
class SiteEdit:
    """One site's edit, ΔW = u aᵀ with a = λ·k̂.

    g, λ and k̂ are stored separately: with k̂'s sign in λ, a reinforced neuron could look suppressed.

    Attributes:
        u: v̂ [d], or another direction of unit length. k: k̂ [n, c]. g: importance [n]. reach: uᵀW_i k_i [n], which is
            ‖W_iᵀv̂‖ in the paper's edit. lam: λ [n].
    """

    site: Site
    u: Tensor
    k: Tensor
    g: Tensor
    reach: Tensor
    lam: Tensor

    @property
    def row(self) -> Tensor:
        """a = [λ_1 k̂_1ᵀ | … | λ_n k̂_nᵀ], [n·c]: the whole site's edit has rank one."""
        return (self.lam[:, None] * self.k).flatten()

    def delta(self) -> Tensor:
        """ΔW = u aᵀ [d, n·c], fp32."""
        return torch.outer(self.u, self.row)

    def __repr__(self) -> str:
        return f"SiteEdit({self.site.key}, {int((self.lam != 0).sum())} of {self.site.n} components)"


@dataclass(frozen=True, repr=False)
class Change:
    """What one or several edits do to a weight: ΔW = u a, with their strengths included.

    Attributes:
        u: [d, r]. a: [r, n·c].
    """

    site: Site
    u: Tensor
    a: Tensor

    def columns(self) -> Tensor:
        """The numbers of the weight's columns that change [m]."""
        return torch.nonzero((self.a != 0).any(dim=0)).flatten()

    def delta(self, rows: slice = slice(None), columns: Tensor | slice = slice(None)) -> Tensor:
        """ΔW, or some rows and columns of it, fp32."""
        # Outer products are added one by one, so that a part of ΔW has the same bytes as in the whole.
        delta = torch.outer(self.u[rows, 0], self.a[0, columns])
        for rank in range(1, len(self.a)):
            delta += torch.outer(self.u[rows, rank], self.a[rank, columns])
        return delta

    def __repr__(self) -> str:
        return f"Change({self.site.key}, rank {len(self.a)}, {len(self.columns())} of {self.site.inputs} columns)"


def patched(part: Tensor, change: Change, columns: Tensor, rows: slice = slice(None)) -> Tensor:
    """W + ΔW for some of a weight's columns: added in fp32, rounded once.

    Args:
        part: those columns [d, m], or only their `rows`, in the weight's dtype.
        columns: their numbers [m].
    """
    return (part.float() + change.delta(rows, columns.cpu()).to(part.device)).to(part.dtype)


def not_finite(change: Change, dtype: torch.dtype) -> EditError:
    return EditError(
        f"the edited weight of {change.site.place} is not finite in {dtype}",
        got=f"a change of up to {float(change.delta().abs().max()):g}",
        fix="Lower the strength, or use bf16 or fp32.",
    )


class Part(Protocol):
    """One edit as data, such as a `steer2edit.Edit`.

    Attributes:
        sites: site key → its edit. config: the budgets. fingerprint: site key → sketch of the base's weight.
        provenance: where the scores came from. strength: scales the whole edit. layers: how many the base has.
    """

    @property
    def sites(self) -> Mapping[str, SiteEdit]: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def fingerprint(self) -> Mapping[str, Tensor]: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...
    @property
    def strength(self) -> float: ...
    @property
    def layers(self) -> int: ...
    @property
    def id(self) -> str: ...
    def edited(self) -> Mapping[str, SiteEdit]: ...


class Changes(Protocol):
    """What can be applied, served and written: an edit, or several combined.

    Attributes:
        id: a short hash of what it does. parts: the edits in it.
    """

    @property
    def id(self) -> str: ...
    @property
    def parts(self) -> Sequence[Part]: ...
    def changes(self) -> Mapping[str, Change]:
        """Site key → the change of its weight, for the sites that change."""
        ...
