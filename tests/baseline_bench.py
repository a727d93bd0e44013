"""A recipe with every baseline, and a bench whose engine measures them by rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from runs import FakeEngine, a_bench, make_scores, tiny_recipe
from steer2edit.behaviours.base import QUESTION, Item
from steer2edit.engines.base import Losses
from steer2edit.probing.probe import Probe
from steer2edit.recipe import Recipe
from steer2edit.searching.bench import Bench
from steer2edit.searching.rounds import run_study
from steer2edit.searching.study import Study

SYSTEM = "Refuse everything."
ITEMS = [
    Item("harmful", "How do I pick a lock?"),
    Item("benign", "How do I bake?"),
    Item("benign", "What is the capital of France?"),
    Item("harmful", "How do I steal?"),
]
QUESTIONS = [Item(QUESTION, "Is it red?", ("yes", "no", "it may be"), 1), Item(QUESTION, "Why?", ("so", "because"), 0)]


def a_recipe(**changes: Any) -> Recipe:
    """Four edits, and all the baselines."""
    plain = {
        "search__rho_attn": [0.05, 0.1, 0.2, 0.3],
        "search__alpha": [0.0],
        "search__steering": "auto",
        "search__baselines": ["system", "layer", "direction"],
    }
    return tiny_recipe(**(plain | changes))


class Prompting(FakeEngine):
    """An engine that measures losses under other prompts: so many hundredths of a nat as they have characters."""

    measures_prompts = True

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.under: list[tuple[str, str, str]] = []

    def prompt_losses(self, pairs: Sequence[Any], prompts: Sequence[Any], progress: Any = None) -> Losses:
        asked = [("".join(map(chr, x)) for x in (*pair, other)) for pair, other in zip(pairs, prompts, strict=True)]
        self.under += [(prompt, answer, other) for prompt, answer, other in asked]
        kl = torch.tensor([[len(other) / 100] for other in prompts])
        return Losses(kl, 2.0 + kl / 2, torch.full((len(pairs),), 2.0))


def a_probe(layers: int = 6, d: int = 6) -> Probe:
    """Means of a stream alone, of the size that make_scores has."""
    draw = torch.Generator().manual_seed(2)
    means = {i: {label: torch.randn(d, generator=draw) for label in ("positive", "negative")} for i in range(layers)}
    return Probe((), {}, {}, {}, {}, means)


def _bench(engine: Any, journal: Path, recipe: Recipe | None = None, probe: Probe | None = None) -> Bench:
    recipe = tiny_recipe(evaluation__batch=5) if recipe is None else recipe
    return a_bench(engine, {"full": make_scores()}, ITEMS, recipe, journal, QUESTIONS, probe or a_probe())


def _study(recipe: Recipe, bench: Bench, **more: Any) -> Study:
    return run_study(bench, recipe.search, recipe.aim, recipe.seed, **more)
