"""Models that are refused, and families that the table does not have: by their structure or as described."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import steer2edit as s2e
from conftest import make_tokenizer, make_traces
from families import make_family, make_model
from family_cases import BUDGET, CLOSE, PROMPTS, Case, applied, greedy, ids_of, logits, made_case, same_state, state
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import ModelError
from steer2edit.models.architectures import Architecture, Heads, describe_as
from steer2edit.models.sites import find_sites


@pytest.fixture(scope="session")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return partial(made_case, tmp_path_factory)


# What is refused ----------------------------------------------------------------------------------------------------


def rename(model: Any, path: str, name: str) -> None:
    """A module of the second layer under another name."""
    holder, _, old = path.rpartition(".")
    owner = model.model.layers[1].get_submodule(holder)
    module = getattr(owner, old)
    delattr(owner, old)
    setattr(owner, name, module)


def _extra(model: Any) -> None:
    model.model.layers[1].mlp.extra = nn.Linear(24, 24)


def _lying_config(model: Any) -> None:
    model.config.num_local_experts = 3


def _cut_experts(model: Any) -> None:
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj[:3].clone())


def _separate_experts(model: Any) -> None:
    dense = make_family("llama").model.layers[0].mlp
    model.model.layers[1].mlp.experts = nn.ModuleList(copy.deepcopy(dense) for _ in range(4))


def _home_made_experts(model: Any) -> None:
    mine = nn.Module()
    mine.down_proj = nn.Parameter(model.model.layers[1].mlp.experts.down_proj.detach().clone())
    model.model.layers[1].mlp.experts = mine


def _second_attention(model: Any) -> None:
    model.model.layers[1].linear_attn = copy.deepcopy(model.model.layers[0].linear_attn)


def _second_mlp(model: Any) -> None:
    model.model.layers[1].mlp.down_proj = nn.Linear(40, 24, bias=False)


def _conv1d(model: Any) -> None:
    attention = model.transformer.h[1].attn
    attention.c_proj = nn.Linear(24, 24)


def _llama4(model: Any) -> None:
    model.config.model_type = "llama4"


def _lora(*targets: str) -> Callable[[Any], None]:
    def inject(model: Any) -> None:
        get_peft_model(model, LoraConfig(r=2, target_modules=list(targets)))

    return inject


def _renamed(path: str, name: str) -> Callable[[Any], None]:
    return lambda model: rename(model, path, name)


BROKEN: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "attention's output renamed": (
        "llama", _renamed("self_attn.o_proj", "out"), r"no linear map model\.layers\.1\.self_attn\.o_proj"),
    "down projection renamed": ("llama", _renamed("mlp.down_proj", "down"), r"no .* model\.layers\.1\.mlp\.down_proj"),
    "experts renamed": ("qwen3_moe", _renamed("mlp.experts", "bank"), r"no .* model\.layers\.1\.mlp\.experts"),
    "shared expert renamed": (
        "qwen2_moe", _renamed("mlp.shared_expert", "always"), r"model\.layers\.1\.mlp\.shared_expert\.down_proj"),
    "an inner map renamed": (
        "llama", _renamed("self_attn.q_proj", "query"), r"model\.layers\.1\.self_attn\.query may write"),
    "an extra map": ("llama", _extra, r"model\.layers\.1\.mlp\.extra may write .*\(24, 24\)"),
    "an extra map beside experts": ("gpt_oss", _extra, r"model\.layers\.1\.mlp\.extra may write"),
    "more experts than the config says": (
        "mixtral", _lying_config,
        r"model\.layers\.0\.mlp\.experts\.down_proj .* as many experts .*4 experts, num_local_experts = 3"),
    "fewer experts than the config says": (
        "qwen3_moe", _cut_experts, r"model\.layers\.1\.mlp\.experts\.down_proj .*3 experts, num_experts = 4"),
    "experts as a list of modules": (
        "mixtral", _separate_experts, r"the experts model\.layers\.1\.mlp\.experts cannot be reached .*ModuleList"),
    "experts that transformers does not run": (
        "mixtral", _home_made_experts, r"model\.layers\.1\.mlp\.experts cannot be reached .*experts functions"),
    "two attention projections": (
        "qwen3_next", _second_attention,
        r"more than one of model\.layers\.1\.self_attn\.o_proj or model\.layers\.1\.linear_attn\.out_proj"),
    "a down projection beside experts": ("mixtral", _second_mlp, r"model\.layers\.1\.mlp\.down_proj may write"),
    "a dense layer's down projection beside experts": (
        "qwen2_moe", _second_mlp,
        r"more than one of model\.layers\.1\.mlp\.down_proj or model\.layers\.1\.mlp\.experts"),
    "a weight that lies the other way": (
        "gpt2", _conv1d, r"transformer\.h\.1\.attn\.c_proj is not laid out .*got: Linear"),
    "an adapter on a site": ("llama", _lora("o_proj"), r"model\.layers\.0\.self_attn\.o_proj\.\S+ may write .*adapter"),
    "an adapter on an inner map": ("llama", _lora("q_proj"), r"model\.layers\.0\.self_attn\.q_proj\.\S+ may write"),
    "an adapter beside experts": (
        "qwen2_moe", _lora("up_proj"), r"model\.layers\.0\.mlp\.up_proj\.\S+ may write .*adapter"),
    "Llama 4": ("llama", _llama4, r"'llama4' is not supported .*experts"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_model_that_would_be_misread_is_refused_by_the_modules_name_and_left_alone(
    what: str, make_case: Any, tokenizer: Any, traces: Any
) -> None:
    name, damage, wanted = BROKEN[what]
    case = make_case(name)
    model = make_family(name)
    damage(model)
    before = state(model)
    with pytest.raises(ModelError, match=wanted):
        find_sites(model)
    with pytest.raises(ModelError, match=wanted):
        s2e.collect(model, tokenizer, *traces)
    with pytest.raises(ModelError, match=wanted):
        case.edit.apply(model)
    with pytest.raises(ModelError, match=wanted), case.edit.applied(model):
        pass
    assert same_state(model, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_wrapped_by_peft_is_refused(make_case: Any) -> None:
    wrapped = get_peft_model(make_family("llama"), LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    before = state(wrapped)
    with pytest.raises(ModelError, match=r"no model\.layers .*got: PeftModelForCausalLM.*adapter"):
        make_case("llama").edit.apply(wrapped)
    assert same_state(wrapped, before)


def test_llama_4_is_refused_by_name() -> None:
    sizes = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 40}
    model = make_model("llama4_text", **sizes)
    with pytest.raises(ModelError, match=r"'llama4_text' is not supported .*every token"):
        find_sites(model)


# Families that are not in the table ---------------------------------------------------------------------------------

GPT = {"n_embd": 24, "n_head": 4, "n_layer": 2, "n_positions": 256}
FOUR = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
ONE_GROUP = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_routed_experts": 4, **FOUR}
MLA = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10}

# model type → config; the attention's and the MLP's module in layer 0, heads' width, components of the MLP; sites in
# all.
BY_STRUCTURE: dict[str, tuple[dict[str, Any], str, str, int, int, int]] = {
    "gpt_bigcode": (GPT | {"n_inner": 40}, "transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj", 6, 40, 4),
    "falcon": (
        {}, "transformer.h.0.self_attention.dense", "transformer.h.0.mlp.dense_4h_to_h", 6, 96, 4),
    "bloom": (
        {"n_layer": 2, "n_head": 4},
        "transformer.h.0.self_attention.dense", "transformer.h.0.mlp.dense_4h_to_h", 6, 96, 4),
    "mpt": (
        {"d_model": 24, "n_heads": 4, "n_layers": 2},
        "transformer.blocks.0.attn.out_proj", "transformer.blocks.0.ffn.down_proj", 6, 96, 4),
    "phi": ({"partial_rotary_factor": 1.0}, "model.layers.0.self_attn.dense", "model.layers.0.mlp.fc2", 6, 40, 4),
    "gptj": (GPT | {"rotary_dim": 2}, "transformer.h.0.attn.out_proj", "transformer.h.0.mlp.fc_out", 6, 96, 4),
    "codegen": (GPT | {"rotary_dim": 2}, "transformer.h.0.attn.out_proj", "transformer.h.0.mlp.fc_out", 6, 96, 4),
    "starcoder2": ({}, "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.c_proj", 6, 40, 4),
    "biogpt": ({}, "biogpt.layers.0.self_attn.out_proj", "biogpt.layers.0.fc2", 6, 40, 4),
    "olmo": ({}, "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", 6, 40, 4),
    "arcee": ({}, "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", 6, 40, 4),
    "cohere2": ({"sliding_window": 8}, "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", 6, 40, 4),
    "helium": ({"head_dim": 6}, "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", 6, 40, 4),
    "ernie4_5": ({"head_dim": 8}, "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", 8, 40, 4),
    "lfm2": (
        {"block_auto_adjust_ff_dim": False},
        "model.layers.0.self_attn.out_proj", "model.layers.0.feed_forward.w2", 6, 40, 4),
    "phimoe": (
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.experts", 6, 40, 10),
    "glm4_moe": (
        {"head_dim": 8, "n_shared_experts": 1, **ONE_GROUP},
        "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", 8, 40, 8),
    "deepseek_v2": (
        {"num_key_value_heads": 4, "n_shared_experts": 2, **MLA, **ONE_GROUP},
        "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", 10, 40, 8),
}  # fmt: skip


def hooked_baked_and_generated_agree(model: Any) -> None:
    tokenizer = make_tokenizer()
    probe = s2e.collect(model, tokenizer, *make_traces())
    edit = s2e.score(model, probe, expert_tokens=1).edit(**BUDGET)
    ids = ids_of()
    base, baked = logits(model, ids), applied(edit, model)
    with edit.applied(model):
        hooked = logits(model, ids)
    torch.testing.assert_close(hooked, logits(baked, ids), **CLOSE)
    assert float((hooked - base).abs().max()) > 0.1
    requests = [Request(prompt, row) for prompt in PROMPTS[:3] for row in (0, 1)]
    answers = TransformersEngine(model, tokenizer).generate(requests, [s2e.NOTHING, edit.intervention()], 5)
    stop = tokenizer.eos_token_id
    assert [a.ids for a in answers] == [greedy((model, baked)[r.row], r.ids, 5, stop) for r in requests]


@pytest.mark.parametrize("model_type", list(BY_STRUCTURE))
def test_a_family_with_a_common_shape_works_without_a_record(model_type: str) -> None:
    config, attention, down, width, neurons, count = BY_STRUCTURE[model_type]
    model = make_model(model_type, **config)
    sites = find_sites(model)
    assert len(sites) == count
    assert (sites[0].module, sites[0].n, sites[0].width) == (attention, 4, width)
    assert (sites[1].module, sites[1].n, sites[1].width) == (down, neurons, 1)
    hooked_baked_and_generated_agree(model)


POST_NORM = {
    "glm4": ({"head_dim": 8}, "post_self_attn_layernorm", "post_mlp_layernorm"),
    "olmo3": ({"sliding_window": 8}, "post_attention_layernorm", "post_feedforward_layernorm"),
}


@pytest.mark.parametrize("model_type", list(POST_NORM))
def test_a_norm_after_the_block_must_be_described_where_there_is_no_record(
    model_type: str, tokenizer: Any, traces: Any
) -> None:
    config, attn_norm, mlp_norm = POST_NORM[model_type]
    model = make_model(model_type, **config)
    before = state(model)
    with pytest.raises(ModelError, match=rf"adds something other .*{model_type} \(by its structure\).*norm"):
        s2e.collect(model, tokenizer, *traces)
    assert same_state(model, before)
    describe_as(model, Architecture(attn_norm=attn_norm, mlp_norm=mlp_norm))
    hooked_baked_and_generated_agree(model)


STRANGE: dict[str, tuple[dict[str, Any], str]] = {
    "bart": (
        {"d_model": 24, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 40},
        r"model\.decoder\.layers\.0\.encoder_attn\.out_proj may write"),
    "minimax": (
        {"num_local_experts": 4, "num_experts_per_tok": 2}, r"model\.layers\.\d\.self_attn\.output_gate may write"),
    "ernie4_5_moe": (
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 12, "moe_num_shared_experts": 1},
        r"model\.layers\.1\.mlp\.gate\.moe_statics\.e_score_correction_bias may write"),
    "granitemoe": (
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        "'granitemoe', whose layers have none .*add_a_family.*llama"),
    "gpt_neo": (
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}, "'gpt_neo', whose layers"),
    "mamba": ({}, "'mamba', whose layers have none of the common shapes"),
}  # fmt: skip


@pytest.mark.parametrize("model_type", list(STRANGE))
def test_a_family_of_another_shape_is_refused_by_what_is_not_understood(model_type: str) -> None:
    config, wanted = STRANGE[model_type]
    model = make_model(model_type, **config)
    with pytest.raises(ModelError, match=wanted):
        find_sites(model)


def test_a_layer_of_another_kind_than_the_first_is_refused() -> None:
    model = make_model("lfm2", layer_types=["full_attention", "conv"])
    with pytest.raises(ModelError, match=r"no linear map model\.layers\.1\.self_attn\.out_proj"):
        find_sites(model)


def test_a_family_can_be_described() -> None:
    sizes = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}
    model = make_model("gpt_neo", **sizes)
    described = Architecture(layers="transformer.h", attn=(Heads("attn.attention.out_proj"),), mlp="mlp.c_proj")
    describe_as(model, described)
    assert [(s.module, s.n, s.width, s.tensor) for s in find_sites(model)] == [
        (f"transformer.h.{layer}.{path}", n, width, f"transformer.h.{layer}.{path}.weight")
        for layer in (0, 1)
        for path, n, width in (("attn.attention.out_proj", 4, 6), ("mlp.c_proj", 40, 1))
    ]
    hooked_baked_and_generated_agree(model)


def test_a_description_goes_before_the_table_and_is_held_to_the_same() -> None:
    model = make_family("llama")
    describe_as(model, Architecture(attn=(Heads(count="num_key_value_heads"),)))
    first = find_sites(model)[0]
    assert (first.key, first.n, first.width) == ("0.attn", 2, 12)
    describe_as(model, Architecture(mlp="mlp.up_proj"))
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.up_proj .*weight 40 × 24"):
        find_sites(model)
