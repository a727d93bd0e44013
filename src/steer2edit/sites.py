"""Where a decoder writes into the residual stream.

A `Site` is one linear map that does so: an attention block's output projection, an MLP's or an expert's down
projection. Everything that the mathematics needs of it is one view of its weight, W.view(d, n, c): n components of
width c.

`ARCHITECTURES` is the table of families; to support a further one, add a record (docs/add_a_family.md). A family that
is not in it is recognised by the common shapes, or described by the user in the recipe. Every weight matrix of a layer
must be a site or a map that is known to work inside a block: anything else is refused by its name, never passed over.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .errors import ModelError

if TYPE_CHECKING:
    from torch import nn

Block = Literal["attn", "mlp"]
BLOCKS: tuple[Block, ...] = ("attn", "mlp")

# Maps that read the residual stream, or work inside a block, and never write into the stream themselves.
INSIDE = frozenset(
    (
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv"),
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "g_proj"),
        *("q_norm", "k_norm", "q_layernorm", "k_layernorm"),
        *("gate_proj", "up_proj", "gate_up_proj", "c_fc", "dense_h_to_4h", "fc1", "fc_in", "w1", "w3"),
        *("gate", "router", "shared_expert_gate", "gate_up_proj_bias", "down_proj_bias"),
        *("conv1d", "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    )
)


@dataclass(frozen=True)
class Heads:
    """An attention block's output projection.

    Attributes:
        path: where it is in a layer.
        count: what the config calls the number of heads; their width is the rest of the weight's shape.
    """

    path: str = "self_attn.o_proj"
    count: str = "num_attention_heads"
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class Experts:
    """A mixture of experts whose down projections are one 3-D parameter.

    Attributes:
        path: the module that holds the parameter, in a layer; `block`: the module whose output is the whole block's.
        parameter: [experts, d, inputs], or [experts, inputs, d] if `transposed`.
        count: what the config calls the number of experts.
        shared: the down projection of the experts that every token visits, where there are any.
        stored: one expert's weight in the checkpoint's files, where they hold the experts apart.
    """

    path: str = "mlp.experts"
    block: str = "mlp"
    parameter: str = "down_proj"
    transposed: bool = False
    count: str = "num_experts"
    shared: str | None = None
    stored: str | None = "mlp.experts.{expert}.down_proj.weight"
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class Architecture:
    """One family: where its layers are and which maps of a layer write into the residual stream.

    Attributes:
        family: its name for people; `model_types`: what configs call it.
        layers: the list of decoder layers, from the model.
        attn: the output projections that an attention block may have; a layer has one of them.
        mlp: the down projection of a layer that has no experts; None if every layer has them.
        experts: the experts of a layer that has them.
        transposed: weights are [inputs, d], as in transformers' Conv1D.
        attn_norm, mlp_norm: the norm between the block's output and the stream (post-norm), in a layer.
        factor: what the config calls a factor on the block's output.
        stored: what the checkpoint's files call `layers`, where they call it otherwise.
        inside: names of further maps that only read the stream, or work inside a block.
        tested: its sites, oracle, hook, baked weights and exports are compared in this project's tests.
    """

    family: str = "described in the recipe"
    model_types: tuple[str, ...] = ()
    layers: str = "model.layers"
    attn: tuple[Heads, ...] = (Heads(),)
    mlp: str | None = "mlp.down_proj"
    experts: Experts | None = None
    transposed: bool = False
    attn_norm: str | None = None
    mlp_norm: str | None = None
    factor: str | None = None
    stored: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    tested: bool = False

    def __post_init__(self) -> None:
        if not self.attn:
            raise ValueError("an architecture without an attention projection")

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


_QWEN_EXPERTS = Experts(shared="mlp.shared_expert.down_proj")
_HYBRID = (Heads(), Heads("linear_attn.out_proj", "linear_num_value_heads"))

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("Llama 1-3, SmolLM 1-2", ("llama",), tested=True),
    Architecture("Mistral", ("mistral",), tested=True),
    Architecture(
        "Mixtral",
        ("mixtral",),
        mlp=None,
        experts=Experts(count="num_local_experts", stored="block_sparse_moe.experts.{expert}.w2.weight"),
        tested=True,
    ),
    Architecture(
        "Gemma 2, Gemma 3 (text)",
        ("gemma2", "gemma3_text"),
        attn_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        tested=True,
    ),
    Architecture(
        "Gemma 3 (with images)",
        ("gemma3",),
        layers="model.language_model.layers",
        attn_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        stored=("language_model.model.layers",),
        tested=True,
    ),
    Architecture("Qwen2, Qwen2.5", ("qwen2",), tested=True),
    Architecture("Qwen2-MoE, Qwen1.5-MoE", ("qwen2_moe",), experts=_QWEN_EXPERTS, tested=True),
    Architecture(
        "Qwen2.5-VL (its text tower)",
        ("qwen2_5_vl",),
        layers="model.language_model.layers",
        stored=("model.layers",),
        tested=True,
    ),
    Architecture("Qwen3", ("qwen3",), tested=True),
    Architecture("Qwen3-MoE", ("qwen3_moe",), experts=Experts(), tested=True),
    Architecture("Qwen3-Next", ("qwen3_next",), attn=_HYBRID, experts=_QWEN_EXPERTS, tested=True),
    Architecture("Qwen3.5 (text)", ("qwen3_5_text",), attn=_HYBRID, tested=True),
    Architecture("Phi-3, Phi-4", ("phi3",), tested=True),
    Architecture(
        "OLMo 2",
        ("olmo2",),
        attn_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        tested=True,
    ),
    Architecture("OLMoE", ("olmoe",), mlp=None, experts=Experts(), tested=True),
    Architecture("SmolLM3", ("smollm3",), tested=True),
    Architecture("Granite 3", ("granite",), factor="residual_multiplier", tested=True),
    Architecture("StableLM", ("stablelm",), tested=True),
    Architecture("Cohere Command-R", ("cohere",), tested=True),
    Architecture(
        "GPT-2",
        ("gpt2",),
        layers="transformer.h",
        attn=(Heads("attn.c_proj"),),
        mlp="mlp.c_proj",
        transposed=True,
        tested=True,
    ),
    Architecture(
        "GPT-NeoX, Pythia",
        ("gpt_neox",),
        layers="gpt_neox.layers",
        attn=(Heads("attention.dense"),),
        mlp="mlp.dense_4h_to_h",
        tested=True,
    ),
    Architecture(
        "OPT",
        ("opt",),
        layers="model.decoder.layers",
        attn=(Heads("self_attn.out_proj"),),
        mlp="fc2",
        tested=True,
    ),
    Architecture(
        "DeepSeek-V3, R1",
        ("deepseek_v3",),
        experts=Experts(count="num_local_experts", shared="mlp.shared_experts.down_proj"),
        tested=True,
    ),
    Architecture(
        "gpt-oss",
        ("gpt_oss",),
        mlp=None,
        experts=Experts(count="num_local_experts", transposed=True, stored=None),
        tested=True,
    ),
)

# Families that would load and be misread.
REFUSED: dict[str, str] = dict.fromkeys(
    ("llama4", "llama4_text"), "Llama 4 runs its experts on every token, outside the experts functions of transformers"
)

# The common shapes, for families that are not in the table.
_ATTN = (
    *("self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "self_attention.dense", "attn.c_proj"),
    *("attn.o_proj", "attn.out_proj", "attention.dense", "attention.o_proj", "attention.wo"),
)
_MLP = (
    *("mlp.down_proj", "mlp.c_proj", "mlp.fc2", "mlp.dense_4h_to_h", "mlp.fc_out", "mlp.w2"),
    *("feed_forward.down_proj", "feed_forward.w2", "ffn.down_proj", "fc2"),
)
_SHARED = ("mlp.shared_expert.down_proj", "mlp.shared_experts.down_proj")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")

_DESCRIBED = "_steer2edit_architecture"


@dataclass(frozen=True)
class Site:
    """A linear map that writes into the residual stream.

    Attributes:
        layer: the layer's number, from 0.
        block: "attn" or "mlp".
        module: the module in memory that holds the weight.
        tensor: the weight's name in the checkpoint's files; `aliases`: other names that files have for it. A name that
            leads to a 3-D tensor is meant at `expert`.
        d: size of the residual stream, the weight's rows.
        n: how many components there are: heads, or neurons.
        width: c, the columns of one component: a head's width, 1 for a neuron.
        parameter: the weight's name in the module.
        expert: its number, if the parameter holds those of `experts` experts.
        shared: an expert that every token visits.
        transposed: the parameter is [.., inputs, d].
        output: the module whose output is the block's, where the block has several sites: v is taken there, and
            steering added.
    """

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
        row = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {k: v for k, v in row.items() if v is not None and (k not in defaults or v != defaults[k])}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Site:
        site = cls(**{**row, "aliases": tuple(row.get("aliases", ()))})
        integers = [site.layer, site.d, site.n, site.width]
        integers += (
            [] if site.expert is None else [site.expert, site.experts or -1, (site.experts or 0) - site.expert - 1]
        )
        texts = (site.module, site.tensor, site.parameter, site.output, *site.aliases)
        if (
            site.block not in BLOCKS
            or any(type(i) is not int or i < 0 for i in integers)
            or any(type(text) is not str for text in texts)
        ):
            raise ValueError(f"no site: {row}")
        return site


def describe_as(model: nn.Module, architecture: Architecture) -> None:
    """Says of a model where it writes into the stream, in place of the table's record or the structure's."""
    setattr(model, _DESCRIBED, replace(architecture, tested=False))


def architecture_of(model: nn.Module) -> Architecture:
    """What the user said of the model, or its family's record, or what its structure shows.

    Raises:
        ModelError: the family is refused by name, or is not in the table and its structure is none of the common ones.
    """
    if described := getattr(model, _DESCRIBED, None):
        return described
    config: Any = model.config
    name = getattr(config, "model_type", None)
    if reason := REFUSED.get(name or ""):
        raise ModelError(
            f"the model type {name!r} is not supported", got=reason, fix="Use a model of another family (see README)."
        )
    return next((a for a in ARCHITECTURES if name in a.model_types), None) or by_structure(model)


def by_structure(model: nn.Module) -> Architecture:
    """The record of a family that is not in the table, if its layers have one of the common shapes.

    Raises:
        ModelError: they have not.
    """
    from torch import nn

    config: Any = model.config
    text = config.get_text_config()
    for name, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList) or len(layers) != text.num_hidden_layers:
            continue
        paths = [{path for path, _ in layer.named_modules()} for layer in layers]
        attn = [path for path in _ATTN if any(path in found for found in paths)]
        if any("linear_attn.out_proj" in found for found in paths):
            attn.append("linear_attn.out_proj")
        mlp = [path for path in _MLP if any(path in found for found in paths)]
        fused = [module for layer in layers if (module := _find(layer, "mlp.experts")) is not None]
        if not attn or not (mlp or fused):
            continue
        experts = None
        if fused:
            shared = [path for path in _SHARED if any(path in found for found in paths)]
            counts = [count for count in _COUNTS if hasattr(text, count)]
            experts = Experts(
                shared=shared[0] if shared else None,
                count=counts[0] if counts else _COUNTS[0],
                transposed=bool(getattr(fused[0], "is_transposed", False)),
            )
        return Architecture(
            f"{config.model_type} (by its structure)",
            (config.model_type,),
            layers=name,
            attn=tuple(Heads(p, "linear_num_value_heads" if "linear" in p else "num_attention_heads") for p in attn),
            mlp=mlp[0] if mlp else None,
            experts=experts,
            transposed=_is_conv1d(layers[0].get_submodule(attn[0])) if attn[0] in paths[0] else False,
        )
    known = ", ".join(t for a in ARCHITECTURES for t in a.model_types)
    raise ModelError(
        "this model's architecture is not supported",
        got=f"model_type {config.model_type!r}, whose layers have none of the common shapes",
        fix="Describe it in the recipe (model.architecture, see docs/add_a_family.md). "
        f"Supported model types: {known}.",
    )


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every site of a model, in the order of its layers, attention before MLP, experts by number, the shared one last.

    Widths come from the weights' own shapes, not from hidden_size / heads, which is wrong for some models. A model on
    the `meta` device will do: only names and shapes are read.

    Raises:
        ModelError: the family is not supported, a module is missing or not of the shape that its family has, or a layer
            has a weight matrix that is neither a site nor known to work inside a block.
    """
    architecture = architecture_of(model)
    config: Any = model.config
    text = config.get_text_config()
    layers: Any = _find(model, architecture.layers)
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
            fix="Load the model as its checkpoint has it.",
        )
    sites: list[Site] = []
    for number, layer in enumerate(layers):
        here = [*_attn_sites(architecture, number, layer, text), *_mlp_sites(architecture, number, layer, text)]
        _nothing_else(f"{architecture.layers}.{number}", layer, here, INSIDE.union(architecture.inside))
        sites += here
    return tuple(sites)


