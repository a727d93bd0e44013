"""The weights of a model's sites: as views of memory that can be changed, or as numbers, however they are stored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..method.site import Site
from .sites import module_of

PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Unit vectors that run through a quantised map at once.
_AT_ONCE = 1024

_ALTERNATIVES = "Use edit.applied(model), or an adapter (edit.save_adapter), which touch no weight"


def is_plain(weight: Any) -> bool:
    """Whether a weight is an ordinary floating-point tensor, neither quantised nor distributed."""
    return isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.dtype in PLAIN


def quantised(model: nn.Module, site: Site) -> bool:
    """Whether the site's weight is stored otherwise than as plain floating-point numbers."""
    return not is_plain(getattr(module_of(model, site), site.parameter, None))


def _sliced(weight: Tensor, site: Site) -> Tensor:
    weight = weight if site.expert is None else weight[site.expert]
    return weight.T if site.transposed else weight


def weight_of(model: nn.Module, site: Site) -> Tensor:
    """The site's weight [d, n·c], a view of what is in memory: writing to it changes the model.

    Raises:
        ModelError: the weight is not floating point (quantised) or not in memory (`meta`, offloaded).
    """
    weight = getattr(module_of(model, site), site.parameter, None)
    if not is_plain(weight):
        raise ModelError(
            f"the weight of {site.place} is not floating point",
            got="no such parameter" if weight is None else f"{weight.dtype} in a {type(weight).__name__}",
            fix=f"{_ALTERNATIVES}; or load the model in bf16, fp16 or fp32.",
        )
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        raise ModelError(
            f"the weight of {site.place} is not in memory",
            got="a tensor on the meta device (offloaded, or never loaded)",
            fix=f"{_ALTERNATIVES}; or load the model onto one device, or export from the checkpoint's folder.",
        )
    return _sliced(weight, site)


def read_weight(model: nn.Module, site: Site) -> Tensor:
    """The site's weight [d, n·c] as numbers. An offloaded weight is fetched, a quantised one dequantised.

    Raises:
        ModelError: the weight was never loaded.
    """
    module: Any = module_of(model, site)
    with _fetching(module) as fetched:
        weight = _in_memory(model, module, site)
        return weight.clone() if fetched else weight


def read_bias(model: nn.Module, site: Site) -> Tensor:
    """An expert's bias [d] fp32 on the CPU, zeros if it has none."""
    module: Any = module_of(model, site)
    with _fetching(module):
        bias = getattr(module, f"{site.parameter}_bias", None)
        return torch.zeros(site.d) if bias is None else bias[site.expert].detach().to("cpu", torch.float32, copy=True)


@contextlib.contextmanager
def _fetching(module: nn.Module) -> Iterator[bool]:
    """Fetches an offloaded module's weights while the context lasts. Yields whether it had to."""
    if hasattr(module, "_hf_hook"):
        from accelerate.utils import align_module_device, has_offloaded_params

        if has_offloaded_params(module):  # every module of a model that is spread over devices has a hook
            with torch.inference_mode(False), torch.no_grad(), align_module_device(module, "cpu"):
                yield True
            return
    yield False


def _in_memory(model: nn.Module, module: Any, site: Site) -> Tensor:
    if site.expert is None and quantised(model, site):
        return _by_its_action(model, module, site)
    return weight_of(model, site)


def _by_its_action(model: nn.Module, module: Any, site: Site) -> Tensor:
    """A quantised map's weight, from its outputs for unit vectors: what the model computes under any scheme."""
    dtype = getattr(model, "dtype", torch.float32)
    dtype = dtype if dtype in PLAIN else torch.float32
    device = next((t.device for t in [*module.parameters(), *module.buffers()]), torch.device("cpu"))
    if device.type == "meta":
        raise ModelError(
            f"the weight of {site.place} is not in memory", got="the meta device", fix="Load the model's weights."
        )
    columns = []
    with torch.inference_mode():
        zero = module(torch.zeros(1, site.inputs, dtype=dtype, device=device)).float()  # its bias
        for start in range(0, site.inputs, _AT_ONCE):
            units = torch.zeros(min(_AT_ONCE, site.inputs - start), site.inputs, dtype=dtype, device=device)
            units[torch.arange(len(units)), start + torch.arange(len(units))] = 1
            columns.append(module(units).float() - zero)
    return torch.cat(columns).T


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's inputs: that of its first weight that is in memory."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
