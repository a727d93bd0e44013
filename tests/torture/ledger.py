"""What was found of each case: a line of a journal, from which a torture that was stopped goes on; and the tables."""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What became of a case: a word for the table, and what was lost or wrong, if anything was."""

    word: str
    bad: str = ""


@dataclass(frozen=True)
class Case:
    """One thing that is done.

    Attributes:
        part, kind: where it stands in the table. number: of those of its kind.
        run: does it, with a random source of its own and an empty folder.
    """

    part: str
    kind: str
    number: int
    run: Callable[[random.Random, Path], Outcome]

    @property
    def id(self) -> str:
        return f"{self.part}/{self.kind}/{self.number}"


class Ledger:
    """The cases that were done, in a folder, by one process or by several at once.

    Args:
        lane: the number of this process. Number 0 begins, and clears what an earlier torture claimed; each writes a
            journal of its own, and reads all.
    """

    def __init__(self, folder: Path, seed: int = 0, lane: int = 0):
        self.folder, self.seed, self.lane = folder, seed, lane
        self.path = folder / f"cases-{lane}.jsonl"
        self.claims = folder / "claims"
        if lane == 0:
            shutil.rmtree(self.claims, ignore_errors=True)
        self.claims.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob("cases-*.jsonl")):
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last one may be cut short
            if path == self.path:
                path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            self.rows |= {row["id"]: row for row in map(json.loads, lines)}

    def run(self, cases: Iterable[Case], seconds: float = float("inf"), loud: bool = True) -> bool:
        """Does what was not done and no other process does. Gives False if the time was up before."""
        every = list(cases)
        todo = [case for case in every if case.id not in self.rows]
        started = time.monotonic()
        for case in todo:
            age = time.monotonic() - started
            if age > seconds:
                return False
            if not self._claim(case):
                continue
            if loud:
                done = len(list(self.claims.iterdir())) - 1
                left = f"about {age / done * (len(todo) - done):.0f} s left" if done else "starting"
                print(f"\r{len(every) - len(todo) + done}/{len(every)} {case.id}, {left}   ", end="", file=sys.stderr)
            work = self.folder / f"work-{self.lane}"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            begun = time.monotonic()
            outcome = case.run(random.Random(f"{self.seed} {case.id}"), work)
            self._add(case, outcome, time.monotonic() - begun)
            if outcome.bad:
                print(f"\n{case.id}: {outcome.bad}", file=sys.stderr)
                kept = self.folder / "bad" / case.id.replace("/", "-")
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(work, kept, symlinks=True, ignore_dangling_symlinks=True)
            shutil.rmtree(work)
        return True

    def _claim(self, case: Case) -> bool:
        """Whether this process is the first to take the case."""
        try:
            (self.claims / case.id.replace("/", "-")).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _add(self, case: Case, outcome: Outcome, seconds: float) -> None:
        row = {"id": case.id, "part": case.part, "kind": case.kind, "outcome": outcome.word, "bad": outcome.bad}
        self.rows[case.id] = row | {"seconds": round(seconds, 2)}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[case.id]) + "\n")

    def summary(self) -> list[dict[str, Any]]:
        """A row for each kind: how often, what came of it, and what was lost."""
        kinds = list(dict.fromkeys((row["part"], row["kind"]) for row in self.rows.values()))
        return [self._summed(part, kind) for part, kind in kinds]

    def _summed(self, part: str, kind: str) -> dict[str, Any]:
        rows = [row for row in self.rows.values() if (row["part"], row["kind"]) == (part, kind)]
        return {
            "part": part,
            "kind": kind,
            "times": len(rows),
            "outcomes": dict(Counter(row["outcome"] for row in rows).most_common()),
            "lost": [f"{row['id']}: {row['bad']}" for row in rows if row["bad"]],
            "seconds": round(sum(row["seconds"] for row in rows), 1),
        }

    def write(self) -> Path:
        """Writes `results.json` and `results.md`; gives the second."""
        summary = self.summary()
        text = json.dumps({"seed": self.seed, "rows": summary}, indent=2, ensure_ascii=False)
        (self.folder / "results.json").write_text(text + "\n", encoding="utf-8")
        lines = [f"| {' | '.join(row)} |" for row in _table(summary)]
        (self.folder / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return self.folder / "results.md"


def _table(summary: list[dict[str, Any]]) -> Iterator[list[str]]:
    yield ["what was done", "how often", "what came of it", "lost"]
    yield ["---", "---", "---", "---"]
    for row in summary:
        outcomes = ", ".join(f"{word} {count}" for word, count in row["outcomes"].items())
        lost = str(len(row["lost"])) if row["lost"] else "nothing"
        yield [f"{row['part']}: {row['kind']}", str(row["times"]), outcomes, lost]


def times(count: int, scale: float) -> range:
    """The numbers of a kind's cases at a scale; at least one."""
    return range(max(1, round(count * scale)))


def miniature(scale: float) -> bool:
    """Whether only what takes no whole run is done, as in the tests."""
    return scale < 0.0005
