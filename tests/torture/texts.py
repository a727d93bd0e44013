"""g. NaN, infinity, nothing, right-to-left marks, escapes of a terminal, NUL, half characters and lines of 10 MB, in
traces, prompts, probes, edits and recipes. What is printed never acts on the terminal.
"""

from __future__ import annotations

import json
import random
import struct
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from torture.fuzz import judged
from torture.ledger import Case, Outcome, miniature
from torture.warm import Ended, say
from torture.world import World

_LONG = 10_000_000
TEXTS: dict[str, Any] = {
    "NaN": float("nan"),
    "infinity": float("-inf"),
    "the text NaN": "NaN",
    "an empty text": "",
    "spaces": " \t\u00a0 ",
    "right-to-left marks": "\u202e\u2066 how \u061c\u200f to bake \u202d",
    "terminal escapes": "\x1b[2J\x1b]0;title\x07\x9b31m bake \r\x08",
    "NUL": "bake\0bread",
    "half a character": "bake \ud83d bread",
    "a line of 10 MB": "bake " * (_LONG // 5),
    "10 MB without a space": "x" * _LONG,
}


def cases(world: World, scale: float) -> Iterator[Case]:
    places: dict[str, Callable[[World, Any, Path], Outcome]] = {
        "a prompt": _prompt,
        "a prompt of a whole run": _run,
        "a trace": _trace,
        "an edit's header": _header,
        "an edit's numbers": _numbers,
        "a probe's numbers": _numbers_of_a_probe,
        "a recipe": _recipe,
    }
    number = 0
    for place, put in places.items():
        for name, text in TEXTS.items():
            few = ("an edit's numbers",) if miniature(scale) else ("a prompt", "an edit's numbers")
            if scale < 0.2 and not (place in few and name in ("NaN", "terminal escapes")):
                continue

            def run(draw: random.Random, folder: Path, put: Any = put, text: Any = text, name: str = name) -> Outcome:
                outcome = put(world, text, folder)
                return Outcome(outcome.word, outcome.bad and f"{name}: {outcome.bad}")

            yield Case("strange text", f"in {place}", number, run)
            number += 1


def _shown(ended: Ended, written: Callable[[], Any]) -> Outcome:
    """As `judged`; bad also if what it printed would act on a terminal, or is no line but a book."""
    outcome = judged(ended, written)
    printed = ended.out + ended.err
    acting = {
        c for c in printed if c not in "\n\t" and (unicodedata.category(c) in ("Cc", "Cs") or c in "\u202e\u2066\u202d")
    }
    if acting and not outcome.bad:
        return Outcome("shown as it is", f"it prints {sorted(acting)!a}")
    if ended.code == 2 and len(ended.err) > 10_000:
        return Outcome("a long sentence", f"{len(ended.err)} characters")
    return outcome


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _prompt_file(world: World, text: Any, folder: Path) -> Path:
    """Prompts of every kind and split, of which one of each split is strange."""
    file = folder / "prompts.jsonl"
    rows = [
        {"prompt": f"{kind} {split} {i}?", "kind": kind, "split": split}
        for kind in ("harmful", "benign", "borderline")
        for split in ("probe", "validation", "test")
        for i in range(3)
    ]
    rows[0]["prompt"] = text
    if isinstance(text, str):  # a prompt may stand in one split alone
        rows[3]["prompt"], rows[6]["prompt"] = f"{text} too" if text.strip() else "too", f"{text} as well"
    file.write_bytes(_lines(rows))
    return file


def _prompt(world: World, text: Any, folder: Path) -> Outcome:
    file, out = _prompt_file(world, text, folder), folder / "out"
    ended = say(folder, "traces", world.recipe, f"data.prompts={file}", "--out", out, cpu=60)
    return _shown(ended, lambda: (out / "traces.jsonl").exists())


def _run(world: World, text: Any, folder: Path) -> Outcome:
    file, out = _prompt_file(world, text, folder), folder / "out"
    ended = say(folder, "run", world.recipe, f"data.prompts={file}", "--out", out, cpu=90)
    return _shown(ended, lambda: (out / "edit.safetensors").exists())


def _trace(world: World, text: Any, folder: Path) -> Outcome:
    out = folder / "out"
    out.mkdir()
    rows = [json.loads(line) for line in (world.whole / "traces.jsonl").read_text(encoding="utf-8").splitlines()]
    rows[0]["response"] = rows[1]["prompt"] = text
    (out / "traces.jsonl").write_bytes(_lines(rows))
    ended = say(folder, "probe", world.recipe, "--out", out, cpu=90)
    return _shown(ended, lambda: (out / "probe.safetensors").exists())


def _header(world: World, text: Any, folder: Path) -> Outcome:
    data = world.file("edit").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    ours = json.loads(header["__metadata__"]["steer2edit"])
    ours["provenance"]["probe"]["model"] = text
    ours["config"]["note"] = text
    ours.pop("sha256")
    header["__metadata__"] = {"steer2edit": json.dumps(ours)}
    packed = json.dumps(header).encode("utf-8", "surrogatepass")
    bent, out = folder / "bent.safetensors", folder / "out"
    bent.write_bytes(struct.pack("<Q", len(packed)) + packed + rest)
    shown = _shown(say(folder, "inspect", bent), lambda: "")
    if shown.bad:
        return shown
    return _shown(say(folder, "apply", world.base, bent, "--as", "adapter", "--to", out), out.exists)


def _numbers(world: World, text: Any, folder: Path) -> Outcome:
    return _tensors(world, text, folder, "edit")


def _numbers_of_a_probe(world: World, text: Any, folder: Path) -> Outcome:
    return _tensors(world, text, folder, "probe")


def _tensors(world: World, text: Any, folder: Path, kind: str) -> Outcome:
    """A number that is not finite, an empty tensor, or a tensor whose name is the text."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    source, bent, out = world.file(kind), folder / "bent.safetensors", folder / "out"
    with safe_open(str(source), framework="pt") as file:
        ours = json.loads(file.metadata()["steer2edit"])
    ours.pop("sha256")
    metadata = {"steer2edit": json.dumps(ours)}
    tensors = load_file(source)
    name = sorted(tensors)[3]
    if isinstance(text, float):
        tensors[name].view(-1)[0] = text
    elif not text.strip():
        tensors[name] = torch.empty(0)
    else:
        try:
            save_file(tensors | {text: torch.zeros(1)}, bent, metadata=metadata)
        except (UnicodeError, ValueError):
            return Outcome("cannot be written")
        tensors = {}
    if tensors:
        save_file(tensors, bent, metadata=metadata)
    shown = _shown(say(folder, "inspect", bent), lambda: "")
    if shown.bad or kind == "probe":
        return shown
    return _shown(say(folder, "apply", world.base, bent, "--to", out), out.exists)


def _recipe(world: World, text: Any, folder: Path) -> Outcome:
    raw = yaml.safe_load(world.recipe.read_text(encoding="utf-8"))
    raw["name"] = text
    raw["model"]["stop"] = [text]
    bent, out = folder / "bent.yaml", folder / "out"
    bent.write_text(json.dumps(raw), encoding="utf-8")  # JSON is YAML
    return _shown(say(folder, "traces", bent, "--out", out), lambda: (out / "traces.jsonl").exists())
