"""What a recipe says of a model: how it is loaded, described and spoken to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes import _raw, _with, _write
from runs import tiny_recipe
from steer2edit.engines import plan
from steer2edit.errors import RecipeError
from steer2edit.models.architectures import Architecture, Experts, Heads
from steer2edit.pipeline.run import Run
from steer2edit.probing.chat import CHAT, Chat
from steer2edit.recipe import load_recipe, parse_recipe, shipped_recipes

NEW = {
    "model": ["device_map", "max_memory", "offload_folder", "plain", "enable_thinking", "date", "architecture"],
    "probe": ["part", "expert_tokens"],
}


def test_a_recipe_without_the_later_keys_is_the_one_with_their_defaults(tmp_path: Path) -> None:
    raw: dict[str, Any] = _raw()
    for section, keys in NEW.items():
        for key in keys:
            del raw[section][key]
    recipe = parse_recipe(raw)
    assert recipe == tiny_recipe()
    assert recipe.model.chat == CHAT == Chat(plain=False, enable_thinking=None, date="2026-01-01")
    assert (recipe.model.device_map, recipe.model.architecture, recipe.probe.part) == (None, None, "both")
    assert Run(tmp_path, recipe).keys == Run(tmp_path, tiny_recipe()).keys
    for name in shipped_recipes():
        assert load_recipe(name).model.chat == CHAT
        assert load_recipe(name).model.device_map is None


def test_everything_in_the_model_section_reaches_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(plan, "load_model", lambda name, **how: asked.update(how, name=name))
    plan.load_section(tiny_recipe().model)
    assert asked == {
        "name": "nowhere", "dtype": "float32", "device": "cpu", "revision": None, "trust_remote_code": False,
        "device_map": None, "max_memory": None, "offload_folder": None, "architecture": None,
    }  # fmt: skip
    raw = _with("model.architecture", {"mlp": "ff.w2"})
    raw["model"] |= {"device_map": "auto", "max_memory": {"0": "20GiB", "cpu": "60GiB"}, "offload_folder": "there"}
    plan.load_section(parse_recipe(raw).model)
    assert asked["device_map"] == "auto"
    assert asked["max_memory"] == {"0": "20GiB", "cpu": "60GiB"}
    assert asked["offload_folder"] == "there"
    assert asked["architecture"] == Architecture(mlp="ff.w2")


@pytest.mark.parametrize(
    ("described", "meant"),
    [
        ({}, Architecture()),
        ({"layers": "model.blocks", "mlp": "ff.w2"}, Architecture(layers="model.blocks", mlp="ff.w2")),
        (
            {"attn": [{"path": "attn.out"}, {"path": "mixer.out", "count": "mixer_heads"}]},
            Architecture(attn=(Heads("attn.out"), Heads("mixer.out", "mixer_heads"))),
        ),
        (
            {"experts": {"path": "moe.experts", "block": "moe", "transposed": True, "stored": None}},
            Architecture(experts=Experts("moe.experts", "moe", transposed=True, stored=None)),
        ),
        (
            {"attn_norm": "norm_1", "mlp_norm": "norm_2", "factor": "scale", "transposed": True, "stored": ["h"]},
            Architecture(attn_norm="norm_1", mlp_norm="norm_2", factor="scale", transposed=True, stored=("h",)),
        ),
    ],
)
def test_a_recipe_describes_an_architecture(described: dict[str, Any], meant: Architecture) -> None:
    recipe = parse_recipe(_with("model.architecture", described))
    assert recipe.model.architecture == meant
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_an_override_describes_an_architecture_too(tmp_path: Path) -> None:
    file = _write(tmp_path, yaml.safe_dump(_raw()))
    recipe = load_recipe(file, ["model.architecture={mlp: ff.w2, attn: [{path: attn.out}]}"])
    assert recipe.model.architecture == Architecture(mlp="ff.w2", attn=(Heads("attn.out"),))


@pytest.mark.parametrize(
    ("described", "key"),
    [
        ({"layer": "model.blocks"}, "layer"),
        ({"attn": [{"path": "attn.out", "heads": "n_head"}]}, "attn.0.heads"),
        ({"attn": [{"path": "attn.out"}, {"pth": "attn.out"}]}, "attn.1.pth"),
        ({"experts": {"gate": "router"}}, "experts.gate"),
    ],
)
def test_an_unknown_key_of_an_architecture_is_refused_by_its_name(described: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError, match=rf"model\.architecture\.{key.replace('.', chr(92) + '.')} ") as caught:
        parse_recipe(_with("model.architecture", described))
    assert caught.value.fix.endswith((".", "?"))


@pytest.mark.parametrize(
    ("described", "key"),
    [
        ("llama", ""),
        (["model.layers"], ""),
        ({"mlp": 3}, ".mlp"),
        ({"transposed": "maybe"}, ".transposed"),
        ({"attn": "self_attn.o_proj"}, ".attn"),
        ({"attn": [{"count": 4}]}, ".attn.0.count"),
        ({"experts": "mlp.experts"}, ".experts"),
        ({"experts": {"shared": ["a"]}}, ".experts.shared"),
    ],
)
def test_a_value_that_an_architecture_cannot_take_is_refused_with_its_key(described: Any, key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(_with("model.architecture", described))
    assert caught.value.what == f"the recipe's model.architecture{key} cannot be used"


@pytest.mark.parametrize("date", ["2026-02-30", "2025-02-29", "yesterday", "", "01.02.2026", 20260101, True, None])
def test_a_date_that_is_none_is_refused(date: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(_with("model.date", date))
    assert caught.value.what == "the recipe's model.date cannot be used"
    assert caught.value.got == repr(date)


@pytest.mark.parametrize("written", ["2024-02-29", "'2024-02-29'", '"2024-02-29"'])
def test_a_date_is_read_with_and_without_quotation_marks(written: str, tmp_path: Path) -> None:
    recipe = load_recipe(_write(tmp_path, yaml.safe_dump(_raw())), [f"model.date={written}"])
    assert recipe.model.chat == Chat(date="2024-02-29")
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("part", ["both", "thinking", "answer"])
def test_each_part_of_a_response_may_be_probed(part: str) -> None:
    assert parse_recipe(_with("probe.part", part)).probe.part == part


@pytest.mark.parametrize("place", ["auto", "balanced", "sequential", None])
def test_a_device_map_is_one_of_accelerates(place: str | None) -> None:
    assert parse_recipe(_with("model.device_map", place)).model.device_map == place


@pytest.mark.parametrize(("written", "meant"), [("true", True), ("off", False), ("null", None)])
def test_thinking_is_on_off_or_the_models_own_default(written: str, meant: bool | None, tmp_path: Path) -> None:
    recipe = load_recipe(_write(tmp_path, yaml.safe_dump(_raw())), [f"model.enable_thinking={written}"])
    assert recipe.model.chat.enable_thinking is meant


@pytest.mark.parametrize(
    ("key", "value", "stage", "before"),
    [
        ("probe.part", "answer", "probe", "traces"),
        ("probe.expert_tokens", 3, "score", "probe"),
        ("model.date", "2024-02-29", "traces", None),
        ("model.enable_thinking", False, "traces", None),
        ("model.plain", True, "traces", None),
        ("model.architecture", {"mlp": "ff.w2"}, "traces", None),
    ],
)
def test_a_later_key_makes_its_own_stage_run_again_and_none_before_it(
    key: str, value: Any, stage: str, before: str | None, tmp_path: Path
) -> None:
    keys, other = Run(tmp_path, tiny_recipe()).keys, Run(tmp_path, parse_recipe(_with(key, value))).keys
    assert keys[stage] != other[stage]
    assert keys["report"] != other["report"]
    assert before is None or keys[before] == other[before]
