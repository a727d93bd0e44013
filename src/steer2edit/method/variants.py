"""The ablations (paper, tables 2–6): each changes one part of the method.

k_mean and k_svd use another input direction, g_dot another score: they change the scores. l0 and l2 use another
penalty: they change how scores become an edit. `preserve` is not the paper's: `method/preserve.py` has it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from .scores import SiteScores, unit

Variant = Literal["full", "k_mean", "k_svd", "g_dot", "l0", "l2", "preserve"]

FULL: Variant = "full"
PRESERVE: Variant = "preserve"

VARIANTS: tuple[Variant, ...] = get_args(Variant)
# The paper's method and its ablations.
PAPERS: tuple[Variant, ...] = tuple(variant for variant in VARIANTS if variant != PRESERVE)

# Variants with scores of their own; the others use the full method's scores.
SCORED = ("k_mean", "k_svd", "g_dot")


def rescored(variant: str, s: SiteScores, mu: Tensor, W: Tensor) -> SiteScores:
    """A site's scores under a variant.

    Args:
        mu: [n·c]. W: [d, n·c], any floating dtype.
    """
    if variant == "k_mean":  # k_i ← μ_i, of unit length as k̂ is, so that λ means the same
        return _along(s, unit(mu, s.site.n).cpu())
    if variant == "k_svd":
        return _along(s, _top_direction(s, W).cpu())
    if variant == "g_dot":  # g_i ← v̂ᵀW_iμ_i
        return replace(s, g=s.reach * (s.k * mu.float().cpu().view_as(s.k)).sum(dim=1))
    return s


def _along(s: SiteScores, k: Tensor) -> SiteScores:
    """The scores with other input directions and their reach v̂ᵀW_i k_i, which shows whether an edit is in weights."""
    return replace(s, k=k, reach=s.reach * (s.k * k).sum(dim=1))


def _top_direction(s: SiteScores, W: Tensor) -> Tensor:
    """Top right singular vector of each W_i [n, c]. It has no sign of its own, so it gets the one on k̂'s side."""
    if s.site.width == 1:
        return s.k
    blocks = W.float().view(s.site.d, s.site.n, s.site.width).transpose(0, 1)  # [n, d, c]
    top = torch.linalg.eigh(blocks.transpose(1, 2) @ blocks).eigenvectors[..., -1]  # [n, c]
    k = s.k.to(top.device)
    return torch.where((top * k).sum(dim=1, keepdim=True) < 0, -top, top) * (k != 0).any(dim=1, keepdim=True)
