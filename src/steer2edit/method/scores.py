"""One site's scores v̂, k̂ and g, from its steering vector, its mean input and one streaming pass over its weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .preserve import Shared
from .site import Site
from .theorems import importance, input_direction, output_direction


@dataclass(frozen=True)
class Reading:
    """All that the paper's method needs to know about a weight, from one pass over it.

    Attributes:
        along: L W [r, n·c] for the rows of L. size: ‖W_i μ_i‖ [n]. power: ‖W‖_F².
    """

    along: Tensor
    size: Tensor
    power: float


class RowSums:
    """The sums of a reading, in fp32, over blocks of a weight's rows.

    Args:
        columns: n·c. L: [r, d]. mu: [n, c].

    Attributes:
        rows: how many rows a block has; the last block may have fewer.
    """

    def __init__(self, columns: int, L: Tensor, mu: Tensor):
        self.L, self.mu = L, mu
        device = L.device
        # On a CPU a block of 4 MB stays in the cache; elsewhere fewer steps are faster.
        self.rows = max(1, 2 ** (20 if device.type == "cpu" else 26) // columns)
        self.along = torch.zeros(len(L), columns, device=device)
        self.squares, self.power = torch.zeros(len(mu), device=device), torch.zeros((), device=device)
        self.scratch = torch.empty(min(self.rows, L.shape[1]), columns, device=device)

    def add(self, start: int, block: Tensor) -> None:
        """Adds a block [≤ rows, n·c] fp32, the weight's rows from `start` on."""
        count, (n, c) = len(block), self.mu.shape
        self.along += self.L[:, start : start + count] @ block
        columns = torch.mul(block, block, out=self.scratch[:count]).sum(dim=0)
        self.power += columns.sum()
        if c == 1:  # ‖W_i μ_i‖ = |μ_i| ‖W_i‖
            self.squares += columns
        else:
            out = (
                torch.mul(block, self.mu.flatten(), out=self.scratch[:count]).view(count, n, c).sum(dim=2)
            )  # [rows, n]
            self.squares += out.square().sum(dim=0)

    def reading(self) -> Reading:
        size = self.squares.sqrt() * (self.mu[:, 0].abs() if self.mu.shape[1] == 1 else 1.0)
        return Reading(self.along, size, float(self.power))


def read(W: Tensor, L: Tensor, mu: Tensor) -> Reading:
    """One pass over a weight, a block of rows at a time, without temporaries of the weight's size.

    Args:
        W: [d, n·c], any floating dtype. L: [r, d]. mu: [n, c].
    """
    W = W.detach().contiguous()
    sums = RowSums(W.shape[1], L.to(W.device, torch.float32), mu.to(W.device, torch.float32))
    # Every block goes into the same memory, even if W is fp32 already: the last bit of a sum depends on the memory's
    # alignment, and a mapped file is not aligned.
    buffer = torch.empty_like(sums.scratch)
    for start in range(0, W.shape[0], sums.rows):
        block = W[start : start + sums.rows]
        sums.add(start, buffer[: len(block)].copy_(block))
    return sums.reading()


@dataclass(frozen=True, repr=False)
class SiteScores:
    """What the traces and the weight say about one site, independent of (ρ, α).

    Attributes:
        u: v̂ [d]. k: k̂ [n, c]. g: importance [n].
        reach: v̂ᵀW_i k_i [n], the component's own gain along v̂, which is ‖W_iᵀv̂‖ for the method's own k̂. λ_i/reach_i is
            the edit's size relative to it.
        v_norm: ‖v‖.
        shared: what v̂ shares with the site's outputs on preserved prompts; None without evidence of them.
    """

    site: Site
    u: Tensor
    k: Tensor
    g: Tensor
    reach: Tensor
    v_norm: float
    shared: Shared | None = None

    def __repr__(self) -> str:
        return f"SiteScores({self.site.key}, {self.site.n} components, ‖v‖ = {self.v_norm:.3g})"


def score_site(site: Site, W: Tensor, v: Tensor, mu: Tensor) -> SiteScores:
    """Steps 1 and 2 and the scores of step 3 for one site, in fp32, on the weight's own device.

    Args:
        W: [d, n·c], any floating dtype. v: [d]. mu: [n·c].
    """
    return scores_from(site, v, mu, read(W, output_direction(v.float())[None], unit(mu, site.n)))


def scores_from(site: Site, v: Tensor, mu: Tensor, reading: Reading) -> SiteScores:
    """Like `score_site`, from a reading of the weight with v̂ as the first row of L, and with `unit(mu)`."""
    u = output_direction(v.float())
    along = reading.along[0].cpu().view(site.n, site.width)
    k, reach = input_direction(along)
    g = importance(along, unit(mu, site.n).cpu(), reading.size.cpu())
    return SiteScores(site, u.cpu(), k, g, reach, float(torch.linalg.vector_norm(v.float())))


def unit(mu: Tensor, n: int) -> Tensor:
    """μ_i/‖μ_i‖ [n, c]: g_i does not depend on the length of μ_i, whose square may leave fp32's range. 0 stays 0."""
    m = mu.float().view(n, -1)
    norm = torch.linalg.vector_norm(m, dim=1, keepdim=True)
    return torch.where(norm > 0, m / norm, 0.0)
