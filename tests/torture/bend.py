"""Ways to bend a file: its bytes, or the values that stand in it."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

import yaml

# What stands where something else should.
STRANGE: list[Any] = [
    None, True, False, -1, 0, 1, 3, 10**18, 10**400, -(10**30), 1.5, 1e308, -0.0, float("inf"), float("nan"), "", " ",
    "x", "../x", "/etc/passwd", "0", "\x1b[31mred\x1b[0m", "\u202egnp.exe", "a\nb", "é" * 300, "{{ 7 * 7 }}",
    "[bold]", "%s%n", [], [[]], [None], [7], ["a", "b"], {}, {"a": 1}, {"": {}}, [["a", 1]], "x" * 10_000,
]  # fmt: skip
# YAML that is a trap for its reader.
TRAPS = [
    "a: &a [x, x]\n" + "\n".join(f"b{i}: &b{i} [*{'a' if i == 0 else f'b{i - 1}'}, *{'a' if i == 0 else f'b{i - 1}'}]"
                                 for i in range(40)),
    "&a [*a]", "a: &a {b: *a}", "[" * 5000, "{a: " * 3000, "- " * 2000, "a: 2001-99-99", "a: !!int x",
    "a: !!timestamp x", "a: !!bool x", "a: !!python/object/apply:os.system [id]", "a: !!binary '///'",
    "%YAML 9.9\n---\na: 1", "a: 1\n---\nb: 2",
    "a: " + "9" * 6000, 'a: "\\ud800"', 'a: "\\0"', "? [a]\n: b", "? {a: 1}\n: b", "<<: 3", "a: *nothing", "\tname: x",
    "name: x\nname: y", "\ufeffname: x", "? !!set {a, b}\n: 1", "a: 0x", "a: !!float _", "2: 3",
    "null: 1", "a" * 1_100_000,
]  # fmt: skip


def bent_bytes(draw: random.Random, data: bytes) -> bytes:
    """A bit flipped, something cut off, put in, taken out, written over, or all of it twice."""
    how = draw.choice(["flip", "flip", "flip", "cut", "insert", "remove", "overwrite", "repeat", "header"])
    at = draw.randrange(max(1, min(len(data), 4000) if draw.random() < 0.5 else len(data)))
    some = draw.randbytes(draw.randint(1, 12))
    if how == "flip":
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    if how == "header":
        length = draw.choice([0, 1, 7, 2**31, 2**62, 2**63, 2**64 - 1, 100_000_001])
        return struct.pack("<Q", length) + data[8:]
    return {
        "cut": data[:at],
        "insert": data[:at] + some + data[at:],
        "remove": data[:at] + data[at + len(some) :],
        "overwrite": data[:at] + some + data[at + len(some) :],
        "repeat": data[:at] + data,
    }[how]


def bent_value(draw: random.Random, value: Any) -> Any:
    """A JSON value in which one value, one key or one thing more is strange, or one is gone."""
    value = copy.deepcopy(value)
    place = draw.choice(_places(value))
    how = draw.choice(["put", "put", "put", "remove", "rename", "add"])
    strange = copy.deepcopy(draw.choice(STRANGE))
    if not place:
        return strange
    inside = value
    for key in place[:-1]:
        inside = inside[key]
    last = place[-1]
    if how == "remove":
        del inside[last]
    elif how == "rename" and isinstance(inside, dict):
        inside[draw.choice(["", "x", f"{last}s", str(last).upper(), "\x1b[1m"])] = inside.pop(last)
    elif how == "add" and isinstance(inside, dict):
        inside[draw.choice(["", "x", "unknown", "\u202e"])] = strange
    else:
        inside[last] = strange
    return value


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, one in inside for place in _places(one, (*at, key)))]


def bent_yaml(draw: random.Random, text: str) -> bytes:
    how = draw.random()
    if how < 0.2:
        return draw.choice(TRAPS).encode("utf-8", "surrogatepass")
    if how < 0.3:  # a trap inside of what is right
        return f"{text}\nextra: {draw.choice(TRAPS[1:4])}\n".encode()
    if how < 0.5:
        return bent_bytes(draw, text.encode())
    return yaml.safe_dump(bent_value(draw, yaml.safe_load(text)), allow_unicode=True).encode("utf-8", "surrogatepass")


def bent_jsonl(draw: random.Random, data: bytes) -> bytes:
    if draw.random() < 0.3:
        return bent_bytes(draw, data)
    lines = data.decode().splitlines()
    at = draw.randrange(len(lines))
    if draw.random() < 0.2:
        lines[at] = draw.choice(
            ["[" * 100_000, "7", "null", "[]", '{"prompt": "\\ud800"}', "", "{}", '"x"', "NaN", "\0"]
        )
    else:
        lines[at] = json.dumps(bent_value(draw, json.loads(lines[at])))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def bent_safetensors(draw: random.Random, data: bytes) -> bytes:
    """Its bytes, its own header, or the header of ours that stands in its metadata."""
    how = draw.random()
    if how < 0.4:
        return bent_bytes(draw, data)
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    ours = header.get("__metadata__", {}).get("steer2edit")
    if how < 0.7 or ours is None:
        header = bent_value(draw, header)
    else:  # without the seal, so that the values themselves are looked at
        value = json.loads(ours)
        value.pop("sha256")
        header["__metadata__"] = {"steer2edit": json.dumps(bent_value(draw, value))}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest
