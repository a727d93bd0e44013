"""The model and the traces that the benchmarks share: the embedded model, and prompts that come with the package."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import steer2edit as s2e
from steer2edit.behaviours.base import Item, Source
from steer2edit.behaviours.safety import BUILTIN, Safety, written_refusals
from steer2edit.models.embedded import EMBEDDED
from steer2edit.recipe import Recipe
from steer2edit.searching.bench import Bench


@cache
def base_model() -> tuple[Any, Any]:
    return s2e.load_model(EMBEDDED, dtype="float32", device="cpu")


def traces(tokenizer: Any, count: int = 48) -> list[s2e.Trace]:
    """Refusals of 5 to 15 tokens and answers of up to 120, as probes have them; no model is run for it."""
    refusals = written_refusals()
    harmful = Safety().items(Source(BUILTIN, {"probe": {"harmful": count}}), "probe")
    benign = Safety().items(Source(BUILTIN, {"probe": {"benign": count}}), "probe")
    found = [s2e.Trace(p.text, refusals[i % len(refusals)], "positive") for i, p in enumerate(harmful)]
    for i, p in enumerate(benign):
        answer = " ".join(q.text for q in benign[i : i + 1 + i % 9])
        found.append(s2e.Trace(p.text, answer, "negative"))
    return found


def open_bench(engine: Any, scores: Any, items: Sequence[Item], recipe: Recipe, journal: Path) -> Bench:
    """A bench as a run opens it, its neutral items out of these."""
    plan = recipe.evaluation
    neutral = [item for item in items if item.kind == recipe.behaviour.neutral][: plan.utility_prompts]
    return Bench(engine, scores, items, recipe.behaviour, plan, journal, neutral=neutral, seed=recipe.seed)


def probe() -> s2e.Probe:
    model, tokenizer = base_model()
    return s2e.collect(model, tokenizer, traces(tokenizer, 16))


def scores() -> s2e.Scores:
    return s2e.score(base_model()[0], probe())
