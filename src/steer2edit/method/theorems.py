"""The paper's three steps, in its symbols (arXiv 2602.09870): for component i the edit is ΔW_i = λ_i u_i k_iᵀ.

Theorem 3.1 gives u, Theorem 3.2 gives k, Theorem 3.3 gives λ. A weight is seen as n components of width c,
W.view(d, n, c); heads (c = head_dim) and neurons (c = 1) go through the same formulas.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from ..errors import EditError


def output_direction(v: Tensor) -> Tensor:
    """u = v̂ = v/‖v‖ [d] (Theorem 3.1: the only direction that moves the output along v alone). 0 where v = 0."""
    norm = torch.linalg.vector_norm(v)
    return v / norm if norm > 0 else torch.zeros_like(v)


def input_direction(along: Tensor) -> tuple[Tensor, Tensor]:
    """k̂_i = W_iᵀv̂/‖W_iᵀv̂‖ (Theorem 3.2: the change that correlates most with the alignment score v·W_i h).

    Args:
        along: W_iᵀv̂ [n, c] fp32.

    Returns:
        k̂ [n, c], a row of zeros where W_iᵀv̂ = 0; and the norms ‖W_iᵀv̂‖ [n].
    """
    norm = torch.linalg.vector_norm(along, dim=1)  # [n]
    return torch.where(norm[:, None] > 0, along / norm[:, None], 0.0), norm


def importance(along: Tensor, mu: Tensor, size: Tensor) -> Tensor:
    """g_i = cos(v, W_i μ_i) = (W_iᵀv̂)·μ_i / ‖W_i μ_i‖ [n], 0 where W_i μ_i = 0.

    Args:
        along: W_iᵀv̂ [n, c]. mu: μ_i [n, c]. size: ‖W_i μ_i‖ [n]. All fp32.
    """
    return torch.where(size > 0, (along * mu).sum(dim=1) / size, 0.0)


def magnitudes(g: Tensor, rho: float | None, alpha: float) -> Tensor:
    """λ_i = sign(g_i) · max(|g_i| − ρα, 0) / (ρ(1 − α)) [n] (Theorem 3.3, the Elastic-Net soft threshold).

    The only maximiser of gᵀλ − ρ(α‖λ‖₁ + (1 − α)/2 · ‖λ‖₂²). A larger ρ gives a smaller edit; None means ρ = ∞.

    Raises:
        EditError: ρ is not above 0, or α is not in [0, 1).
    """
    check_budget(rho, alpha)
    if rho is None:
        return torch.zeros_like(g)
    # softshrink(g, t) = sign(g) · max(|g| − t, 0)
    return torch.nn.functional.softshrink(g, rho * alpha).div_(rho * (1 - alpha))


def check_budget(rho: float | None, alpha: float) -> None:
    if rho is not None and not (isinstance(rho, Real) and 0 < rho < math.inf):
        raise EditError("the budget ρ must be above 0 and finite", got=rho, fix="Use None to switch a block type off.")
    if not (isinstance(alpha, Real) and 0 <= alpha < 1):
        raise EditError("the mixing weight α must be in [0, 1)", got=alpha, fix="α = 0 is dense, towards 1 is sparse.")
