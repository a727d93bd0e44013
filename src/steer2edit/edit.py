"""The paper: a steering vector becomes a rank-1 weight edit of every head and neuron (arXiv 2602.09870).

Pure mathematics, tensors in, tensors out. W.view(d, n, c) is a weight seen as n components of width c; heads
(c = head_dim) and neurons (c = 1) go through the same formulas. For component i the edit is ΔW_i = λ_i u k_iᵀ:
Theorem 3.1 gives u, Theorem 3.2 gives k, Theorem 3.3 gives λ.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import EditError
from .sites import BLOCKS, Site

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn

    from .bake import Applied
    from .intervention import Intervention

# Step 1 ------------------------------------------------------------------------------------------------------------


def output_direction(v: Tensor) -> Tensor:
    """u = v̂ = v/‖v‖ [d] (Theorem 3.1: the only direction that moves the output along v alone). 0 where v = 0."""
    norm = torch.linalg.vector_norm(v)
    return v / norm if norm > 0 else torch.zeros_like(v)


# Step 2 ------------------------------------------------------------------------------------------------------------


def input_direction(along: Tensor) -> tuple[Tensor, Tensor]:
    """k̂_i = W_iᵀv̂/‖W_iᵀv̂‖ (Theorem 3.2: the change that correlates most with the alignment score v·W_i h).

    Args:
        along: W_iᵀv̂ [n, c] fp32.

    Returns:
        k̂ [n, c], a row of zeros where W_iᵀv̂ = 0; and the norms ‖W_iᵀv̂‖ [n].
    """
    norm = torch.linalg.vector_norm(along, dim=1)  # [n]
    return torch.where(norm[:, None] > 0, along / norm[:, None], 0.0), norm


# Step 3 ------------------------------------------------------------------------------------------------------------


def importance(along: Tensor, mu: Tensor, size: Tensor) -> Tensor:
    """g_i = cos(v, W_i μ_i) = (W_iᵀv̂)·μ_i / ‖W_i μ_i‖ [n], 0 where W_i μ_i = 0.

    Args:
        along: W_iᵀv̂ [n, c]. mu: μ_i [n, c]. size: ‖W_i μ_i‖ [n]. All fp32.
    """
    return torch.where(size > 0, (along * mu).sum(dim=1) / size, 0.0)


def magnitudes(g: Tensor, rho: float | None, alpha: float) -> Tensor:
    """λ_i = sign(g_i) · max(|g_i| − ρα, 0) / (ρ(1 − α)) [n] (Theorem 3.3, the Elastic-Net soft threshold).

    The one maximiser of gᵀλ − ρ(α‖λ‖₁ + (1 − α)/2 · ‖λ‖₂²). A larger ρ is a smaller edit; None is ρ = ∞.

    Raises:
        EditError: if ρ is not above 0 or α is not in [0, 1).
    """
    check_budget(rho, alpha)
    if rho is None:
        return torch.zeros_like(g)
    # softshrink(g, t) = sign(g) · max(|g| − t, 0)
    return torch.nn.functional.softshrink(g, rho * alpha).div_(rho * (1 - alpha))


# -------------------------------------------------------------------------------------------------------------------


def check_budget(rho: float | None, alpha: float) -> None:
    if rho is not None and not (isinstance(rho, Real) and 0 < rho < math.inf):
        raise EditError("the budget ρ must be above 0 and finite", got=rho, fix="Use None to switch a block type off.")
    if not (isinstance(alpha, Real) and 0 <= alpha < 1):
        raise EditError("the mixing weight α must be in [0, 1)", got=alpha, fix="α = 0 is dense, towards 1 is sparse.")


@dataclass(frozen=True)
class Reading:
    """All that the method needs of a weight, from one pass over it.

    Attributes:
        along: L W [r, n·c] for the rows of L. size: ‖W_i μ_i‖ [n]. power: ‖W‖_F².
    """

    along: Tensor
    size: Tensor
    power: float


class Sums:
    """What a reading adds up over a weight's blocks of rows, in fp32.

    Args:
        columns: n·c. L: [r, d]. mu: [n, c].

    Attributes:
        rows: how many rows a block has; the last one may have fewer.
    """

    def __init__(self, columns: int, L: Tensor, mu: Tensor):
        self.L, self.mu = L, mu
        device = L.device
        # On a CPU a block of 4 MB stays in the cache; elsewhere few steps count.
        self.rows = max(1, 2 ** (20 if device.type == "cpu" else 26) // columns)
        self.along = torch.zeros(len(L), columns, device=device)
        self.squares, self.power = torch.zeros(len(mu), device=device), torch.zeros((), device=device)
        self.scratch = torch.empty(min(self.rows, L.shape[1]), columns, device=device)

    def add(self, start: int, block: Tensor) -> None:
        """block [≤ rows, n·c] fp32, the weight's rows from `start` on."""
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
    """One pass over a weight, a block of rows at a time, so that nothing of its size is made.

    Args:
        W: [d, n·c], any floating dtype. L: [r, d]. mu: [n, c].
    """
    W = W.detach().contiguous()
    sums = Sums(W.shape[1], L.to(W.device, torch.float32), mu.to(W.device, torch.float32))
    # The same memory for every block, even where W is fp32 already: sums depend in the last bit on how memory is
    # aligned, and a mapped file's is not.
    buffer = torch.empty_like(sums.scratch)
    for start in range(0, W.shape[0], sums.rows):
        block = W[start : start + sums.rows]
        sums.add(start, buffer[: len(block)].copy_(block))
    return sums.reading()


