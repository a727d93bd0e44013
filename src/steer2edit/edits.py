"""Scores, edits and combinations of edits, with all that can be done with them.

Scores come from a probe and a model's weights. Budgets (ρ, α) turn them into an Edit by a soft threshold. Several edits
of one model combine into a Combination.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .artefacts.adapter import save_adapter
from .artefacts.store import load_edit, load_edits, load_scores, save_combination, save_edit, save_scores
from .errors import EditError
from .files.tensors import read_header
from .method.change import Change, SiteEdit
from .method.fingerprint import differing
from .method.intervention import Intervention, Term
from .method.preserve import REPEL, Evidence, check_preserving, quieted
from .method.scores import SiteScores
from .method.site import BLOCKS, are_layers, layers_of, numbered_layers
from .method.theorems import check_budget, magnitudes
from .method.variants import FULL, PRESERVE, SCORED
from .models import bake
from .models.hooks import intervening


@dataclass(frozen=True, repr=False)
class Scores:
    """The scores of every site, from which any (ρ, α) gives an edit by a soft threshold.

    Attributes:
        sites: site key → its scores, in the model's order.
        fingerprint: site key → sketch of the base's weight.
        provenance: where the probe and the vectors came from.
        evidence: the probe's, for edits that preserve; None if it kept none.

    >>> from steer2edit.method.scores import score_site
    >>> from steer2edit.method.site import Site
    >>> site = Site(0, "mlp", "down_proj", "down_proj.weight", d=2, n=3, width=1)
    >>> W = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])  # [d, n·c]
    >>> scores = Scores({"0.mlp": score_site(site, W, v=torch.tensor([1.0, 0.0]), mu=torch.ones(3))})
    >>> scores.sites["0.mlp"].g
    tensor([1.0000, 0.8944, 0.0000])
    >>> scores.edit(rho_attn=None, rho_mlp=0.5, alpha=0.4).sites["0.mlp"].lam
    tensor([2.6667, 2.3148, 0.0000])
    """

    sites: Mapping[str, SiteScores]
    fingerprint: Mapping[str, Tensor] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    evidence: Evidence | None = None

    def __repr__(self) -> str:
        return f"Scores({len(self.sites)} sites, {sum(s.site.n for s in self.sites.values())} components)"

    @property
    def depth(self) -> int:
        """How many layers the model has; without that in the provenance, as many as have scores."""
        return int(self.provenance.get("layers") or 1 + max(s.site.layer for s in self.sites.values()))

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

    def edit(
        self,
        *,
        rho_attn: float | None,
        rho_mlp: float | None,
        alpha: float,
        layers: str | Container[int] | None = None,
        preserve: float | None = None,
        repel: float = REPEL,
    ) -> Edit:
        """The edit of one configuration; ρ = None switches a block type off.

        Args:
            layers: those that are edited: a range or a set, or as in a recipe: "8-20", or shares of the depth like
                "33%-67%". None is all.
            preserve: ε of `method.preserve`, above 0: heads fire little at what the probe was told to preserve, and
                write little of what they write there anyway. A large ε gives the paper's edit, as None does; a
                smaller one comes nearer to what the firing there should be.
            repel: β of `method.preserve`, at least 0: how hard preserved prompts are pushed the other way before
                their answer begins, as a share of the push on positive responses.

        Raises:
            EditError: ρ ≤ 0, α outside [0, 1), ε below 1e-4 or β below 0, layers that cannot be read, or no evidence
                to preserve by.
        """
        rho = {"attn": rho_attn, "mlp": rho_mlp}
        for value in rho.values():
            check_budget(value, alpha)
        lam = {block: magnitudes(g, rho[block], alpha) for block, g in self._blocks.items()}
        config = {"rho_attn": rho_attn, "rho_mlp": rho_mlp, "alpha": alpha}
        config = {name: None if value is None else float(value) for name, value in config.items()}
        edit = Edit(_Thresholded(self.sites, lam, self._starts), config, self.fingerprint, self.provenance)
        if layers is not None:
            edit = edit.only(self._numbered(layers))
        return edit if preserve is None else self._preserving(edit, preserve, repel)

    def _numbered(self, layers: str | Container[int]) -> Container[int]:
        if isinstance(layers, str):
            if not are_layers(layers):
                raise EditError("these are no layers", got=layers, fix="Write 8-20, 8, or shares like 50%-100%.")
            return layers_of(numbered_layers(layers, self.depth))
        return layers

    def _preserving(self, edit: Edit, epsilon: float, repel: float) -> Edit:
        check_preserving(epsilon, repel)
        if self.evidence is None:
            raise EditError(
                "the scores have no evidence to preserve by",
                got="a probe without preserve",
                fix="Collect with preserve=(…), the groups of negative traces that the edit should leave alone.",
            )
        shared = {key: s.shared for key, s in self.sites.items()}
        if without := [key for key in self.evidence.inputs if key in shared and shared[key] is None]:
            raise EditError(
                "the scores do not hold what vectors share with preserved outputs",
                got=f"scores of an earlier version, at {len(without)} sites",
                fix="Score the probe again.",
            )
        how = self.evidence, epsilon, repel
        sites = {key: quieted(site, *how, shared[key]) for key, site in edit.sites.items()}
        return replace(edit, sites=sites, config={**edit.config, PRESERVE: float(epsilon), "repel": float(repel)})

    def save(self, path: str | Path) -> None:
        save_scores(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Reads what `save` wrote. Raises FileError if the file is damaged or its tensors do not fit its sites."""
        return load_scores(path, cls)


