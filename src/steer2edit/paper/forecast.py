"""What a suite will cost, for people: tokens, hours on this machine and on accelerators, memory and disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import Steer2EditError
from ..models.embedded import EMBEDDED
from .cost import Cost, cost_of
from .facts import PaperModel, machines
from .machine import Estimate, Hardware, Work, estimate, parameters
from .plan import Planned, SuitePlan
from .speed import Trial, cpu_here, trials_here


@dataclass(frozen=True)
class Elsewhere:
    """A run on a machine, estimated from the model's shape.

    Attributes:
        training: bytes that a step of every weight needs; None if the run has none, or if they fit.
    """

    machine: str
    estimate: Estimate
    seconds: float
    training: float | None = None


@dataclass(frozen=True)
class Forecast:
    """A run's cost.

    Attributes:
        parts: stage or part → seconds here, by the model's measured speeds; empty if it cannot be loaded here, which
            `why` says.
        elsewhere: of one of the six on each machine.
    """

    cost: Cost
    parts: Mapping[str, float]
    why: str = ""
    elsewhere: tuple[Elsewhere, ...] = ()

    @property
    def seconds(self) -> float | None:
        return sum(self.parts.values()) if self.parts else None


def forecast(plan: SuitePlan, out: str | Path, fetch: bool = True) -> list[Forecast]:
    """Of every run what it costs.

    Args:
        out: where the measured speeds are kept. fetch: whether models of the Hub are loaded to measure their speeds.
    """
    here = [planned for planned in plan.runs if fetch or _is_here(planned.recipe.model.name)]
    trials = dict(zip((planned.name for planned in here), trials_here([p.recipe for p in here], out), strict=True))
    cpu = cpu_here(Path(out)) if any(planned.facts is not None for planned in plan.runs) else None
    return [_forecast(planned, plan, trials.get(planned.name), cpu) for planned in plan.runs]


def _is_here(model: str) -> bool:
    return model == EMBEDDED or Path(model).exists()


def _forecast(
    planned: Planned, plan: SuitePlan, trial: Trial | Steer2EditError | None, cpu: Hardware | None
) -> Forecast:
    parts: dict[str, float] = {}
    if isinstance(trial, Trial):
        cost = cost_of(planned, plan, trial.answer, trial.size)
        parts = {part: trial.speed.seconds(work) for part, work in cost.parts.items()}
    else:
        cost = cost_of(planned, plan)
    why = "a plan fetches no model" if trial is None else str(trial)
    elsewhere: tuple[Elsewhere, ...] = ()
    if planned.facts is not None and cpu is not None:
        elsewhere = tuple(_elsewhere(cost, planned, planned.facts, cpu))
    return Forecast(cost, parts, "" if parts else why, elsewhere)


def _elsewhere(cost: Cost, planned: Planned, facts: PaperModel, cpu: Hardware) -> list[Elsewhere]:
    known = machines()
    places: dict[str, Hardware] = {
        f"{m.name} ({m.like})": Hardware(
            known.compute_share * m.peak, known.bandwidth_share * m.bandwidth, m.disk, m.memory
        )
        for m in known.machines
    }
    places["this CPU, fp32"] = cpu
    length = mean_length(cost, planned)
    estimates = []
    for name, hardware in places.items():
        one = estimate(facts.shape, hardware, planned.recipe.evaluation.rows, length)
        # In fp32 the weights, their gradients, and two moments of each.
        needed = 16.0 * parameters(facts.shape)
        trains = "fine_tuning" in planned.recipe.training.methods
        too_much = trains and hardware.memory is not None and needed > hardware.memory
        estimates.append(Elsewhere(name, one, cost.seconds(one.speed), needed if too_much else None))
    return estimates


def mean_length(cost: Cost, planned: Planned) -> float:
    """The mean tokens of a row, half of its answer written: what the keys and values of a step hold."""
    facts = planned.facts
    most = planned.recipe.evaluation.new_tokens
    answer = most if facts is None else min(most, facts.answer_tokens)
    return 100 + answer / 2


def lines_of(plan: SuitePlan, forecasts: Sequence[Forecast]) -> list[str]:
    """The forecast as lines of text."""
    lines = [f"suite {plan.suite}, profile {plan.profile_name}: {len(plan.runs)} runs, {', '.join(plan.parts)}"]
    for one in forecasts:
        work, planned = one.cost.work, one.cost.planned
        time = f"about {duration(one.seconds)} here" if one.seconds is not None else f"not measured here: {one.why}"
        lines.append(
            f"  {planned.name}: {_millions(work.written)} tokens written, {_millions(work.read)} read, "
            f"{_millions(work.scored)} scored{_trained(work)}; {time}; {one.cost.disk / 1e6:.0f} MB on disk"
        )
        lines += [f"    {note}" for note in planned.notes]
        for place in one.elsewhere:
            e = place.estimate
            fits = f"{e.needed / 1e9:.1f} GB with {e.rows} rows at once"
            if not e.fits:
                fits = f"does not fit: the weights alone are {e.weights / 1e9:.1f} GB"
            if place.training is not None:
                fits += f"; full fine-tuning does not fit: it needs {place.training / 1e9:.0f} GB in fp32"
            lines.append(f"    {place.machine}: about {duration(place.seconds)}, {fits}; an estimate")
    known = [one.seconds for one in forecasts if one.seconds is not None]
    if len(known) == len(forecasts):
        lines.append(f"  in all: about {duration(sum(known))} here")
        lines.append(f"  of it: {', '.join(_by_part(forecasts))}")
    if any(one.elsewhere for one in forecasts):
        shares = machines()
        lines.append(
            f"  Estimates follow from the model's shape and the makers' figures: {shares.compute_share:.0%} of the"
            f" operations and {shares.bandwidth_share:.0%} of the bandwidth are assumed to be reached (docs/paper.md)."
        )
    return lines


def _by_part(forecasts: Sequence[Forecast]) -> list[str]:
    """The stages and parts of all runs that take a second or more, with their times."""
    names = dict.fromkeys(part for one in forecasts for part in one.parts)
    seconds = {name: sum(one.parts.get(name, 0.0) for one in forecasts) for name in names}
    return [f"{name.replace('_', ' ')} {duration(taken)}" for name, taken in seconds.items() if taken >= 1]


def _trained(work: Work) -> str:
    tokens = work.lora + work.full
    return f", {_millions(tokens)} trained on" if tokens else ""


def _millions(tokens: float) -> str:
    return f"{tokens / 1e6:.2f} M" if tokens >= 10_000 else f"{tokens:.0f}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours in words.

    >>> duration(50), duration(600), duration(9000)
    ('50 s', '10 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def as_json(plan: SuitePlan, forecasts: Sequence[Forecast]) -> Mapping[str, Any]:
    """The forecast for scripts."""
    return {
        "suite": plan.suite,
        "profile": plan.profile_name,
        "runs": [
            {
                "name": one.cost.planned.name,
                "model": one.cost.planned.recipe.model.name,
                "behaviour": one.cost.planned.behaviour,
                "tokens": asdict(one.cost.work),
                "disk": one.cost.disk,
                "seconds": one.seconds,
                "parts": dict(one.parts),
                "why": one.why,
                "notes": list(one.cost.planned.notes),
                "elsewhere": [
                    {"machine": place.machine, "seconds": place.seconds, **asdict(place.estimate)}
                    for place in one.elsewhere
                ],
            }
            for one in forecasts
        ],
    }