@dataclass(frozen=True)
class SiteScores:
    """What the traces and the weight say of one site; no (ρ, α) in it.

    Attributes:
        u: v̂ [d]. k: k̂ [n, c]. g: importance [n].
        reach: v̂ᵀW_i k_i [n], the component's own gain along v̂, which is ‖W_iᵀv̂‖ for the method's own k̂; λ_i/reach_i is
            an edit's size relative to it.
        v_norm: ‖v‖.
    """

    site: Site
    u: Tensor
    k: Tensor
    g: Tensor
    reach: Tensor
    v_norm: float


def score_site(site: Site, W: Tensor, v: Tensor, mu: Tensor) -> SiteScores:
    """Steps 1 and 2 and the scores of step 3 for one site, in fp32, on the weight's own device.

    Args:
        W: [d, n·c], any floating dtype. v: [d]. mu: [n·c].
    """
    return scores_from(site, v, mu, read(W, output_direction(v.float())[None], unit(mu, site.n)))


def scores_from(site: Site, v: Tensor, mu: Tensor, reading: Reading) -> SiteScores:
    """As `score_site`, from a reading of the weight with v̂ as the first row of L, and with `unit(mu)`."""
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


@dataclass(frozen=True)
class Scores:
    """The scores of every site, from which any (ρ, α) gives an edit by a soft threshold.

    Attributes:
        sites: site key → its scores, in the model's order.
        fingerprint: site key → sketch of the base's weight.
        provenance: of the probe, and of the vectors if they were given.
    """

    sites: Mapping[str, SiteScores]
    fingerprint: Mapping[str, Tensor] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def _blocks(self) -> dict[str, Tensor]:
        # A block type's g as one vector: one more configuration costs one soft threshold.
        by_block = {block: [s.g for s in self.sites.values() if s.site.block == block] for block in BLOCKS}
        return {block: torch.cat(g) for block, g in by_block.items() if g}

    @cached_property
    def _starts(self) -> dict[str, int]:
        # Where a site's components begin in its block type's vector.
        starts, next_one = {}, dict.fromkeys(BLOCKS, 0)
        for key, s in self.sites.items():
            starts[key] = next_one[s.site.block]
            next_one[s.site.block] += s.site.n
        return starts

    def edit(self, *, rho_attn: float | None, rho_mlp: float | None, alpha: float) -> Edit:
        """The edit of one configuration; ρ = None switches a block type off.

        Raises:
            EditError: ρ ≤ 0 or α outside [0, 1).
        """
        rho = {"attn": rho_attn, "mlp": rho_mlp}
        for value in rho.values():
            check_budget(value, alpha)
        lam = {block: magnitudes(g, rho[block], alpha) for block, g in self._blocks.items()}
        config = {"rho_attn": rho_attn, "rho_mlp": rho_mlp, "alpha": alpha}
        config = {name: None if value is None else float(value) for name, value in config.items()}
        return Edit(_Thresholded(self.sites, lam, self._starts), config, self.fingerprint, self.provenance)

    def save(self, path: str | Path) -> None:
        from .store import save_scores

        save_scores(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Raises FileError if the file is cut short or its tensors are not those of its sites."""
        from .store import load_scores

        return load_scores(path)


@dataclass(frozen=True)
class SiteEdit:
    """One site's edit, ΔW = u aᵀ with a = λ·k̂. g, λ and k̂ are kept apart: a sign folded into λ would say that a
    neuron is suppressed when it is reinforced.

    Attributes:
        u: v̂ [d]. k: k̂ [n, c]. g: importance [n]. reach: ‖W_iᵀv̂‖ [n]. lam: λ [n].
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


@dataclass(frozen=True)
class Change:
    """What one edit, or several, do to a weight: ΔW = u a, strengths included.

    Attributes:
        u: [d, r]. a: [r, n·c].
    """

    site: Site
    u: Tensor
    a: Tensor

    def columns(self) -> Tensor:
        """Which columns of the weight change [m]."""
        return torch.nonzero((self.a != 0).any(dim=0)).flatten()

    def delta(self, rows: slice = slice(None), columns: Tensor | slice = slice(None)) -> Tensor:
        """ΔW, or some rows and columns of it, fp32."""
        # One outer product after the other, so that the same bytes come out whatever part is asked for.
        delta = torch.outer(self.u[rows, 0], self.a[0, columns])
        for rank in range(1, len(self.a)):
            delta += torch.outer(self.u[rows, rank], self.a[rank, columns])
        return delta


class Verbs(ABC):
    """What can be done with an edit, or with several combined; each verb only calls the module that does the work."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Edit, ...]:
        """The edits that it is made of."""

    @property
    @abstractmethod
    def id(self) -> str:
        """A short hash of what it does."""

    @abstractmethod
    def changes(self) -> dict[str, Change]:
        """Site key → what changes there, of the sites that change."""

    def applied(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A context in which the model answers as if edited; no weight is touched."""
        from .intervention import intervening

        return intervening(model, self.intervention(), edit=self)

    def intervention(self, name: str = "edit") -> Intervention:
        """out += u(aᵀx) at each edited site."""
        from .intervention import Intervention, Term

        return Intervention(name, {key: Term(change.u, change.a) for key, change in self.changes().items()})

    def apply(self, model: nn.Module) -> Applied:
        """Bakes it into the weights and says what rounding to their dtype lost. `revert` undoes it."""
        from .bake import apply

        return apply(self, model)

    def revert(self, model: nn.Module) -> None:
        """Restores the exact bytes that `apply` found."""
        from .bake import revert

        revert(self, model)

    def save_adapter(self, folder: str | Path, base: str | None = None) -> Path:
        """Writes it as a PEFT LoRA adapter: of rank 1, or of as many as there are edits combined."""
        from .export.adapter import save_adapter

        return save_adapter(self, folder, base)


class _Thresholded(Mapping[str, SiteEdit]):
    """Scores with a λ of each site, put together when asked for: a search makes hundreds of edits and reads few."""

    def __init__(self, scores: Mapping[str, SiteScores], lam: Mapping[str, Tensor], starts: Mapping[str, int]):
        self.scores, self.lam, self.starts = scores, lam, starts

    def __getitem__(self, key: str) -> SiteEdit:
        s = self.scores[key]
        lam = self.lam[s.site.block][self.starts[key] :][: s.site.n]
        return SiteEdit(s.site, s.u, s.k, s.g, s.reach, lam)

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)


