"""Our library against the tools that people use today: the same model, traces and answers, each tool in an environment
of its own.

Ours and the tool's take turns, once a round, each measurement in a process of its own. Everything measured is kept in a
journal, so that the same command goes on after a kill; delete the folder to begin anew. The environments
(`.venv-peers/NAME`, about 1 GB each) are made at the first run.

Run: python benchmarks/peers.py [--quick] [--rounds 5] [--only NAME] [--task KIND] [--out runs/peers.md]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from peer_tools.compare import agreement
from peer_tools.table import Pair, markdown
from peer_tools.tools import SCRIPTS, STEER2EDIT, TOOLS, Tool
from steer2edit.files.reading import read_journal
from steer2edit.files.writing import append_jsonl, remove, write_text

ROOT = Path(__file__).resolve().parent.parent
FULL = {"traces": 80, "prompts": 64, "strengths": 16, "tokens": 12, "rows": 64}
QUICK = {"traces": 16, "prompts": 16, "strengths": 4, "tokens": 12, "rows": 64}
KINDS = ("vectors", "sweep", "edit")


class Failed(Exception):
    """An environment cannot be made, or a measurement fails."""


def python_of(tool: Tool, environments: Path) -> str:
    """The interpreter of a tool's environment, which is made if it is not there.

    Raises:
        Failed: pip cannot install the tool.
    """
    if not tool.requirement:
        return sys.executable
    folder = environments / tool.name
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.is_file() and ready.read_text(encoding="utf-8") == tool.requirement:
        return str(python)
    print(f"  installing {tool.requirement} into {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (environments / ".gitignore").write_text("*\n", encoding="utf-8")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = folder / "constraints.txt"
    pins.write_text("".join(f"{line}\n" for line in lines if line.split("==")[0] in tool.pins), encoding="utf-8")
    pip = [str(python), "-m", "pip", "install", "-q", "-c", str(pins)]
    # torch first and by its pin, since an unpinned one is a CUDA build of several gigabytes.
    for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, "torch"], [*pip, tool.requirement]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment_of(tool))
        if done.returncode:
            raise Failed(f"could not be installed: {last_words(done.stderr)}")
    ready.write_text(tool.requirement, encoding="utf-8")
    return str(python)


def environment_of(tool: Tool) -> dict[str, str]:
    """The variables of a tool's processes: nothing of ours is on its path, and no network is asked."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    if tool.requirement:
        variables.pop("PYTHONPATH", None)
    return variables


def last_words(text: str) -> str:
    """The last error of what a process said, or pip's last one, as a cell of a table."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if of_pip := [line for line in lines if line.startswith("ERROR: ")]:
        return _cell(of_pip[-1])
    raised = [i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return _cell(" ".join(lines[raised[-1] if raised else -1 :]) or "it said nothing")


def _cell(text: str) -> str:
    return text.replace("|", "/")[:200]


def measure(tool: Tool, python: str, task: str, folder: Path, out: Path) -> dict[str, Any]:
    """One measurement in a process of its own: what its script tells.

    Raises:
        Failed: the script ended with an error.
    """
    command = [python, str(tool.script), task, str(folder), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment_of(tool))
    if done.returncode:
        raise Failed(f"failed: {last_words(done.stderr)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


class Benchmark:
    """The pairs of a plan, and the journal of what was measured.

    Args:
        folder: holds the plan, the journal and, while they are needed, results.
        environments: where the tools' environments are.
        retry: measure again what failed.
    """

    def __init__(self, folder: Path, environments: Path, ours: Tool = STEER2EDIT, retry: bool = False):
        self.folder, self.environments, self.ours = folder, environments, ours
        self.journal = folder / "journal.jsonl"
        rows = read_journal(self.journal)
        self.rows = {self._key(row): row for row in rows if not (retry and "failed" in row)}

    def _key(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("tool", "requirement", "task", "round", "what"))

    def _known(self, tool: Tool, task: str, number: int, what: str) -> dict[str, Any] | None:
        return self.rows.get((tool.name, tool.requirement, task, number, what))

    def _note(self, tool: Tool, task: str, number: int, what: str, told: Mapping[str, Any]) -> None:
        names = {"tool": tool.name, "requirement": tool.requirement, "task": task, "round": number, "what": what}
        row = {**names, **told}
        append_jsonl(self.journal, row)
        self.rows[self._key(row)] = row

    def pair(self, tool: Tool, task: str, number: int) -> None:
        """Ours and the tool's in turn, and what their results have in common; what is in the journal is left out."""
        if self._known(tool, task, number, "agreement") or self.failure(tool, task):
            return
        results = {side: self.folder / "results" / f"{tool.name}-{task}-{number}-{side}" for side in ("ours", "theirs")}
        sides = [("ours", self.ours), ("theirs", tool)]
        # Who goes first changes, so that what the first leaves in the caches helps neither.
        for side, who in sides if number % 2 == 0 else reversed(sides):
            if self._known(tool, task, number, side):
                continue
            remove(results[side])
            try:
                told = measure(who, python_of(who, self.environments), task, self.folder, results[side])
            except Failed as error:
                self._note(tool, task, number, side, {"failed": f"{who.name} {error}"})
                print(f"{task}, {tool.name}: {who.name} {error}", flush=True)
                return
            self._note(tool, task, number, side, told)
            print(f"{task}, {tool.name}, round {number + 1}: {who.name} {told['seconds']:.1f} s", flush=True)
        common = agreement(task, self.folder / "model", results["ours"], results["theirs"])
        self._note(tool, task, number, "agreement", common)
        for folder in results.values():
            remove(folder)

    def failure(self, tool: Tool, task: str) -> str:
        """Why a pair has no result; empty if nothing failed."""
        wanted = (tool.name, tool.requirement, task)
        return next((row["failed"] for key, row in self.rows.items() if key[:3] == wanted and "failed" in row), "")

    def pairs(self, tools: Sequence[Tool]) -> list[Pair]:
        """What is measured so far: rounds that are whole, grouped by task."""
        found = []
        for tool in tools:
            for task, remark in tool.tasks.items():
                wanted = (tool.name, tool.requirement, task)
                numbers = sorted(key[3] for key in self.rows if key[:3] == wanted and key[4] == "agreement")
                ours, theirs, common = (
                    [self.rows[*wanted, number, what] for number in numbers] for what in ("ours", "theirs", "agreement")
                )
                last = common[-1] if common else {}
                found.append(Pair(tool.name, task, remark, ours, theirs, last, self.failure(tool, task)))
        return sorted(found, key=lambda pair: pair.task.split("-")[0], reverse=True)


