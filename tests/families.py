"""A tiny random model of every family, and by hand where each one writes into the residual stream.

Nothing here is taken from the library: the rows are what a reader of the families' code in transformers, and of the
files that it writes, would write down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from conftest import VOCABULARY

D, NEURONS, HEADS = 24, 40, 4
WINDOW = 8
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "intermediate_size": NEURONS,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


class Row(NamedTuple):
    """What is written by hand of one site. `block` is the module whose output is the whole block's; `stored` is the
    shape of the tensor that `file` names."""

    key: str
    module: str
    parameter: str
    d: int
    n: int
    width: int
    expert: int | None
    transposed: bool
    block: str
    file: str
    stored: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    model_type: str
    config: dict[str, Any]
    rows: list[Row]


# How the rows are written -------------------------------------------------------------------------------------------


def _map(key: str, module: str, n: int, width: int, file: str = "", block: str = "", conv1d: bool = False) -> Row:
    stored = (n * width, D) if conv1d else (D, n * width)
    file = f"{file or module}.weight"
    return Row(key, module, "weight", D, n, width, None, conv1d, block or module, file, stored)


def attn(layer: int, module: str, width: int, file: str = "", heads: int = HEADS, conv1d: bool = False) -> Row:
    return _map(f"{layer}.attn", module, heads, width, file, conv1d=conv1d)


def mlp(layer: int, module: str, neurons: int = NEURONS, file: str = "", conv1d: bool = False) -> Row:
    return _map(f"{layer}.mlp", module, neurons, 1, file, conv1d=conv1d)


def shared(layer: int, module: str, neurons: int, block: str) -> Row:
    return _map(f"{layer}.mlp.shared", module, neurons, 1, block=block)


APART = "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"


def experts(layer: int, neurons: int, file: str = APART) -> list[Row]:
    """Four experts, as Mixtral's and those after it are in memory: [experts, d, neurons]; in the files apart."""
    return [
        Row(
            f"{layer}.mlp.{e}", f"model.layers.{layer}.mlp.experts", "down_proj", D, neurons, 1, e, False,
            f"model.layers.{layer}.mlp", file.format(layer=layer, expert=e), (D, neurons),
        )
        for e in range(4)
    ]  # fmt: skip


def gpt_oss_experts(layer: int, neurons: int) -> list[Row]:
    """Four experts in one parameter [experts, neurons, d], in memory and in the files."""
    name = f"model.layers.{layer}.mlp.experts"
    return [
        Row(
            f"{layer}.mlp.{e}", name, "down_proj", D, neurons, 1, e, True,
            f"model.layers.{layer}.mlp", f"{name}.down_proj", (4, neurons, D),
        )
        for e in range(4)
    ]  # fmt: skip


def as_llama(width: int = 6) -> list[Row]:
    return [
        attn(0, "model.layers.0.self_attn.o_proj", width),
        mlp(0, "model.layers.0.mlp.down_proj"),
        attn(1, "model.layers.1.self_attn.o_proj", width),
        mlp(1, "model.layers.1.mlp.down_proj"),
    ]


def as_gpt(layers: str, attention: str, down: str, neurons: int = NEURONS, conv1d: bool = False) -> list[Row]:
    return [
        attn(0, f"{layers}.0.{attention}", 6, conv1d=conv1d),
        mlp(0, f"{layers}.0.{down}", neurons, conv1d=conv1d),
        attn(1, f"{layers}.1.{attention}", 6, conv1d=conv1d),
        mlp(1, f"{layers}.1.{down}", neurons, conv1d=conv1d),
    ]


def all_experts(width: int, neurons: int, file: str = APART) -> list[Row]:
    return [
        attn(0, "model.layers.0.self_attn.o_proj", width),
        *experts(0, neurons, file),
        attn(1, "model.layers.1.self_attn.o_proj", width),
        *experts(1, neurons, file),
    ]


def text_tower(width: int, file: str) -> list[Row]:
    memory = "model.language_model.layers"
    return [
        attn(0, f"{memory}.0.self_attn.o_proj", width, f"{file}.0.self_attn.o_proj"),
        mlp(0, f"{memory}.0.mlp.down_proj", file=f"{file}.0.mlp.down_proj"),
        attn(1, f"{memory}.1.self_attn.o_proj", width, f"{file}.1.self_attn.o_proj"),
        mlp(1, f"{memory}.1.mlp.down_proj", file=f"{file}.1.mlp.down_proj"),
    ]


# The table ----------------------------------------------------------------------------------------------------------

FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
FOUR_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
IMAGES = {"hidden_size": 16, "intermediate_size": 16}

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", {}, as_llama()),
    "mistral": Family("mistral", {"sliding_window": WINDOW}, as_llama()),
    "mixtral": Family(
        "mixtral",
        {**FOUR_LOCAL, "sliding_window": WINDOW},
        all_experts(6, NEURONS, "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"),
    ),
    "gemma2": Family("gemma2", {"head_dim": 10, "sliding_window": WINDOW}, as_llama(10)),
    "gemma3_text": Family("gemma3_text", {"head_dim": 8, **MIXED}, as_llama(8)),
    "gemma3": Family(
        "gemma3",
        {
            "text_config": {**TEXT, "head_dim": 8, **MIXED},
            "vision_config": {
                **IMAGES, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
        text_tower(8, "language_model.model.layers"),
    ),
    "qwen2": Family(
        "qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}, as_llama()
    ),
    "qwen2_moe": Family(
        "qwen2_moe",
        {**FOUR, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 16, "mlp_only_layers": [0]},
        [
            attn(0, "model.layers.0.self_attn.o_proj", 6),
            mlp(0, "model.layers.0.mlp.down_proj"),
            attn(1, "model.layers.1.self_attn.o_proj", 6),
            *experts(1, 12),
            shared(1, "model.layers.1.mlp.shared_expert.down_proj", 16, "model.layers.1.mlp"),
        ],
    ),
    "qwen2_5_vl": Family(
        "qwen2_5_vl",
        {
            "text_config": {
                **TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]},
            },
            "vision_config": {**IMAGES, "depth": 1, "num_heads": 2, "out_hidden_size": D},
        },
        text_tower(6, "model.layers"),
    ),
    "qwen3": Family("qwen3", {"head_dim": 8}, as_llama(8)),
    "qwen3_moe": Family("qwen3_moe", {**FOUR, "head_dim": 8, "moe_intermediate_size": 12}, all_experts(8, 12)),
    "qwen3_next": Family(
        "qwen3_next",
        {**FOUR, **LINEAR, "head_dim": 8, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 16},
        [
            attn(0, "model.layers.0.linear_attn.out_proj", 6, heads=2),
            *experts(0, 12),
            shared(0, "model.layers.0.mlp.shared_expert.down_proj", 16, "model.layers.0.mlp"),
            attn(1, "model.layers.1.self_attn.o_proj", 8),
            *experts(1, 12),
            shared(1, "model.layers.1.mlp.shared_expert.down_proj", 16, "model.layers.1.mlp"),
        ],
    ),
    "qwen3_5_text": Family(
        "qwen3_5_text",
        {**LINEAR, "head_dim": 8},
        [
            attn(0, "model.layers.0.linear_attn.out_proj", 6, heads=2),
            mlp(0, "model.layers.0.mlp.down_proj"),
            attn(1, "model.layers.1.self_attn.o_proj", 8),
            mlp(1, "model.layers.1.mlp.down_proj"),
        ],
    ),
    "phi3": Family("phi3", {"sliding_window": WINDOW}, as_llama()),
    "olmo2": Family("olmo2", {}, as_llama()),
    "olmoe": Family("olmoe", FOUR, all_experts(6, NEURONS)),
    "smollm3": Family("smollm3", {"no_rope_layers": [1, 0]}, as_llama()),
    "granite": Family("granite", {"residual_multiplier": 0.5}, as_llama()),
    "stablelm": Family("stablelm", {"use_parallel_residual": False}, as_llama()),
    "stablelm, parallel": Family("stablelm", {"use_parallel_residual": True}, as_llama()),
    "cohere": Family("cohere", {}, as_llama()),
    "gpt2": Family(
        "gpt2",
        {"n_embd": D, "n_head": HEADS, "n_layer": 2, "n_positions": 256, "n_inner": NEURONS},
        as_gpt("transformer.h", "attn.c_proj", "mlp.c_proj", conv1d=True),
    ),
    "gpt_neox": Family("gpt_neox", {}, as_gpt("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h")),
    "opt": Family(
        "opt",
        {"ffn_dim": NEURONS, "word_embed_proj_dim": D},
        as_gpt("model.decoder.layers", "self_attn.out_proj", "fc2"),
    ),
    "opt, norm after": Family(
        "opt",
        {"ffn_dim": NEURONS, "word_embed_proj_dim": D, "do_layer_norm_before": False},
        as_gpt("model.decoder.layers", "self_attn.out_proj", "fc2"),
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        {
            "num_key_value_heads": HEADS, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4, "v_head_dim": 10, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
            "topk_group": 1, "moe_intermediate_size": 12, "n_shared_experts": 2, "first_k_dense_replace": 1,
        },
        [
            attn(0, "model.layers.0.self_attn.o_proj", 10),
            mlp(0, "model.layers.0.mlp.down_proj"),
            attn(1, "model.layers.1.self_attn.o_proj", 10),
            *experts(1, 12),
            shared(1, "model.layers.1.mlp.shared_experts.down_proj", 24, "model.layers.1.mlp"),
        ],
    ),
    "gpt_oss": Family(
        "gpt_oss",
        {**FOUR_LOCAL, **MIXED, "head_dim": 8, "swiglu_limit": 0.7},  # a limit that many gates reach
        [
            attn(0, "model.layers.0.self_attn.o_proj", 8),
            *gpt_oss_experts(0, NEURONS),
            attn(1, "model.layers.1.self_attn.o_proj", 8),
            *gpt_oss_experts(1, NEURONS),
        ],
    ),
}  # fmt: skip

ALL = list(FAMILIES)
# The families whose experts share one parameter.
MIXTURES = [name for name, family in FAMILIES.items() if any(row.expert is not None for row in family.rows)]


def make_family(name: str, **overrides: Any) -> Any:
    """A fresh model of a family, in evaluation mode, fp32."""
    family = FAMILIES[name]
    return make_model(family.model_type, **family.config | overrides)


def make_model(model_type: str, seed: int = 0, **config: Any) -> Any:
    """A tiny random model of any model type of transformers; its init is wide, so that numbers are not tiny."""
    usual = {} if "text_config" in config else _usual(model_type, config)
    made = AutoConfig.for_model(model_type, **usual | config)
    for part in (made, made.get_text_config()):
        part.initializer_range = 0.2
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(part, name, None)
    text_only = type(made) in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    torch.manual_seed(seed)
    model = (AutoModelForCausalLM if text_only else AutoModelForImageTextToText).from_config(made)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)  # transformers starts biases at 0, where a bias lost would not show
    return model.eval()


def _usual(model_type: str, config: dict[str, Any]) -> dict[str, Any]:
    """The usual sizes, as far as the model type knows them and `config` does not give them under names of its own."""
    known = AutoConfig.for_model(model_type)
    return {k: v for k, v in TEXT.items() if hasattr(known, k) and known.attribute_map.get(k, k) not in config}
