"""f. Thousands of apply and revert, thousands of generate, in one process: memory, files and hooks stay as they are."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import steer2edit as s2e
from conftest import make_pico, make_tokenizer, make_traces
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.method.intervention import NOTHING
from torture.ledger import Case, Outcome
from torture.warm import Child, parent_memory
from torture.world import World

COUNTS = {"apply and revert": 10_000, "generate": 2_000}
# Memory that an allocator may take more after a tenth of the cycles.
_SLACK = 8 * 2**20


def cases(world: World, scale: float) -> Iterator[Case]:
    for kind, count in COUNTS.items():
        cycles = max(10, round(count * scale))

        def run(draw: random.Random, folder: Path, kind: str = kind, cycles: int = cycles) -> Outcome:
            ended = Child(lambda: _cycle(kind, cycles), folder, cpu=1000).wait(wall=1000)
            bad = "" if ended.code == 0 else f"{ended.out.strip()[-300:]} {ended.err.strip()[-300:]}".strip()
            return Outcome("as at the start", bad)

        yield Case("cycles", f"{cycles} of {kind}", 0, run)


def _cycle(kind: str, cycles: int) -> int:
    """Runs in a child; 0 if nothing grew and every weight is as it was."""
    torch.manual_seed(0)
    model, tokenizer = make_pico(num_hidden_layers=1), make_tokenizer()
    edit = s2e.score(model, s2e.collect(model, tokenizer, *make_traces())).edit(rho_attn=0.3, rho_mlp=0.3, alpha=0.3)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    once = _applied(edit, model) if kind == "apply and revert" else _generated(edit, model, tokenizer)
    first: Any = None
    for number in range(cycles):
        once()
        if number == max(1, cycles // 10):
            _state(model)  # the first look at all objects of a large parent takes memory itself
            first = _state(model)
    last = _state(model)
    same = all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    grown = last["memory"] - first["memory"]
    print(f"first {first}, last {last}, weights the same: {same}")
    return int(not same or grown > _SLACK or any(last[name] != first[name] for name in ("files", "hooks", "objects")))


def _applied(edit: s2e.Edit, model: Any) -> Callable[[], None]:
    def once() -> None:
        edit.apply(model)
        edit.revert(model)

    return once


def _generated(edit: s2e.Edit, model: Any, tokenizer: Any) -> Callable[[], None]:
    engine = TransformersEngine(model, tokenizer, rows=4)
    ids = engine.tokens([{"role": "user", "content": "How do I bake bread?"}])
    table = [NOTHING, edit.intervention()]
    told = [answer.ids for answer in engine.generate([Request(ids, 0), Request(ids, 1)], table, 4)]

    def once() -> None:
        answers = engine.generate([Request(ids, 0), Request(ids, 1)], table, 4)
        assert [answer.ids for answer in answers] == told

    return once


def _state(model: Any) -> dict[str, int]:
    gc.collect()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    tensors = sum(isinstance(one, torch.Tensor) for one in gc.get_objects())
    return {"memory": parent_memory(), "files": len(os.listdir("/proc/self/fd")), "hooks": hooks, "objects": tensors}
