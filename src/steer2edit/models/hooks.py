"""Interventions in a live model: a different one in every row of a batch, without touching a weight."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, Steer2EditError
from ..method.change import Changes
from ..method.intervention import Intervention, Term, residual_key
from .architectures import architecture_of
from .bake import check_base
from .experts import Tap, tapped
from .sites import find_sites, module_of


@contextlib.contextmanager
def _lasting() -> Iterator[None]:
    # Tensors kept between forward passes must work in a pass with gradients after one in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Stack:
    """One site's terms under all interventions, and those of the rows of the current batch."""

    def __init__(self, terms: Sequence[Term | None], d: int, inputs: int):
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
        self.index = torch.zeros(1, dtype=torch.long)
        self.rows: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None

    def choose(self, index: Tensor) -> None:
        self.index, self.rows = index, None

    def _place(self, out: Tensor) -> None:
        # The output's device and dtype are known only when the site runs: its weight may be quantised or offloaded.
        first = next((t for t in (self.u, self.b) if t is not None), out)
        if first.device != out.device or first.dtype != out.dtype:
            with _lasting():
                self.u = None if self.u is None else self.u.to(out.device, out.dtype)
                self.a = None if self.a is None else self.a.to(out.device, out.dtype)
                self.b = None if self.b is None else self.b.to(out.device, out.dtype)
            self.rows = None
        if self.index.device != out.device:
            self.index = self.index.to(out.device)

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """x [rows, time, n·c] (or one row that is broadcast), out [rows, time, d]."""
        self._place(out)
        if self.rows is None:
            with _lasting():
                self.rows = self._of(self.index)
        return _added(x, out, *self.rows)

    def add_to_pairs(self, row: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """x [m, n·c] and out [m, d] of tokens that are in the batch's rows `row` [m]."""
        if len(self.index) == 1:
            return self.add(x[None], out[None])[0]
        self._place(out)
        return _added(x[:, None], out[:, None], *self._of(self.index[row]))[:, 0]

    def _of(self, index: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The terms of these interventions, in this order."""
        u = None if self.u is None else self.u[index]
        a = None if self.a is None else self.a[index]
        b = None if self.b is None else self.b[index]
        return u, a, b


def _added(x: Tensor, out: Tensor, u: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
    if a is not None and u is not None:
        x = x.to(out.device)
        for rank in range(a.shape[1]):
            # One dot product per row, then a fused multiply-add: on a CPU a third of the time of batched matmuls.
            along = torch.linalg.vecdot(x, a[:, rank, None])  # [rows, time]
            out = torch.addcmul(out, along[..., None], u[:, rank, None])
    return out if b is None else out + b


class Interventions:
    """Hooks that let each row of a batch run under its own intervention.

    A context manager. `rows` sets the intervention of each row of the next forward passes; a single index serves a
    batch of any size. `calls` counts how often hooked modules ran, which must be hooked modules × forward passes.

    Args:
        table: the interventions. Their terms name sites, the residual stream after a layer ("3.residual"), or a whole
            block that is a mixture of experts ("3.mlp"), to which only a constant b can be added.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
    >>> steered = Intervention("steered", {"0.mlp": Term(b=torch.ones(32))})
    >>> with Interventions(model, [Intervention("base"), steered]) as running:
    ...     running.rows([0, 1])
    ...     logits = model(torch.tensor([[1, 2, 3], [1, 2, 3]])).logits
    >>> bool((logits[0] == logits[1]).all()), running.calls
    (False, 1)
    """

    def __init__(self, model: nn.Module, table: Sequence[Intervention]):
        self.model, self.table = model, tuple(table)
        self.calls = 0
        self._count = 1
        self._hooked: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._experts: dict[str, dict[int, _Stack]] = {}
        self._stacks: list[_Stack] = []
        model_sites = find_sites(model)
        sites = {site.key: site for site in model_sites}
        blocks = {site.block_key: site for site in model_sites if site.block_key not in sites}
        layers = architecture_of(model).layers
        streams = {residual_key(i): f"{layers}.{i}" for i in range(len(model.get_submodule(layers)))}  # type: ignore[arg-type]
        named = {key for intervention in self.table for key in intervention.terms}
        if strangers := sorted(named - set(sites) - set(blocks) - set(streams)):
            raise ModelError(
                "an intervention names sites that the model does not have",
                got=", ".join(strangers[:4]),
                fix="Use the model that the probe was made on.",
            )
        for key, site in (sites | blocks).items():
            if key not in named:
                continue
            terms = [intervention.terms.get(key) for intervention in self.table]
            inputs = site.inputs if key in sites else 0
            for term in filter(None, terms):
                _check(key, term, site.d, inputs)
            stack = _Stack(terms, site.d, inputs)
            self._stacks.append(stack)
            if key in blocks:
                self._hooked.append((model.get_submodule(site.block_module), self._hook(stack)))
            elif site.expert is None:
                self._hooked.append((module_of(model, site), self._hook(stack)))
            else:
                self._experts.setdefault(site.module, {})[site.expert] = stack
        for key in [key for key in streams if key in named]:
            terms = [intervention.terms.get(key) for intervention in self.table]
            for term in filter(None, terms):
                _check(key, term, model_sites[0].d, model_sites[0].d)
            stack = _Stack(terms, model_sites[0].d, model_sites[0].d)
            self._stacks.append(stack)
            self._hooked.append((model.get_submodule(streams[key]), self._hook(stack, on_output=True)))
        self._first_layer = model.get_submodule(f"{layers}.0")
        self._opened = contextlib.ExitStack()
        self.rows([0])

    @property
    def sites(self) -> int:
        """How many modules are hooked: sites, blocks, and one module for all the experts of a layer."""
        return len(self._hooked) + len(self._experts)

    def rows(self, index: Sequence[int] | Tensor) -> None:
        """From the next batch on, row i runs under table[index[i]]."""
        chosen = torch.as_tensor(index, dtype=torch.long)
        self._count = len(chosen)
        for stack in self._stacks:
            stack.choose(chosen)

    def _hook(self, stack: _Stack, on_output: bool = False) -> Callable[..., Any]:
        """Args: on_output: x is what the module gives out, not what it takes in."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
            self.calls += 1
            out: Tensor = output if isinstance(output, Tensor) else output[0]
            if out.dim() == 2:  # [rows · time, d], as inside some mixtures of experts
                rows = [t.reshape(self._count, -1, t.shape[-1]) for t in (out if on_output else args[0], out)]
                added = stack.add(*rows).reshape(out.shape)
            else:
                added = stack.add(out if on_output else args[0], out)
            return added if isinstance(output, Tensor) else (added, *output[1:])

        return hook

    def _tap(self, stacks: Mapping[int, _Stack]) -> Tap:
        def tap(expert: int, tokens: Tensor, x: Tensor, out: Tensor) -> Tensor:
            stack = stacks.get(expert)
            return out if stack is None else stack.add_to_pairs(tokens // self._time, x, out)

        return tap

    def _announced(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        batch, self._time = (args[0] if args else kwargs["hidden_states"]).shape[:2]
        if self._count not in (1, batch):
            raise Steer2EditError(
                "the batch does not have the rows that were announced",
                got=f"{batch} rows, {self._count} announced",
                fix="Call rows() with one index for each row of the batch.",
            )

    def _seen(self, module: nn.Module, args: Any) -> None:
        self.calls += 1

    def __enter__(self) -> Interventions:
        with contextlib.ExitStack() as opening:
            first = self._first_layer.register_forward_pre_hook(self._announced, with_kwargs=True)
            opening.callback(first.remove)
            for module, hook in self._hooked:
                opening.callback(module.register_forward_hook(hook).remove)
            for name in self._experts:
                opening.callback(self.model.get_submodule(name).register_forward_pre_hook(self._seen).remove)
            opening.enter_context(tapped(self.model, {n: self._tap(stacks) for n, stacks in self._experts.items()}))
            self._opened = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


def _check(key: str, term: Term, d: int, inputs: int) -> None:
    shapes = [tuple(t.shape[i:]) for t, i in ((term.u, 0), (term.b, 0)) if t is not None]
    if any(shape[0] != d for shape in shapes) or (term.a is not None and term.a.shape[1] != inputs):
        raise ModelError(
            f"an intervention does not fit {'site' if inputs else 'block'} {key}",
            got=f"sizes {shapes}",
            fix=f"That site is {d} × {inputs}: use the model that the probe was made on.",
        )


@contextlib.contextmanager
def intervening(model: nn.Module, intervention: Intervention, edit: Changes | None = None) -> Iterator[Interventions]:
    """Runs all rows of all forward passes inside the context under one intervention.

    Args:
        edit: the edit that the intervention comes from, if any; the model must be its base.

    Raises:
        ModelError: the intervention does not fit the model, or the model is not the edit's base.
        EditError: the model already contains the edit.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> before = model(ids).logits
    >>> with intervening(model, Intervention("steered", {"0.mlp": Term(b=torch.ones(32))})):
    ...     bool((model(ids).logits == before).all())
    False
    """
    if edit is not None:
        check_base(edit, model)
    with Interventions(model, [intervention]) as running:
        yield running
