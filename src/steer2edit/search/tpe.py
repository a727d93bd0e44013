"""Rounds of candidates from Optuna's multi-objective TPE."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from .candidates import Candidate, edited
from .front import Trial
from .grid import _short
from .plan import Search
from .study import Study


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
