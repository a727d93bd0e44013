"""Inside a mixture of experts: the inputs and outputs of every expert's down projection, which no forward hook sees.

transformers keeps all experts of a layer in one 3-D parameter and runs them through a function that can be registered.
Our function runs them one by one and calls taps with the input and the output of each down projection: the probe's tap
sums them, an intervention's tap changes the output.
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
    """An experts function for transformers: [tokens, d], [tokens, k], [tokens, k] → [tokens, d].

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
    """Runs taps in the experts of some modules while the context lasts. Every other module runs as before.

    Args:
        taps: name of an experts module → its tap. Contexts may be nested; the innermost tap runs last.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    before: list[tuple[Any, Any, tuple[Tap, ...]]] = []
    try:
        for name, tap in taps.items():
            module: Any = model.get_submodule(name)
            outer_taps: tuple[Tap, ...] = getattr(module, _TAPS, ())
            before.append((module, module.config, outer_taps))
            if not outer_taps:  # a config of its own, so that no other module runs our function
                module.config = copy.copy(module.config)
                module.config._experts_implementation = NAME
            setattr(module, _TAPS, (*outer_taps, tap))
        yield
    finally:
        for module, config, outer_taps in reversed(before):
            module.config = config
            if outer_taps:
                setattr(module, _TAPS, outer_taps)
            else:
                delattr(module, _TAPS)
