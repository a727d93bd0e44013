"""Where a decoder writes into the residual stream.

A `Site` is one linear map that does so: an attention block's output projection, an MLP's down projection. Everything
that the mathematics needs of it is one view of its weight, W.view(d, n, c): n components of width c. To support a
further family, add one `Architecture` to `ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

from .errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

Block = Literal["attn", "mlp"]
BLOCKS: tuple[Block, ...] = ("attn", "mlp")


@dataclass(frozen=True)
class Architecture:
    """One family: where its layers are and which two modules of a layer write into the residual stream."""

    family: str
    model_types: tuple[str, ...]
    layers: str = "model.layers"
    attn: str = "self_attn.o_proj"
    mlp: str = "mlp.down_proj"
    heads: str = "num_attention_heads"


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("Llama 1-3, SmolLM 1-2", ("llama",)),
    Architecture("Mistral", ("mistral",)),
    Architecture("Qwen2, Qwen2.5", ("qwen2",)),
    Architecture("Qwen3", ("qwen3",)),
)


@dataclass(frozen=True)
class Site:
    """A linear map that writes into the residual stream.

    Attributes:
        layer: the layer's number, from 0.
        block: "attn" or "mlp".
        module: the module's name in memory.
        tensor: the weight's name in the checkpoint's files.
        d: size of the residual stream, the weight's rows.
        n: how many components there are: heads, or neurons.
        width: c, the columns of one component: head_dim for a head, 1 for a neuron.
    """

    layer: int
    block: Block
    module: str
    tensor: str
    d: int
    n: int
    width: int

    @property
    def key(self) -> str:
        """The site's name in files: `3.attn`."""
        return f"{self.layer}.{self.block}"

    @property
    def inputs(self) -> int:
        """Columns of the weight, n · c."""
        return self.n * self.width

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Site:
        site = cls(**row)
        integers = (site.layer, site.d, site.n, site.width)
        if site.block not in BLOCKS or any(type(i) is not int or i < 0 for i in integers):
            raise ValueError(f"no site: {row}")
        return site


def architecture_of(config: Any) -> Architecture:
    """The record of a model's family.

    Raises:
        ModelError: if the family is not in the table.
    """
    name = getattr(config, "model_type", None)
    for architecture in ARCHITECTURES:
        if name in architecture.model_types:
            return architecture
    known = ", ".join(t for a in ARCHITECTURES for t in a.model_types)
    raise ModelError(
        "this model's architecture is not supported",
        got=f"model_type {name!r}",
        fix=f"Supported model types: {known}. A further one takes a record in steer2edit/sites.py.",
    )


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every site of a model, in the order of its layers, attention before MLP.

    The width of a head comes from the weight's own shape, not from hidden_size / heads, which is wrong for some models.
    A model on the `meta` device will do: only names and shapes are read.

    Raises:
        ModelError: if the family is not supported, or a module is missing or not of the shape that its family has.
    """
    config: Any = model.config
    architecture = architecture_of(config)
    try:
        layers: Any = attrgetter(architecture.layers)(model)
    except AttributeError:
        raise ModelError(
            f"the model has no {architecture.layers}",
            got=type(model).__name__,
            fix="Give the causal language model itself; merge or unload an adapter or a wrapper first.",
        ) from None
    if len(layers) != config.num_hidden_layers:
        raise ModelError(
            f"{architecture.layers} does not hold as many layers as the config says",
            got=f"{len(layers)} layers, num_hidden_layers = {config.num_hidden_layers}",
            fix="Load the model as its checkpoint has it.",
        )
    heads = getattr(config, architecture.heads)
    sites = []
    for number, layer in enumerate(layers):
        d = None
        for block, path, n in (("attn", architecture.attn, heads), ("mlp", architecture.mlp, None)):
            name = f"{architecture.layers}.{number}.{path}"
            try:
                module: Any = attrgetter(path)(layer)
                rows, columns = module.weight.shape
            except (AttributeError, ValueError):
                raise ModelError(
                    f"the model has no linear map {name}",
                    got=f"a {config.model_type} layer without it",
                    fix="Load the model as transformers defines it.",
                ) from None
            n = columns if n is None else n
            if columns % n or (d is not None and rows != d):
                raise ModelError(
                    f"{name} does not have the shape of a {config.model_type}'s",
                    got=f"weight {rows} × {columns}, {n} components, residual stream {d or rows}",
                    fix="Load the model as transformers defines it.",
                )
            d = rows
            sites.append(Site(number, block, name, f"{name}.weight", rows, n, columns // n))  # type: ignore[arg-type]
    return tuple(sites)


def module_of(model: nn.Module, site: Site) -> nn.Module:
    return model.get_submodule(site.module)


def weight_of(model: nn.Module, site: Site) -> Tensor:
    """The site's weight [d, n·c], as it is in memory.

    Raises:
        ModelError: if the weight is not floating point (quantised) or not here (`meta`, offloaded).
    """
    weight: Any = module_of(model, site).weight
    if not weight.is_floating_point():
        raise ModelError(
            f"the weight of {site.module} is not floating point",
            got=weight.dtype,
            fix="Load the model in bf16, fp16 or fp32.",
        )
    if weight.is_meta:
        raise ModelError(
            f"the weight of {site.module} is not in memory",
            got="a tensor on the meta device (offloaded, or never loaded)",
            fix="Load the model onto one device, or give score() the checkpoint's folder.",
        )
    return weight


def same_sites(found: Sequence[Site], wanted: Sequence[Site], wanted_by: str) -> None:
    """Raises ModelError unless a model has each of the sites that a probe or an edit was made on, in the same shape."""
    here = {site.key: site for site in found}
    for site in wanted:
        other = here.get(site.key)
        if other is None or (other.d, other.n, other.width) != (site.d, site.n, site.width):
            got = "no such site" if other is None else f"{other.d} × {other.n} × {other.width}"
            raise ModelError(
                f"{wanted_by} was made on another model: site {site.key} should be {site.d} × {site.n} × {site.width}",
                got=got,
                fix="Use the model that it was made on.",
            )
