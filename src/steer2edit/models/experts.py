"""Inside a mixture of experts: the inputs and outputs of every expert's down projection, which no forward hook sees.

transformers keeps all experts of a layer in one 3-D parameter and runs them through a function that can be registered.
Ours runs them one by one and shows what goes in and out of each down projection to whoever asked: the probe that adds
up, the interventions that add something.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

NAME = "steer2edit"

_TAPS = "_steer2edit_taps"

# tap(expert, tokens [m], x [m, inputs], out [m, d]) → out: one expert's down projection, before the routing weight.
# `tokens` are positions in the flattened [rows · time].
Tap = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An experts function of transformers: [tokens, d], [tokens, k], [tokens, k] → [tokens, d].

    The order of the sum over a token's experts is fixed, so that the same tokens give the same bytes.
    """
    tokens, k = top_k_index.shape
    flat = top_k_index.flatten()
    order = flat.argsort(stable=True)  # the (token, choice) pairs, expert by expert
    counts = torch.bincount(flat, minlength=self.num_experts)[: self.num_experts].tolist()
    pairs = hidden_states.new_zeros(tokens * k, hidden_states.shape[-1])
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        chosen = order[start : start + count]
        start += count
        token = chosen // k
        x = hidden_states[token]
        if self.has_gate:
            x = self._apply_gate(_project(self, "gate_up_proj", expert, x))
        else:
            x = self.act_fn(_project(self, "up_proj", expert, x))
        out = _project(self, "down_proj", expert, x)
        for tap in getattr(self, _TAPS, ()):
            out = tap(expert, token, x, out)
        if self.has_post_expert_norm:
            out = self.post_expert_norm(out)
        pairs[chosen] = out
    weighted = pairs.view(tokens, k, -1) * top_k_weights[..., None]
    return weighted.sum(dim=1).to(hidden_states.dtype)


def _project(experts: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return linear(x, weight.T if experts.is_transposed else weight, bias)


@contextlib.contextmanager
def tapped(model: nn.Module, taps: Mapping[str, Tap]) -> Iterator[None]:
    """Shows the experts of some modules to taps, while the context lasts; every other module runs as before.

    Args:
        taps: name of an experts module → its tap. Contexts may be nested: the innermost comes last.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    before: list[tuple[Any, Any, tuple[Tap, ...]]] = []
    try:
        for name, tap in taps.items():
            module: Any = model.get_submodule(name)
            there: tuple[Tap, ...] = getattr(module, _TAPS, ())
            before.append((module, module.config, there))
            if not there:  # a config of its own, so that no other module of the model takes our way
                module.config = copy.copy(module.config)
                module.config._experts_implementation = NAME
            setattr(module, _TAPS, (*there, tap))
        yield
    finally:
        for module, config, there in reversed(before):
            module.config = config
            if there:
                setattr(module, _TAPS, there)
            else:
                delattr(module, _TAPS)