def run(
    benchmark: Benchmark,
    tools: Sequence[Tool],
    rounds: int,
    title: str,
    out: Path | None,
    kinds: Collection[str] = KINDS,
) -> str:
    """All rounds of all pairs of some kinds; the table, which `out` gets after every pair."""
    beyond = {tool.name: tool.beyond for tool in tools if tool.beyond}
    for number in range(rounds):
        for tool in tools:
            for task in tool.tasks:
                if task.split("-")[0] not in kinds or (number and task in tool.once):
                    continue
                benchmark.pair(tool, task, number)
                if out is not None:
                    write_text(out, markdown(benchmark.pairs(tools), title, beyond))
    return markdown(benchmark.pairs(tools), title, beyond)


def prepare(folder: Path, model: str, sizes: Mapping[str, int]) -> None:
    """Makes the plan in a process of its own, unless it is there."""
    made, wanted = folder / "made.json", {"model": model, "sizes": dict(sizes)}
    if made.is_file() and json.loads(made.read_text(encoding="utf-8")) != wanted:
        sys.exit(f"peers.py: {folder} holds another plan (got: {made.read_text('utf-8')}). Give another --work.")
    folder.mkdir(parents=True, exist_ok=True)
    made.write_text(json.dumps(wanted), encoding="utf-8")
    if (folder / "plan.json").is_file():
        return
    path = os.pathsep.join([str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(SCRIPTS / "prepare.py"), str(folder), model, json.dumps(dict(sizes))]
    subprocess.run(command, check=True, env={**environment_of(STEER2EDIT), "PYTHONPATH": path})


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="embedded:smollm2-135m-instruct", help="a name or a folder")
    options.add_argument("--rounds", type=int, help="5, or 1 with --quick")
    options.add_argument("--quick", action="store_true", help="small sizes, and one round")
    options.add_argument("--only", action="append", help="one tool, by its name; may be given again")
    options.add_argument("--task", action="append", choices=KINDS, help="one kind of task; may be given again")
    options.add_argument("--retry", action="store_true", help="measure again what failed")
    options.add_argument("--work", type=Path, default=Path("runs/peers"), help="where the journal is kept")
    options.add_argument("--out", type=Path, help="where the table goes")
    given = options.parse_args()
    unknown = set(given.only or ()) - {tool.name for tool in TOOLS}
    if unknown:
        options.error(f"no tool has that name (got: {', '.join(unknown)}). Known: {', '.join(t.name for t in TOOLS)}.")
    tools = [tool for tool in TOOLS if not given.only or tool.name in given.only]
    sizes, rounds = (QUICK if given.quick else FULL), given.rounds or (1 if given.quick else 5)
    folder = (given.work / ("quick" if given.quick else "full")).resolve()
    prepare(folder, given.model, sizes)
    title = (
        f"{given.model}, fp32. Vectors from {sizes['traces']} + {sizes['traces']} traces; sweeps of"
        f" {sizes['strengths']} strengths × {sizes['prompts']} prompts × {sizes['tokens']} greedy tokens. Times are"
        " medians over the rounds; memory is the peak of all rounds."
    )
    benchmark = Benchmark(folder, ROOT / ".venv-peers", retry=given.retry)
    print(run(benchmark, tools, rounds, title, given.out, given.task or KINDS))


if __name__ == "__main__":
    main()
