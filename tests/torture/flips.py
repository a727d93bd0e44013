"""d. A bit flips in a file of a finished run: it is detected, its stage is made again, or no result depends on it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from torture.ledger import Case, Outcome, miniature, times
from torture.warm import say
from torture.world import UNLIKE, World, contents, difference

# How often a bit flips in each file at full scale.
ROUNDS = 2


def cases(world: World, scale: float) -> Iterator[Case]:
    if not miniature(scale):
        yield from _of_a_run(world, scale)
    for number in times(30 * ROUNDS, scale):
        yield Case("bit flip", "in an edit that is applied", number, lambda draw, folder: _edit(world, draw, folder))


def _of_a_run(world: World, scale: float) -> Iterator[Case]:
    names = sorted(name for name, data in contents(world.whole, {".lock"}).items() if data)
    chosen = names if scale >= 0.2 else [name for name in names if name in ("choice.json", "edit.safetensors")]
    for number in times(ROUNDS, scale):
        for at, name in enumerate(chosen):

            def run(draw: random.Random, folder: Path, name: str = name) -> Outcome:
                return _flipped(world, name, draw, folder)

            yield Case("bit flip", "then run again", number * len(names) + at, run)
    journals = [name for name in names if "journal" in name]
    for number in times(10 * ROUNDS, scale):
        for at, name in enumerate(journals if scale >= 0.2 else journals[:1]):

            def again(draw: random.Random, folder: Path, name: str = name) -> Outcome:
                return _journal(world, name, draw, folder)

            yield Case("bit flip", "in a journal that is read again", number * len(journals) + at, again)


def _flip(file: Path, draw: random.Random) -> bytes:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return bytes(data)


def _flipped(world: World, name: str, draw: random.Random, folder: Path) -> Outcome:
    out = Path(shutil.copytree(world.whole, folder / "out"))
    flipped = _flip(out / name, draw)
    ended = say(folder, "run", world.recipe, "--out", out, "--quiet")
    if bad := ended.complaint():
        return Outcome("neither", bad)
    if ended.code == 2:
        return Outcome("detected")
    still = (out / name).is_file() and (out / name).read_bytes() == flipped
    beside = name.endswith("traces/own.jsonl") or "journal" in name
    # Traces that somebody may have changed by hand are kept under another name.
    leave = {*UNLIKE, "traces.changed.jsonl", *([name] if beside and still else [])}
    bad = difference(out, world.whole, leave)
    if name == "manifest.json":
        return Outcome("results as they were", bad)
    return Outcome(
        "no result depends on it" if still else "made again", bad if beside or not still else f"{name} stays"
    )


def _journal(world: World, name: str, draw: random.Random, folder: Path) -> Outcome:
    """The stage that reads the journal is made again, since a file that it wrote is gone."""
    out = Path(shutil.copytree(world.whole, folder / "out"))
    wrote = {"traces": "traces.jsonl", "search": "search/trials.jsonl", "evaluation": "evaluation/results.json"}
    (out / wrote[name.split("/")[0]]).unlink()
    _flip(out / name, draw)
    ended = say(folder, "run", world.recipe, "--out", out, "--quiet")
    if bad := ended.complaint():
        return Outcome("neither", bad)
    if ended.code == 2:
        return Outcome("detected")
    return Outcome("the same results", difference(out, world.whole, {*UNLIKE, name}))


def _edit(world: World, draw: random.Random, folder: Path) -> Outcome:
    """An edit file, written again by `apply`: another edit must not come of it."""
    edit, told, out = folder / "edit.safetensors", folder / "told.safetensors", folder / "out.safetensors"
    shutil.copyfile(world.file("edit"), edit)
    assert say(folder, "apply", world.base, edit, "--as", "edit", "--to", told, "--quiet").code == 0
    _flip(edit, draw)
    ended = say(folder, "apply", world.base, edit, "--as", "edit", "--to", out, "--quiet")
    if bad := ended.complaint():
        return Outcome("neither", bad)
    if ended.code == 2:
        return Outcome("detected", "it wrote an edit" if out.exists() else "")
    return Outcome("the same edit", "" if out.read_bytes() == told.read_bytes() else "another edit")
