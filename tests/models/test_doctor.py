"""The self-check passes on what is right and names what is wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import steer2edit as s2e
from conftest import VOCABULARY
from families import ALL, FAMILIES, make_family, make_model
from steer2edit.errors import ModelError, ProbeError
from steer2edit.models import architectures as architectures_module
from steer2edit.models.architectures import Architecture, architecture_of, describe_as
from steer2edit.models.inventory import examine
from steer2edit.models.selfcheck import TOKENS, self_check
from steer2edit.models.weights import read_weight

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
