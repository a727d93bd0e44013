"""The self-check passes on what is right and names what is wrong; the examination counts every parameter once."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import steer2edit as s2e
from conftest import VOCABULARY, make_pico
from families import FAMILIES, make_family, make_model
from runs import Said, is_one_sentence, said_by, save_pico, tiny_recipe
from steer2edit.engines.slots import SlotCache
from steer2edit.errors import ModelError, ProbeError
from steer2edit.models import architectures as architectures_module
from steer2edit.models.architectures import Architecture, architecture_of, describe_as
from steer2edit.models.inventory import examine
from steer2edit.models.load import empty_model
from steer2edit.models.selfcheck import TOKENS, self_check
from steer2edit.models.sites import find_sites, module_of
from steer2edit.models.weights import read_weight

ALL = list(FAMILIES)
# There a norm stands between a block and the stream.
BETWEEN = {"gemma2", "gemma3_text", "gemma3", "olmo2", "opt, norm after"}


def count_passes(model: Any) -> list[Tensor]:
    """The token ids of every forward pass from now on."""
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    return seen


# The self-check passes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_family_passes_thoroughly(name: str) -> None:
    model = make_family(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    health = self_check(model, thorough=True)
    rows = FAMILIES[name].rows
    layers_of_experts = {row.key.split(".")[0] for row in rows if row.expert is not None}
    assert health.interventions == sum(row.expert is None for row in rows) + len(layers_of_experts)
    assert health.least_moved > 0.05
    assert health.moved_by_nothing < 1e-5
    assert health.heads < 1e-4
    assert (health.unaccounted > 0.1) == (name in BETWEEN)
    assert health.unaccounted < 1e-5 or name in BETWEEN
    # No hook stays and no weight moves.
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(hasattr(module, "_steer2edit_taps") for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2"])
def test_half_precision_passes(name: str, dtype: torch.dtype) -> None:
    model = make_family(name).to(dtype)
    health = self_check(model, thorough=True)
    assert health.least_moved > 0.05
    assert health.heads < 0.1


def test_a_model_that_passed_is_not_run_again(pico: Any) -> None:
    model = pico()
    passes = count_passes(model)
    health = self_check(model)
    assert len(passes) >= 4
    assert all(ids.shape[1] == TOKENS for ids in passes)
    del passes[:]
    assert self_check(model) is health
    assert passes == []
    thorough = self_check(model, thorough=True)  # more was asked than was done
    assert len(passes) >= 4
    del passes[:]
    assert self_check(model) is self_check(model, thorough=True) is thorough
    assert passes == []
    describe_as(model, Architecture())  # now it is said to be something else
    self_check(model)
    assert len(passes) >= 4


# The self-check fails -----------------------------------------------------------------------------------------------


def forget(model: Any, layer: int) -> None:
    """The layer runs its MLP and adds nothing."""
    mlp = model.model.layers[layer].mlp
    run = mlp.forward
    mlp.forward = lambda x: 0.0 * run(x)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_projection_whose_output_is_thrown_away_is_named(pico: Any, layer: int) -> None:
    model = pico()
    forget(model, layer)
    with pytest.raises(ModelError) as caught:
        self_check(model)
    assert caught.value.what == f"an intervention at {layer}.mlp does not reach the logits"
    assert float(caught.value.got.split()[3]) < 1e-5


def test_experts_whose_output_is_thrown_away_are_named() -> None:
    model = make_family("qwen2_moe")
    mlp = model.model.layers[1].mlp
    mlp.shared_expert_gate.forward = lambda x: torch.full_like(x[..., :1], -1e4)  # a gate that never opens
    with pytest.raises(ModelError, match=r"an intervention at 1\.mlp\.shared does not reach the logits"):
        self_check(model)
    model = make_family("mixtral")
    mlp = model.model.layers[1].mlp
    run = mlp.forward
    mlp.forward = lambda x: 0.0 * run(x)
    with pytest.raises(ModelError, match=r"an intervention at 1\.mlp \(experts\) does not reach the logits"):
        self_check(model)


@pytest.mark.parametrize("path", ["self_attn.o_proj", "mlp.down_proj"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_module_that_runs_another_weight_than_its_own_is_named(pico: Any, path: str, layer: int) -> None:
    model = pico()
    module = model.model.layers[layer].get_submodule(path)
    turned = module.weight.detach().roll(8, dims=1)
    module.forward = lambda x: nn.functional.linear(x, turned)
    with pytest.raises(ModelError) as caught:
        self_check(model)
    assert caught.value.what == f"component {layer} of model.layers.{layer}.{path} does not act through its own columns"


def test_two_heads_that_are_swapped_are_found_by_the_thorough_check(pico: Any) -> None:
    model = pico()
    module = model.model.layers[0].self_attn.o_proj  # four heads of width 8
    order = [*range(16), *range(24, 32), *range(16, 24)]
    module.forward = lambda x: nn.functional.linear(x[..., order], module.weight)
    self_check(model)  # one head of each site
    with pytest.raises(ModelError, match=r"component 2 of model\.layers\.0\.self_attn\.o_proj does not act"):
        self_check(model, thorough=True)


def test_a_square_weight_that_is_read_the_wrong_way_is_found(pico: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(model: Any, site: s2e.Site) -> Tensor:
        weight = read_weight(model, site)
        return weight.T if site.d == site.inputs else weight

    monkeypatch.setattr("steer2edit.models.selfcheck.read_weight", turned)
    with pytest.raises(ModelError, match=r"component 0 of model\.layers\.0\.self_attn\.o_proj does not act"):
        self_check(pico())
    model = make_family("mixtral", intermediate_size=24, head_dim=8)  # square experts, and no other site is
    with pytest.raises(ModelError, match=r"the output of model\.layers\.0\.mlp\.experts\.down_proj\[\d\] is not its"):
        self_check(model)


def test_noise_inside_a_projection_is_found(pico: Any) -> None:
    model = pico()
    module = model.model.layers[1].self_attn.o_proj
    module.forward = lambda x: nn.functional.linear(x, module.weight) + torch.randn(x.shape[-1])
    with pytest.raises(ModelError, match="an intervention of zeros changes the model's output"):
        self_check(model)


def test_experts_that_run_by_a_function_of_their_own_are_found() -> None:
    def twice(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return 2 * ALL_EXPERTS_FUNCTIONS["batched_mm"](self, hidden, index, weights)

    ALL_EXPERTS_FUNCTIONS.register("twice", twice)
    model = make_family("mixtral")
    self_check(copy.deepcopy(model))
    model.config._experts_implementation = "twice"
    with pytest.raises(ModelError, match="an intervention of zeros changes the model's output") as caught:
        self_check(model)
    assert "moved by" in caught.value.got


def test_nothing_is_remembered_of_a_check_that_failed(pico: Any) -> None:
    model = pico()
    forget(model, 1)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"1\.mlp does not reach"):
            self_check(model)
    assert not any(module._forward_hooks for module in model.modules())
    del model.model.layers[1].mlp.forward
    assert self_check(model).interventions == 6


@pytest.mark.parametrize(
    ("broken", "place"),
    [
        ("model.layers.0.self_attn.o_proj", "an activation at site 0.attn is"),
        ("model.layers.1.mlp.down_proj", "an activation at site 1.mlp is"),
        ("model.layers.2.self_attn.v_proj", "an activation at site 2.attn is"),
        ("lm_head", "the model's logits are"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_traced_to_its_site(pico: Any, broken: str, place: str, value: float) -> None:
    model = pico()
    with torch.no_grad():
        model.get_submodule(broken).weight[3, 2] = value
    with pytest.raises(ProbeError) as caught:
        self_check(model)
    assert caught.value.what == f"{place} not finite"


def test_an_expert_whose_weight_is_not_finite_is_traced() -> None:
    model = make_family("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.fill_(float("nan"))
    with pytest.raises(ProbeError, match=r"an activation at site 1\.mlp(\.\d)? is not finite"):
        self_check(model)


# Something stands between a block and the stream --------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["glm4", "exaone4"])
def test_an_unknown_family_with_a_norm_after_its_blocks_is_refused(model_type: str) -> None:
    model = make_model(model_type)
    assert not architecture_of(model).tested
    with pytest.raises(ModelError) as caught:
        self_check(model)
    assert caught.value.what == "a layer adds something other than its sites' outputs to the residual stream"
    assert caught.value.got.startswith(f"{model_type} (by its structure): a difference of")
    assert "model.architecture" in caught.value.fix


def test_a_known_structure_with_a_factor_is_refused_until_it_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures_module, "ARCHITECTURES", ())
    assert self_check(make_family("llama")).unaccounted < 1e-5
    model = make_family("granite")  # residual_multiplier = 0.5
    with pytest.raises(ModelError, match=r"adds something other .*a difference of 1 of what it adds"):
        self_check(model)
    describe_as(model, Architecture(factor="residual_multiplier"))
    assert self_check(model).unaccounted < 1e-5


def test_a_layer_that_adds_a_constant_of_its_own_is_refused(pico: Any) -> None:
    model = pico()
    describe_as(model, Architecture())
    layer = model.model.layers[1]
    run = layer.forward
    layer.forward = lambda x, *args, **kwargs: run(x, *args, **kwargs) + 1.0
    with pytest.raises(ModelError, match="a layer adds something other than its sites' outputs"):
        self_check(model)


def at_last_token(model: Any, ids: Tensor, modules: list[nn.Module]) -> list[Tensor]:
    seen: dict[nn.Module, Tensor] = {}
    handles = [m.register_forward_hook(lambda m, args, out: seen.__setitem__(m, out[0, -1])) for m in modules]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [seen[module] for module in modules]


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_what_a_post_norm_makes_of_an_edit_is_what_its_derivative_says(name: str) -> None:
    # Wide, so that one random direction tells of all: ‖Jδ‖ / ‖δ‖ is near ‖J‖_F / √d.
    d = 512
    model = make_model(name, hidden_size=d, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                       num_key_value_heads=4, head_dim=8, vocab_size=VOCABULARY)  # fmt: skip
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.mul_(1.5)
    passes = count_passes(model)
    norms = self_check(model).norms
    layers = model.model.layers
    for block, path, norm in (
        ("attn", "self_attn.o_proj", "post_attention_layernorm"),
        ("mlp", "mlp.down_proj", "post_feedforward_layernorm"),
    ):
        outs = at_last_token(model, passes[0], [layer.get_submodule(path) for layer in layers])
        ratios = []
        for layer, out in zip(layers, outs, strict=True):
            jacobian = torch.autograd.functional.jacobian(layer.get_submodule(norm), out[None, None])
            ratios.append(float(jacobian.reshape(d, d).norm()) / d**0.5)
        assert norms[block] == pytest.approx(sorted(ratios)[1], rel=0.1)
        assert norms[block] != pytest.approx(1, rel=0.2)


def test_families_without_a_post_norm_have_no_ratio() -> None:
    assert self_check(make_family("llama")).norms == {}
    assert self_check(make_family("granite")).norms == {}


def test_a_factor_is_in_the_remarks_and_a_norm_too() -> None:
    said = examine(make_family("granite"))["remarks"]
    assert "A block's output is multiplied by residual_multiplier = 0.5 before it is added to the stream." in said
    said = " ".join(examine(make_family("gemma2"))["remarks"])
    assert "post_attention_layernorm" in said
    assert "post_feedforward_layernorm" in said
    assert examine(make_family("llama"))["remarks"] == []


# Before the first probe ---------------------------------------------------------------------------------------------


def test_collect_checks_before_it_runs_a_trace_and_stops(pico: Any, tokenizer: Any, traces: Any) -> None:
    model = pico()
    forget(model, 1)
    lengths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    done: list[tuple[int, int]] = []
    with pytest.raises(ModelError, match=r"1\.mlp does not reach the logits"):
        s2e.collect(model, tokenizer, *traces, progress=lambda *at: done.append(at))
    assert done == []
    assert set(lengths) == {TOKENS}  # no trace is as short as that
    del lengths[:]
    probe = s2e.collect(model, tokenizer, *traces, check=False, progress=lambda *at: done.append(at))
    assert done[-1] == (5, 5)
    assert TOKENS not in lengths
    assert float(probe.vector(probe.sites[0]).norm()) > 0.1


def test_collect_checks_a_model_once(pico: Any, tokenizer: Any, traces: Any) -> None:
    model = pico()
    passes = count_passes(model)  # of the whole model: the probe runs the body alone
    first = s2e.collect(model, tokenizer, *traces)
    assert len(passes) >= 4
    del passes[:]
    second = s2e.collect(model, tokenizer, *traces)
    assert passes == []
    assert torch.equal(first.vector(first.sites[0]), second.vector(second.sites[0]))


# The examination ----------------------------------------------------------------------------------------------------


def own(model: Any) -> set[nn.Parameter]:
    """The parameters of the modules that are sites, an expert's biases not among them."""
    found: set[nn.Parameter] = set()
    for site in find_sites(model):
        module: Any = module_of(model, site)
        found |= {getattr(module, site.parameter)} if site.expert is not None else set(module.parameters())
    return found


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_is_a_sites_or_listed_as_not_edited_once(name: str) -> None:
    model = make_family(name)
    found = examine(model)
    assert found["tested"]
    edited = sum(p.numel() for p in own(model))
    others = sum(row["parameters"] for row in found["not edited"])
    assert edited + others == model.num_parameters()
    assert sum(row["count"] for row in found["not edited"]) == len(list(model.parameters())) - len(own(model))
    assert sum(row["count"] for row in found["sites"]) == len(FAMILIES[name].rows)
    names = [(row["weights"], row["why"]) for row in found["not edited"]]
    assert len(set(names)) == len(names)
    assert all(row["why"] for row in found["not edited"])


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_embedding_is_counted_once(pico: Any, tied: bool) -> None:
    model = pico("qwen2", tie_word_embeddings=tied)
    edited = sum(s.d * s.inputs for s in find_sites(model))
    rows = examine(model)["not edited"]
    assert edited + sum(row["parameters"] for row in rows) == model.num_parameters()
    large = {row["weights"]: row["parameters"] for row in rows if row["parameters"] == VOCABULARY * 32}
    assert list(large) == ["model.embed_tokens", *([] if tied else ["lm_head.weight"])]