def _off(site: SiteEdit) -> SiteEdit:
    return replace(site, lam=torch.zeros_like(site.lam))


@dataclass(frozen=True)
class Edit(Verbs):
    """An edit of a model: for each site u, k̂, g and λ; a few megabytes, as a `safetensors` file.

    Attributes:
        sites: site key → its edit, in the model's order.
        config: rho_attn, rho_mlp, alpha.
        fingerprint: site key → sketch of the base's weight, by which another base is refused.
        provenance: where the scores came from.
        strength: scales the whole edit; kept apart from λ.
    """

    sites: Mapping[str, SiteEdit]
    config: Mapping[str, Any]
    fingerprint: Mapping[str, Tensor] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    strength: float = 1.0

    @property
    def layers(self) -> int:
        """How many layers the base has."""
        layers = self.provenance.get("layers", 0)
        return layers if isinstance(layers, int) else 0

    def edited(self) -> dict[str, SiteEdit]:
        """The sites that the edit changes: those with a λ that is not 0."""
        return {key: site for key, site in self.sites.items() if bool((site.lam != 0).any())}

    @property
    def parts(self) -> tuple[Edit, ...]:
        return (self,)

    def changes(self) -> dict[str, Change]:
        edited = self.edited().items()
        return {key: Change(s.site, s.u[:, None], (self.strength * s.row)[None]) for key, s in edited}

    def only(self, layers: Container[int] | None = None, blocks: Container[str] = BLOCKS) -> Edit:
        """The edit of some layers and block types alone: λ = 0 elsewhere. `layers` is a range or a set; None is all."""
        kept = {
            key: s if (layers is None or s.site.layer in layers) and s.site.block in blocks else _off(s)
            for key, s in self.sites.items()
        }
        return replace(self, sites=kept)

    def with_strength(self, strength: float) -> Edit:
        """The same edit, scaled; a negative strength negates it. Raises EditError if the strength is not finite."""
        if not math.isfinite(strength):
            raise EditError("the strength must be finite", got=strength, fix="1.0 is the edit as scored.")
        return replace(self, strength=float(strength))

    def summary(self) -> dict[str, Any]:
        """For each block type: components in all, edited, reinforced (λ > 0), suppressed (λ < 0), largest |λ|."""
        table: dict[str, Any] = {}
        for block in BLOCKS:
            lams = [s.lam for s in self.sites.values() if s.site.block == block]
            lam = torch.cat(lams) if lams else torch.zeros(0)
            table[block] = {
                "components": lam.numel(),
                "edited": int((lam != 0).sum()),
                "reinforced": int((lam > 0).sum()),
                "suppressed": int((lam < 0).sum()),
                "largest": float(lam.abs().max()) if lam.numel() else 0.0,
            }
        return table

    @property
    def id(self) -> str:
        """A short hash of what the edit does: its sites, directions, rows and strength."""
        digest = hashlib.sha256(repr(self.strength).encode())
        for key, site in self.edited().items():
            digest.update(key.encode() + site.u.numpy().tobytes() + site.row.numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        from .store import save_edit

        save_edit(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Raises FileError if the file is cut short or its tensors are not those of its sites."""
        from .store import load_edit

        return load_edit(path)
