"""What the scripts of all tools share: the plan that they are given, and what they say of their work.

It imports nothing but torch, since each script runs in an environment of its own. A script is called as
`SCRIPT TASK FOLDER OUT`: FOLDER holds the plan, OUT gets the result, and the last line of the output is JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Trace:
    """A prompt with its response, as text and as tokens.

    Attributes:
        text: prompt and response in the chat template, up to the response's last token.
        ids: its tokens. first, last: the positions [first, last) that predict the response's tokens.
    """

    label: str
    system: str
    prompt: str
    text: str
    ids: tuple[int, ...]
    first: int
    last: int


@dataclass(frozen=True)
class Prompt:
    """A prompt, and its tokens up to where the answer begins."""

    system: str
    user: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What every tool is to do.

    Attributes:
        model: a folder with a checkpoint that all tools can load.
        layer: the layer after which the stream is steered. strengths: γ, or the weight of an ablation.
        weight: of the ablation that is written into a checkpoint.
        tokens: the most tokens of an answer. rows: prompts that a batch holds. stops: tokens that end an answer.
    """

    folder: Path
    model: str
    layers: int
    layer: int
    strengths: tuple[float, ...]
    weights: tuple[float, ...]
    weight: float
    tokens: int
    rows: int
    stops: tuple[int, ...]
    traces: tuple[Trace, ...]
    prompts: tuple[Prompt, ...]

    def of(self, label: str) -> list[Trace]:
        return [trace for trace in self.traces if trace.label == label]

    def vectors(self) -> Any:
        """The stream's steering vectors of all layers [layers, d], as the plan's maker measured them."""
        from safetensors.torch import load_file

        return load_file(str(self.folder / "vectors.safetensors"))["stream"]


def read_plan(folder: str | Path) -> Plan:
    raw = json.loads((Path(folder) / "plan.json").read_text(encoding="utf-8"))
    raw["traces"] = tuple(Trace(**{**row, "ids": tuple(row["ids"])}) for row in raw["traces"])
    raw["prompts"] = tuple(Prompt(**{**row, "ids": tuple(row["ids"])}) for row in raw["prompts"])
    for name in ("strengths", "weights", "stops"):
        raw[name] = tuple(raw[name])
    return Plan(folder=Path(folder), **raw)


# A task loads what it needs and returns the work that is timed; the work returns its result.
Work = Callable[[], Any]
Task = Callable[[Plan, Path], Work]


@dataclass(frozen=True)
class Layers:
    """The vectors of all layers that a tool gives: layer → [d]."""

    vectors: Mapping[int, Any]


def main(tasks: Mapping[str, Task], packages: Sequence[str]) -> None:
    """Runs the task that the command line names.

    Args:
        packages: those whose versions are told.
    """
    task, folder, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    sys.argv = sys.argv[:1]  # some tools read the command line when they are imported
    print(json.dumps(measured(tasks[task], read_plan(folder), out, packages)), flush=True)


def measured(task: Task, plan: Plan, out: Path, packages: Sequence[str]) -> dict[str, Any]:
    """Does a task, writes its result into `out`, and tells what it took."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    work = task(plan, out)
    loaded = time.perf_counter()
    result = work()
    done = time.perf_counter()
    peak = peak_memory()
    if isinstance(result, int):  # peak memory of the processes that did the work
        peak = max(peak, result)
    elif result is not None:
        write_result(out, result)
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"load": loaded - start, "seconds": done - loaded, "memory": peak, "versions": versions}


def write_result(out: Path, result: Layers | list[list[list[int]]]) -> None:
    """Vectors as tensors, or answers as JSON: strength → prompt → tokens."""
    if isinstance(result, Layers):
        from safetensors.torch import save_file

        tensors = {str(layer): v.detach().float().contiguous().clone() for layer, v in result.vectors.items()}
        save_file(tensors, str(out / "vectors.safetensors"))
    else:
        (out / "answers.json").write_text(json.dumps(result), encoding="utf-8")


def peak_memory() -> int:
    """The most memory that this process has held resident, mapped files included, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def padded(ids: Sequence[Sequence[int]], pad: int, side: str) -> tuple[Any, Any]:
    """Token ids and mask [rows, longest], padded on the left or on the right."""
    import torch

    width = max(map(len, ids))
    tokens = torch.full((len(ids), width), pad, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, some in enumerate(ids):
        place = slice(width - len(some), width) if side == "left" else slice(0, len(some))
        tokens[row, place], mask[row, place] = torch.tensor(some), 1
    return tokens, mask


def answers_of(plan: Plan, tokens: Any, width: int) -> list[list[int]]:
    """The answers in what a `generate` returned, each up to the token that ends it.

    Args:
        width: of the prompts, which it returned, too.
    """
    answers = []
    for row in tokens[:, width:].tolist():
        end = next((at for at, token in enumerate(row) if token in plan.stops), len(row))
        answers.append(row[:end])
    return answers


def spans(traces: Sequence[Trace], width: int) -> Any:
    """1 / its length over the span of each trace of a batch that is padded on the right [rows, width]."""
    import torch

    weights = torch.zeros(len(traces), width)
    for row, trace in enumerate(traces):
        weights[row, trace.first : trace.last] = 1 / (trace.last - trace.first)
    return weights


def greedy(plan: Plan) -> dict[str, Any]:
    """Arguments of transformers' `generate` for greedy answers."""
    return {
        "max_new_tokens": plan.tokens,
        "do_sample": False,
        "eos_token_id": list(plan.stops),
        "pad_token_id": plan.stops[0],
    }
