"""The export of a checkpoint: strange bases, what is copied and what is not, and the bytes whatever a kernel offers."""

from __future__ import annotations

import errno
import filecmp
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import steer2edit as s2e
from checkpoint_cases import ONE_FILE, SHARDED, Case, contents, make_case, names, random_edit
from conftest import make_pico, make_tokenizer, make_traces
from families import make_family
from runs import places
from steer2edit.artefacts.checkpoint import MANIFEST
from steer2edit.artefacts.places import site_reader
from steer2edit.errors import EditError, FileError, ModelError
from steer2edit.models.sites import find_sites
from steer2edit.models.weights import weight_of


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """A sharded bf16 base with a tokenizer, and an edit of all of its sites."""
    return make_case(tmp_path)


# Another base -------------------------------------------------------------------------------------------------------


@pytest.fixture
def never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that comes to making its folder fails the test."""

    def resume(*_: Any) -> None:
        raise AssertionError("something was written")

    monkeypatch.setattr("steer2edit.artefacts.checkpoint._resume", resume)


@pytest.mark.usefixtures("never_written")
@pytest.mark.parametrize("parts", [1, 2])
def test_another_base_and_an_edited_one_are_refused_before_anything_is_written(
    parts: int, case: Case, tmp_path: Path
) -> None:
    edit: Any = (
        case.edit if parts == 1 else s2e.combine(case.edit.only(blocks=("mlp",)), case.edit.only([1], ("attn",)))
    )
    make_pico("llama", dtype=torch.bfloat16, seed=1).save_pretrained(tmp_path / "stranger", max_shard_size=SHARDED)
    with pytest.raises(ModelError, match="the model is not the base that the edit was made for"):
        s2e.export_checkpoint(tmp_path / "stranger", edit, tmp_path / "out")
    case.edit.apply(case.model)
    case.model.save_pretrained(tmp_path / "edited", max_shard_size=SHARDED)
    with pytest.raises(EditError, match="the edit is already in this model"):
        s2e.export_checkpoint(tmp_path / "edited", edit, tmp_path / "out")
    assert names(tmp_path) == {"base", "stranger", "edited"}


def test_only_the_smallest_weight_is_read_before_the_copy(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steer2edit.artefacts import checkpoint

    read: list[str] = []

    def reader(folder: Path) -> Callable[[Any], Tensor]:
        one = site_reader(folder)
        return lambda site: (read.append(site.key), one(site))[1]

    monkeypatch.setattr(checkpoint, "site_reader", reader)
    s2e.export_checkpoint(case.base, case.edit.only([1, 2]), tmp_path / "out")
    assert read == ["1.attn"]  # heads: 32 × 32 against 32 × 48
    read.clear()
    both = s2e.combine(case.edit.only([2], ("mlp",)), case.edit.only([0]))
    s2e.export_checkpoint(case.base, both, tmp_path / "both")
    assert read == ["2.mlp", "0.attn"]


def test_a_base_that_differs_where_the_glance_does_not_look_is_refused_in_the_end(case: Case, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    file = places(case.base)[name][0]
    tensors = load_file(file)
    save_file(tensors | {name: -tensors[name]}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not the base .*1 of 6 sites, first 2\.mlp"):
        s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert names(tmp_path) == {"base"}


# Tensors of few bits ------------------------------------------------------------------------------------------------


def few_bits(base: Path, chosen: Callable[[str], bool], scaled: bool = True) -> dict[str, bytes]:
    """Makes some of a checkpoint's weights fp8, each with its scale beside it, and gives those tensors' bytes."""
    made = {}
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("_proj.weight") and chosen(name)]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            made[name] = b""
            if scaled:
                tensors[f"{name}_scale_inv"] = torch.tensor([1.0])
                made[f"{name}_scale_inv"] = b""
        save_file(tensors, file, metadata={"format": "pt"})
    index = base / "model.safetensors.index.json"
    if index.is_file():
        where = {name: file.name for name, (file, _, _) in places(base).items()}
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return {name: data for name, data in stored_bytes(base).items() if name in made}


@pytest.mark.usefixtures("never_written")
def test_an_fp8_weight_without_scales_that_is_edited_is_refused_with_what_to_do(case: Case, tmp_path: Path) -> None:
    probe = s2e.collect(case.model, make_tokenizer(), *make_traces())
    few_bits(case.base, lambda name: "layers.1.self_attn.o_proj" in name, scaled=False)
    before = contents(tmp_path)
    expected = (
        "model.layers.1.self_attn.o_proj.weight is not plain floating point (got: F8_E4M3). Known are F32, F16 and "
        "BF16; fp8, MXFP4, NVFP4, GPTQ, AWQ and bitsandbytes with their scales; and GGUF's Q8_0, Q4_0, Q4_1, Q5_0, "
        "Q5_1, Q4_K, Q5_K and Q6_K. Others: dequantise the checkpoint first; or give the loaded model to score(), "
        "which dequantises it, and serve the edit as an adapter."
    )
    for refused in (
        lambda: s2e.export_checkpoint(case.base, case.edit, tmp_path / "out"),
        lambda: s2e.score(case.base, probe),
    ):
        with pytest.raises(FileError) as caught:
            refused()
        assert str(caught.value) == expected
    assert contents(tmp_path) == before


@pytest.mark.parametrize("shard_size", [SHARDED, ONE_FILE])
def test_fp8_weights_that_are_not_edited_are_copied_verbatim(shard_size: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, shard_size)
    edit = case.edit.only(blocks=("attn",))
    s2e.export_checkpoint(case.base, edit, tmp_path / "plain")
    expected = {s.site.tensor: stored_bytes(tmp_path / "plain")[s.site.tensor] for s in edit.edited().values()}
    # All maps but the attention's output; of those the MLP's are sites of the edit, with λ = 0.
    fp8 = few_bits(case.base, lambda name: "o_proj" not in name)
    assert len(fp8) == 2 * 3 * 6
    s2e.export_checkpoint(case.base, edit, tmp_path / "out")
    out = stored_bytes(tmp_path / "out")
    assert {name: out[name] for name in fp8} == fp8
    assert {name: out[name] for name in expected} == expected
    assert s2e.verify(case.base, edit, tmp_path / "out")["as_expected"]
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "whole", accept_rounding=True)
    whole = stored_bytes(tmp_path / "whole")
    assert {name for name in fp8 if whole[name] != fp8[name]} <= {n for n in fp8 if "mlp.down_proj" in n}
    assert s2e.verify(case.base, case.edit, tmp_path / "whole")["as_expected"]


# What is copied and what is not -------------------------------------------------------------------------------------


def test_weights_in_other_formats_are_left_out_and_named(case: Case, tmp_path: Path, capsys: Any) -> None:
    strangers = ["consolidated.safetensors", "model.gguf", "onnx/model.onnx", "pytorch_model.bin", "tf_model.h5"]
    (case.base / "onnx").mkdir()
    for name in strangers:
        (case.base / name).write_bytes(b"the base's weights")
    save_file({"x": torch.zeros(2)}, case.base / "consolidated.safetensors")
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    out = contents(tmp_path / "out")
    assert not set(strangers) & set(out)
    assert json.loads(out[MANIFEST])["left_out"] == strangers
    said = capsys.readouterr().err
    assert "not copied" in said
    assert all(name in said for name in strangers)


def test_all_else_is_copied_byte_for_byte(case: Case, tmp_path: Path, capsys: Any) -> None:
    (case.base / "notes" / "deep").mkdir(parents=True)
    (case.base / "notes" / "deep" / "ünder.txt").write_bytes(bytes(range(256)))
    (case.base / "empty").write_bytes(b"")
    (case.base / ".hidden").write_text("kept")
    for stale in (".git", ".cache"):
        (case.base / stale).mkdir()
        (case.base / stale / "config").write_text("left")
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    expected = {k: v for k, v in contents(case.base).items() if not k.startswith((".git", ".cache"))}
    out = contents(tmp_path / "out")
    manifest = json.loads(out.pop(MANIFEST))
    assert out.keys() == expected.keys()
    assert {"tokenizer.json", "tokenizer_config.json", "notes/deep/ünder.txt", ".hidden", "empty"} <= out.keys()
    assert {name for name in out if out[name] != expected[name]} <= {n for n in out if n.endswith(".safetensors")}
    assert (manifest["left_out"], manifest["base"], manifest["edit"]) == ([], "base", case.edit.id)
    assert "not copied" not in capsys.readouterr().err


def test_what_a_shard_holds_beside_the_model_is_copied_verbatim(tmp_path: Path) -> None:
    case = make_case(tmp_path, ONE_FILE)
    file = case.base / "model.safetensors"
    payload = torch.tensor([0x7FC1, 0x7F81, 0xFFC3 - 2**16, 0x8000 - 2**16], dtype=torch.int16).view(torch.bfloat16)
    strangers = {
        "of.nothing": torch.arange(7, dtype=torch.int64),
        "a.nan": payload,
        "flags": torch.tensor([True, False]),
        "double": torch.randn(3, 3, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.5),
    }
    save_file(load_file(file) | strangers, file, metadata={"format": "pt", "made by": "a ‘test’"})
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    old, new = load_file(file), load_file(tmp_path / "out" / "model.safetensors")
    assert list(new) == list(old)
    edited = {s.site.tensor for s in case.edit.edited().values()}
    for name, tensor in old.items():
        bits = (tensor.reshape(-1).view(torch.uint8), new[name].reshape(-1).view(torch.uint8))
        assert torch.equal(*bits) == (name not in edited), name
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "made by": "a ‘test’"}
    head = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert (tmp_path / "out" / "model.safetensors").read_bytes()[:head] == file.read_bytes()[:head]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_modes_that_the_umask_gives(case: Case, tmp_path: Path, mask: int) -> None:
    (case.base / "config.json").chmod(0o600)
    old = os.umask(mask)
    try:
        s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    finally:
        os.umask(old)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o777 if path.is_dir() else 0o666) & ~mask, path.name


def test_a_link_that_leads_out_of_the_folder_is_refused_by_its_name(case: Case, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("of another user")
    (tmp_path / "elsewhere").mkdir()
    for name, target in (("readme.md", "secret.txt"), ("more", "elsewhere"), ("gone", "nothing")):
        link = case.base / name
        link.symlink_to(tmp_path / target)
        with pytest.raises(FileError, match=rf"^{name} is not a file inside the checkpoint"):
            s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
        link.unlink()
    (case.base / "inside.json").symlink_to("config.json")  # one that stays is followed
    shard = sorted(case.base.glob("*.safetensors"))[0]
    (tmp_path / "elsewhere" / shard.name).write_bytes(shard.read_bytes())
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert (tmp_path / "out" / "inside.json").read_bytes() == (case.base / "config.json").read_bytes()
    assert not (tmp_path / "out" / "inside.json").is_symlink()
    shutil.rmtree(tmp_path / "out")
    shard.unlink()
    shard.symlink_to(tmp_path / "elsewhere" / shard.name)
    with pytest.raises(FileError, match=rf"^{shard.name} is not a file inside the checkpoint"):
        s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert names(tmp_path) == {"base", "secret.txt", "elsewhere"}


def test_an_output_inside_the_base_is_refused(case: Case) -> None:
    before = contents(case.base)
    with pytest.raises(FileError, match="lies inside the base"):
        s2e.export_checkpoint(case.base, case.edit, case.base / "sub" / "out")
    assert contents(case.base) == before
    assert not (case.base / "sub").exists()


# The bytes ----------------------------------------------------------------------------------------------------------


def stored_bytes(folder: Path) -> dict[str, bytes]:
    """Tensor → its bytes in the checkpoint's files."""
    return {name: file.read_bytes()[start:end] for name, (file, start, end) in places(folder).items()}


