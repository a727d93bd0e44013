"""What training made of a model's weights, as a file, and a model that carries it for a while.

A file holds each weight that was trained: whole, or as the two factors of a low rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..files.tensors import read_header, read_tensors, write_tensors

KIND = "trained weights"
# Behind a weight's name: W + left @ right.
_LEFT, _RIGHT = ".left", ".right"


def trained_tensors(model: Any) -> dict[str, Tensor]:
    """What training changed in a model, in fp32, by the names of the base model's parameters.

    Args:
        model: a PEFT model with one LoRA adapter, or a plain model that was trained as a whole.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel):
        return _factors(model)
    return {name: weight.detach().float() for name, weight in model.named_parameters()}


def _factors(model: Any) -> dict[str, Tensor]:
    """ΔW = left @ right of every LoRA layer, in the orientation of its weight."""
    from peft.tuners.lora import LoraLayer

    factors: dict[str, Tensor] = {}
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        (adapter,) = layer.active_adapters
        left = layer.scaling[adapter] * layer.lora_B[adapter].weight.detach().float()  # [out, r]
        right = layer.lora_A[adapter].weight.detach().float()  # [r, in]
        if getattr(layer, "fan_in_fan_out", False):  # the weight is [in, out]
            left, right = right.T, left.T
        factors[f"{name}.weight{_LEFT}"], factors[f"{name}.weight{_RIGHT}"] = left, right
    return factors


def write_weights(path: Path, model: Any, about: Mapping[str, Any]) -> None:
    """Writes a checkpoint whole or not at all; of a model whose weights are not finite only that it is so."""
    tensors = trained_tensors(model)
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    write_tensors(path, tensors if finite else {}, {"kind": KIND, "finite": finite, **about})


def are_finite(path: Path) -> bool:
    """Whether a checkpoint has weights, or training went astray before it."""
    return bool(read_header(path).get("finite"))


@contextlib.contextmanager
def carrying(model: nn.Module, path: Path) -> Iterator[None]:
    """While it lasts, the model has the weights of a checkpoint; after it, its own to the bit.

    A change is added in fp32 and rounded once to the weight's dtype.

    Raises:
        ModelError: the checkpoint is of another model, or the model's weights cannot be written here.
        FileError: the file is missing or not whole.
    """
    tensors, _ = read_tensors(path, KIND)
    parameters = dict(model.named_parameters())
    names = list(dict.fromkeys(name.removesuffix(_LEFT).removesuffix(_RIGHT) for name in tensors))
    for name in names:
        _check(parameters, name, tensors, path)
    kept: dict[str, Tensor] = {}
    try:
        for name in names:
            weight = parameters[name]
            new = _new(weight, name, tensors)
            if new is not None:
                kept[name] = weight.detach().to("cpu", copy=True)
                _write(weight, new)
        yield
    finally:
        for name, old in kept.items():
            _write(parameters[name], old)


def _check(parameters: Mapping[str, Tensor], name: str, tensors: Mapping[str, Tensor], path: Path) -> None:
    weight = parameters.get(name)
    if weight is not None and (weight.is_meta or not weight.is_floating_point()):
        raise ModelError(
            "a trained checkpoint cannot be tried on this model",
            got=f"{name} is {'not in memory' if weight.is_meta else weight.dtype}",
            fix="Load the model unquantised and without offloading.",
        )
    if name in tensors:
        shape = tensors[name].shape
    else:
        shape = torch.Size((tensors[name + _LEFT].shape[0], tensors[name + _RIGHT].shape[1]))
    if weight is None or weight.shape != shape:
        raise ModelError(
            f"{path} was trained from another model",
            got=f"{name} {tuple(shape)}, the model's is {None if weight is None else tuple(weight.shape)}",
            fix="Train again from this model.",
        )


def _new(weight: Tensor, name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The weight that a checkpoint puts in a weight's place; None if it changes nothing."""
    if name in tensors:
        return tensors[name]
    delta = tensors[name + _LEFT].to(weight.device) @ tensors[name + _RIGHT].to(weight.device)
    return weight.detach().float() + delta if delta.any() else None


def _write(weight: Tensor, new: Tensor) -> None:
    with torch.inference_mode(False), torch.no_grad():
        weight.copy_(new)
