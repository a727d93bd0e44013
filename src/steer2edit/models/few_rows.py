"""Fewer seconds for a few rows on a CPU: BLAS multiplies x [2..6, k] by a weight much faster as (W xᵀ)ᵀ than as x Wᵀ.

On an AVX2 machine three rows cost 2 to 3 times as much as one the usual way, and about 1.3 times this way. More rows
gain nothing. The results differ in the last bits of fp32, as they do between batches of other sizes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

MOST_ROWS = 6


@contextlib.contextmanager
def few_rows(model: nn.Module) -> Iterator[None]:
    """While it lasts, the linear layers of a model in fp32 on a CPU multiply 2 to 6 rows the fast way.

    >>> layer = nn.Sequential(nn.Linear(3, 2))
    >>> x = torch.ones(3, 1, 3)
    >>> with few_rows(layer):
    ...     bool(torch.allclose(layer(x), nn.functional.linear(x, layer[0].weight, layer[0].bias)))
    True
    """
    with contextlib.ExitStack() as undo:
        for module in model.modules():
            # Quantised layers are of other classes; accelerate has put a forward of its own into offloaded ones.
            if type(module) is nn.Linear and "forward" not in vars(module):
                weight = module.weight
                if weight.dtype is torch.float32 and weight.device.type == "cpu":
                    module.forward = _forward(module)  # type: ignore[method-assign, assignment]
                    undo.callback(delattr, module, "forward")
        yield


def _forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        rows = x.numel() // x.shape[-1]
        if not 2 <= rows <= MOST_ROWS or x.dtype is not torch.float32:
            return nn.functional.linear(x, weight, bias)
        flat = x.reshape(rows, x.shape[-1])
        if rows % 2:  # an odd number of rows is slower than the next even one
            flat = nn.functional.pad(flat, (0, 0, 0, 1))
        out = torch.mm(weight, flat.T).T[:rows].reshape(*x.shape[:-1], -1).contiguous()
        return out if bias is None else out + bias

    return forward