def test_the_hashes_are_those_of_the_tensors_before_and_after(case: Case, tmp_path: Path) -> None:
    edit = case.edit.only(layers=[0, 2])
    s2e.export_checkpoint(case.base, edit, tmp_path / "out")
    old, new = stored_bytes(case.base), stored_bytes(tmp_path / "out")
    expected = {
        name: {"before": hashlib.sha256(old[name]).hexdigest(), "after": hashlib.sha256(new[name]).hexdigest()}
        for name in sorted(s.site.tensor for s in edit.edited().values())
    }
    assert len(expected) == 4
    assert all(both["before"] != both["after"] for both in expected.values())
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["tensors"] == expected


def test_without_hashes_there_are_none_and_the_weights_are_the_same(case: Case, tmp_path: Path) -> None:
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "with")
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "without", hashes=False)
    there, here = contents(tmp_path / "with"), contents(tmp_path / "without")
    assert json.loads(here.pop(MANIFEST))["tensors"] == {}
    assert len(json.loads(there.pop(MANIFEST))["tensors"]) == 6
    assert here == there


def test_hashes_of_experts_in_one_tensor_are_those_of_their_parts(tmp_path: Path) -> None:
    model = make_family("gpt_oss")
    model.save_pretrained(tmp_path / "base")
    edit = random_edit(model)
    s2e.export_checkpoint(tmp_path / "base", edit, tmp_path / "out")
    expected = json.loads((tmp_path / "out" / MANIFEST).read_text())["tensors"]
    old, new = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        for expert in range(4):
            both = [hashlib.sha256(t[name][expert].numpy().tobytes()).hexdigest() for t in (old, new)]
            assert expected[f"{name}[{expert}]"] == dict(zip(("before", "after"), both, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_sparse_edit_leaves_the_bytes_of_other_columns_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_pico("llama", dtype=dtype)
    edit = random_edit(model, rho=0.5, alpha=0.3)
    kept = {}
    with torch.no_grad():
        for site in find_sites(model):
            columns = torch.nonzero(edit.sites[site.key].row == 0).flatten()
            kept[site.tensor] = columns
            weight_of(model, site)[::3, columns] = -0.0
    edit = s2e.Edit(edit.sites, edit.config, {}, edit.provenance)
    model.save_pretrained(tmp_path / "base")
    s2e.export_checkpoint(tmp_path / "base", edit, tmp_path / "out")
    old, new = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    integer = torch.int32 if dtype is torch.float32 else torch.int16
    assert sum(len(columns) for columns in kept.values()) > 20
    for name, columns in kept.items():
        a, b = (t[name].view(integer)[:, columns] for t in (old, new))
        assert torch.equal(a, b)
        assert bool((a == torch.iinfo(integer).min).any()) == bool(len(columns))  # −0
    assert any(not torch.equal(old[name], new[name]) for name in kept)


@pytest.mark.parametrize("where", [0, -1], ids=["edited column", "untouched column"])
def test_a_weight_that_holds_a_nan_is_refused_and_nothing_is_left(tmp_path: Path, where: int) -> None:
    model = make_pico("llama")
    edit = random_edit(model, rho=0.5, alpha=0.3)
    site = edit.sites["1.mlp"]
    columns = torch.nonzero((site.row != 0) == (where == 0)).flatten()
    assert len(columns)
    with torch.no_grad():
        weight_of(model, site.site)[5, columns[0]] = torch.nan
    model.save_pretrained(tmp_path / "base")
    for known in (edit.fingerprint, {}):
        with pytest.raises((EditError, ModelError), match=r"not finite|not the base"):
            s2e.export_checkpoint(tmp_path / "base", s2e.Edit(edit.sites, edit.config, known), tmp_path / "out")
        assert names(tmp_path) == {"base"}


@pytest.mark.parametrize(
    ("dtype", "strength"),
    [(torch.float16, 1e6), (torch.bfloat16, 3e38), (torch.float32, 3e38), (torch.float32, 1e300)],
    ids=["fp16", "bf16", "fp32", "beyond fp32"],
)
def test_an_edited_weight_that_overflows_is_refused_and_nothing_is_left(
    tmp_path: Path, dtype: torch.dtype, strength: float
) -> None:
    case = make_case(tmp_path, ONE_FILE, dtype)
    edit = case.edit.with_strength(strength)
    assert max(float(c.delta().abs().max()) for c in edit.changes().values()) > torch.finfo(dtype).max
    with pytest.raises(EditError, match="is not finite"):
        s2e.export_checkpoint(case.base, edit, tmp_path / "out")
    assert names(tmp_path) == {"base"}


@pytest.mark.parametrize("how", ["ENOSYS", "EXDEV", "EINVAL", "0", "little", "missing"])
def test_the_bytes_are_the_same_where_the_kernel_copies_nothing(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "expected")
    real = os.copy_file_range

    def copy(source: int, to: int, count: int, *offsets: int) -> int:
        if how == "0":
            return 0
        if how == "little":
            return real(source, to, min(count, 1000), *offsets)
        raise OSError(getattr(errno, how), "not here")

    if how == "missing":
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(os, "copy_file_range", copy)
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize("shard_size", [ONE_FILE, SHARDED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "gpt2"])
def test_fused_and_separate_experts_are_as_apply_and_save_pretrained_give_them(
    name: str, dtype: torch.dtype, shard_size: str, tmp_path: Path
) -> None:
    model = make_family(name).to(dtype)
    scores = s2e.score(model, s2e.collect(model, make_tokenizer(), *make_traces()), expert_tokens=2)
    edit = scores.edit(rho_attn=0.3, rho_mlp=0.3, alpha=0.2)
    model.save_pretrained(tmp_path / "base", max_shard_size=shard_size)
    s2e.export_checkpoint(tmp_path / "base", edit, tmp_path / "out")
    edit.apply(model)
    model.save_pretrained(tmp_path / "expected", max_shard_size=shard_size)
    expected = {name: data for name, data in contents(tmp_path / "expected").items() if name.endswith(".safetensors")}
    assert {name: data for name, data in contents(tmp_path / "out").items() if name in expected} == expected
    assert stored_bytes(tmp_path / "base") != stored_bytes(tmp_path / "out")


def test_one_expert_alone_changes_only_its_part_of_the_tensor(tmp_path: Path) -> None:
    model = make_family("gpt_oss")
    model.save_pretrained(tmp_path / "base")
    whole = random_edit(model)
    sites = {key: site for key, site in whole.sites.items() if key == "1.mlp.2"}
    s2e.export_checkpoint(tmp_path / "base", s2e.Edit(sites, whole.config), tmp_path / "out")
    old, new = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    name = "model.layers.1.mlp.experts.down_proj"
    assert [k for k in old if not torch.equal(old[k], new[k])] == [name]
    assert [e for e in range(4) if not torch.equal(old[name][e], new[name][e])] == [2]
    delta: Tensor = sites["1.mlp.2"].delta()
    torch.testing.assert_close((new[name] - old[name])[2].T, delta, rtol=0, atol=1e-6)


def test_an_export_beside_a_finished_one_changes_nothing_of_it(case: Case, tmp_path: Path) -> None:
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    s2e.export_checkpoint(case.base, case.edit.with_strength(0.5), tmp_path / "other")
    compared = filecmp.dircmp(tmp_path / "out", tmp_path / "other")
    assert compared.left_only == compared.right_only == []
    with pytest.raises(FileError, match="exists already"):
        s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
