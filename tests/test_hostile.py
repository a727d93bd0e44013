"""Files that lie: every reader either loads what is right or says in one sentence what is wrong, and writes nothing."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liars import (
    KINDS,
    LOADERS,
    STRANGE,
    World,
    damages,
    make_world,
    packed,
    put,
    read,
    refused,
    short,
    unpacked,
    with_header,
)
from steer2edit.edits import load_any
from steer2edit.errors import FileError


@pytest.fixture(scope="module")
def world(tmp_path_factory: Any) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


# Bytes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(damage=damages())
def test_damaged_bytes_are_refused_or_harmless(kind: str, damage: Any, world: World, tmp_path: Path) -> None:
    read(kind, damage(world.files[kind]), world, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_anywhere_is_refused(kind: str, world: World, tmp_path: Path) -> None:
    data = world.files[kind]
    for size in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        assert "not a whole safetensors file" in refused(kind, data[:size], tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_and_other_files_are_refused_and_not_run(kind: str, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "run",))

    torch.save(Evil(), tmp_path / "zip")
    for data in (pickle.dumps(Evil()), (tmp_path / "zip").read_bytes(), b"\x89PNG", b"{}", b"GGUF" + bytes(100)):
        refused(kind, data, tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_a_folder_and_nothing_are_refused(kind: str, world: World, tmp_path: Path) -> None:
    for other in set(KINDS) - {kind}:
        assert "does not hold a" in refused(kind, world.files[other], tmp_path)
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none", tmp_path / "none" / "deeper"):
        with pytest.raises(FileError, match=rf"no {kind} file"):
            LOADERS[kind](path)


# Headers ------------------------------------------------------------------------------------------------------------


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside a JSON value."""
    inside: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, one in inside for place in places(one, (*at, key)))]


def removed(value: Any, place: tuple[Any, ...]) -> Any:
    value = copy.deepcopy(value)
    inside = value
    for key in place[:-1]:
        inside = inside[key]
    del inside[place[-1]]
    return value


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80)
@given(share=st.floats(0, 1, exclude_max=True), new=st.sampled_from(STRANGE))
def test_a_header_with_something_strange_in_it_is_refused_or_harmless(
    kind: str, share: float, new: Any, world: World, tmp_path: Path
) -> None:
    def change(header: Any) -> Any:
        ways = places(header)
        return json.dumps(put(header, ways[int(share * len(ways))], new))

    read(kind, with_header(world.files[kind], change), world, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_header_without_something_is_refused_or_harmless(
    kind: str, share: float, world: World, tmp_path: Path
) -> None:
    def change(header: Any) -> Any:
        ways = places(header)[1:]
        return removed(header, ways[int(share * len(ways))])

    read(kind, with_header(world.files[kind], change), world, tmp_path)


@pytest.mark.parametrize("new", STRANGE, ids=short)
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_values_of_a_header_may_be_anything(kind: str, new: Any, world: World, tmp_path: Path) -> None:
    outer, _ = unpacked(world.files[kind])
    header = json.loads(outer["__metadata__"]["steer2edit"])
    ways = [way for way in places(header) if len(way) <= 1 or way in (("sites", 0), ("counts", "experts"))]
    ways += [("edits", 0, key) for key in header["edits"][0]] if kind == "combination" else []
    failed = []
    for way in ways:
        try:
            read(kind, with_header(world.files[kind], lambda h, way=way: json.dumps(put(h, way, new))), world, tmp_path)
        except Exception as error:
            failed.append((way, repr(error)))
    assert not failed


@pytest.mark.parametrize("new", STRANGE, ids=short)
@pytest.mark.parametrize("kind", KINDS)
def test_the_values_of_a_site_may_be_anything(kind: str, new: Any, world: World, tmp_path: Path) -> None:
    outer, _ = unpacked(world.files[kind])
    header = json.loads(outer["__metadata__"]["steer2edit"])
    inside = ("edits", 0, "sites") if kind == "combination" else ("sites",)
    sites = header["edits"][0]["sites"] if kind == "combination" else header["sites"]
    last = len(sites) - 1
    fields = [*sites[last], "shared", "aliases", "parameter", "unknown"]
    failed = []
    for field in fields:
        try:
            changed = put(header, (*inside, last), sites[last] | {field: new})
            read(kind, with_header(world.files[kind], lambda h, c=changed: json.dumps(c)), world, tmp_path)
        except Exception as error:
            failed.append((field, repr(error)))
    assert not failed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("field", "new"),
    [
        *(("layer", value) for value in (-1, True, "0", 1.0, None, [0])),
        *(("d", value) for value in (-24, 10**400, True, "24", 24.0)),
        *(("n", value) for value in (-1, 2**62, False, "4")),
        *(("width", value) for value in (0, -6, 6.0, None)),
        *(("expert", value) for value in (-1, 4, 10**30, True, "1", [1])),
        *(("experts", value) for value in (0, 1, -4, "4")),
        *(("aliases", value) for value in (7, [7], None, [["a"]])),
        *(("block", value) for value in ("", "attention", None, ["mlp"], {"a": 1})),
        *(("module", value) for value in (None, 7, ["a"])),
        ("unknown", 1),
    ],
)
def test_a_site_with_a_value_that_cannot_be_is_refused(
    kind: str, field: str, new: Any, world: World, tmp_path: Path
) -> None:
    def change(header: Any) -> None:
        sites = (header["edits"][0] if kind == "combination" else header)["sites"]
        sites[-1][field] = new

    told = refused(kind, with_header(world.files[kind], change), tmp_path)
    assert "is not a whole" in told


