"""Runs every part, or those that are named; a torture that was stopped goes on."""

from __future__ import annotations

import argparse
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
    wanted = parser.parse_args(arguments)
    world = make_world(wanted.out.resolve() / "world")
    ledger = Ledger(wanted.out.resolve(), wanted.seed)
    cases = [case for part in wanted.only.split(",") for case in PARTS[part].cases(world, wanted.scale)]
    whole = ledger.run(cases, wanted.seconds)
    table = ledger.write()
    print(f"\n{table.read_text(encoding='utf-8')}\n{table}")
    if any(row["lost"] for row in ledger.summary()):
        return 1
    return 0 if whole else 3


if __name__ == "__main__":
    sys.exit(main())
