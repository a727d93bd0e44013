"""The search: which edits are tried, in rounds, and as many steering strengths beside them; all on validation.

A round is a list of candidates that are evaluated at once. The grid is one round, or two; TPE proposes one after the
other, each from what the rounds before it showed. Nothing is kept but the journal: a killed study proposes the same
rounds again, finds them in the journal, and goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np

from ..engines import Progress
from ..errors import EditError, RecipeError
from ..files.reading import read_jsonl
from ..recipe import Recipe
from .bench import Bench
from .candidates import BASE, Candidate, steered
from .front import RULES, Trial, choose, hypervolume_interval, pareto
from .grid import _grid, _refinable, _short, axes_of, grid
from .plan import Range
from .statistics import within
from .tpe import tpe


@dataclass
class Study:
    """What a search tried.

    Attributes:
        trials: a row a candidate, the base model first; `round` says when it was tried.
        discarded: the edits that the sanity check threw out, or a loss that is not finite, and why.
        refined: what the second grid was laid around, if there was one.
        evaluations: kind → configurations × prompts.
    """

    trials: list[dict[str, Any]] = field(default_factory=list)
    discarded: list[dict[str, Any]] = field(default_factory=list)
    refined: dict[str, Any] | None = None
    evaluations: dict[str, int] = field(default_factory=lambda: {"edit": 0, "steering": 0})


def run_study(
    bench: Bench,
    recipe: Recipe,
    progress: Progress | None = None,
    told: Callable[[Study], None] | None = None,
) -> Study:
    """Every round of the recipe's search.

    Args:
        progress: told of the steps done and planned; an edit that is discarded counts as done.
        told: called after each round.

    Raises:
        RecipeError: TPE without benign prompts, on which the utility loss is measured.
    """
    s, study = recipe.search, Study()
    if s.method == "tpe" and not bench.own:
        raise RecipeError(
            "TPE weighs refusal against utility loss, which is measured on benign prompts",
            got="none on validation",
            fix="Add data.validation.benign, or use search.method: grid.",
        )
    simple = sanity_prompts()[: s.sanity]
    planned_edits = s.trials if s.method == "tpe" else len(_grid(s, axes_of(s))) + s.refine ** len(_refinable(s))
    strengths = [] if isinstance(s.steering, Range) else list(dict.fromkeys(s.steering))
    count = planned_edits + (planned_edits if isinstance(s.steering, Range) else len(strengths))
    planned = (1 + count) * bench.steps + planned_edits * len(simple)
    done = 0

    def part(steps: int) -> Progress | None:
        """Progress of the next part of so many steps."""
        nonlocal done
        start, done = done, done + steps
        return None if progress is None else lambda now, _: progress(min(start + now, planned), planned)

    waiting = [BASE, *map(steered, strengths)]
    for number, proposed in enumerate(grid(s, study) if s.method == "grid" else tpe(s, recipe.seed, study)):
        sound = proposed
        if simple:
            shares = bench.sane(proposed, simple, f"{number} sanity", part(len(proposed) * len(simple)))
            study.evaluations["edit"] += len(proposed) * len(simple)
            sound = []
            for candidate, share in zip(proposed, shares, strict=True):
                if share > (s.limits.degenerate or 0.0):
                    _discard(study, candidate, f"{share:.0%} of its answers to simple prompts are degenerate")
                else:
                    sound.append(candidate)
        part((len(proposed) - len(sound)) * bench.steps)
        _take(study, bench, [*waiting, *sound], str(number), part((len(waiting) + len(sound)) * bench.steps))
        waiting = []
        if told:
            told(study)
    if isinstance(s.steering, Range):
        # As many strengths as make its evaluations the edits', sanity checks included.
        many = max(2, math.ceil(study.evaluations["edit"] / max(1, len(bench.prompts))))
        spaced = [_short(x, 6) for x in np.linspace(s.steering.low, s.steering.high, many)]
        _take(study, bench, list(map(steered, spaced)), "steering", part(many * bench.steps))
        if told:
            told(study)
    if progress:
        progress(planned, planned)
    return study


def _take(study: Study, bench: Bench, tried: Sequence[Candidate], name: str, progress: Progress | None) -> None:
    """One round: its rows go to the study, those of edits whose losses are not finite to the discarded."""
    for trial in bench.run(tried, name, progress) if tried else []:
        kind = trial["kind"]
        if kind in study.evaluations:
            study.evaluations[kind] += len(bench.prompts)
        if kind != "base" and bench.own and trial["utility_loss"] is None:
            _discard(study, Candidate(trial["id"], kind, trial["config"]), "its losses are not finite")
        else:
            study.trials.append({**trial, "round": name})


def _discard(study: Study, candidate: Candidate, why: str) -> None:
    study.discarded.append({"id": candidate.id, "kind": candidate.kind, "config": dict(candidate.config), "why": why})


def sanity_prompts() -> list[str]:
    """Twenty short simple prompts."""
    return [row["prompt"] for row in read_jsonl(str(files("steer2edit") / "data" / "sanity_prompts.jsonl"))]


def require_choice(trials: Sequence[Trial], recipe: Recipe) -> Trial:
    """The edit that the recipe's rule takes. Raises EditError if none is within the limits."""
    s = recipe.search
    edits = [t for t in trials if t["kind"] == "edit"]
    if not edits:
        raise EditError("no edit is left to choose from", got="all discarded", fix="Raise ρ or α (smaller edits).")
    chosen = choose(edits, s.rule, s.limits.model_dump(), s.tolerance)
    if chosen is None:
        gentlest = min(edits, key=lambda t: t["utility_loss"] or 0.0)
        raise EditError(
            "no edit stays within the limits on validation",
            got=f"the gentlest has over-refusal {gentlest['over_refusal']}, utility loss {gentlest['utility_loss']}",
            fix="Raise search.rho_attn, search.rho_mlp or search.alpha (smaller edits), or the limits.",
        )
    return chosen


def summary(study: Study, recipe: Recipe) -> dict[str, Any]:
    """What was tried, at which budget, and each method's front and hypervolume on validation.

    A front is of the trials within the limits, but for that of the utility loss, for which the reference stands.
    """
    s = recipe.search
    limits = {name: limit for name, limit in s.limits.model_dump().items() if name != "utility_loss"}
    found: dict[str, Any] = {
        "method": s.method,
        "rule": RULES[s.rule][0],
        "limits": s.limits.model_dump(),
        "tried": {kind: sum(t["kind"] == kind for t in study.trials) for kind in study.evaluations},
        "discarded": len(study.discarded),
        "evaluations": study.evaluations,
        "refined": study.refined,
        "front": {},
        "hypervolume": {},
    }
    for kind in study.evaluations:
        allowed = [t for t in study.trials if t["kind"] == kind and within(t, limits)]
        found["front"][kind] = [t["id"] for t in pareto(allowed)]
        found["hypervolume"][kind] = hypervolume_interval(
            allowed, s.reference, recipe.evaluation.resamples, recipe.seed
        )
    return found
