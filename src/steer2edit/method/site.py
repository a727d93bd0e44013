"""A place where a decoder writes into the residual stream, as data.

A `Site` is one linear map that does so: an attention block's output projection, an MLP's or an expert's down
projection. The mathematics needs only one view of its weight, W.view(d, n, c): n components of width c.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..errors import ModelError

Block = Literal["attn", "mlp"]

BLOCKS: tuple[Block, ...] = ("attn", "mlp")


@dataclass(frozen=True)
class Site:
    """A linear map that writes into the residual stream.

    Attributes:
        layer: the layer's number, from 0.
        block: "attn" or "mlp".
        module: the module in memory that holds the weight.
        tensor: the weight's name in the checkpoint's files; `aliases`: other names that files have for it. In a 3-D
            tensor the site's weight is the part `expert`.
        d: size of the residual stream, the weight's rows.
        n: how many components there are: heads or neurons.
        width: c, the columns of one component: a head's width, 1 for a neuron.
        parameter: the weight's name in the module.
        expert: the expert's number, if the parameter holds the weights of `experts` experts.
        shared: whether this is the expert that every token visits.
        transposed: whether the parameter is [.., inputs, d].
        output: for a block with several sites, the module whose output is the block's: v is measured and steering is
            added there.

    >>> site = Site(3, "attn", "layers.3.self_attn.o_proj", "layers.3.self_attn.o_proj.weight", d=64, n=4, width=16)
    >>> site.key, site.inputs
    ('3.attn', 64)
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    layer: int
    block: Block
    module: str
    tensor: str
    d: int
    n: int
    width: int
    parameter: str = "weight"
    expert: int | None = None
    experts: int | None = None
    shared: bool = False
    transposed: bool = False
    output: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The site's name in files: `3.attn`, `3.mlp`, `3.mlp.shared`, or `3.mlp.17` for an expert."""
        part = "shared" if self.shared else self.expert
        return self.block_key if part is None else f"{self.block_key}.{part}"

    @property
    def block_key(self) -> str:
        """The block's name in files: `3.mlp`. The steering vector is the block's, whatever its sites."""
        return f"{self.layer}.{self.block}"

    @property
    def inputs(self) -> int:
        """Columns of the weight, n · c."""
        return self.n * self.width

    @property
    def block_module(self) -> str:
        """The module whose output is the block's."""
        return self.output or self.module

    @property
    def place(self) -> str:
        """The weight's name in memory, for people."""
        return self.module if self.expert is None else f"{self.module}.{self.parameter}[{self.expert}]"

    def to_json(self) -> dict[str, Any]:
        defaults = {"parameter": "weight", "shared": False, "transposed": False, "output": "", "aliases": ()}
        row = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: v for k, v in row.items() if v is not None and (k not in defaults or v != defaults[k])}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Site:
        """The site of a row from `to_json`. Raises ValueError if the row is not a site's."""
        try:
            site = _ROW.validate_json(json.dumps(dict(row)), strict=True)
        except ValidationError:
            raise ValueError(f"no site: {row}") from None
        if min(site.layer, site.d, site.n, site.width) < 0:
            raise ValueError(f"no site, a number is negative: {row}")
        if site.expert is not None and not 0 <= site.expert < (site.experts or 0):
            raise ValueError(f"no site, there is no such expert: {row}")
        return site


_ROW = TypeAdapter(Site)


def same_sites(model_sites: Sequence[Site], wanted: Sequence[Site], wanted_by: str) -> dict[str, Site]:
    """The model's own sites, by key, for those that a probe or an edit was made on.

    Raises:
        ModelError: the model lacks one of them, or has it in another shape.
    """
    by_key = {site.key: site for site in model_sites}
    for site in wanted:
        other = by_key.get(site.key)
        if other is None or (other.d, other.n, other.width) != (site.d, site.n, site.width):
            got = "no such site" if other is None else f"{other.d} × {other.n} × {other.width}"
            raise ModelError(
                f"{wanted_by} was made on another model: site {site.key} should be {site.d} × {site.n} × {site.width}",
                got=got,
                fix="Use the model that it was made on.",
            )
    return {site.key: by_key[site.key] for site in wanted}


def are_layers(text: str) -> bool:
    """Whether a text names layers: `8-20`, `8`, or shares of the depth like `50%-100%`."""
    shares = re.fullmatch(r"(\d{1,3})%-(\d{1,3})%", text)
    if shares:
        return int(shares[1]) < int(shares[2]) <= 100
    return bool(re.fullmatch(r"\d{1,6}(-\d{1,6})?", text) and layers_of(text))


def layers_of(text: str) -> range:
    """`8-20` → layers 8 to 20, both of them."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def numbered_layers(text: str, depth: int) -> str:
    """Layers as numbers, where they are given as shares of a model's depth: `50%-100%` of 30 layers is `15-29`.

    A share that falls between two layers is rounded; at least one layer is left.
    """
    if "%" not in text:
        return text
    low, high = text.split("-")
    first = min(round(int(low.rstrip("%")) / 100 * depth), depth - 1)
    last = max(first, round(int(high.rstrip("%")) / 100 * depth) - 1)
    return f"{first}-{last}"
