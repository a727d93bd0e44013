"""Files whose tensors lie: of another dtype, shape or place, not finite, or not there."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import steer2edit as s2e
from liars import KINDS, STRANGE, World, careful, make_world, packed, put, read, refused, unpacked, with_header
from steer2edit.edits import load_any


@pytest.fixture(scope="module")
def world(tmp_path_factory: Any) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL"]
SMALL = ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "C64", "F128", "", "f32", "E8"]


@pytest.mark.parametrize("dtype", [*DTYPES, *SMALL])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_says_another_dtype_is_refused_or_harmless(
    kind: str, dtype: str, world: World, tmp_path: Path
) -> None:
    outer, rest = unpacked(world.files[kind])
    name = max((n for n in outer if n != "__metadata__"), key=lambda n: outer[n]["data_offsets"][0])
    start, end = outer[name]["data_offsets"]
    shapes = [outer[name]["shape"], [(end - start)], [(end - start) * 2], [(end - start) // 2], [(end - start) // 8]]
    for shape in shapes:
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        read(kind, packed(outer | {name: entry}, rest), world, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int32])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_tensors_of_another_dtype_are_refused_or_harmless(
    kind: str, dtype: torch.dtype, world: World, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(world.files[kind])
    tensors = load_file(tmp_path / "source")
    metadata = unpacked(world.files[kind])[0]["__metadata__"]
    failed = []
    for field in sorted({name.rsplit(".", 1)[-1] for name in tensors}):
        changed = {n: t.to(dtype) if n.rsplit(".", 1)[-1] == field else t for n, t in tensors.items()}
        save_file(changed, tmp_path / "changed", metadata=metadata)
        try:
            read(kind, (tmp_path / "changed").read_bytes(), world, tmp_path)
        except Exception as error:
            failed.append((field, repr(error)))
    assert not failed


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (5, 1), (2, 3, 4), (1000,)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_another_shape_are_refused_or_harmless(
    kind: str, shape: tuple[int, ...], world: World, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(world.files[kind])
    tensors = load_file(tmp_path / "source")
    metadata = unpacked(world.files[kind])[0]["__metadata__"]
    failed = []
    by_field = {name.rsplit(".", 1)[-1] if kind != "probe" else name.split(".", 2)[-1]: name for name in tensors}
    for field, name in by_field.items():
        save_file(tensors | {name: torch.ones(shape)}, tmp_path / "changed", metadata=metadata)
        try:
            made = read(kind, (tmp_path / "changed").read_bytes(), world, tmp_path)
        except Exception as error:
            failed.append((field, repr(error)))
        else:
            assert made is None, field
    assert not failed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_number_that_is_not_finite_is_refused_wherever_it_stands(
    kind: str, value: float, world: World, tmp_path: Path
) -> None:
    outer, rest = unpacked(world.files[kind])
    for name, entry in list(outer.items())[1::7]:
        start, _ = entry["data_offsets"]
        data = packed(outer, rest[:start] + struct.pack("<f", value) + rest[start + 4 :])
        assert f"tensor {name} of" in refused(kind, data, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_is_not_there_is_refused(kind: str, world: World, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(world.files[kind])
    tensors = load_file(tmp_path / "source")
    metadata = unpacked(world.files[kind])[0]["__metadata__"]
    for name in list(tensors)[::5]:
        if name.endswith("sketch"):
            continue  # without one the base is not known again
        save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "changed", metadata=metadata)
        assert "is not a whole" in refused(kind, (tmp_path / "changed").read_bytes(), tmp_path)


@pytest.mark.parametrize(
    "lie",
    [
        {"data_offsets": [0, 2**63]},
        {"data_offsets": [-4, 0]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [0]},
        {"data_offsets": "0"},
        {"data_offsets": None},
        {"shape": [2**62, 4]},
        {"shape": [2**32, 2**32]},
        {"shape": [-1]},
        {"shape": "24"},
        {"shape": [1.0]},
        {"dtype": 7},
        {"dtype": None},
        {"dtype": "NaN"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_that_lies_is_refused(kind: str, lie: dict[str, Any], world: World, tmp_path: Path) -> None:
    outer, rest = unpacked(world.files[kind])
    name = next(n for n in outer if n != "__metadata__")
    refused(kind, packed(outer | {name: outer[name] | lie}, rest), tmp_path)


@pytest.mark.parametrize(
    "metadata", [None, {}, {"steer2edit": ""}, {"steer2edit": "7"}, {"steer2edit": "null"}, {"steer2edit": "[]"}, 7, [],
                 {"steer2edit": 7}, {"steer2edit": {}}, {"format": "pt"}, {"steer2edit": '{"kind": ["edit"]}'}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_metadata_that_are_not_ours_are_refused(kind: str, metadata: Any, world: World, tmp_path: Path) -> None:
    outer, rest = unpacked(world.files[kind])
    refused(kind, packed(outer | {"__metadata__": metadata}, rest), tmp_path)
    careful(lambda: load_any(tmp_path / f"{kind}.safetensors"))


def test_an_edit_of_strange_provenance_is_still_written_for_other_tools(world: World, tmp_path: Path) -> None:
    failed = []
    for place in (("provenance", "layers"), ("provenance", "probe"), ("provenance", "probe", "model")):
        for new in STRANGE:
            data = with_header(world.files["edit"], lambda h, p=place, n=new: json.dumps(put(h, p, n)))
            (tmp_path / "edit.safetensors").write_bytes(data)
            try:
                edit = careful(lambda: s2e.Edit.load(tmp_path / "edit.safetensors"))
                if edit is not None:
                    careful(lambda e=edit: e.save_adapter(tmp_path / "adapter"))
            except Exception as error:
                failed.append((place, new, repr(error)))
            shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
    assert not failed
