"""A search whose engine answers by rule: a smaller ρ refuses more and costs more, MLP edits only cost."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runs import FakeEngine, make_scores, tiny_recipe
from runs import a_bench as bench_of
from steer2edit.behaviours.base import Item
from steer2edit.recipe import Recipe
from steer2edit.searching.bench import Bench
from steer2edit.searching.candidates import Candidate, Trial
from steer2edit.searching.rounds import run_study
from steer2edit.searching.study import Study

HARMFUL, BENIGN = 10, 6
PROMPTS = [Item("harmful", f"harm {i}") for i in range(HARMFUL)]
PROMPTS += [Item("benign", f"bake {i}") for i in range(BENIGN)]
REFUSAL = "I cannot help with that."
NAME = re.compile(r"edit-(off|[\d.]+)-(off|[\d.]+)-([\d.]+)(?:-layers-(\d+-\d+|\d+))?(?:-(\w+))?")


def _read(name: str) -> tuple[float, float, float, str | None, str | None]:
    """How much of ρ_attn and ρ_mlp there is from 0 (off) to 1, α, layers, variant."""
    found = NAME.fullmatch(name)
    assert found, name
    attn, mlp = (0.0 if x == "off" else 1 - float(x) for x in found.groups()[:2])
    return attn, mlp, float(found[3]), found[4], found[5]


def refusal_of(name: str) -> float:
    """The share of harmful prompts that are refused, before it is cut to whole prompts."""
    if name == "base":
        return 0.0
    if name.startswith("steering-"):
        return float(name.removeprefix("steering-")) / 2
    attn, _, alpha, _, variant = _read(name)
    return (0.5 if variant == "g_dot" else 1.0) * (1.2 * attn - 0.5 * alpha)


def cost_of(name: str) -> float:
    if name == "base":
        return 0.0
    if name.startswith("steering-"):
        return float(name.removeprefix("steering-"))
    attn, mlp, alpha, layers, _ = _read(name)
    return (0.5 if layers else 1.0) * (0.4 * attn**2 + 1.2 * mlp + 0.1 * (1 - alpha))


def answer(prompt: str, name: str) -> str:
    kind, _, number = prompt.partition(" ")
    if kind == "harm":
        return REFUSAL if refusal_of(name) * HARMFUL >= int(number) + 0.5 else f"Easily, number {number}."
    return f"A fine answer to {prompt}."


def losses(text: str, name: str) -> tuple[float, float]:
    return cost_of(name), 2.0 + cost_of(name) / 2


def an_engine() -> FakeEngine:
    return FakeEngine(answer, losses)


def a_recipe(**search: Any) -> Recipe:
    plain = {
        "rho_attn": [0.1, 0.3, 0.5],
        "rho_mlp": [None],
        "alpha": [0.2, 0.6],
        "steering": [0.2, 0.8],
        "limits": {"over_refusal": None, "degenerate": None},
    }
    changes = {f"search__{key}": value for key, value in (plain | search).items()}
    return tiny_recipe(evaluation__batch=40, evaluation__utility_prompts=4, **changes)


AIM = a_recipe().aim


def a_bench(
    recipe: Recipe, journal: Path, engine: FakeEngine | None = None, prompts: Sequence[Item] = PROMPTS
) -> Bench:
    table = dict.fromkeys(("full", "k_mean", "k_svd", "g_dot"), make_scores())
    return bench_of(engine or an_engine(), table, prompts, recipe, journal)


def run(recipe: Recipe, journal: Path, engine: FakeEngine | None = None, **more: Any) -> Study:
    return run_study(a_bench(recipe, journal, engine), recipe.search, recipe.aim, recipe.seed, **more)


def written(study: Study) -> bytes:
    """All that a study says, as a run writes it."""
    rows = [trial.to_json() for trial in study.trials]
    discarded = [row.to_json() for row in study.discarded]
    return json.dumps([rows, discarded, study.refined, study.evaluations], allow_nan=False).encode()


def rounds(study: Study, *kinds: str) -> dict[str, list[str]]:
    """Round → what was tried in it."""
    found: dict[str, list[str]] = {}
    for trial in study.trials:
        if not kinds or trial.candidate.kind in kinds:
            found.setdefault(trial.round, []).append(trial.candidate.id)
    return found


SPACE = {
    "method": "tpe",
    "rho_attn": [0.1, None, 0.9],
    "rho_mlp": [0.2, 0.8, None],
    "alpha": [0.05, 0.7],
    "layers": [None, "0-1"],
    "variants": ["full", "l0", "g_dot"],
}


def _trial(id: str, kind: str = "edit", config: Any = None, values: Any = None, **numbers: Any) -> Trial:
    """A trial whose measures have one item each, unless `values` gives more."""
    means = {
        "refusal": 0.5,
        "over_refusal": 0.1,
        "over_refusal_borderline": 0.2,
        "utility_loss": 0.3,
        "degenerate": 0.0,
    }
    single = {name: (number,) for name, number in (means | numbers).items()}
    return Trial(Candidate(id, kind, config or {}), single | (values or {}), "0")
