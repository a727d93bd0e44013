"""Closed-form rivals of the paper's edit, each from its own paper: one row for every site.

Each of them is ΔW = γ u aᵀ, as the paper's edit is, so that it runs in the same batch and its files are an edit's. They
differ from it in the row a, and ROSI in u as well. docs/rivals.md says in which points a form here departs from its
paper, and why.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .change import SiteEdit
from .preserve import ridge_solution
from .scores import SiteScores
from .theorems import output_direction

Rival = Literal["rosi", "llm_va", "null_space"]

RIVALS: tuple[Rival, ...] = get_args(Rival)
# Those that need the evidence of prompts that an edit should leave alone. They edit only sites that have evidence.
WITH_EVIDENCE: tuple[Rival, ...] = ("llm_va", "null_space")

# Of the linear readers: the ridge as a share of the mean eigenvalue.
RIDGE = 0.1
# Outputs whose spread along a direction is below this share of their size are the same, but for rounding.
_SAME = 1e-5
# Which share of a site's directions `null_space` may use: those in which preserved inputs have the least energy.
NULL_SHARE = 0.5


def rosi_row(W: Tensor) -> Tensor:
    """w̄ = (1/d) Σ_j W_j, the mean of the weight's rows [n·c]: W' = W + γ ŝ w̄ᵀ.

    Rank-One Safety Injection (arXiv 2508.20766). ŝ is the difference of means of the residual stream after one layer,
    at unit length: the same for every weight that writes to the stream.

    Args:
        W: [d, n·c], any floating dtype.

    >>> rosi_row(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    tensor([2., 1.])
    """
    return W.detach().mean(dim=0, dtype=torch.float32).cpu()


def llm_va_row(W: Tensor, direction: Tensor, h: Tensor, weights: Tensor, positive: Tensor) -> Tensor:
    """Wᵀ((σ_r/σ_h) v̂_h − v̂_r) [n·c]: W' = W + γ v̂_r ((σ_r/σ_h) v̂_h − v̂_r)ᵀ W.

    LLM-VA, vector alignment (arXiv 2601.19487). At γ = 1 it is the smallest change of W, in the Frobenius norm, after
    which every output's coordinate along v̂_r is the one along v̂_h, to scale:

        v̂_rᵀ W' x = (σ_r/σ_h) v̂_hᵀ W x    for every x.

    Whether the model answers then follows what it reads in the prompt. v̂_h is the normal of a linear classifier of
    outputs at the prompt's last token without intercept, by least squares with a ridge; σ_r and σ_h are the standard
    deviations of those outputs along v̂_r and v̂_h.

    Args:
        W: [d, n·c], any floating dtype. direction: v̂_r [d]. h: inputs at the last token of prompts [rows, n·c].
        weights: [rows]. positive: [rows] bool, which prompts call for the behaviour.

    Returns:
        The row; 0 if the outputs do not vary along v̂_h.
    """
    W, direction, h = W.detach().float().cpu(), direction.float(), h.float()
    weights = weights / weights.sum()
    o = h @ W.T  # [rows, d]
    signed = weights * torch.where(positive, 1.0, -1.0)
    size = float((weights[:, None] * o.square()).sum())
    if size == 0:
        return torch.zeros(W.shape[1])
    harm = output_direction(ridge_solution(o, weights[:, None], RIDGE * size / o.shape[1], signed @ o))
    spread = _deviation(o @ harm, weights)
    if spread <= _SAME * size**0.5:
        return torch.zeros(W.shape[1])
    return (_deviation(o @ direction, weights) / spread * harm - direction) @ W


def null_space_row(
    h: Tensor, weights: Tensor, positive: Tensor, target: float, share: float = NULL_SHARE, ridge: float = RIDGE
) -> Tensor:
    """k = P (P S₊ P + r P)⁺ P m₊ t [n·c]: out += γ v̂ kᵀh, with P S₋ P about 0.

    After AlphaSteer (arXiv 2506.07022): the added vector is Δh, where Δ = Δ̃P minimises E₊‖Δh − v‖² + r‖Δ‖² and P
    projects on the directions in which preserved inputs have no energy, or the least. As every row of the target is
    the same v, Δ = v̂kᵀ with t = ‖v‖. S₊ = E₊[h hᵀ] and m₊ = E₊[h] are of the positive rows.

    P leaves `share` of all directions: without the (1 − share)·n·c principal directions of S₋, or without all that have
    any energy if those are fewer.

    Args:
        h: [rows, n·c]. weights: [rows]. positive: [rows] bool. target: t. ridge: r, as a share of P S₊ P's mean
            eigenvalue.
    """
    h, columns = h.float(), h.shape[1]
    quiet = weights[~positive].sqrt()[:, None] * h[~positive]
    _, size, directions = torch.linalg.svd(quiet, full_matrices=False)
    with_energy = int((size > size.max() * 1e-6).sum())
    taken = directions[: min(with_energy, columns - round(share * columns))]  # [q, n·c]
    projected = h[positive] - (h[positive] @ taken.T) @ taken
    of_positive = (weights[positive] / weights[positive].sum())[:, None]
    scale = float((of_positive * projected.square()).sum()) / max(1, columns - len(taken))
    if scale == 0:
        return torch.zeros(columns)
    row = ridge_solution(projected, of_positive, ridge * scale, target * (of_positive * projected).sum(dim=0))
    return row - (row @ taken.T) @ taken  # P k = k but for rounding, which the ridge magnifies


def as_site_edit(s: SiteScores, row: Tensor | None, u: Tensor | None = None, along: Tensor | None = None) -> SiteEdit:
    """A rival's row as a site's edit: |a_i| is λ_i and its direction k̂_i. Without a row the site is not edited.

    Args:
        u: [d] in place of the site's v̂, with along: uᵀW [n·c].
    """
    parts = torch.zeros_like(s.k) if row is None else row.view_as(s.k)
    lam = torch.linalg.vector_norm(parts, dim=1)
    k = torch.where(lam[:, None] > 0, parts / lam[:, None], s.k)
    own = s.reach[:, None] * s.k if along is None else along.view_as(s.k)  # uᵀW_i
    return SiteEdit(s.site, s.u if u is None else u, k, s.g, (own * k).sum(dim=1), lam)


def _deviation(values: Tensor, weights: Tensor) -> float:
    """The standard deviation of weighted numbers; the weights add up to 1."""
    mean = (weights * values).sum()
    return float((weights * (values - mean).square()).sum().sqrt())
