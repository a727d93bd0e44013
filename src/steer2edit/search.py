"""The search: which edits are tried, in rounds, and as many steering strengths beside them; all on validation.

A round is a list of candidates that are evaluated at once. The grid is one round, or two; TPE proposes one after the
other, each from what the rounds before it showed. Nothing is kept but the journal: a killed study proposes the same
rounds again, finds them in the journal, and goes on.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np

from .config import Range, Recipe, Search
from .engines import Progress
from .errors import EditError, RecipeError
from .evaluate import within
from .files import read_jsonl
from .front import RULES, Trial, choose, hypervolume_interval, pareto
from .trials import BASE, Bench, Candidate, edited, steered

Axes = Mapping[str, Sequence[Any]]


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


# The grid ----------------------------------------------------------------------------------------------------------


def axes_of(s: Search) -> dict[str, Sequence[Any]]:
    return {"rho_attn": s.rho_attn, "rho_mlp": s.rho_mlp, "alpha": s.alpha, "layers": s.layers, "variant": s.variants}


def _grid(s: Search, axes: Axes) -> list[Candidate]:
    """Every combination, without those that switch both block types off; l2, which takes no α, under the first only."""
    found = [edited(*values) for values in itertools.product(*axes.values()) if values[0] or values[1]]
    found = [c for c in found if c.config.get("variant") != "l2" or c.config["alpha"] == axes["alpha"][0]]
    return list({c.id: c for c in found}.values())


def grid(s: Search, study: Study) -> Iterator[list[Candidate]]:
    """The coarse grid; then, if asked for, a finer one around what the rule takes of it (paper, section 5)."""
    coarse = _grid(s, axes_of(s))
    yield coarse
    if not s.refine:
        return
    edits = [t for t in study.trials if t["kind"] == "edit"]
    # Where nothing is within the limits the good region is where they are missed least: at the smallest cost.
    best = choose(edits, s.rule, s.limits.model_dump(), s.tolerance) or min(
        edits, key=lambda t: (t["utility_loss"] or 0.0, t["refusal"]), default=None
    )
    if best is None:
        return
    axes: dict[str, Sequence[Any]] = {
        name: [best["config"].get(name, "full" if name == "variant" else None)] for name in axes_of(s)
    }
    for name in _refinable(s):
        axes[name] = _around(best["config"][name], getattr(s, name), s.refine)
    tried = {candidate.id for candidate in coarse}
    study.refined = {"around": best["id"], **{name: list(values) for name, values in axes.items()}}
    yield [candidate for candidate in _grid(s, axes) if candidate.id not in tried]


def _short(x: float, digits: int) -> float:
    """A number as it is printed."""
    return float(f"{x:.{digits}g}")


def _refinable(s: Search) -> list[str]:
    """The axes with more than one number."""
    return [
        name for name in ("rho_attn", "rho_mlp", "alpha") if len({x for x in getattr(s, name) if x is not None}) > 1
    ]


def _around(best: float | None, values: Sequence[float | None], count: int) -> list[float | None]:
    """`count` numbers that reach halfway to the neighbours of `best`."""
    if best is None:
        return [None]
    numbers = sorted({x for x in values if x is not None})
    at = numbers.index(best)
    low = (numbers[at - 1] + best) / 2 if at else best
    high = (numbers[at + 1] + best) / 2 if at + 1 < len(numbers) else best
    return list(dict.fromkeys(_short(x, 6) for x in np.linspace(low, high, count)))


# TPE ---------------------------------------------------------------------------------------------------------------


def tpe(s: Search, seed: int, study: Study) -> Iterator[list[Candidate]]:
    """Rounds of candidates from Optuna's multi-objective TPE: refusal up, utility loss down, the limits as constraints.

    Each round is drawn from a study made anew of the trials so far, by a sampler seeded with the round's number: the
    rounds depend on the seed and on the trials alone, and a resumed study draws what the broken one drew.
    """
    made = 0
    for number in itertools.count():
        if made >= s.trials:
            return
        proposed = _ask(s, seed, number, study, min(s.at_once, s.trials - made))
        if not proposed:  # the space has no more
            return
        made += len(proposed)
        yield proposed


def _ask(s: Search, seed: int, number: int, study: Study, count: int) -> list[Candidate]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    axes = _Axes(s)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]),
            n_startup_trials=s.at_once,
            multivariate=True,
            group=True,
            constant_liar=True,  # candidates of one round keep away from each other
        )
        own = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        own.add_trials([axes.told(trial, s) for trial in study.trials if trial["kind"] == "edit"])
        own.add_trials([axes.told(row, s) for row in study.discarded if row["kind"] == "edit"])
        known = {row["id"] for row in (*study.trials, *study.discarded)}
        proposed: dict[str, Candidate] = {}
        # A drawn configuration may be one that was tried, or have both block types off: then another is drawn.
        for _ in range(50 * count):
            candidate = axes.candidate(own.ask())
            if candidate is not None and candidate.id not in known:
                proposed.setdefault(candidate.id, candidate)
            if len(proposed) == count:
                break
    return list(proposed.values())


class _Axes:
    """The search space as Optuna has it: numbers between the lists' ends, and a switch where a list has `off`."""

    def __init__(self, s: Search):
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        self.space: dict[str, Any] = {}
        for name in ("rho_attn", "rho_mlp", "alpha"):
            values = getattr(s, name)
            numbers = [x for x in values if x is not None]
            if None in values:
                self.space[f"{name} on"] = CategoricalDistribution([True, False] if numbers else [False])
            if numbers:
                self.space[name] = FloatDistribution(min(numbers), max(numbers))
        for name, values in (("layers", s.layers), ("variant", s.variants)):
            self.space[name] = CategoricalDistribution([str(x) if x else "all" for x in values])

    def candidate(self, trial: Any) -> Candidate | None:
        """What an asked trial stands for; None where both block types are off."""
        config: dict[str, Any] = {}
        for name in ("rho_attn", "rho_mlp", "alpha"):
            switch, numbers = self.space.get(f"{name} on"), self.space.get(name)
            config[name] = None
            if switch is None or trial.suggest_categorical(f"{name} on", switch.choices):
                assert numbers is not None
                # Four digits: what is tried is what is printed, and what the study is told.
                drawn = _short(trial.suggest_float(name, numbers.low, numbers.high), 4)
                config[name] = min(max(drawn, numbers.low), numbers.high)
        layers, variant = (trial.suggest_categorical(name, self.space[name].choices) for name in ("layers", "variant"))
        if config["rho_attn"] is None and config["rho_mlp"] is None:
            return None
        return edited(**config, layers=None if layers == "all" else layers, variant=variant)

    def told(self, row: Trial, s: Search) -> Any:
        """A trial that was made, as Optuna is told of it; one that was discarded misses every limit."""
        from optuna.trial import create_trial

        config = row["config"]
        params: dict[str, Any] = {"layers": config.get("layers", "all"), "variant": config.get("variant", "full")}
        for name in ("rho_attn", "rho_mlp", "alpha"):
            if f"{name} on" in self.space:
                params[f"{name} on"] = config[name] is not None
            if config[name] is not None:
                params[name] = config[name]
        limits = {name: limit for name, limit in s.limits.model_dump().items() if limit is not None}
        discarded = "why" in row
        return create_trial(
            params=params,
            distributions={name: self.space[name] for name in params},
            values=[0.0, s.reference] if discarded else [row["refusal"], row["utility_loss"]],
            constraints={
                name: 1.0 if discarded or row[name] is None else row[name] - limit for name, limit in limits.items()
            },
        )


# The choice --------------------------------------------------------------------------------------------------------


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
