"""A second, trivial behaviour for the tests: the model answers in fewer capital letters. It has words of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from steer2edit.behaviours.base import Behaviour, Item, Measure, Outcome, Source
from steer2edit.probing.traces import Trace
from steer2edit.recipe import Recipe, parse_recipe

CAPITALS = Measure("capitals", "capitals (%)", better="lower", worst=80.0, best=20.0, rate=False)
BLUNT = Measure("blunt", "blunt answers", limit=0.4)
LENGTH = Measure("length", "words", better="higher", worst=0.0, best=10.0, rate=False)


class Shouting(Behaviour):
    kinds: ClassVar[tuple[str, ...]] = ("loud", "calm")
    probe_kinds: ClassVar[tuple[str, ...]] = ("loud",)
    required: ClassVar[tuple[str, ...]] = ("loud",)
    neutral: ClassVar[str | None] = "calm"
    prompts: ClassVar[str | None] = "builtin:shouting"
    probe: ClassVar[Mapping[str, int] | None] = {"loud": 2}

    name: Literal["shouting"] = "shouting"

    @property
    def attribute(self) -> Measure:
        return CAPITALS

    @property
    def costs(self) -> tuple[Measure, ...]:
        return (BLUNT, LENGTH)

    def items(self, source: Source, split: Any) -> list[Item]:
        counts = source.counts[split] or {}
        return [Item(kind, f"{split} {kind} {i}") for kind, count in counts.items() for i in range(count)]

    def make_traces(self, engine: Any, items: Sequence[Item], progress: Any = None) -> list[Trace]:
        return [Trace(item.prompt, "quiet" * sign, label) for item in items for sign, label in ((1, "positive"),)]

    def measure(self, item: Item, outcome: Outcome, base: Outcome) -> Mapping[str, float]:
        letters = [c for c in outcome.answer if c.isalpha()]
        words = len(outcome.answer.split())
        if item.kind == "calm":
            return {"blunt": float(words < 2), "length": float(words)}
        return {"capitals": 100 * sum(c.isupper() for c in letters) / max(1, len(letters))}


def shouting_recipe(**search: Any) -> Recipe:
    """Its measures are limited by default as they say themselves. The behaviour has to be registered first."""
    plain = {"rho_attn": [0.1, 0.3, 0.5], "rho_mlp": [None], "alpha": [0.2, 0.6], "steering": [0.2, 0.8]}
    plain |= {"baselines": []}
    return parse_recipe(
        {
            "name": "quiet",
            "model": {"name": "nowhere"},
            "behaviour": {"name": "shouting"},
            "data": {"validation": {"loud": 4, "calm": 3}, "test": {"loud": 2}},
            "search": plain | search,
            "evaluation": {"utility_prompts": 2, "batch": 5, "resamples": 50},
        }
    )
