"""Rounds of candidates from Optuna's multi-objective TPE."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..behaviours.base import Measure
from .candidates import Candidate, Trial, edited
from .front import Aim
from .grid import short
from .plan import Search
from .study import Discarded, Study


def tpe(s: Search, aim: Aim, seed: int, study: Study) -> Iterator[list[Candidate]]:
    """Rounds of candidates: the attribute to be better, the utility loss smaller, the limits as constraints.

    Each round is drawn from a study made anew of the trials so far, by a sampler seeded with the round's number: the
    rounds depend on the seed and on the trials alone, and a resumed study draws what the broken one drew.
    """
    proposed_so_far = 0
    for number in itertools.count():
        if proposed_so_far >= s.trials:
            return
        proposed = _ask(s, aim, seed, number, study, min(s.at_once, s.trials - proposed_so_far))
        if not proposed:  # the space has no more
            return
        proposed_so_far += len(proposed)
        yield proposed


def _ask(s: Search, aim: Aim, seed: int, number: int, study: Study, count: int) -> list[Candidate]:
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
        own.add_trials([axes.as_optuna(trial, aim) for trial in study.of_kind("edit")])
        own.add_trials([axes.as_optuna(row, aim) for row in study.discarded if row.candidate.kind == "edit"])
        known = study.known()
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
                # Four digits: what is tried is what is printed, and what Optuna gets to know.
                drawn = short(trial.suggest_float(name, numbers.low, numbers.high), 4)
                config[name] = min(max(drawn, numbers.low), numbers.high)
        layers = trial.suggest_categorical("layers", self.space["layers"].choices)
        variant = trial.suggest_categorical("variant", self.space["variant"].choices)
        if config["rho_attn"] is None and config["rho_mlp"] is None:
            return None
        return edited(**config, layers=None if layers == "all" else layers, variant=variant)

    def as_optuna(self, tried: Trial | Discarded, aim: Aim) -> Any:
        """A trial as Optuna has it; one that was discarded misses every limit."""
        from optuna.trial import create_trial

        config = tried.candidate.config
        params: dict[str, Any] = {"layers": config.get("layers", "all"), "variant": config.get("variant", "full")}
        for name in ("rho_attn", "rho_mlp", "alpha"):
            if f"{name} on" in self.space:
                params[f"{name} on"] = config[name] is not None
            if config[name] is not None:
                params[name] = config[name]
        limits = {measure: limit for measure, limit in aim.limits.items() if limit is not None}
        if isinstance(tried, Discarded):
            values: list[float] = [aim.attribute.gain(aim.attribute.worst), aim.reference]
            excess = {measure.name: 1.0 for measure in limits}
        else:
            values = list(_objectives(tried, aim))
            excess = {measure.name: _excess(measure, tried, limit) for measure, limit in limits.items()}
        return create_trial(
            params=params,
            distributions={name: self.space[name] for name in params},
            values=values,
            constraints=excess,
        )


def _objectives(trial: Trial, aim: Aim) -> tuple[float, float]:
    """(gain, utility loss) of a trial that has both: one that has not is discarded."""
    point = aim.point(trial)
    assert point is not None
    cost, gain = point
    return gain, cost


def _excess(measure: Measure, trial: Trial, limit: float) -> float:
    """By how much a trial misses a limit; 0 or less if it is within."""
    mean = trial.mean(measure.name)
    return 1.0 if mean is None else measure.gain(limit) - measure.gain(mean)
