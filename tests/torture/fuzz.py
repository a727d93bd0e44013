"""b. Bent recipes, prompts, traces, probes, scores, edits, indices, shards and GGUF files, through the command line.

Each is refused in one sentence with exit code 2 and nothing written, or it is taken; no traceback, no hang, no
gigabytes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torture import bend
from torture.ledger import Case, Outcome, miniature, times
from torture.warm import Ended, say
from torture.world import World

# How many of each kind at full scale: 1,000 together.
COUNTS = {
    "recipe": 300,
    "prompts": 120,
    "traces": 120,
    "probe": 60,
    "scores": 60,
    "edit": 100,
    "combination": 40,
    "index": 60,
    "shard": 60,
    "gguf": 80,
}


def cases(world: World, scale: float) -> Iterator[Case]:
    tries: dict[str, Callable[[World, random.Random, Path], Outcome]] = {
        "recipe": _recipe,
        "prompts": _prompts,
        "traces": _traces,
        "index": _index,
        "shard": _shard,
        "gguf": _gguf,
    }
    for kind, count in COUNTS.items():
        if miniature(scale) and kind in ("traces", "prompts", "scores", "shard"):
            continue
        for number in times(count, scale):

            def run(draw: random.Random, folder: Path, kind: str = kind) -> Outcome:
                return tries[kind](world, draw, folder) if kind in tries else _tensors(world, kind, draw, folder)

            yield Case("bent input", kind, number, run)


def judged(ended: Ended, written: Callable[[], Any]) -> Outcome:
    """What became of a command: taken or refused; bad if in another way, or if it wrote something and was refused."""
    if bad := ended.complaint():
        return Outcome("neither", bad)
    if ended.code == 0:
        return Outcome("taken")
    if left := written():
        return Outcome("refused", f"it wrote {left}")
    return Outcome("refused")


def _results(out: Path) -> list[str]:
    """What a refused stage must not leave: results, and temporary files. The recipe and the lock may be there."""
    names = [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()]
    return [
        name
        for name in names
        if ".tmp" in name or (name.endswith((".jsonl", ".safetensors")) and "journal" not in name)
    ]


def _recipe(world: World, draw: random.Random, folder: Path) -> Outcome:
    bent, out = folder / "bent.yaml", folder / "out"
    bent.write_bytes(bend.bent_yaml(draw, world.recipe.read_text(encoding="utf-8")))
    return judged(say(folder, "traces", bent, "--out", out, "--quiet"), lambda: _results(out))


def _prompts(world: World, draw: random.Random, folder: Path) -> Outcome:
    rows = [
        {"prompt": f"{kind} {split} {i}?", "kind": kind, "split": split}
        for kind in ("harmful", "benign", "borderline")
        for split in ("probe", "validation", "test")
        for i in range(4)
    ]
    rows[5]["prompt"] = [{"role": "user", "content": "How?"}]
    bent, out = folder / "bent.jsonl", folder / "out"
    bent.write_bytes(bend.bent_jsonl(draw, "\n".join(map(json.dumps, rows)).encode()))
    ended = say(folder, "traces", world.recipe, f"data.prompts={bent}", "--out", out, "--quiet")
    return judged(ended, lambda: _results(out))


def _traces(world: World, draw: random.Random, folder: Path) -> Outcome:
    out = folder / "out"
    out.mkdir()
    (out / "traces.jsonl").write_bytes(bend.bent_jsonl(draw, (world.whole / "traces.jsonl").read_bytes()))
    ended = say(folder, "probe", world.recipe, "--out", out, "--quiet")
    return judged(ended, lambda: [name for name in _results(out) if name != "traces.jsonl"])


def _tensors(world: World, kind: str, draw: random.Random, folder: Path) -> Outcome:
    bent, out = folder / f"{kind}.safetensors", folder / "out.safetensors"
    bent.write_bytes(bend.bent_safetensors(draw, world.file(kind).read_bytes()))
    shown = judged(say(folder, "inspect", bent, *(["--json"] if draw.random() < 0.5 else [])), lambda: "")
    if shown.bad or kind in ("probe", "scores"):
        return shown
    return judged(say(folder, "apply", world.base, bent, "--as", "edit", "--to", out, "--quiet"), out.exists)


def _linked(base: Path, folder: Path) -> Path:
    """A checkpoint of links to the base's files, of which one is then replaced."""
    return Path(shutil.copytree(base, folder / "base", copy_function=os.link))


def _replaced(file: Path, data: bytes) -> None:
    file.unlink()
    file.write_bytes(data)


def _index(world: World, draw: random.Random, folder: Path) -> Outcome:
    base = _linked(world.base, folder)
    index = base / "model.safetensors.index.json"
    data = index.read_bytes()
    bent = bend.bent_value(draw, json.loads(data))
    _replaced(index, bend.bent_bytes(draw, data) if draw.random() < 0.4 else json.dumps(bent).encode())
    return _exported(world, base, folder)


def _shard(world: World, draw: random.Random, folder: Path) -> Outcome:
    base = _linked(world.base, folder)
    shard = draw.choice(sorted(base.glob("*.safetensors")))
    _replaced(shard, bend.bent_safetensors(draw, shard.read_bytes()))
    return _exported(world, base, folder)


def _exported(world: World, base: Path, folder: Path) -> Outcome:
    out = folder / "out"
    ended = say(folder, "apply", base, world.file("edit"), "--to", out, "--quiet")
    return judged(ended, lambda: sorted(path.name for path in folder.iterdir() if "out" in path.name))


def _gguf(world: World, draw: random.Random, folder: Path) -> Outcome:
    bent, out = folder / "bent.gguf", folder / "out.gguf"
    bent.write_bytes(bend.bent_bytes(draw, world.gguf.read_bytes()))
    for arguments in (("doctor", bent), ("diff", world.gguf, bent)):
        outcome = judged(say(folder, *arguments), lambda: "")
        if outcome.bad:
            return outcome
    ended = say(folder, "apply", bent, world.file("small"), "--as", "gguf-model", "--to", out, "--quiet")
    return judged(ended, lambda: sorted(path.name for path in folder.iterdir() if "out" in path.name))