class _Thresholded(Mapping[str, SiteEdit]):
    """Scores with each site's λ, joined on access, since a search makes hundreds of edits and reads few of them."""

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


class AnyEdit(ABC):
    """What an edit and a combination of edits share: all that can be done with them."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Edit, ...]:
        """The edits in it: one, or those that were combined."""

    @property
    @abstractmethod
    def id(self) -> str:
        """A short hash of what it does."""

    @abstractmethod
    def changes(self) -> dict[str, Change]:
        """Site key → the change of its weight, for the sites that change."""

    def applied(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A context in which the model answers as if edited; no weight is touched.

        >>> ids = torch.tensor([[1, 2, 3]])
        >>> before = model(ids).logits
        >>> with edit.applied(model):
        ...     bool((model(ids).logits == before).all())
        False
        >>> bool((model(ids).logits == before).all())
        True
        """
        return intervening(model, self.intervention(), edit=self)

    def intervention(self, name: str = "edit") -> Intervention:
        """out += u(aᵀx) at each edited site."""
        return Intervention(name, {key: Term(change.u, change.a) for key, change in self.changes().items()})

    def apply(self, model: nn.Module) -> bake.Applied:
        """Bakes it into the weights and reports what rounding to their dtype lost. `revert` undoes it.

        >>> edit.apply(model).rounding_loss < 1e-5
        True
        >>> edit.revert(model)
        """
        return bake.apply(self, model)

    def revert(self, model: nn.Module) -> None:
        """Restores the exact bytes from before `apply`."""
        bake.revert(self, model)

    def save_adapter(self, folder: str | Path, base: str | None = None) -> Path:
        """Writes it as a PEFT LoRA adapter, of rank 1 or, for r combined edits, of rank r."""
        return save_adapter(self, folder, base)


_UNITS = {"attn": "heads", "mlp": "neurons"}


def _off(site: SiteEdit) -> SiteEdit:
    return replace(site, lam=torch.zeros_like(site.lam))


