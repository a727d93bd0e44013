"""Several edits of one model: combined into one of rank r, and how they interfere.

Scaling and negating is `edit.with_strength`, taking some layers or one block type of it `edit.only`.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .edit import Change, Edit, Verbs
from .errors import EditError
from .fingerprint import differing


@dataclass(frozen=True)
class Combination(Verbs):
    """Edits that act together: ΔW = Σ_j u_j a_jᵀ. It is applied, exported and taken out as one edit of rank r is."""

    edits: tuple[Edit, ...]

    @property
    def parts(self) -> tuple[Edit, ...]:
        return self.edits

    @property
    def id(self) -> str:
        return hashlib.sha256(" ".join(edit.id for edit in self.edits).encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        from .store import save_combination

        save_combination(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Combination:
        """Raises FileError if the file is cut short or its tensors are not those of its sites."""
        from .store import load_combination

        return load_combination(path)

    def changes(self) -> dict[str, Change]:
        found: dict[str, list[Change]] = {}
        for edit in self.edits:
            for key, change in edit.changes().items():
                found.setdefault(key, []).append(change)
        return {
            key: Change(some[0].site, torch.cat([c.u for c in some], dim=1), torch.cat([c.a for c in some]))
            for key, some in found.items()
        }


def combine(*edits: Edit) -> Combination:
    """Edits as one.

    Raises:
        EditError: there is none, two are the same, or they were made on other models.
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
    """How two edits get into each other's way, before they are combined.

    Returns:
        sites: for each site that both change, the cosine of their directions u, of their rows a, and of their ΔW (the
            product of the two); how many components both change, and how many of those they push opposite ways
            (⟨ΔW_i, ΔW'_i⟩ < 0). shared, opposed: those counts over all sites; opposed_share: their ratio.
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
    shared, opposed = (sum(row[name] for row in rows) for name in ("shared", "opposed"))
    return {"sites": rows, "shared": shared, "opposed": opposed, "opposed_share": opposed / shared if shared else 0.0}
