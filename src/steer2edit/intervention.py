"""Interventions: out += u(aᵀx) + b at each site, a different one in every row of a batch.

An edit is one with b = 0, activation steering one with a = 0, and nothing is one without terms; so a sweep runs any
mixture of them in one batch, in prefill and decode alike, and no weight is touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .errors import ModelError, Steer2EditError
from .sites import find_sites, module_of

if TYPE_CHECKING:
    from .edit import Edit


@dataclass(frozen=True)
class Term:
    """What one site's output gains: u(aᵀx) + b.

    Attributes:
        u: [d, r] and a: [r, n·c], or both None. b: [d], or None.
    """

    u: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None


@dataclass(frozen=True)
class Intervention:
    """A term for each site key; a site that is not named is left alone."""

    name: str
    terms: Mapping[str, Term] = field(default_factory=dict)


NOTHING = Intervention("base")


def steering(vectors: Mapping[str, Tensor], gamma: float, name: str | None = None) -> Intervention:
    """Activation steering at every site that has a vector: out += γv (paper, section 3).

    Args:
        vectors: site key → v [d], not normalised.
    """
    return Intervention(name or f"steering γ={gamma:g}", {key: Term(b=gamma * v) for key, v in vectors.items()})


class _Stack:
    """One site's terms of all interventions, and the rows of the batch that is running."""

    def __init__(self, terms: Sequence[Term | None], d: int, inputs: int, device: torch.device, dtype: torch.dtype):
        rank = max((t.a.shape[0] for t in terms if t is not None and t.a is not None), default=0)
        self.u = torch.zeros(len(terms), rank, d) if rank else None
        self.a = torch.zeros(len(terms), rank, inputs) if rank else None
        self.b = torch.zeros(len(terms), 1, d) if any(t is not None and t.b is not None for t in terms) else None
        for i, term in enumerate(terms):
            if term is None:
                continue
            if term.a is not None and term.u is not None and self.u is not None and self.a is not None:
                self.u[i, : term.u.shape[1]] = term.u.T
                self.a[i, : term.a.shape[0]] = term.a
            if term.b is not None and self.b is not None:
                self.b[i] = term.b
        self.u, self.a, self.b = (None if t is None else t.to(device, dtype) for t in (self.u, self.a, self.b))
        self.rows: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)

    def choose(self, index: Tensor) -> None:
        self.rows = tuple(None if t is None else t[index.to(t.device)] for t in (self.u, self.a, self.b))  # type: ignore[assignment]

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """x [rows, time, n·c] (or one row that is broadcast), out [rows, time, d]."""
        u, a, b = self.rows
        if a is not None and u is not None:
            for rank in range(a.shape[1]):
                # A dot product a row, then one fused multiply-add: on a CPU a third of the time of batched matmuls.
                along = torch.linalg.vecdot(x, a[:, rank, None])  # [rows, time]
                out = torch.addcmul(out, along[..., None], u[:, rank, None])
        return out if b is None else out + b


class Interventions:
    """Hooks that let each row of a batch run under an intervention of its own.

    Used as a context. `rows` says which intervention each row of the coming forward passes carries; one index alone
    serves a batch of any size. `calls` counts the hook calls, so that sites × forward passes can be proved to have run.
    """

    def __init__(self, model: nn.Module, table: Sequence[Intervention]):
        self.table = tuple(table)
        self.calls = 0
        self._count = 1
        sites = {site.key: site for site in find_sites(model)}
        named = {key for intervention in self.table for key in intervention.terms}
        if strangers := sorted(named - set(sites)):
            raise ModelError(
                "an intervention names sites that the model does not have",
                got=", ".join(strangers[:4]),
                fix="Use the model that the probe was made on.",
            )
        self._hooked: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        self._stacks: list[_Stack] = []
        for key, site in sites.items():
            if key not in named:
                continue
            module = module_of(model, site)
            terms = [intervention.terms.get(key) for intervention in self.table]
            for term in filter(None, terms):
                shapes = [tuple(t.shape[i:]) for t, i in ((term.u, 0), (term.b, 0)) if t is not None]
                wrong = any(shape[0] != site.d for shape in shapes)
                if wrong or (term.a is not None and term.a.shape[1] != site.inputs):
                    raise ModelError(
                        f"an intervention does not fit site {key}",
                        got=f"sizes {shapes}",
                        fix=f"That site is {site.d} × {site.inputs}: use the model that the probe was made on.",
                    )
            stack = _Stack(terms, site.d, site.inputs, module.weight.device, module.weight.dtype)  # type: ignore[arg-type]
            self._stacks.append(stack)
            self._hooked.append((module, self._hook(stack)))
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.rows([0])

    @property
    def sites(self) -> int:
        """How many sites are hooked."""
        return len(self._stacks)

    def rows(self, index: Sequence[int] | Tensor) -> None:
        """Row i of the batches to come runs under table[index[i]]."""
        chosen = torch.as_tensor(index, dtype=torch.long)
        self._count = len(chosen)
        for stack in self._stacks:
            stack.choose(chosen)

    def _hook(self, stack: _Stack) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self.calls += 1
            if self._count not in (1, output.shape[0]):
                raise Steer2EditError(
                    "the batch does not have the rows that were announced",
                    got=f"{output.shape[0]} rows, {self._count} announced",
                    fix="Call rows() with one index for each row of the batch.",
                )
            return stack.add(args[0], output)

        return hook

    def __enter__(self) -> Interventions:
        self._handles = [module.register_forward_hook(hook) for module, hook in self._hooked]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


@contextlib.contextmanager
def intervening(model: nn.Module, intervention: Intervention, edit: Edit | None = None) -> Iterator[Interventions]:
    """Every row of every forward pass inside runs under one intervention.

    Raises:
        ModelError: it does not fit the model; for an edit also if the model is not the edit's base.
    """
    if edit is not None:
        from .bake import check_base

        check_base(edit, model)
    with Interventions(model, [intervention]) as running:
        yield running