@dataclass(frozen=True, repr=False)
class Edit(AnyEdit):
    """An edit of a model: u, k̂, g and λ for each site. Its `safetensors` file takes a few megabytes.

    Attributes:
        sites: site key → its edit, in the model's order.
        config: rho_attn, rho_mlp, alpha.
        fingerprint: site key → sketch of the base's weight, by which another base is refused.
        provenance: where the scores came from.
        strength: scales the whole edit; stored separately from λ.

    >>> from steer2edit.method.scores import score_site
    >>> from steer2edit.method.site import Site
    >>> site = Site(0, "mlp", "down_proj", "down_proj.weight", d=2, n=2, width=1)
    >>> scores = Scores({"0.mlp": score_site(site, torch.eye(2), v=torch.tensor([1.0, 0.0]), mu=torch.ones(2))})
    >>> edit = scores.edit(rho_attn=None, rho_mlp=2.0, alpha=0.0)
    >>> edit.with_strength(-1.0).changes()["0.mlp"].delta()
    tensor([[-0.5000, -0.0000],
            [-0.0000, -0.0000]])
    """

    sites: Mapping[str, SiteEdit]
    config: Mapping[str, Any]
    fingerprint: Mapping[str, Tensor] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    strength: float = 1.0

    def __repr__(self) -> str:
        parts = [f"{s['edited']} of {s['components']} {_UNITS[block]}" for block, s in self.summary().items()]
        budgets = [f"{name}={value}" for name, value in self.config.items()]
        return f"Edit(id={self.id}, {', '.join([*parts, *budgets])}, strength={self.strength:g})"

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
        """The edit restricted to some layers (a range or a set; None is all) and block types: λ = 0 elsewhere."""
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

    def with_budget(self, *, rho_attn: float | None, rho_mlp: float | None, alpha: float) -> Edit:
        """The edit that the same g gives at another (ρ, α), in all layers.

        Raises:
            EditError: ρ ≤ 0, α outside [0, 1), or the edit's λ is not the soft threshold of its g.
        """
        variant = PRESERVE if PRESERVE in self.config else self.config.get("rival", self.config.get("variant", FULL))
        if variant != FULL and variant not in SCORED:
            raise EditError(
                "this edit has no (ρ, α) to change", got=f"the variant {variant}", fix="Change its strength."
            )
        rho = {"attn": rho_attn, "mlp": rho_mlp}
        sites = {key: replace(s, lam=magnitudes(s.g, rho[s.site.block], alpha)) for key, s in self.sites.items()}
        budget = {"rho_attn": rho_attn, "rho_mlp": rho_mlp, "alpha": alpha}
        return replace(self, sites=sites, config={**self.config, **budget})

    def summary(self) -> dict[str, Any]:
        """For each block type: how many components there are, are edited, reinforced (λ > 0) and suppressed (λ < 0),
        and the largest |λ|."""
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
    def preserving(self) -> dict[str, float]:
        """What makes `Scores.edit` preserve as this edit does: `preserve` and `repel`. Empty for other edits."""
        has = self.config  # edits of earlier versions do not repel, and do not speak of it
        return {PRESERVE: has[PRESERVE], "repel": has.get("repel", 0.0)} if PRESERVE in has else {}

    @property
    def id(self) -> str:
        """A short hash of what the edit does: its sites, directions, rows and strength."""
        digest = hashlib.sha256(repr(self.strength).encode())
        for key, site in self.edited().items():
            digest.update(key.encode() + site.u.numpy().tobytes() + site.row.numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        save_edit(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Reads what `save` wrote. Raises FileError if the file is damaged or its tensors do not fit its sites."""
        return load_edit(path, cls)


@dataclass(frozen=True, repr=False)
class Combination(AnyEdit):
    """Edits that act together: ΔW = Σ_j u_j a_jᵀ. It is applied, exported and reverted like one edit of rank r.

    Attributes:
        edits: the edits in it.

    >>> other = scores.edit(rho_attn=0.2, rho_mlp=None, alpha=0.2)
    >>> both = s2e.combine(edit, other.with_strength(-0.5))
    >>> [part.strength for part in both.with_strength(2.0).parts]
    [2.0, -1.0]
    >>> len(both.changes()["0.attn"].a)  # its rank
    2
    """

    edits: tuple[Edit, ...]

    @property
    def parts(self) -> tuple[Edit, ...]:
        return self.edits

    def __repr__(self) -> str:
        return f"Combination(id={self.id}, {len(self.edits)} edits: {', '.join(edit.id for edit in self.edits)})"

    @property
    def id(self) -> str:
        return hashlib.sha256(" ".join(edit.id for edit in self.edits).encode()).hexdigest()[:16]

    def only(self, layers: Container[int] | None = None, blocks: Container[str] = BLOCKS) -> Combination:
        """Each edit restricted to some layers and block types, as by `Edit.only`."""
        return replace(self, edits=tuple(edit.only(layers, blocks) for edit in self.edits))

    def with_strength(self, strength: float) -> Combination:
        """All edits scaled by the same factor, in addition to each edit's own strength."""
        return replace(self, edits=tuple(edit.with_strength(strength * edit.strength) for edit in self.edits))

    def save(self, path: str | Path) -> None:
        save_combination(self.edits, path)

    @classmethod
    def load(cls, path: str | Path) -> Combination:
        """Reads what `save` wrote. Raises FileError if the file is damaged or its tensors do not fit its sites."""
        return load_edits(path, lambda edits: combine(*edits), Edit)

    def changes(self) -> dict[str, Change]:
        by_site: dict[str, list[Change]] = {}
        for edit in self.edits:
            for key, change in edit.changes().items():
                by_site.setdefault(key, []).append(change)
        return {
            key: Change(some[0].site, torch.cat([c.u for c in some], dim=1), torch.cat([c.a for c in some]))
            for key, some in by_site.items()
        }


def combine(*edits: Edit) -> Combination:
    """Combines edits into one.

    Raises:
        EditError: no edit is given, two are the same, or they belong to different models.

    >>> from steer2edit.method.scores import score_site
    >>> from steer2edit.method.site import Site
    >>> site = Site(0, "mlp", "down_proj", "down_proj.weight", d=2, n=1, width=1)
    >>> scores = [Scores({"0.mlp": score_site(site, torch.ones(2, 1), v, torch.ones(1))}) for v in torch.eye(2)]
    >>> combine(*(s.edit(rho_attn=None, rho_mlp=1.0, alpha=0.0) for s in scores)).changes()["0.mlp"]
    Change(0.mlp, rank 2, 1 of 1 columns)
    """
    if not edits or len({edit.id for edit in edits}) < len(edits):
        raise EditError(
            "edits cannot be combined",
            got="none" if not edits else "the same edit twice",
            fix="Give edits that differ.",
        )
    for first, edit in itertools.combinations(edits, 2):
        for key in first.sites.keys() & edit.sites.keys():
            a, b = first.sites[key].site, edit.sites[key].site
            known = all(key in e.fingerprint for e in (first, edit))
            stranger = known and differing({key: first.fingerprint[key]}, {key: edit.fingerprint[key]})
            if (a.d, a.n, a.width) != (b.d, b.n, b.width) or stranger:
                raise EditError(
                    "edits of different models cannot be combined",
                    got=f"site {key}: {a.d} × {a.n} × {a.width} and {b.d} × {b.n} × {b.width}, or other weights",
                    fix="Combine edits that were scored on the same base.",
                )
    return Combination(edits)


def interference(one: Edit, other: Edit) -> dict[str, Any]:
    """How far two edits of one model would interfere if they were combined.

    Returns:
        sites: for each site that both change, the cosine of their directions u, of their rows a, and of their ΔW (the
            product of the two); how many components both change, and how many of those they push in opposite
            directions (⟨ΔW_i, ΔW'_i⟩ < 0). shared, opposed: these counts over all sites; opposed_share: their ratio.

    >>> from steer2edit.method.scores import score_site
    >>> from steer2edit.method.site import Site
    >>> site = Site(0, "mlp", "down_proj", "down_proj.weight", d=2, n=1, width=1)
    >>> scores = Scores({"0.mlp": score_site(site, torch.ones(2, 1), torch.ones(2), torch.ones(1))})
    >>> edit = scores.edit(rho_attn=None, rho_mlp=1.0, alpha=0.0)
    >>> interference(edit, edit.with_strength(-1.0))["opposed_share"]
    1.0
    """
    rows: list[dict[str, Any]] = []
    for key in one.edited().keys() & other.edited().keys():
        a, b = one.sites[key], other.sites[key]
        directions = float(torch.nn.functional.cosine_similarity(a.u, b.u, dim=0))
        sign = 1 if one.strength * other.strength > 0 else -1
        along = (a.lam * b.lam * (a.k * b.k).sum(dim=1)) * directions * sign  # [n]
        both = (a.lam != 0) & (b.lam != 0)
        cos_rows = sign * float(torch.nn.functional.cosine_similarity(a.row, b.row, dim=0))
        rows.append(
            {
                "site": key,
                "cos u": directions,
                "cos row": cos_rows,
                "cos ΔW": directions * cos_rows,
                "shared": int(both.sum()),
                "opposed": int((both & (along < 0)).sum()),
            }
        )
    order = list(one.sites)
    rows.sort(key=lambda row: order.index(row["site"]))
    shared, opposed = sum(row["shared"] for row in rows), sum(row["opposed"] for row in rows)
    return {"sites": rows, "shared": shared, "opposed": opposed, "opposed_share": opposed / shared if shared else 0.0}


def meetings(edit: AnyEdit) -> list[dict[str, Any]]:
    """For every two parts of an edit: their ids, how many components both change (shared), and how many of those they
    push in opposite directions (opposed, opposed_share)."""
    rows = []
    for a, b in itertools.combinations(edit.parts, 2):
        overlap = interference(a, b)
        rows.append({"edits": [a.id, b.id]} | {name: overlap[name] for name in ("shared", "opposed", "opposed_share")})
    return rows


def load_any(path: str | Path) -> Edit | Combination:
    """The edit or the combination that a file, or `gallery:NAME`, holds. Raises FileError as `Edit.load` does."""
    kind = read_header(path).get("kind")
    return Combination.load(path) if kind == "combination" else Edit.load(path)