def test_the_classes_of_sites_are_those_of_a_mixture_by_hand() -> None:
    found = examine(make_family("qwen2_moe"))
    assert [
        (r["sites"], r["where"], r["count"], r["layers"], r["components"], r["stream"]) for r in found["sites"]
    ] == [
        ("attn", "self_attn.o_proj", 2, 2, "4 heads × 6", 24),
        ("mlp", "mlp.down_proj", 1, 1, "40 neurons × 1", 24),
        ("experts", "mlp.experts.down_proj[i]", 4, 1, "12 neurons × 1", 24),
        ("shared expert", "mlp.shared_expert.down_proj", 1, 1, "16 neurons × 1", 24),
    ]
    gate = next(row for row in found["not edited"] if row["weights"] == "mlp.shared_expert_gate")
    assert (gate["count"], gate["parameters"]) == (1, 24)
    assert gate["why"] == "reads the stream, or works inside a block"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen3_next", "deepseek_v3", "gpt_oss"])
def test_a_model_without_weights_is_examined_as_the_loaded_one(name: str) -> None:
    model = make_family(name)
    empty = empty_model(model.config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert find_sites(empty) == find_sites(model)
    assert examine(empty) == examine(model)


def test_the_memory_that_each_stage_needs_is_that_computed_by_hand(pico: Any) -> None:
    model = pico()  # d = 32, 48 neurons, 4 heads of width 8, 2 of keys and values, 3 layers, 320 tokens, fp32
    of_layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert examine(model)["memory"] == {
        "the model": 4 * (2 * 320 * 32 + 3 * of_layer + 32),
        "probe, sums of 4 groups": 8 * 4 * 3 * ((32 + 48) + (32 + 32)),
        "score, the largest weight": 3 * 4 * 32 * 48,
        "search, 16 configurations": 16 * 4 * 3 * ((32 + 48) + (32 + 32)),
        "search, keys and values of 128 rows of 256 tokens": 128 * 256 * 3 * 2 * 2 * 8 * 4,
        "an edit, on disk or in memory": 4 * 3 * (2 * (32 + 48) + 3 * (4 + 48) + 32 + 32),
        "apply, the columns it keeps, at most": 4 * 3 * (32 * 32 + 32 * 48),
    }


def test_the_memory_told_is_what_an_edit_its_columns_and_the_keys_and_values_take(
    pico: Any, make_edit: Callable[..., s2e.Edit]
) -> None:
    model = pico()
    expected = examine(model)["memory"]
    edit = make_edit(model, 1e-3, 1e-3, 0.0)
    tensors = [t for s in edit.sites.values() for t in (s.u, s.k, s.g, s.reach, s.lam)]
    taken = sum(t.numel() * t.element_size() for t in tensors)
    # Their rows a = λ·k̂ besides, which are made when they are needed.
    assert expected["an edit, on disk or in memory"] == taken + 4 * sum(s.row.numel() for s in edit.sites.values())
    edit.apply(model)
    kept = sum(t.numel() * t.element_size() for t in model._steer2edit_applied[-1].bytes.values())
    assert 0.9 < kept / expected["apply, the columns it keeps, at most"] <= 1
    cache = SlotCache(3, 128, 256)
    x = torch.zeros(128, 2, 256, 8)
    cache.write_from(0, 256)
    for layer in range(3):
        cache.update(x, x, layer)
    held = sum(t.numel() * t.element_size() for slot in cache.slots for t in (slot.keys, slot.values))
    assert held == expected["search, keys and values of 128 rows of 256 tokens"]


def test_half_precision_halves_what_follows_the_models_dtype(pico: Any) -> None:
    whole, half = (examine(pico(dtype=dtype))["memory"] for dtype in (torch.float32, torch.bfloat16))
    follows = {"the model", "search, 16 configurations", "search, keys and values of 128 rows of 256 tokens"}
    follows |= {"apply, the columns it keeps, at most"}
    assert {stage for stage in whole if whole[stage] == 2 * half[stage]} == follows
    assert all(whole[stage] == half[stage] for stage in set(whole) - follows)


# The command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    return functools.partial(said_by, monkeypatch, capfd, "doctor")


def test_doctor_tells_what_is_edited_and_what_is_not_without_the_weights(say: Any, tmp_path: Path) -> None:
    folder = Path(save_pico(tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    said = say(folder)
    assert (said.code, said.err) == (0, "")
    for part in ("Llama", "self_attn.o_proj", "4 heads × 8", "mlp.down_proj", "48 neurons × 1", "model.embed_tokens"):
        assert part in said.out
    assert "The self-check was not run" in said.out
    is_one_sentence(say(folder, "--weights"), "cannot be loaded")


def test_doctor_with_weights_runs_the_self_check(say: Any, tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model", "gemma2", head_dim=8, attn_implementation="eager")
    said = say(folder, "--weights", "--dtype", "float32", "--device", "cpu")
    assert (said.code, said.err) == (0, "")
    assert "Self-check passed: 6 interventions" in said.out
    assert "The norm after the attn block makes an edit" in said.out
    assert "was not run" not in said.out


def test_doctors_findings_are_json_on_demand(say: Any, tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model")
    found = json.loads(say(folder, "--json").out)
    model = make_pico(max_position_embeddings=512)
    stored = [{"format": "F32", "weights": 6, "an export": "adds the edit"}]
    assert found == json.loads(json.dumps(examine(model))) | {"model": folder, "stored": stored}
    assert "self-check" not in found
    found = json.loads(say(folder, "--json", "--weights", "--dtype", "float32", "--device", "cpu").out)
    expected = vars(self_check(model, thorough=True))
    assert found["self-check"].keys() == expected.keys()
    assert found["self-check"]["interventions"] == 6
    assert found["self-check"]["least_moved"] == pytest.approx(expected["least_moved"], abs=1e-5)


def test_doctor_takes_the_model_of_a_recipe_and_how_it_describes_it(say: Any, tmp_path: Path) -> None:
    folder = Path(save_pico(tmp_path / "model", "gemma2", head_dim=8, attn_implementation="eager"))
    described = {"attn_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}
    recipe = tiny_recipe(str(folder), model__architecture={"family": "mine", **described})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    for options in (["--json"], ["--json", "--weights"]):
        said = say(file, *options)
        assert said.code == 0, said.err
        found = json.loads(said.out)
        assert (found["family"], found["tested"], found["model"]) == ("mine", False, str(folder))
        assert any("post_feedforward_layernorm" in remark for remark in found["remarks"])
    wrong = tiny_recipe(str(folder), model__architecture={"family": "mine"})
    file.write_text(wrong.to_yaml(), encoding="utf-8")
    assert say(file, "--json").code == 0  # names and shapes fit
    is_one_sentence(
        say(file, "--weights"), "a layer adds something other than its sites' outputs to the residual stream"
    )
    nowhere = tiny_recipe(str(folder), model__architecture={"mlp": "mlp.up"})
    file.write_text(nowhere.to_yaml(), encoding="utf-8")
    is_one_sentence(say(file), "model.layers.0.mlp.up")


def test_doctor_refuses_a_model_that_is_not_supported(say: Any, tmp_path: Path) -> None:
    AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path / "mamba")
    is_one_sentence(say(tmp_path / "mamba"), "not supported", "mamba", "model.architecture")
    AutoConfig.for_model("llama4_text", hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path / "llama4")
    is_one_sentence(say(tmp_path / "llama4"), "llama4_text")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown/config.json").write_text('{"model_type": "of tomorrow"}', encoding="utf-8")
    is_one_sentence(say(tmp_path / "unknown"), "cannot be loaded")


@pytest.mark.parametrize("options", [[], ["--weights"], ["--json"]])
def test_doctor_says_that_there_is_no_such_model(say: Any, tmp_path: Path, options: list[str]) -> None:
    is_one_sentence(say(tmp_path / "nowhere", *options), "no such folder")
    (tmp_path / "empty").mkdir()
    is_one_sentence(say(tmp_path / "empty", *options), "empty cannot be loaded")
    is_one_sentence(say(tmp_path / "none.gguf", *options), "no such GGUF file")
    is_one_sentence(say(tmp_path / "none.yaml", *options), "no such recipe")


def test_doctor_refuses_a_dtype_and_a_device_that_are_none(say: Any, tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model")
    is_one_sentence(say(folder, "--weights", "--device", "toaster"), "toaster")
    is_one_sentence(say(folder, "--weights", "--dtype", "float7"), "float7")
