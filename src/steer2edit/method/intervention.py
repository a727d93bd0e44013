"""Interventions as data: out += u(aᵀx) + b at each site.

An edit has b = 0, activation steering has a = 0, and the base model is an intervention without terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, repr=False)
class Term:
    """What is added to one site's output: u(aᵀx) + b.

    Attributes:
        u: [d, r] and a: [r, n·c], or both None. b: [d], or None.
    """

    u: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None

    def __repr__(self) -> str:
        return f"Term(rank {0 if self.a is None else len(self.a)}, {'no constant' if self.b is None else 'a constant'})"


@dataclass(frozen=True, repr=False)
class Intervention:
    """A term for each site key, block key, or residual key; what is not named is left alone.

    At a residual key (`residual_key`) the term acts on the stream itself, after the layer: x += u(aᵀx) + b.

    Attributes:
        name: for people.
        terms: key → what is added there.

    >>> Intervention("louder", {"3.mlp": Term(b=torch.ones(4))})
    Intervention('louder', 1 terms)
    """

    name: str
    terms: Mapping[str, Term] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Intervention({self.name!r}, {len(self.terms)} terms)"


NOTHING = Intervention("base")
"""The intervention without terms: a row that runs under it is the original model's."""


def residual_key(layer: int) -> str:
    """The residual stream after a layer.

    >>> residual_key(3)
    '3.residual'
    """
    return f"{layer}.residual"


def steering(vectors: Mapping[str, Tensor], gamma: float, name: str | None = None) -> Intervention:
    """Activation steering at every block that has a vector: out += γv (paper, section 3).

    Args:
        vectors: block key ("3.attn", "3.mlp") → v [d], not normalised. A block with one site has that site's key.

    >>> import torch
    >>> steering({"3.mlp": torch.ones(4)}, gamma=0.5).terms["3.mlp"].b
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    return Intervention(name or f"steering γ={gamma:g}", {key: Term(b=gamma * v) for key, v in vectors.items()})


def together(interventions: Sequence[Intervention], name: str) -> Intervention:
    """Interventions that act at the same time: their changes add up.

    >>> import torch
    >>> steered = [steering({"3.mlp": torch.ones(2)}, gamma) for gamma in (0.5, 0.25)]
    >>> together(steered, "both").terms["3.mlp"].b
    tensor([0.7500, 0.7500])
    """
    by_site: dict[str, list[Term]] = {}
    for intervention in interventions:
        for key, term in intervention.terms.items():
            by_site.setdefault(key, []).append(term)
    return Intervention(name, {key: terms[0] if len(terms) == 1 else _sum(terms) for key, terms in by_site.items()})


def _sum(terms: Sequence[Term]) -> Term:
    u = [term.u for term in terms if term.u is not None]
    a = [term.a for term in terms if term.a is not None]
    b = [term.b for term in terms if term.b is not None]
    return Term(
        torch.cat(u, dim=1) if u else None,
        torch.cat(a) if a else None,
        torch.stack(b).sum(dim=0) if b else None,
    )
