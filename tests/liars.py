"""Files that lie, and what every reader must do with them: load what is right, or refuse it in one sentence."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st

import steer2edit as s2e
from conftest import make_tokenizer, make_traces
from families import make_family
from steer2edit.edits import Combination, combine
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


def make_world(folder: Path) -> World:
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


def put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """The JSON value with another one at a place."""
    if not place:
        return new
    value = copy.copy(value)
    value[place[0]] = put(value[place[0]], place[1:], new)
    return value
