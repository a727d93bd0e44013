"""Finding a model's sites by its family's record (architectures.py).

Every weight matrix of a layer must be a site or a map that is known to work inside a block. Any other is refused by
name, never skipped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..method.site import Block, Site
from .architectures import INSIDE, Architecture, architecture_of, is_conv1d, submodule

if TYPE_CHECKING:
    from torch import nn


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every site of a model, in the order of its layers, attention before MLP, experts by number, the shared one last.

    Widths come from the weights' own shapes, not from hidden_size / heads, which is wrong for some models. Only names
    and shapes are read, so the model may be on the `meta` device.

    Raises:
        ModelError: the family is not supported, a module is missing or has another shape than in its family, or a layer
            has a weight matrix that is neither a site nor known to work inside a block.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> with torch.device("meta"):
    ...     model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2))
    >>> [site.key for site in find_sites(model)]
    ['0.attn', '0.mlp', '1.attn', '1.mlp']
    """
    architecture = architecture_of(model)
    config: Any = model.config
    text = config.get_text_config()
    layers: Any = submodule(model, architecture.layers)
    if layers is None:
        raise ModelError(
            f"the model has no {architecture.layers}",
            got=type(model).__name__,
            fix="Give the causal language model itself; merge or unload an adapter or a wrapper first.",
        )
    if len(layers) != text.num_hidden_layers:
        raise ModelError(
            f"{architecture.layers} does not hold as many layers as the config says",
            got=f"{len(layers)} layers, num_hidden_layers = {text.num_hidden_layers}",
            fix="Load the model as its checkpoint defines it.",
        )
    sites: list[Site] = []
    for number, layer in enumerate(layers):
        own = [*_attn_sites(architecture, number, layer, text), *_mlp_sites(architecture, number, layer, text)]
        _nothing_else(f"{architecture.layers}.{number}", layer, own, INSIDE.union(architecture.inside))
        sites += own
    return tuple(sites)


def _attn_sites(architecture: Architecture, number: int, layer: nn.Module, config: Any) -> Iterator[Site]:
    present = [heads for heads in architecture.attn if submodule(layer, heads.path) is not None]
    if len(present) != 1:
        raise _no_map(architecture, number, [h.path for h in architecture.attn], [h.path for h in present])
    heads = present[0]
    yield _site(architecture, number, layer, config, "attn", heads.path, getattr(config, heads.count, None))


def _mlp_sites(architecture: Architecture, number: int, layer: nn.Module, config: Any) -> Iterator[Site]:
    experts = architecture.experts
    dense = architecture.mlp is not None and submodule(layer, architecture.mlp) is not None
    fused: Any = submodule(layer, experts.path) if experts else None
    if dense == (fused is not None):
        wanted = [path for path in (architecture.mlp, experts.path if experts else None) if path]
        raise _no_map(architecture, number, wanted, wanted if dense else [])
    if dense or experts is None:
        assert architecture.mlp is not None
        yield _site(architecture, number, layer, config, "mlp", architecture.mlp, None)
        return
    module = f"{architecture.layers}.{number}.{experts.path}"
    weight = getattr(fused, experts.parameter, None)
    count = getattr(config, experts.count, None)
    # These attributes mark modules that run through transformers' registry of experts functions, as ours must.
    known = hasattr(fused, "_apply_gate") and getattr(fused, "is_transposed", None) is experts.transposed
    if weight is None or weight.dim() != 3 or not known:
        got = f"{type(fused).__name__}: " + (
            "not run through transformers' experts functions"
            if weight is not None and weight.dim() == 3
            else f"no 3-D parameter {experts.parameter}"
        )
        raise ModelError(
            f"the experts {module} cannot be reached",
            got=got,
            fix="Load the model as transformers defines it, and a quantised one dequantised.",
        )
    if len(weight) != count:
        raise ModelError(
            f"{module}.{experts.parameter} does not hold as many experts as the config says",
            got=f"{len(weight)} experts, {experts.count} = {count}",
            fix="Load the model as its checkpoint defines it.",
        )
    d, inputs = weight.shape[1:][::-1] if experts.transposed else weight.shape[1:]
    block = f"{architecture.layers}.{number}.{experts.block}"
    if d != config.hidden_size:
        raise _wrong_shape(module, config, d, inputs, inputs)
    for expert in range(count):
        apart = experts.stored.format(expert=expert) if experts.stored else None
        names = _names(architecture, number, *([apart] if apart else []), f"{experts.path}.{experts.parameter}")
        yield Site(
            number,
            "mlp",
            module,
            names[0],
            d,
            inputs,
            1,
            parameter=experts.parameter,
            expert=expert,
            experts=count,
            transposed=experts.transposed,
            output=block,
            aliases=names[1:],
        )
    if experts.shared:
        if submodule(layer, experts.shared) is None:
            raise _no_map(architecture, number, [experts.shared], [])
        site = _site(architecture, number, layer, config, "mlp", experts.shared, None)
        yield replace(site, shared=True, output=block)


