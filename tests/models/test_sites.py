"""Where each family writes into the residual stream, against a table written by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from families import make_family, make_model
from steer2edit.errors import ModelError
from steer2edit.method.site import Site, same_sites
from steer2edit.models.sites import find_sites, module_of
from steer2edit.models.weights import weight_of

SITES = [
    # model_type, overrides, heads, head_dim
    ("llama", {}, 4, 8),
    ("llama", {"num_attention_heads": 8, "num_key_value_heads": 2}, 8, 4),
    ("llama", {"head_dim": 16}, 4, 16),
    ("mistral", {}, 4, 8),
    ("qwen2", {}, 4, 8),
    ("qwen3", {}, 4, 8),
    ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}, 4, 16),
]


@pytest.mark.parametrize(("model_type", "overrides", "heads", "head_dim"), SITES)
def test_each_family_has_its_output_and_down_projections(
    pico: Any, model_type: str, overrides: dict[str, Any], heads: int, head_dim: int
) -> None:
    model = pico(model_type, num_hidden_layers=2, **overrides)
    attn, mlp = "self_attn.o_proj", "mlp.down_proj"

    def site(layer: int, block: Any, path: str, n: int, width: int) -> Site:
        name = f"layers.{layer}.{path}"  # and so it is called in files that were written of the body alone
        return Site(
            layer, block, f"model.{name}", f"model.{name}.weight", 32, n, width, aliases=(f"{name}.weight",)
        )  # fmt: skip

    assert find_sites(model) == (
        site(0, "attn", attn, heads, head_dim),
        site(0, "mlp", mlp, 48, 1),
        site(1, "attn", attn, heads, head_dim),
        site(1, "mlp", mlp, 48, 1),
    )


def test_a_component_is_its_own_columns(pico: Any) -> None:
    model = pico("qwen3", head_dim=16)
    attn, mlp = find_sites(model)[:2]
    o_proj, down_proj = model.model.layers[0].self_attn.o_proj.weight, model.model.layers[0].mlp.down_proj.weight
    assert weight_of(model, attn).data_ptr() == o_proj.data_ptr()
    assert module_of(model, mlp) is model.model.layers[0].mlp.down_proj
    assert torch.equal(weight_of(model, attn).view(attn.d, attn.n, attn.width)[:, 2], o_proj[:, 32:48])
    assert torch.equal(weight_of(model, mlp).view(mlp.d, mlp.n, mlp.width)[:, 2, 0], down_proj[:, 2])
    assert (attn.key, attn.inputs, mlp.key, mlp.inputs) == ("0.attn", 64, "0.mlp", 48)
    for site in (attn, mlp):
        assert (site.block_key, site.block_module, site.place) == (site.key, site.module, site.module)


def test_an_experts_weight_is_its_own_part_upright_and_in_place() -> None:
    for name in ("mixtral", "gpt_oss"):
        model = make_family(name)
        sites = {site.key: site for site in find_sites(model)}
        site, down = sites["1.mlp.2"], model.model.layers[1].mlp.experts.down_proj
        assert (site.block_key, site.block_module) == ("1.mlp", "model.layers.1.mlp")
        assert site.place == "model.layers.1.mlp.experts.down_proj[2]"
        weight = weight_of(model, site)
        assert weight.shape == (24, 40)
        assert torch.equal(weight, down[2].T if name == "gpt_oss" else down[2])
        before = down.detach().clone()
        with torch.no_grad():
            weight[:, 7] += 1
        before[2, 7, :] += name == "gpt_oss"
        before[2, :, 7] += name != "gpt_oss"
        assert torch.equal(down, before)


def test_a_shared_expert_is_a_site_of_its_own_in_its_experts_block() -> None:
    site = find_sites(make_family("qwen2_moe"))[-1]
    assert (site.key, site.expert, site.shared) == ("1.mlp.shared", None, True)
    assert (site.block_key, site.block_module) == ("1.mlp", "model.layers.1.mlp")
    assert site.place == "model.layers.1.mlp.shared_expert.down_proj"


def test_weights_that_lie_the_other_way_are_read_upright() -> None:
    model = make_family("gpt2")
    attn, mlp = find_sites(model)[:2]
    layer = model.transformer.h[0]
    assert torch.equal(weight_of(model, attn), layer.attn.c_proj.weight.T)
    assert weight_of(model, mlp).shape == (24, 40)
    assert weight_of(model, mlp).data_ptr() == layer.mlp.c_proj.weight.data_ptr()


@pytest.mark.parametrize(("model_type", "overrides", "heads", "head_dim"), SITES)
def test_the_checkpoint_has_the_tensors_that_the_sites_name(
    pico: Any, model_type: str, overrides: dict[str, Any], heads: int, head_dim: int
) -> None:
    model = pico(model_type, **overrides)
    tensors = model.state_dict()
    for site in find_sites(model):
        assert tensors[site.tensor].shape == (site.d, site.inputs)


def test_sites_are_found_without_weights(pico: Any) -> None:
    model = pico()
    expected = find_sites(model)
    empty = model.to("meta")
    assert find_sites(empty) == expected
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.o_proj is not in memory.*meta"):
        weight_of(empty, expected[0])


def test_a_quantised_weight_is_refused(pico: Any) -> None:
    model = pico()
    site = find_sites(model)[1]
    module = module_of(model, site)
    module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.down_proj is not floating point.*torch\.int8"):
        weight_of(model, site)


def test_an_unsupported_family_is_refused_by_name() -> None:
    expected = (
        r"not supported \(got: model_type 'mamba', whose layers .*Supported model types: llama, mistral, mixtral, "
    )
    with pytest.raises(ModelError, match=expected):
        find_sites(make_model("mamba"))


@pytest.mark.parametrize("missing", ["self_attn.o_proj", "mlp.down_proj", "mlp"])
def test_a_missing_module_is_refused_by_name(pico: Any, missing: str) -> None:
    model = pico()
    holder, _, name = missing.rpartition(".")
    delattr(model.model.layers[1].get_submodule(holder), name)
    expected = "mlp.down_proj" if missing == "mlp" else missing
    with pytest.raises(ModelError, match=rf"no linear map model\.layers\.1\.{expected}"):
        find_sites(model)


def test_a_module_that_is_no_linear_map_is_refused(pico: Any) -> None:
    model = pico()
    model.model.layers[2].mlp.down_proj = torch.nn.LayerNorm(32)
    with pytest.raises(ModelError, match=r"no linear map model\.layers\.2\.mlp\.down_proj"):
        find_sites(model)


def test_shapes_that_the_family_does_not_have_are_refused(pico: Any) -> None:
    model = pico()
    model.model.layers[0].self_attn.o_proj = torch.nn.Linear(30, 32)
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.o_proj .*got: weight 32 × 30, 4 components"):
        find_sites(model)
    model = pico()
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(48, 16)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj .*got: weight 16 × 48.*stream 32"):
        find_sites(model)


def test_a_body_without_its_head_and_a_model_with_layers_missing_are_refused(pico: Any) -> None:
    with pytest.raises(ModelError, match=r"has no model\.layers \(got: LlamaModel\)"):
        find_sites(pico().model)
    model = pico()
    del model.model.layers[2]
    with pytest.raises(ModelError, match="2 layers, num_hidden_layers = 3"):
        find_sites(model)


def test_a_site_comes_back_from_json_and_no_other_row_does(pico: Any) -> None:
    site = find_sites(pico())[3]
    row = site.to_json()
    assert row == {
        "layer": 1, "block": "mlp", "module": "model.layers.1.mlp.down_proj",
        "tensor": "model.layers.1.mlp.down_proj.weight", "d": 32, "n": 48, "width": 1,
        "aliases": ("layers.1.mlp.down_proj.weight",),
    }  # fmt: skip
    assert Site.from_json(row) == site
    assert Site.from_json(json.loads(json.dumps(row))) == site
    assert "aliases" not in replace(site, aliases=()).to_json()
    bad_rows: list[dict[str, Any]] = [
        {"block": "moe"}, {"layer": -1}, {"n": 1.5}, {"d": True}, {"tensor": 3}, {"aliases": [1]}, {"output": None},
        {"expert": 0}, {"expert": 4, "experts": 4}, {"expert": -1, "experts": 4}, {"expert": 0, "experts": 0},
    ]  # fmt: skip
    for bad in bad_rows:
        with pytest.raises(ValueError, match="no site"):
            Site.from_json(row | bad)


def test_an_experts_row_says_where_it_lies_and_a_shared_ones_that_it_is_shared() -> None:
    sites = {site.key: site for site in find_sites(make_family("gpt_oss"))}
    row = sites["0.mlp.3"].to_json()
    fused = "model.layers.0.mlp.experts"
    assert row == {
        "layer": 0, "block": "mlp", "module": fused, "tensor": f"{fused}.down_proj", "d": 24, "n": 40, "width": 1,
        "parameter": "down_proj", "expert": 3, "experts": 4, "transposed": True, "output": "model.layers.0.mlp",
        "aliases": ("layers.0.mlp.experts.down_proj",),
    }  # fmt: skip
    assert Site.from_json(json.loads(json.dumps(row))) == sites["0.mlp.3"]
    shared = find_sites(make_family("deepseek_v3"))[-1]
    assert shared.to_json()["shared"] is True
    assert Site.from_json(json.loads(json.dumps(shared.to_json()))) == shared


def test_files_may_call_an_expert_by_any_of_its_names() -> None:
    site = {site.key: site for site in find_sites(make_family("mixtral"))}["1.mlp.2"]
    assert (site.tensor, *site.aliases) == (
        "model.layers.1.block_sparse_moe.experts.2.w2.weight",
        "layers.1.block_sparse_moe.experts.2.w2.weight",
        "model.layers.1.mlp.experts.down_proj",
        "layers.1.mlp.experts.down_proj",
    )


def test_another_models_sites_are_not_the_same(pico: Any) -> None:
    sites = find_sites(pico())
    same_sites(sites, sites[2:], "the edit")
    with pytest.raises(ModelError, match=r"the edit was made on another model: site 0\.attn.*got: 32 × 4 × 16"):
        same_sites(find_sites(pico("qwen3", head_dim=16)), sites, "the edit")
    with pytest.raises(ModelError, match=r"site 2\.attn.*got: no such site"):
        same_sites(sites[:4], sites, "the probe")
