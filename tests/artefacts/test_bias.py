"""Steering written as biases into a checkpoint: the same logits as by hooks, from a folder that any server loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import steer2edit as s2e
from conftest import make_tokenizer
from families import FAMILIES, make_family
from steer2edit.artefacts.bias import export_steering
from steer2edit.errors import FileError, ModelError, Steer2EditError
from steer2edit.models.sites import find_sites

SHARDS = {"one file": "1GB", "sharded": "10KB"}
# Which switches bring a family its biases; none where it has them already.
SWITCHES = {
    "llama": {"attention_bias", "mlp_bias"},
    "granite": {"attention_bias", "mlp_bias"},
    "smollm3": {"attention_bias", "mlp_bias"},
    "gpt2": set(),
    "opt": set(),
    "opt, norm after": set(),
    "gpt_neox": set(),
}
REFUSED = {
    "mistral": r"model\.layers\.0\.self_attn\.o_proj",
    "qwen2": r"model\.layers\.0\.self_attn\.o_proj",
    "qwen3": r"model\.layers\.0\.mlp\.down_proj",
    "gemma2": r"model\.layers\.0\.mlp\.down_proj",
    "gemma3": r"model\.language_model\.layers\.0\.self_attn\.o_proj",
    "phi3": r"model\.layers\.0\.self_attn\.o_proj",
    "stablelm": r"model\.layers\.0\.self_attn\.o_proj",
    "cohere": r"model\.layers\.0\.mlp\.down_proj",
    "qwen3_5_text": r"model\.layers\.0\.linear_attn\.out_proj",
}
IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(5))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


def vectors_of(model: Any, block: str | None = None) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(9)
    blocks = dict.fromkeys(s.block_key for s in find_sites(model) if block in (None, s.block))
    return {key: torch.randn(find_sites(model)[0].d, generator=draw) for key in blocks}


def saved(model: Any, folder: Path, shard_size: str = "1GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard_size)
    make_tokenizer().save_pretrained(folder)
    return folder


def same_as_hooks(model: Any, vectors: dict[str, Tensor], gamma: float, out: Path) -> None:
    base = logits(model)
    with s2e.intervening(model, s2e.steering(vectors, gamma)):
        expected = logits(model)
    assert float((expected - base).abs().max()) > 0.1
    reloaded = AutoModelForCausalLM.from_pretrained(out, dtype=model.dtype).eval()
    torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shards", list(SHARDS))
@pytest.mark.parametrize("name", list(SWITCHES))
def test_a_reloaded_checkpoint_answers_as_under_hooks(name: str, shards: str, tmp_path: Path) -> None:
    model = make_family(name)
    vectors = vectors_of(model)
    base = saved(model, tmp_path / "base", SHARDS[shards])
    before = contents(base)
    assert export_steering(base, vectors, 0.3, tmp_path / "out") == tmp_path / "out"
    assert contents(base) == before
    assert names(tmp_path) == {"base", "out"}
    same_as_hooks(model, vectors, 0.3, tmp_path / "out")
    old, new = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("base", "out"))
    assert {key for key in new if new[key] != old.get(key)} == SWITCHES[name]
    assert all(new[switch] is True for switch in SWITCHES[name])
    out = contents(tmp_path / "out")
    assert all(out[file] == data for file, data in before.items() if "tokenizer" in file or "template" in file)


@pytest.mark.parametrize("shards", list(SHARDS))
def test_a_switch_brings_the_other_biases_as_zeros(shards: str, tmp_path: Path) -> None:
    model = make_family("llama")
    vectors = vectors_of(model)
    del vectors["1.mlp"]
    base = saved(model, tmp_path / "base", SHARDS[shards])
    export_steering(base, vectors, -0.5, tmp_path / "out")
    old, new = tensors(base), tensors(tmp_path / "out")
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    added = {name: new[name] for name in new.keys() - old.keys()}
    expected = {}
    for layer in range(2):
        where = f"model.layers.{layer}"
        expected |= {f"{where}.self_attn.o_proj.bias": -0.5 * vectors[f"{layer}.attn"]}
        expected |= {
            f"{where}.self_attn.{n}_proj.bias": torch.zeros(size) for n, size in (("q", 24), ("k", 12), ("v", 12))
        }
        expected |= {f"{where}.mlp.{n}_proj.bias": torch.zeros(40) for n in ("gate", "up")}
        expected |= {f"{where}.mlp.down_proj.bias": -0.5 * vectors.get(f"{layer}.mlp", torch.zeros(24))}
    assert added.keys() == expected.keys()
    assert all(torch.equal(added[name], tensor) for name, tensor in expected.items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == new.keys()
    for file in set(index.values()):
        assert {name for name in index if index[name] == file} == load_file(tmp_path / "out" / file).keys()
    same_as_hooks(model, vectors, -0.5, tmp_path / "out")


@pytest.mark.parametrize("block", ["attn", "mlp"])
def test_one_block_type_turns_one_switch_on(block: str, tmp_path: Path) -> None:
    model = make_family("llama")
    vectors = vectors_of(model, block)
    base = saved(model, tmp_path / "base")
    export_steering(base, vectors, 0.4, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (block == "attn", block == "mlp")
    same_as_hooks(model, vectors, 0.4, tmp_path / "out")


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_bias_that_is_there_is_added_to_and_nothing_else_changes(name: str, tmp_path: Path) -> None:
    model = make_family(name)
    vectors = vectors_of(model)
    base = saved(model, tmp_path / "base")
    export_steering(base, vectors, 0.3, tmp_path / "out")
    old, new = tensors(base), tensors(tmp_path / "out")
    assert old.keys() == new.keys()
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert len(changed) == len(vectors) == 4
    for site in find_sites(model):
        name = next(n for n in changed if site.module.endswith(n.removesuffix(".bias").split(".", 1)[-1]))
        torch.testing.assert_close(new[name], old[name] + 0.3 * vectors[site.block_key], rtol=0, atol=1e-6)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_bf16_checkpoint_gets_biases_in_bf16(tmp_path: Path) -> None:
    for name in ("llama", "opt"):
        model = make_family(name).to(torch.bfloat16)
        vectors = vectors_of(model)
        base = saved(model, tmp_path / name)
        out = export_steering(base, vectors, 0.3, tmp_path / f"{name}, steered")
        old, new = tensors(base), tensors(out)
        assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}
        bias = f"{find_sites(model)[0].module}.bias"
        before = old[bias].float() if bias in old else torch.zeros(24)
        assert torch.equal(new[bias], (before + 0.3 * vectors["0.attn"]).bfloat16())


def test_steering_may_be_written_onto_what_was_steered_already(tmp_path: Path) -> None:
    model = make_family("llama")
    vectors = vectors_of(model)
    saved(model, tmp_path / "base")
    export_steering(tmp_path / "base", vectors, 0.5, tmp_path / "once")
    export_steering(tmp_path / "once", vectors, -0.2, tmp_path / "twice")
    same_as_hooks(model, vectors, 0.3, tmp_path / "twice")


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_family_without_a_place_for_a_bias_is_refused_by_the_modules_name(name: str, tmp_path: Path) -> None:
    model = make_family(name)
    base = saved(model, tmp_path / "base")
    with pytest.raises(ModelError, match=f"cannot be written as biases .*no bias at {REFUSED[name]}\\)") as caught:
        export_steering(base, vectors_of(model), 0.3, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == {"base"}


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_the_mlp_blocks_of_a_mixture_are_refused(name: str, tmp_path: Path) -> None:
    model = make_family(name)
    base = saved(model, tmp_path / "base")
    experts = {row.key.rsplit(".", 1)[0] for row in FAMILIES[name].rows if row.expert is not None}
    for key in sorted(experts):
        with pytest.raises(ModelError, match=f"into a mixture of experts .*block {key} has no projection"):
            export_steering(base, {key: torch.ones(24)}, 0.3, tmp_path / "out")
    assert names(tmp_path) == {"base"}


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("already", [False, True], ids=["switched on", "on already"])
def test_the_attention_of_a_mixture_is_steered_where_its_configuration_has_a_switch(
    name: str, already: bool, tmp_path: Path
) -> None:
    model = make_family(name, attention_bias=already)
    vectors = vectors_of(model, "attn")
    base = saved(model, tmp_path / "base")
    assert json.loads((base / "config.json").read_text())["attention_bias"] is already
    export_steering(base, vectors, 0.3, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["attention_bias"] is True
    same_as_hooks(model, vectors, 0.3, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"2.attn": torch.ones(24)}, r"blocks that the model does not have .*2\.attn"),
        ({"0.moe": torch.ones(24)}, r"blocks that the model does not have .*0\.moe"),
        ({"model.layers.0": torch.ones(24)}, "blocks that the model does not have"),
        ({"0.attn": torch.ones(23)}, r"the vector of 0\.attn cannot be used .*\(23,\)"),
        ({"0.attn": torch.ones(1, 24)}, r"the vector of 0\.attn cannot be used"),
        ({"0.attn": torch.full((24,), torch.nan)}, r"the vector of 0\.attn cannot be used"),
        ({"1.mlp": torch.full((24,), torch.inf)}, r"the vector of 1\.mlp cannot be used"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(change: dict[str, Tensor], says: str, tmp_path: Path) -> None:
    model = make_family("llama")
    base = saved(model, tmp_path / "base")
    with pytest.raises(ModelError, match=says):
        export_steering(base, vectors_of(model) | change, 0.3, tmp_path / "out")
    assert names(tmp_path) == {"base"}


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("gamma", [float("nan"), float("inf"), 1e300])
def test_a_strength_that_makes_no_finite_bias_is_refused(name: str, gamma: float, tmp_path: Path) -> None:
    model = make_family(name)
    base = saved(model, tmp_path / "base")
    with pytest.raises(Steer2EditError, match="finite"):
        export_steering(base, vectors_of(model), gamma, tmp_path / "out")
    assert names(tmp_path) == {"base"}


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_bias_that_overflows_fp16_is_refused(name: str, tmp_path: Path) -> None:
    model = make_family(name).half()
    base = saved(model, tmp_path / "base")
    with pytest.raises(Steer2EditError, match="finite"):
        export_steering(base, vectors_of(model), 1e6, tmp_path / "out")
    assert names(tmp_path) == {"base"}


def test_an_output_that_is_there_is_refused_and_left_alone(tmp_path: Path) -> None:
    model = make_family("llama")
    base = saved(model, tmp_path / "base")
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for out in ("out", "file", "base"):
        with pytest.raises(FileError, match="exists already"):
            export_steering(base, vectors_of(model), 0.3, tmp_path / out)
    assert contents(tmp_path) == before


def test_an_output_inside_the_base_is_refused(tmp_path: Path) -> None:
    model = make_family("llama")
    base = saved(model, tmp_path / "base")
    before = contents(base)
    with pytest.raises(FileError):
        export_steering(base, vectors_of(model), 0.3, base / "out")
    assert contents(base) == before


def test_weights_in_other_formats_do_not_come_along_unsteered(tmp_path: Path) -> None:
    model = make_family("llama")
    base = saved(model, tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(b"the base's weights")
    (base / "model.gguf").write_bytes(b"the base's weights")
    export_steering(base, vectors_of(model), 0.3, tmp_path / "out")
    assert not {"pytorch_model.bin", "model.gguf"} & names(tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_nothing_is_left_of_an_export_that_fails(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steer2edit.artefacts import bias

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    model = make_family(name)
    base = saved(model, tmp_path / "base")
    before = contents(base)
    monkeypatch.setattr(bias, "_add_shard" if name == "llama" else "_add", fail)
    with pytest.raises((OSError, Steer2EditError)):
        export_steering(base, vectors_of(model), 0.3, tmp_path / "out")
    assert names(tmp_path) == {"base"}
    assert contents(base) == before


def test_a_base_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    vectors = {"0.attn": torch.ones(24)}
    (tmp_path / "empty").mkdir()
    base = saved(make_family("llama"), tmp_path / "base")
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-1])
    for folder in ("nowhere", "empty", "base"):
        with pytest.raises(Steer2EditError):
            export_steering(tmp_path / folder, vectors, 0.3, tmp_path / "out")
    assert names(tmp_path) == {"empty", "base"}


def test_a_base_of_links_into_a_cache_is_copied_and_the_cache_left_alone(tmp_path: Path) -> None:
    model = make_family("opt")
    blobs = saved(model, tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    before = contents(blobs)
    vectors = vectors_of(model)
    export_steering(snapshot, vectors, 0.3, tmp_path / "out")
    assert contents(blobs) == before
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    same_as_hooks(model, vectors, 0.3, tmp_path / "out")