def test_every_value_of_the_counts_may_be_anything_and_the_wrong_ones_are_refused(world: World, tmp_path: Path) -> None:
    for new in (7, "x", None, [], ["experts"]):
        refused("probe", with_header(world.files["probe"], lambda h, n=new: h.update(counts=n)), tmp_path)
    for new in (7, "x", [], {"0.mlp.0": 7}, {"0.mlp.0": ["positive", "negative"]}, {"0.mlp.0": {"positive": 1}}):
        data = with_header(world.files["probe"], lambda h, n=new: h["counts"].update(experts=n))
        refused("probe", data, tmp_path)
    for new in (-1, True, "3", 1.5, None):
        data = with_header(
            world.files["probe"], lambda h, n=new: next(iter(h["counts"]["experts"].values())).update(positive=n)
        )
        refused("probe", data, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new", [7, "x", None, ["ab"], [["a", 1]], []], ids=repr)
def test_a_provenance_that_is_no_mapping_is_refused_or_harmless(
    kind: str, new: Any, world: World, tmp_path: Path
) -> None:
    def change(header: Any) -> None:
        (header["edits"][0] if kind == "combination" else header)["provenance"] = new

    read(kind, with_header(world.files[kind], change), world, tmp_path)


@pytest.mark.parametrize("kind", ["edit", "combination"])
@pytest.mark.parametrize("new", [float("nan"), float("inf"), 10**400, -(10**400), "x", None, [], {}], ids=short)
def test_a_strength_that_is_no_finite_number_is_refused(kind: str, new: Any, world: World, tmp_path: Path) -> None:
    def change(header: Any) -> None:
        (header["edits"][0] if kind == "combination" else header)["strength"] = new

    refused(kind, with_header(world.files[kind], change), tmp_path)


@pytest.mark.parametrize("new", [float("nan"), float("inf"), -1.0, 10**400, "x", None, []], ids=short)
def test_a_norm_that_is_no_finite_number_is_refused(new: Any, world: World, tmp_path: Path) -> None:
    data = with_header(world.files["scores"], lambda h: h["v_norm"].update({"0.attn": new}))
    refused("scores", data, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_header_that_is_nested_without_end_is_refused(kind: str, world: World, tmp_path: Path) -> None:
    for text in ("[" * 200_000, '{"a":' * 200_000, "[" * 200_000 + "]" * 200_000):
        refused(kind, with_header(world.files[kind], lambda h, text=text: text), tmp_path)
        file = tmp_path / f"{kind}.safetensors"
        with pytest.raises(FileError):
            load_any(file)


@pytest.mark.parametrize("kind", KINDS)
def test_no_sites_at_all_are_refused_or_harmless(kind: str, world: World, tmp_path: Path) -> None:
    def change(header: Any) -> None:
        for part in header["edits"] if kind == "combination" else [header]:
            part["sites"] = []

    read(kind, with_header(world.files[kind], change), world, tmp_path)


def test_a_combination_of_nothing_is_refused(world: World, tmp_path: Path) -> None:
    refused("combination", with_header(world.files["combination"], lambda h: h.update(edits=[])), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_key_twice_is_refused_or_read_as_json_reads_it(kind: str, world: World, tmp_path: Path) -> None:
    outer, rest = unpacked(world.files[kind])
    text = json.dumps(outer)
    name = next(n for n in outer if n != "__metadata__")
    lie = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})[1:-1]
    for twice in (text[:-1] + ", " + lie + "}", "{" + lie + ", " + text[1:]):
        read(kind, packed(twice.encode(), rest), world, tmp_path)
    again = json.dumps({"__metadata__": {"steer2edit": "{}"}})[1:-1]
    for twice in (text[:-1] + ", " + again + "}", "{" + again + ", " + text[1:]):
        read(kind, packed(twice.encode(), rest), world, tmp_path)
    read(kind, with_header(world.files[kind], lambda h: json.dumps(h)[:-1] + ', "sites": 7}'), world, tmp_path)