def _attn_sites(architecture: Architecture, number: int, layer: nn.Module, config: Any) -> Iterator[Site]:
    found = [heads for heads in architecture.attn if _find(layer, heads.path) is not None]
    if len(found) != 1:
        raise _no_map(architecture, number, [h.path for h in architecture.attn], [h.path for h in found])
    yield _site(architecture, number, layer, config, "attn", found[0].path, getattr(config, found[0].count, None))


def _mlp_sites(architecture: Architecture, number: int, layer: nn.Module, config: Any) -> Iterator[Site]:
    experts = architecture.experts
    dense = architecture.mlp is not None and _find(layer, architecture.mlp) is not None
    fused: Any = _find(layer, experts.path) if experts else None
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
    # The marks of transformers' registry of experts functions, through which the experts' inputs are reached.
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
            fix="Load the model as its checkpoint has it.",
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
        if _find(layer, experts.shared) is None:
            raise _no_map(architecture, number, [experts.shared], [])
        site = _site(architecture, number, layer, config, "mlp", experts.shared, None)
        yield replace(site, shared=True, output=block)


def _site(
    architecture: Architecture, number: int, layer: nn.Module, config: Any, block: Block, path: str, n: int | None
) -> Site:
    module: Any = _find(layer, path)
    name = f"{architecture.layers}.{number}.{path}"
    if _is_conv1d(module) != architecture.transposed:
        raise ModelError(
            f"the weight of {name} does not lie as the family's do",
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
    """What files may call a weight of a layer: in the hub's way, as in memory, or without the causal model's prefix."""
    prefixes = (*architecture.stored, architecture.layers, architecture.layers.split(".", 1)[-1])
    return tuple(dict.fromkeys(f"{prefix}.{number}.{path}" for path in paths for prefix in prefixes))


def _nothing_else(name: str, layer: nn.Module, sites: Sequence[Site], inside: Collection[str]) -> None:
    """Raises ModelError if the layer has a weight matrix that is no site and is not known to work inside a block."""
    held = {f"{site.module}.{site.parameter}" for site in sites} | {site.module for site in sites}
    for path, parameter in layer.named_parameters():
        owner, _, leaf = path.rpartition(".")
        full = f"{name}.{path}"
        if full in held or (f"{name}.{owner}" in held and leaf.startswith(("weight", "bias"))):
            continue
        told = owner.rpartition(".")[2] if leaf.startswith(("weight", "bias")) else leaf
        if parameter.dim() < 2 or told in inside or owner.rpartition(".")[2] in inside:
            continue
        raise ModelError(
            f"{full.removesuffix('.weight')} may write into the residual stream and is no known site",
            got=f"a parameter of shape {tuple(parameter.shape)}",
            fix="Load the model as transformers defines it; merge or unload an adapter first. A family with such a map "
            "needs a record (docs/add_a_family.md).",
        )


def _find(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _is_conv1d(module: Any) -> bool:
    return type(module).__name__ == "Conv1D"


def shape_of(module: Any) -> tuple[int, int] | None:
    """[d, inputs] of a linear map, whatever holds its weight; None if it is none."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):  # a quantised weight is packed
        return module.out_features, module.in_features
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2:
        return None
    rows, columns = weight.shape
    return (columns, rows) if _is_conv1d(module) else (rows, columns)


def _no_map(architecture: Architecture, number: int, wanted: list[str], found: list[str]) -> ModelError:
    names = " or ".join(f"{architecture.layers}.{number}.{path}" for path in wanted)
    return ModelError(
        f"the model has {'not one of' if found else 'no linear map'} {names}",
        got=" and ".join(found) if found else f"a layer of {architecture.family} without it",
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


def same_sites(found: Sequence[Site], wanted: Sequence[Site], wanted_by: str) -> dict[str, Site]:
    """The model's own sites, by key, for those that a probe or an edit was made on.

    Raises:
        ModelError: the model has not each of them, in the same shape.
    """
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
    return {site.key: here[site.key] for site in wanted}
