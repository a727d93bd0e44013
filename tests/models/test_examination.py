"""The examination counts every parameter once and says what memory is needed; and the command that shows it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

import steer2edit as s2e
from conftest import VOCABULARY, make_pico
from families import ALL, FAMILIES, make_family
from runs import Said, is_one_sentence, said_by, save_pico, tiny_recipe
from steer2edit.engines.slots import SlotCache
from steer2edit.models.inventory import examine
from steer2edit.models.load import empty_model
from steer2edit.models.selfcheck import self_check
from steer2edit.models.sites import find_sites, module_of

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
