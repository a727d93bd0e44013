"""The pairs as Markdown: medians over the rounds, what the results have in common, starts, and versions."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .tools import OURS


@dataclass(frozen=True)
class Pair:
    """A task that we and a tool did, once a round.

    Attributes:
        remark: where the two differ in what they do.
        ours, theirs: what each round told, one entry a round in both.
        agreement: what the results of the last round have in common.
        failed: why there is nothing; empty if there is something.
    """

    tool: str
    task: str
    remark: str
    ours: Sequence[Mapping[str, Any]] = ()
    theirs: Sequence[Mapping[str, Any]] = ()
    agreement: Mapping[str, Any] = field(default_factory=dict)
    failed: str = ""

    def ratio(self, what: str) -> float:
        """The median over rounds of theirs / ours."""
        return statistics.median(b[what] / a[what] for a, b in zip(self.ours, self.theirs, strict=True))


def markdown(pairs: Sequence[Pair], title: str, beyond: Mapping[str, str]) -> str:
    """The whole table with its notes.

    Args:
        title: sizes and rounds. beyond: tool → what it does that we don't.
    """
    lines = [
        f"{title} {machine()}",
        "",
        f"| task | tool | rounds | {OURS}, s | tool, s | tool / {OURS} | {OURS}, MB | tool, MB | results |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(row(pair) for pair in pairs),
    ]
    lines += ["", *verdicts(pairs), "", *starts(pairs), "", "What each does that steer2edit doesn't:", ""]
    lines += [f"- **{tool}**: {text}" for tool, text in beyond.items()]
    return "\n".join([*lines, "", *versions(pairs)]) + "\n"


def machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
    return f"Cores: {cores}, threads: {threads}, {platform.machine()}, Python {platform.python_version()}."


def row(pair: Pair) -> str:
    remark = f" ({pair.remark})" if pair.remark else ""
    if not pair.theirs:
        return f"| {pair.task}{remark} | {pair.tool} | 0 | | | | | | {pair.failed or 'not measured yet'} |"
    ours, theirs = (statistics.median(side["seconds"] for side in sides) for sides in (pair.ours, pair.theirs))
    memory = [max(side["memory"] for side in sides) / 1e6 for sides in (pair.ours, pair.theirs)]
    times = f"{ours:.1f} | {theirs:.1f} | {pair.ratio('seconds'):.2f}"
    failure = f"; then {pair.failed}" if pair.failed else ""
    numbers = f"{len(pair.theirs)} | {times} | {memory[0]:.0f} | {memory[1]:.0f}"
    return f"| {pair.task}{remark} | {pair.tool} | {numbers} | {said(pair.agreement)}{failure} |"


def said(agreement: Mapping[str, Any]) -> str:
    """What the results have in common, in words."""
    if "median" in agreement:
        median, smallest = agreement["median"], agreement["smallest"]
        return f"cosine {median:.4f} (median of {agreement['layers']} layers; smallest {smallest:.4f})"
    if "equal" in agreement:
        return f"{agreement['equal']:.1%} of {agreement['answers']} answers equal"
    if "tensors" in agreement:
        text = f"tensors differ by {agreement['difference']:.1g} at most, of a change of {agreement['change']:.2g}"
        return f"{text}; {len(agreement['only_in_one'])} in one alone" if agreement["only_in_one"] else text
    return ""


def verdicts(pairs: Sequence[Pair]) -> list[str]:
    """Where a tool is faster or holds less memory."""
    if not any(pair.theirs for pair in pairs):
        return ["Nothing is measured yet."]
    found = []
    for pair in pairs:
        if not pair.theirs:
            continue
        for what, words in (("seconds", "takes less time"), ("memory", "holds less memory")):
            if pair.ratio(what) < 1:
                found.append(f"- {pair.tool} {words} at {pair.task}: {pair.ratio(what):.2f} of ours.")
    if not found:
        return ["No tool takes less time or memory in any row that was measured."]
    return ["Where the tool wins:", "", *found]


def starts(pairs: Sequence[Pair]) -> list[str]:
    """Imports and the load of the model, which the times above leave out."""
    seconds: dict[str, list[float]] = {}
    for pair in pairs:
        # An edit loads what it needs in its work.
        if pair.task == "edit":
            continue
        for name, sides in ((OURS, pair.ours), (pair.tool, pair.theirs)):
            seconds.setdefault(name, []).extend(side["load"] for side in sides)
    words = [f"{name} {statistics.median(times):.1f} s" for name, times in seconds.items() if times]
    return [f"Imports and the model's load, which the times leave out (median): {', '.join(words)}."]


def versions(pairs: Sequence[Pair]) -> list[str]:
    """The packages' versions, as each environment told them."""
    found: dict[str, Mapping[str, str]] = {}
    for pair in pairs:
        for name, sides in ((OURS, pair.ours), (pair.tool, pair.theirs)):
            for side in sides:
                found[name] = side["versions"]
    lines = [f"| {name} | {', '.join(f'{p} {v}' for p, v in some.items())} |" for name, some in found.items()]
    return ["| environment | versions |", "| --- | --- |", *lines]
