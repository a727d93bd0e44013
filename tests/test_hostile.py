"""Files that lie: every reader either loads what is right or says in one sentence what is wrong, and writes nothing."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import steer2edit as s2e
from conftest import make_tokenizer, make_traces
from families import make_family
from steer2edit.edits import Combination, combine, load_any
from steer2edit.errors import FileError, Steer2EditError

KINDS = ("probe", "scores", "edit", "combination")
LOADERS: dict[str, Callable[[Path], Any]] = {
    "probe": s2e.Probe.load,
    "scores": s2e.Scores.load,
    "edit": s2e.Edit.load,
    "combination": Combination.load,
}
# What stands in JSON where something else should.
STRANGE: list[Any] = [
    None, True, False, -1, 0, 1, 3, 10**400, -(10**30), 1.5, 1e308, float("inf"), float("nan"), "", "x", "../x", "0",
    "\0", [], [[]], [None], [7], ["a", "b"], ["positive", "negative"], {}, {"a": 1}, {"positive": 1}, [["a", 1]],
]  # fmt: skip


def short(value: Any) -> str:
    return repr(value)[:20]


class World(NamedTuple):
    """A mixture with experts, what the stages make of it, and its checkpoint in several files."""

    model: Any
    probe: s2e.Probe
    edit: s2e.Edit
    files: dict[str, bytes]
    base: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: Any) -> World:
    folder = tmp_path_factory.mktemp("world")
    model = make_family("gpt_oss")
    probe = s2e.collect(model, make_tokenizer(), *make_traces())
    scores = s2e.score(model, probe, expert_tokens=2)
    edit = scores.edit(rho_attn=0.3, rho_mlp=0.3, alpha=0.2)
    other = copy.deepcopy(edit).only(layers=[0]).with_strength(-0.5)
    for kind, made in zip(KINDS, (probe, scores, edit, combine(edit, other)), strict=True):
        made.save(folder / f"{kind}.safetensors")
    # Without their checksums, which would refuse all of it before anything else is looked at.
    files = {kind: unsealed((folder / f"{kind}.safetensors").read_bytes()) for kind in KINDS}
    model.save_pretrained(folder / "base", max_shard_size="20KB")
    return World(model, probe, edit, files, folder / "base")


def unpacked(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and its tensors' bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def packed(header: Any, rest: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def unsealed(data: bytes) -> bytes:
    """The file without its checksum, as older versions wrote it."""
    outer, rest = unpacked(data)
    header = json.loads(outer["__metadata__"]["steer2edit"])
    del header["sha256"]
    return packed(outer | {"__metadata__": {"steer2edit": json.dumps(header, ensure_ascii=False)}}, rest)


def with_header(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file with its own header, the one that stands as JSON in the metadata, changed."""
    outer, rest = unpacked(data)
    inner = json.loads(outer["__metadata__"]["steer2edit"])
    changed = change(inner)
    text = changed if isinstance(changed, str) else json.dumps(inner if changed is None else changed)
    return packed(outer | {"__metadata__": {"steer2edit": text}}, rest)


def use(made: Any, model: Any) -> None:
    """What a user would do next; only an error of ours may come of it."""
    if isinstance(made, s2e.Probe):
        use(s2e.score(model, made, expert_tokens=2), model)
        return
    if isinstance(made, s2e.Scores):
        use(made.edit(rho_attn=0.3, rho_mlp=0.3, alpha=0.2), model)
        return
    assert len(made.id) == 16
    for change in made.changes().values():
        assert change.delta().shape == (change.site.d, change.site.inputs)
    for part in made.parts:
        assert set(part.summary()) == {"attn", "mlp"}
        assert part.layers >= 0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made.apply(model)
    made.revert(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def careful(run: Callable[[], Any]) -> Any:
    """What `run` gives, or None where it refuses in one sentence; every other exception goes through."""
    refusal: Steer2EditError
    try:
        return run()
    except Steer2EditError as error:
        refusal = error
    assert refusal.what
    assert refusal.fix
    assert str(refusal) == f"{refusal.what} (got: {refusal.got}). {refusal.fix}"
    return None


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def read(kind: str, data: bytes, world: World, folder: Path) -> Any:
    """Loads such a file and uses what it holds; gives it, or None where it was refused."""
    file = folder / f"{kind}.safetensors"
    file.write_bytes(data)
    there = names(folder)
    made = careful(lambda: LOADERS[kind](file))
    if made is not None:
        careful(lambda: use(made, world.model))
    assert names(folder) == there
    assert file.read_bytes() == data
    return made


def refused(kind: str, data: bytes, folder: Path) -> str:
    """Why a file is refused when it is loaded."""
    file = folder / f"{kind}.safetensors"
    file.write_bytes(data)
    with pytest.raises(FileError) as told:
        LOADERS[kind](file)
    assert str(file) in str(told.value)
    return str(told.value)


# Bytes --------------------------------------------------------------------------------------------------------------


@st.composite
def damages(draw: Any) -> Callable[[bytes], bytes]:
    """A way to damage a file: somewhere in it, or in its first bytes, where the header is."""
    how = draw(st.sampled_from(["flip", "cut", "insert", "remove", "length", "overwrite", "repeat"]))
    share = draw(st.floats(0, 1, exclude_max=True))
    early = draw(st.booleans())
    some = draw(st.binary(min_size=1, max_size=12))
    bit = draw(st.integers(0, 7))
    length = draw(st.sampled_from([0, 1, 7, 2**31, 2**62, 2**63, 2**64 - 1, 100_000_001]))

    def damage(data: bytes) -> bytes:
        at = int(share * (min(len(data), 4000) if early else len(data)))
        if how == "flip":
            return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        return {
            "cut": data[:at],
            "insert": data[:at] + some + data[at:],
            "remove": data[:at] + data[at + len(some) :],
            "length": struct.pack("<Q", length) + data[8:],
            "overwrite": data[:at] + some + data[at + len(some) :],
            "repeat": data[:at] + data,
        }[how]

    return damage


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


def put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """The JSON value with another one at a place."""
    if not place:
        return new
    value = copy.copy(value)
    value[place[0]] = put(value[place[0]], place[1:], new)
    return value


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


# Tensors ------------------------------------------------------------------------------------------------------------


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


# Checkpoints --------------------------------------------------------------------------------------------------------


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
