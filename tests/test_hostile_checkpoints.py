"""Checkpoints that lie: they are scored and exported as they are, or refused in one sentence, and nothing is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import steer2edit as s2e
from liars import STRANGE, World, careful, damages, make_world, names
from steer2edit.errors import Steer2EditError


@pytest.fixture(scope="module")
def world(tmp_path_factory: Any) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def tried(world: World, base: Path, folder: Path) -> tuple[bool, bool]:
    """Whether a checkpoint was scored, and whether it was exported; nothing is left where it was refused."""
    there = names(folder)
    before = {p: p.read_bytes() for p in base.rglob("*") if p.is_file()}
    scored = careful(lambda: s2e.score(base, world.probe, expert_tokens=2)) is not None
    assert names(folder) == there
    exported = careful(lambda: s2e.export_checkpoint(base, world.edit, folder / "out")) is not None
    if exported:
        shutil.rmtree(folder / "out")
    assert names(folder) == there
    assert {p: p.read_bytes() for p in base.rglob("*") if p.is_file()} == before
    return scored, exported


@pytest.fixture
def base(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.base, tmp_path / "base"))


def index_of(base: Path) -> Path:
    return base / "model.safetensors.index.json"


def shard_of(base: Path, name: str) -> Path:
    return base / json.loads(index_of(base).read_text())["weight_map"][name]


ATTN, EXPERTS = "model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.experts.down_proj"


def test_a_whole_checkpoint_is_scored_and_exported(world: World, base: Path, tmp_path: Path) -> None:
    assert tried(world, base, tmp_path) == (True, True)


@settings(max_examples=60)
@given(damage=damages(), which=st.sampled_from([ATTN, EXPERTS, "index", "config.json"]))
def test_a_damaged_checkpoint_is_refused_or_harmless(
    damage: Any, which: str, world: World, base: Path, tmp_path: Path
) -> None:
    shutil.rmtree(base)
    shutil.copytree(world.base, base)
    file = index_of(base) if which == "index" else base / which if "json" in which else shard_of(base, which)
    file.write_bytes(damage(file.read_bytes()))
    tried(world, base, tmp_path)


PLACES = [
    "../x.safetensors", "/etc/passwd", "/", ".", "..", "", " ", "a/../b", "sub/x.safetensors", "none.safetensors",
    "model.safetensors.index.json", "config.json", "x" * 300, "x" * 5000, "a\0b", "\ud800", "~", "*", None, True, 7,
    1.5, [], ["a"], {}, {"a": "b"},
]  # fmt: skip


@pytest.mark.parametrize("new", PLACES, ids=lambda new: repr(new)[:30])
def test_an_index_that_names_something_else_is_refused(new: Any, world: World, base: Path, tmp_path: Path) -> None:
    shutil.copyfile(shard_of(base, ATTN), tmp_path / "x.safetensors")
    (base / "sub").mkdir()
    shutil.copyfile(shard_of(base, ATTN), base / "sub" / "x.safetensors")
    index = json.loads(index_of(base).read_text())
    index["weight_map"][ATTN] = new
    index_of(base).write_text(json.dumps(index))
    assert tried(world, base, tmp_path) == (False, False)


@pytest.mark.parametrize(
    "text",
    [*(json.dumps(value) for value in STRANGE), *(json.dumps({"weight_map": value}) for value in STRANGE), "", "{",
     "[" * 200_000, '{"weight_map": ' * 200_000, '{"weight_map": {"a": "b", "a": "c"}}', "\ufeff{}", "NaN"],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_an_index_of_something_else_is_refused(text: str, world: World, base: Path, tmp_path: Path) -> None:
    index_of(base).write_text(text)
    assert tried(world, base, tmp_path) == (False, False)


def test_an_index_that_is_no_text_or_a_folder_is_refused(world: World, base: Path, tmp_path: Path) -> None:
    index_of(base).write_bytes(b"\xff\xfe\x00{}")
    assert tried(world, base, tmp_path) == (False, False)
    index_of(base).unlink()
    index_of(base).mkdir()
    assert tried(world, base, tmp_path) == (False, False)


@pytest.mark.parametrize("name", [ATTN, EXPERTS])
def test_a_tensor_of_another_shape_or_dtype_is_refused(name: str, world: World, base: Path, tmp_path: Path) -> None:
    file = shard_of(base, name)
    tensors = load_file(file)
    weight = tensors[name]
    changed = {
        "fewer": weight[: len(weight) // 2],
        "one": weight[:1],
        "none": weight[:0],
        "scalar": torch.tensor(1.0),
        "flat": weight.flatten(),
        "deeper": weight[None],
        "stacked": torch.stack([weight, weight]),
        "four": weight[None, None],
        "turned": weight.transpose(-1, -2)[..., :-1],
        "more": torch.cat([weight, weight]),
        "integers": weight.to(torch.int32),
        "bool": weight > 0,
        "double": weight.double(),
        "fp8": weight.to(torch.float8_e4m3fn),
        "nan": torch.full_like(weight, torch.nan),
        "inf": torch.full_like(weight, torch.inf),
        "huge": torch.full_like(weight, 3e38),
    }
    failed = []
    for how, tensor in changed.items():
        save_file(tensors | {name: tensor.contiguous().clone()}, file, metadata={"format": "pt"})
        try:
            scored, exported = tried(world, base, tmp_path)
        except Exception as error:
            failed.append((how, repr(error)))
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            continue
        if exported or (scored and how not in ("nan", "inf", "huge")):
            failed.append((how, f"scored: {scored}, exported: {exported}"))
    assert not failed


def test_scores_of_a_weight_that_is_not_finite_are_not_made(world: World, base: Path) -> None:
    file = shard_of(base, ATTN)
    tensors = load_file(file)
    tensors[ATTN][3, 5] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Steer2EditError):
        s2e.score(base, world.probe, expert_tokens=2)


def test_shards_that_are_pickles_links_or_folders_are_refused(world: World, base: Path, tmp_path: Path) -> None:
    file = shard_of(base, ATTN)
    whole = file.read_bytes()
    torch.save({ATTN: torch.zeros(24, 32)}, file)
    assert tried(world, base, tmp_path) == (False, False)
    file.unlink()
    (tmp_path / "elsewhere").write_bytes(whole)
    file.symlink_to(tmp_path / "elsewhere")
    assert careful(lambda: s2e.export_checkpoint(base, world.edit, tmp_path / "out")) is None
    file.unlink()
    file.symlink_to(file.name)  # a link to itself
    assert careful(lambda: s2e.score(base, world.probe)) is None
    assert careful(lambda: s2e.export_checkpoint(base, world.edit, tmp_path / "out")) is None
    file.unlink()
    file.mkdir()
    assert tried(world, base, tmp_path) == (False, False)
    file.rmdir()
    assert tried(world, base, tmp_path) == (False, False)
