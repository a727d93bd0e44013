"""A base far larger than the memory and the disk: its holes stay holes, and little of it is ever in memory."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import steer2edit as s2e
from steer2edit.artefacts.bases import how_stored
from steer2edit.artefacts.places import site_reader
from steer2edit.files.ranges import copy_range, gaps, stored_ranges, stored_size
from steer2edit.models.load import empty_model, load_config
from steer2edit.models.sites import find_sites


@pytest.fixture(scope="module")
def huge() -> Any:
    """The benchmark's module."""
    path = Path(__file__).parents[2] / "benchmarks" / "huge.py"
    spec = importlib.util.spec_from_file_location("huge", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["huge"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A file of 3 MB: data, a hole of 1 MB, data. Skips the test where the file system has no holes."""
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.write(b"a" * 2**20)
        file.seek(2**21)
        file.write(b"b" * 2**20)
    if stored_size(path) == 3 * 2**20:
        pytest.skip("no holes in this file system")
    return path


def test_the_ranges_that_a_disk_holds_are_found(sparse: Path) -> None:
    file = os.open(sparse, os.O_RDONLY)
    MB = 2**20
    assert list(stored_ranges(file, 0, 3 * MB)) == [(0, MB), (2 * MB, 3 * MB)]
    assert list(stored_ranges(file, MB // 2, 2 * MB + 5)) == [(MB // 2, MB), (2 * MB, 2 * MB + 5)]
    assert list(stored_ranges(file, MB, 2 * MB)) == []
    assert stored_size(sparse) == 2 * MB
    os.truncate(sparse, 4 * MB)
    assert list(stored_ranges(file, 3 * MB, 4 * MB)) == []
    os.close(file)


def test_a_copied_range_keeps_its_holes_and_its_bytes(sparse: Path, tmp_path: Path) -> None:
    source = os.open(sparse, os.O_RDONLY)
    copy = os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT)
    copy_range(source, copy, 0, 3 * 2**20)
    os.close(source)
    os.close(copy)
    assert (tmp_path / "copy").read_bytes() == sparse.read_bytes()
    assert stored_size(tmp_path / "copy") == 2 * 2**20
    assert list(gaps([], 5)) == [(0, 5)]


@pytest.mark.parametrize("few_bits", [True, False], ids=["fp8", "bf16"])
def test_a_huge_base_is_scored_edited_and_keeps_its_holes(huge: Any, tmp_path: Path, few_bits: bool) -> None:
    shape = huge.Shape(layers=6, hidden=2048, heads=16, experts=128, neurons=768)
    layers, experts = range(2, 4), 3
    base, out = tmp_path / "base", tmp_path / "out"
    huge.make_checkpoint(base, shape, few_bits, huge.is_filled(layers, experts))
    apparent = sum(file.stat().st_size for file in base.iterdir())
    assert apparent > (4e9 if few_bits else 8e9)
    if huge.data_in(base) > 0.1:
        pytest.skip("no holes in this file system")
    (row,) = how_stored(str(base), find_sites(empty_model(load_config(base))))
    assert row["weights"] == 6 * 129
    assert row["format"] == ("fp8 E4M3, a scale per block 128 × 128" if few_bits else "BF16")
    probe = huge.random_probe(shape, layers, experts)
    before = huge.anonymous() / 1e6
    scores: list[Any] = []
    peak = huge.peak_of(lambda: scores.append(s2e.score(base, probe)))
    assert peak - before < 250
    edit = scores[0].edit(rho_attn=0.02, rho_mlp=0.02, alpha=0.2).with_strength(4.0)
    assert len(edit.changes()) == len(layers) * (1 + experts)
    before = huge.anonymous() / 1e6
    peak = huge.peak_of(lambda: s2e.export_checkpoint(base, edit, out, accept_rounding=True))
    assert peak - before < 250
    assert sum(file.stat().st_size for file in out.iterdir() if file.suffix == ".safetensors") == sum(
        file.stat().st_size for file in base.iterdir() if file.suffix == ".safetensors"
    )
    assert huge.data_in(out) < 1.1 * huge.data_in(base)
    read, read_edited = site_reader(base), site_reader(out)
    for key, change in edit.changes().items():
        old, new = read(change.site).float(), read_edited(change.site).float()
        delta = change.delta()
        kept = float(((new - old) * delta).sum() / delta.square().sum())
        assert kept > 0.5, key
    untouched = next(site for site in probe.sites if site.key == "2.mlp.0")
    assert not torch.equal(read(untouched), read_edited(untouched))
