"""Runs every part, or those that are named; a torture that was stopped goes on."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import conftest  # noqa: F401  it takes the models and tokenizers offline, and torch to one thread
from torture import cycles, flips, full_disk, fuzz, kills, pairs, texts
from torture.ledger import Ledger
from torture.world import make_world

PARTS: dict[str, ModuleType] = {
    "kills": kills,
    "fuzz": fuzz,
    "full_disk": full_disk,
    "flips": flips,
    "pairs": pairs,
    "cycles": cycles,
    "texts": texts,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 if all was done and nothing is lost, 1 if something is, 3 if the time was up before."""
    parser = argparse.ArgumentParser(prog="torture", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/torture"), help="where cases and tables go")
    parser.add_argument("--scale", type=float, default=1.0, help="this share of the full counts")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many; run again to go on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=1, help="processes that share the cases")
    parser.add_argument("--lane", type=int, default=0, help=argparse.SUPPRESS)
    wanted = parser.parse_args(arguments)
    out = wanted.out.resolve()
    world = make_world(out / "world")
    ledger = Ledger(out, wanted.seed, wanted.lane)
    cases = [case for part in wanted.only.split(",") for case in PARTS[part].cases(world, wanted.scale)]
    if wanted.lane:
        return 0 if ledger.run(cases, wanted.seconds, loud=False) else 3
    if wanted.lanes > 1:
        _ = world.whole  # the others find it there
    same = ["--out", str(out), "--scale", str(wanted.scale), "--only", wanted.only, "--seed", str(wanted.seed)]
    command = [sys.executable, "-m", "torture", *same, "--seconds", str(wanted.seconds)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    others = [subprocess.Popen([*command, "--lane", str(lane)], env=env) for lane in range(1, wanted.lanes)]
    try:
        whole = ledger.run(cases, wanted.seconds)
        codes = [other.wait() for other in others]
        whole = whole and not any(codes)
    finally:
        for other in others:
            other.terminate()
    ledger = Ledger(out, wanted.seed)
    table = ledger.write()
    print(f"\n{table.read_text(encoding='utf-8')}\n{table}")
    if any(row["lost"] for row in ledger.summary()):
        return 1
    return 0 if whole else 3


if __name__ == "__main__":
    sys.exit(main())
