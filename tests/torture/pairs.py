"""e. Two processes at once: in one run directory, and with one output."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torture.ledger import Case, Outcome, miniature, times
from torture.warm import Child, Ended, command
from torture.world import World, difference

COUNTS = {
    "run in one directory": 8,
    "apply to one output": 40,
    "two edits to one output": 40,
    "adapters to one folder": 40,
}


def cases(world: World, scale: float) -> Iterator[Case]:
    for kind, count in COUNTS.items():
        if miniature(scale) and kind != "two edits to one output":
            continue
        for number in times(count, scale):

            def run(draw: random.Random, folder: Path, kind: str = kind) -> Outcome:
                return _pair(world, kind, draw, folder)

            yield Case("two processes", kind, number, run)


def _pair(world: World, kind: str, draw: random.Random, folder: Path) -> Outcome:
    out = folder / "out"
    edits = [world.file("edit"), world.file("other" if kind == "two edits to one output" else "edit")]
    if kind == "run in one directory":
        both: list[Any] = [command("run", world.recipe, "--out", out, "--quiet")] * 2
    else:
        form = "adapter" if kind == "adapters to one folder" else "checkpoint"
        both = [command("apply", world.base, edit, "--as", form, "--to", out, "--quiet") for edit in edits]
    ended = _together(both, folder, draw.choice([0, 0, draw.uniform(0, 0.3)]))
    if bad := next((bad for one in ended if (bad := one.complaint())), ""):
        return Outcome("neither", bad)
    codes = sorted(one.code for one in ended)
    if codes[0] != 0:
        return Outcome("neither was done", " / ".join(one.err[-200:] for one in ended))
    if kind == "run in one directory":
        bad = difference(out, world.whole)
    elif kind == "adapters to one folder":
        bad = "" if (out / "adapter_model.safetensors").is_file() else "no adapter"
    elif kind == "apply to one output":
        bad = difference(out, world.edited, set())
    else:
        bad = _whole_one(world, out, edits, ended, folder)
    left = [path.name for path in folder.iterdir() if path.name.startswith((".out", "out.")) or ".tmp" in path.name]
    word = "one done, one refused" if codes == [0, 2] else "one after the other"
    return Outcome(word, bad or (f"left behind: {left}" if left else ""))


def _together(both: list[Any], folder: Path, apart: float) -> list[Ended]:
    first = Child(both[0], folder, "first")
    time.sleep(apart)
    second = Child(both[1], folder, "second")
    return [first.wait(), second.wait()]


def _whole_one(world: World, out: Path, edits: list[Path], ended: list[Ended], folder: Path) -> str:
    """Whether the output is that of the edit whose command succeeded, to the byte."""
    winner = edits[next(i for i, one in enumerate(ended) if one.code == 0)]
    alone = folder / "alone"
    assert Child(command("apply", world.base, winner, "--to", alone, "--quiet"), folder).wait().code == 0
    return difference(out, alone, set())
