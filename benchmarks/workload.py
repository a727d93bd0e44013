"""The model and the traces that the benchmarks share: the embedded model, and prompts that come with the package."""

from __future__ import annotations

from functools import cache
from typing import Any

import steer2edit as s2e
from steer2edit.behaviours.safety import BUILTIN, Safety, written_refusals
from steer2edit.models.embedded import EMBEDDED


@cache
def base_model() -> tuple[Any, Any]:
    return s2e.load_model(EMBEDDED, dtype="float32", device="cpu")


def traces(tokenizer: Any, count: int = 48) -> list[s2e.Trace]:
    """Refusals of 5 to 15 tokens and answers of up to 120, as probes have them; no model is run for it."""
    refusals = written_refusals()
    harmful = Safety().items(BUILTIN, "probe", {"harmful": count})
    benign = Safety().items(BUILTIN, "probe", {"benign": count})
    found = [s2e.Trace(p.text, refusals[i % len(refusals)], "positive") for i, p in enumerate(harmful)]
    for i, p in enumerate(benign):
        answer = " ".join(q.text for q in benign[i : i + 1 + i % 9])
        found.append(s2e.Trace(p.text, answer, "negative"))
    return found


def probe() -> s2e.Probe:
    model, tokenizer = base_model()
    return s2e.collect(model, tokenizer, traces(tokenizer, 16))


def scores() -> s2e.Scores:
    return s2e.score(base_model()[0], probe())
