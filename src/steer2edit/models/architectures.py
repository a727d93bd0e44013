"""The table of families: where each writes into the residual stream.

To support another family, add a record to `ARCHITECTURES` (docs/add_a_family.md). A family that is not in the table is
recognised by the common shapes, or described by the user.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import ModelError

if TYPE_CHECKING:
    from torch import nn

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
        path: its path in a layer.
        count: the config's name for the number of heads; their width follows from the weight's shape.

    >>> Heads("linear_attn.out_proj", count="linear_num_value_heads")
    Heads(path='linear_attn.out_proj', count='linear_num_value_heads')
    """

    path: str = "self_attn.o_proj"
    count: str = "num_attention_heads"
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class Experts:
    """A mixture of experts whose down projections are one 3-D parameter.

    Attributes:
        path: the module in a layer that holds the parameter; `block`: the one whose output is the block's.
        parameter: [experts, d, inputs], or [experts, inputs, d] if `transposed`.
        count: the config's name for the number of experts.
        shared: the down projection of the experts that every token visits, if there are any.
        stored: the name of one expert's weight in the checkpoint's files, if they store each expert separately.

    >>> Experts(count="num_local_experts").stored.format(expert=3)
    'mlp.experts.3.down_proj.weight'
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
        family: its name for people; `model_types`: its names in configs.
        layers: the path of the list of decoder layers in the model.
        attn: the output projections that an attention block may have; a layer has exactly one of them.
        mlp: the down projection of a layer that has no experts; None if every layer has them.
        experts: the experts of a layer that has them.
        transposed: weights are [inputs, d], as in transformers' Conv1D.
        attn_norm, mlp_norm: the norm between the block's output and the stream (post-norm), in a layer.
        factor: the config's name for a factor on the block's output.
        stored: other names of `layers` in the checkpoint's files.
        inside: names of further maps that only read the stream, or work inside a block.
        tested: this project's tests compare its sites, oracle, hook, baked weights and exports.

    >>> starcoder2 = Architecture(family="StarCoder2", model_types=("starcoder2",), mlp="mlp.c_proj")
    >>> starcoder2.layers, starcoder2.attn
    ('model.layers', (Heads(path='self_attn.o_proj', count='num_attention_heads'),))
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

# Families that would load but be misread.
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


def describe_as(model: nn.Module, architecture: Architecture) -> None:
    """Sets where a model writes into the residual stream, in place of its family's record or its recognised structure.

    >>> from torch import nn
    >>> model = nn.Module()
    >>> describe_as(model, Architecture(mlp="mlp.c_proj"))
    >>> architecture_of(model).mlp
    'mlp.c_proj'
    """
    setattr(model, _DESCRIBED, replace(architecture, tested=False))


def architecture_of(model: nn.Module) -> Architecture:
    """The user's description of the model, else its family's record, else what its structure shows.

    Raises:
        ModelError: the family is refused by name, or is not in the table and has none of the common structures.
    """
    if hasattr(model, "_orig_mod"):
        raise ModelError(
            "the model is compiled (torch.compile), and its modules have other names",
            got=type(model).__name__,
            fix="Give the model itself (model._orig_mod), and compile it afterwards.",
        )
    if described := getattr(model, _DESCRIBED, None):
        return described
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ModelError(
            "this is not a transformers model", got=type(model).__name__, fix="Load it with steer2edit.load_model."
        )
    name = getattr(config, "model_type", None)
    if reason := REFUSED.get(name or ""):
        raise ModelError(
            f"the model type {name!r} is not supported", got=reason, fix="Use a model of another family (see README)."
        )
    return next((a for a in ARCHITECTURES if name in a.model_types), None) or by_structure(model)


def by_structure(model: nn.Module) -> Architecture:
    """The record of a family that is not in the table, if its layers have one of the common shapes.

    Raises:
        ModelError: its layers have none of them.
    """
    from torch import nn

    config: Any = model.config
    text = config.get_text_config()
    for name, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList) or len(layers) != text.num_hidden_layers:
            continue
        paths = {path for layer in layers for path, _ in layer.named_modules()}
        attn = [path for path in (*_ATTN, "linear_attn.out_proj") if path in paths]
        mlp = [path for path in _MLP if path in paths]
        fused = [module for layer in layers if (module := submodule(layer, "mlp.experts")) is not None]
        if not attn or not (mlp or fused):
            continue
        experts = None
        if fused:
            shared = [path for path in _SHARED if path in paths]
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
            transposed=is_conv1d(submodule(layers[0], attn[0])),
        )
    known = ", ".join(t for a in ARCHITECTURES for t in a.model_types)
    raise ModelError(
        "this model's architecture is not supported",
        got=f"model_type {config.model_type!r}, whose layers have none of the common shapes",
        fix="Describe it in the recipe (model.architecture, see docs/add_a_family.md). "
        f"Supported model types: {known}.",
    )


def submodule(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def is_conv1d(module: Any) -> bool:
    return type(module).__name__ == "Conv1D"
