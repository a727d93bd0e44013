"""Edits written for other tools: PEFT adapters and whole checkpoints, and scores read from a checkpoint's files."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import steer2edit as s2e
from steer2edit.errors import EditError, FileError, ModelError, ProbeError, Steer2EditError
from steer2edit.models.sites import find_sites

MakeEdit = Callable[..., s2e.Edit]
SHARDS = {"one file": "1GB", "sharded": "20KB"}


def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(params=list(SHARDS))
def shard_size(request: pytest.FixtureRequest) -> str:
    return SHARDS[request.param]


def saved(model: Any, folder: Path, shard_size: str = "1GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard_size)
    files = len(list(folder.glob("*.safetensors")))
    assert (files > 2) == (shard_size != "1GB")
    return folder


# Adapters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho_attn", "rho_mlp", "modules"),
    [(0.2, 0.2, {"o_proj", "down_proj"}), (0.2, None, {"o_proj"}), (None, 0.2, {"down_proj"})],
)
@pytest.mark.parametrize("strength", [1.0, -0.4])
def test_an_adapter_is_the_edit_through_peft(
    pico: Any,
    make_edit: MakeEdit,
    tmp_path: Path,
    recwarn: Any,
    rho_attn: float | None,
    rho_mlp: float | None,
    modules: set[str],
    strength: float,
) -> None:
    model = pico("qwen3", head_dim=16)
    edit = make_edit(model, rho_attn, rho_mlp, 0.2).with_strength(strength)
    assert edit.save_adapter(tmp_path / "adapter", base="the/base") == tmp_path / "adapter"
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter"))
    assert not [w for w in recwarn if "adapter keys" in str(w.message)]
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha) == (1, 1)
    assert {name.rsplit(".", 1)[-1] for name in config.target_modules} == modules
    assert config.base_model_name_or_path == "the/base"
    base = logits(model)
    edit.apply(model)
    torch.testing.assert_close(logits(adapted), logits(model), rtol=0, atol=1e-4)
    assert float((logits(model) - base).abs().max()) > 0.1
    merged = adapted.merge_and_unload()
    for site in find_sites(model):
        here, there = merged.get_submodule(site.module).weight, model.get_submodule(site.module).weight
        torch.testing.assert_close(here, there, rtol=0, atol=1e-6)


def test_a_layer_that_a_sparse_edit_leaves_alone_gets_a_zero_row(
    pico: Any, make_edit: MakeEdit, tmp_path: Path
) -> None:
    model = pico()
    scored = make_edit(model).sites.values()
    largest = sorted(float(s.g.abs().max()) for s in scored if s.site.block == "attn")
    sparse = make_edit(model, 1.0, None, (largest[-1] + largest[-2]) / 2)
    (key,) = sparse.edited()
    sparse.save_adapter(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 6
    for site in find_sites(model)[::2]:
        row = tensors[f"base_model.model.{site.module}.lora_A.weight"]
        assert row.shape == (1, site.inputs)
        assert bool((row != 0).any()) == (site.key == key)
        column = tensors[f"base_model.model.{site.module}.lora_B.weight"][:, 0]
        assert torch.equal(column, sparse.sites[site.key].u if site.key == key else torch.zeros(32))


def test_an_edit_of_some_layers_alone_loads_whole_through_peft(
    pico: Any, tokenizer: Any, traces: Any, tmp_path: Path, recwarn: Any
) -> None:
    model = pico()
    probe = s2e.collect(model, tokenizer, *traces)
    scores = s2e.score(model, probe, vectors={1: torch.randn(32)})
    edit = scores.edit(rho_attn=0.1, rho_mlp=0.1, alpha=0.0)
    edit.save_adapter(tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter"))
    assert not [str(w.message) for w in recwarn if "adapter keys" in str(w.message)]
    targeted = [name for name, _ in adapted.named_modules() if name.endswith("lora_A.default")]
    assert len(targeted) == len(edit.edited()) == 2  # a layer without a vector is no part of the adapter
    with edit.applied(model):
        torch.testing.assert_close(logits(adapted), logits(model), rtol=0, atol=1e-4)


def test_an_adapter_says_where_it_came_from(pico: Any, make_edit: MakeEdit, tmp_path: Path) -> None:
    model = pico()
    model.config._name_or_path = "pico/llama"
    edit = make_edit(model).with_strength(0.5)
    edit.save_adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "pico/llama"
    part = {"id": edit.id, "config": {"rho_attn": 0.3, "rho_mlp": 0.3, "alpha": 0.3}, "strength": 0.5}
    expected = {"edit": edit.id, "parts": [part]}
    assert json.loads((tmp_path / "adapter" / "steer2edit.json").read_text()) == expected
    edit.with_strength(0.25).save_adapter(tmp_path / "adapter")  # an adapter is written over the old one
    assert json.loads((tmp_path / "adapter" / "steer2edit.json").read_text())["parts"][0]["strength"] == 0.25
    assert list(tmp_path.iterdir()) == [tmp_path / "adapter"]


def test_a_folder_with_other_things_in_it_is_not_wiped_for_an_adapter(
    pico: Any, make_edit: MakeEdit, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    edit = make_edit(pico())
    with contextlib.suppress(Steer2EditError):  # refused, or written beside it
        edit.save_adapter(tmp_path / "mine")
    assert contents(tmp_path / "mine").get("thesis.txt") == b"years of work"


def test_an_edit_that_changes_nothing_is_not_written(pico: Any, make_edit: MakeEdit, tmp_path: Path) -> None:
    model = pico()
    nothing = make_edit(model, 1.5, None, 0.99)
    assert nothing.summary()["attn"]["edited"] == 0
    base = saved(model, tmp_path / "base")
    with pytest.raises(EditError, match="changes nothing"):
        nothing.save_adapter(tmp_path / "adapter")
    with pytest.raises(EditError, match="changes nothing"):
        s2e.export_checkpoint(base, nothing, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [base]


# Checkpoints --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_an_exported_checkpoint_is_apply_and_save_pretrained_bit_for_bit(
    pico: Any, make_edit: MakeEdit, tmp_path: Path, shard_size: str, dtype: torch.dtype
) -> None:
    model = pico("qwen2", dtype=dtype, tie_word_embeddings=True)
    edit = make_edit(model, 0.2, 0.4, 0.5).with_strength(0.3)
    base = saved(model, tmp_path / "base", shard_size)
    (base / "notes").mkdir()
    (base / "notes" / "read me.txt").write_text("ünchanged")
    before = contents(base)
    assert s2e.export_checkpoint(base, edit, tmp_path / "out") == tmp_path / "out"
    edit.apply(model)
    expected = contents(saved(model, tmp_path / "expected", shard_size))
    out = contents(tmp_path / "out")
    manifest = json.loads(out.pop("manifest.json"))
    assert contents(base) == before
    assert out.keys() == before.keys()
    assert set(manifest["tensors"]) == {s.site.tensor for s in edit.edited().values()}
    for name, data in out.items():
        assert data == (expected if name.endswith(".safetensors") else before)[name], name
    assert {name for name in out if out[name] != before[name]} == changed_files(base, edit)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    assert torch.equal(logits(reloaded), logits(model))


def changed_files(base: Path, edit: s2e.Edit) -> set[str]:
    """The files that hold an edited tensor."""
    if (base / "model.safetensors").is_file():
        return {"model.safetensors"}
    where = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    return {where[s.site.tensor] for s in edit.edited().values()}


def test_only_the_edited_columns_of_the_edited_tensors_change(pico: Any, make_edit: MakeEdit, tmp_path: Path) -> None:
    model = pico()
    edit = make_edit(model, 0.2, 0.6, 0.5)
    base = saved(model, tmp_path / "base")
    s2e.export_checkpoint(base, edit, tmp_path / "out")
    old, new = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    by_tensor = {s.site.tensor: s for s in edit.edited().values()}
    assert old.keys() == new.keys()
    for name, weight in new.items():
        if name not in by_tensor:
            assert torch.equal(weight, old[name])
            continue
        site = by_tensor[name]
        torch.testing.assert_close(weight - old[name], site.delta(), rtol=0, atol=1e-6)
        left = site.row == 0
        assert torch.equal(weight[:, left], old[name][:, left])
    assert any(bool((s.row == 0).any()) for s in by_tensor.values())


def test_a_base_of_links_into_a_cache_is_copied_and_the_cache_left_alone(
    pico: Any, make_edit: MakeEdit, tmp_path: Path
) -> None:
    model = pico()
    edit = make_edit(model)
    blobs = saved(model, tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    before = contents(blobs)
    s2e.export_checkpoint(snapshot, edit, tmp_path / "out")
    assert contents(blobs) == before
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    assert contents(tmp_path / "out")["model.safetensors"] != before["model.safetensors"]


def test_an_existing_folder_another_model_and_an_edited_base_are_refused(
    pico: Any, make_edit: MakeEdit, tmp_path: Path, shard_size: str
) -> None:
    model = pico()
    edit = make_edit(model)
    base, stranger = saved(model, tmp_path / "base", shard_size), saved(pico(seed=1), tmp_path / "stranger", shard_size)
    small = saved(pico(num_hidden_layers=2), tmp_path / "small", shard_size)
    edited = s2e.export_checkpoint(base, edit, tmp_path / "edited")
    there = contents(tmp_path)
    with pytest.raises(FileError, match="exists already"):
        s2e.export_checkpoint(base, edit, edited)
    with pytest.raises(ModelError, match=r"not the base .*6 of 6 sites"):
        s2e.export_checkpoint(stranger, edit, tmp_path / "out")
    with pytest.raises(FileError, match=r"has no tensor model\.layers\.2"):
        s2e.export_checkpoint(small, edit, tmp_path / "out")
    with pytest.raises(EditError, match="already in this model"):
        s2e.export_checkpoint(edited, edit, tmp_path / "out")
    with pytest.raises(FileError, match="holds no safetensors checkpoint"):
        s2e.export_checkpoint(tmp_path / "nowhere", edit, tmp_path / "out")
    assert contents(tmp_path) == there


def test_a_model_of_another_shape_is_refused(pico: Any, make_edit: MakeEdit, tmp_path: Path) -> None:
    edit = make_edit(pico())
    wider = saved(pico(intermediate_size=64), tmp_path / "wider")
    with pytest.raises(ModelError):
        s2e.export_checkpoint(wider, edit, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [wider]


def test_a_dtype_that_is_not_plain_floating_point_is_refused_and_leaves_nothing(
    pico: Any, make_edit: MakeEdit, tmp_path: Path
) -> None:
    model = pico()
    edit = make_edit(model)
    base = saved(model.double(), tmp_path / "base")
    with pytest.raises(FileError, match=r"self_attn\.o_proj\.weight is not .*got: F64"):
        s2e.export_checkpoint(base, edit, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [base]


# A checkpoint's files -----------------------------------------------------------------------------------------------


def test_scores_from_a_folder_are_those_of_the_model(variant: Any, tokenizer: Any, traces: Any, tmp_path: Path) -> None:
    probe = s2e.collect(variant, tokenizer, *traces)
    expected = s2e.score(variant, probe)
    folders = [saved(variant, tmp_path / name, size) for name, size in SHARDS.items()]
    for source in (*folders, AutoModelForCausalLM.from_pretrained(folders[0], dtype=variant.dtype)):
        here = s2e.score(source, probe)
        assert list(here.sites) == list(expected.sites)
        for key, s in here.sites.items():
            for field in ("u", "k", "g", "reach"):
                assert torch.equal(getattr(s, field), getattr(expected.sites[key], field))
            assert (s.site, s.v_norm) == (expected.sites[key].site, expected.sites[key].v_norm)
            assert torch.equal(here.fingerprint[key], expected.fingerprint[key])
        assert here.provenance == expected.provenance


def test_given_vectors_take_the_place_of_the_probes(pico: Any, tokenizer: Any, traces: Any) -> None:
    model = pico()
    probe = s2e.collect(model, tokenizer, *traces)
    expected = s2e.score(model, probe)
    same = s2e.score(model, probe, vectors={site.key: probe.vector(site) for site in probe.sites})
    for key, s in expected.sites.items():
        assert torch.equal(same.sites[key].g, s.g)
    v = torch.randn(32)
    assert all(torch.equal(s.u, v / v.norm()) for s in s2e.score(model, probe, vectors=v).sites.values())
    some = s2e.score(model, probe, vectors={1: v, "1.mlp": -v, "2.attn": torch.zeros(32)})
    assert list(some.sites) == ["1.attn", "1.mlp", "2.attn"]
    assert torch.equal(some.sites["1.mlp"].u, -some.sites["1.attn"].u)
    assert some.provenance["vectors"] == "given"
    assert some.provenance["sites_without_vector"] == ["0.attn", "0.mlp", "2.mlp"]
    assert some.provenance["sites_with_zero_vector"] == ["2.attn"]
    for bad, says in (
        (torch.randn(31), r"site 0\.attn cannot be used .*\(31,\)"),
        ({1: torch.full((32,), torch.nan)}, r"site 1\.attn .*finite: False"),
        ({3: v}, r"the model does not have .*3"),
        ({"1.moe": v, 1: v}, r"1\.moe"),
        ({}, "no vector is given"),
    ):
        with pytest.raises(ProbeError, match=says):
            s2e.score(model, probe, vectors=bad)


def test_a_probe_of_another_model_is_refused(pico: Any, tokenizer: Any, traces: Any, tmp_path: Path) -> None:
    probe = s2e.collect(pico(), tokenizer, *traces)
    with pytest.raises(ModelError, match="the probe was made on another model"):
        s2e.score(pico(intermediate_size=64), probe)
    wider = saved(pico(intermediate_size=64), tmp_path / "wider")
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.down_proj\.weight should be 32 × 48 .*\(32, 64\)"):
        s2e.score(wider, probe)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "none.safetensors", "sub/../../x.safetensors", "..", 7, ["a"]], ids=str
)
def test_an_index_that_names_a_file_elsewhere_is_refused(
    pico: Any, tokenizer: Any, traces: Any, make_edit: MakeEdit, tmp_path: Path, file: Any
) -> None:
    model = pico()
    edit, probe = make_edit(model), s2e.collect(model, tokenizer, *traces)
    base = saved(model, tmp_path / "base", SHARDS["sharded"])
    index = base / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    name = edit.sites["0.attn"].site.tensor
    (tmp_path / "x.safetensors").write_bytes((base / whole["weight_map"][name]).read_bytes())
    whole["weight_map"][name] = file
    index.write_text(json.dumps(whole))
    for use in (lambda: s2e.score(base, probe), lambda: s2e.export_checkpoint(base, edit, tmp_path / "out")):
        with pytest.raises(FileError, match=r"index\.json (names a shard that is not a file|is not a shard index)"):
            use()
    assert not (tmp_path / "out").exists()


def test_broken_checkpoints_are_refused(pico: Any, tokenizer: Any, traces: Any, tmp_path: Path) -> None:
    model = pico()
    probe = s2e.collect(model, tokenizer, *traces)
    base = saved(model, tmp_path / "base")
    file = base / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(FileError, match="not a whole safetensors file"):
        s2e.score(base, probe)
    tensors = load_file(saved(model, tmp_path / "other") / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "1.mlp.down" not in k}, file)
    with pytest.raises(FileError, match=r"has no tensor model\.layers\.1\.mlp\.down_proj\.weight"):
        s2e.score(base, probe)
    sharded = saved(model, tmp_path / "sharded", SHARDS["sharded"])
    for shard in sharded.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FileError, match="not a whole safetensors file"):
        s2e.score(sharded, probe)
    for text in ("{", "[]", "{}", '{"weight_map": 7}'):
        (sharded / "model.safetensors.index.json").write_text(text)
        with pytest.raises(FileError, match=r"index\.json is not"):
            s2e.score(sharded, probe)