def _site(
    architecture: Architecture, number: int, layer: nn.Module, config: Any, block: Block, path: str, n: int | None
) -> Site:
    module: Any = submodule(layer, path)
    name = f"{architecture.layers}.{number}.{path}"
    if is_conv1d(module) != architecture.transposed:
        raise ModelError(
            f"the weight of {name} is not laid out as in its family",
            got=f"{type(module).__name__}, expected {'[inputs, d]' if architecture.transposed else '[d, inputs]'}",
            fix="Load the model as transformers defines it.",
        )
    shape = shape_of(module)
    if shape is None:
        raise _no_map(architecture, number, [path], [])
    rows, columns = shape
    n = columns if block == "mlp" else n
    if not n or columns % n or rows != config.hidden_size:
        raise _wrong_shape(name, config, rows, columns, n)
    names = _names(architecture, number, f"{path}.weight")
    return Site(
        number, block, name, names[0], rows, n, columns // n, transposed=architecture.transposed, aliases=names[1:]
    )


def _names(architecture: Architecture, number: int, *paths: str) -> tuple[str, ...]:
    """Names that files may have for a layer's weight: the Hub's, the one in memory, one without the model's prefix."""
    prefixes = (*architecture.stored, architecture.layers, architecture.layers.split(".", 1)[-1])
    return tuple(dict.fromkeys(f"{prefix}.{number}.{path}" for path in paths for prefix in prefixes))


def _nothing_else(name: str, layer: nn.Module, sites: Sequence[Site], inside: Collection[str]) -> None:
    """Raises ModelError if the layer has a weight matrix that is neither a site nor known to work inside a block."""
    held = {f"{site.module}.{site.parameter}" for site in sites} | {site.module for site in sites}
    for path, parameter in layer.named_parameters():
        owner, _, leaf = path.rpartition(".")
        full = f"{name}.{path}"
        if full in held or (f"{name}.{owner}" in held and leaf.startswith(("weight", "bias"))):
            continue
        part = owner.rpartition(".")[2] if leaf.startswith(("weight", "bias")) else leaf
        if parameter.dim() < 2 or part in inside or owner.rpartition(".")[2] in inside:
            continue
        raise ModelError(
            f"{full.removesuffix('.weight')} may write into the residual stream and is not a known site",
            got=f"a parameter of shape {tuple(parameter.shape)}",
            fix="Load the model as transformers defines it; merge or unload an adapter first. A family with such a map "
            "needs a record (docs/add_a_family.md).",
        )


def shape_of(module: Any) -> tuple[int, int] | None:
    """[d, inputs] of a linear map, however its weight is stored; None for another module."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):  # a quantised weight is packed
        return module.out_features, module.in_features
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2:
        return None
    rows, columns = weight.shape
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def _no_map(architecture: Architecture, number: int, wanted: list[str], present: list[str]) -> ModelError:
    names = " or ".join(f"{architecture.layers}.{number}.{path}" for path in wanted)
    return ModelError(
        f"the model has {'more than one of' if present else 'no linear map'} {names}",
        got=" and ".join(present) if present else f"a layer of {architecture.family} without it",
        fix="Load the model as transformers defines it.",
    )


def _wrong_shape(name: str, config: Any, rows: int, columns: int, n: int | None) -> ModelError:
    return ModelError(
        f"{name} does not have the shape of a {config.model_type}'s",
        got=f"weight {rows} × {columns}, {n} components, residual stream {config.hidden_size}",
        fix="Load the model as transformers defines it.",
    )


def module_of(model: nn.Module, site: Site) -> nn.Module:
    return model.get_submodule(site.module)
