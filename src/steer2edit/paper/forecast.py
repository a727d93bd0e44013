"""What a suite will cost, for people: tokens, hours on this machine and on accelerators, memory and disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..models.embedded import EMBEDDED
from .cost import Cost, cost_of
from .facts import PaperModel, machines
from .machine import Estimate, Hardware, estimate
from .plan import Planned, SuitePlan
from .speed import Trial, cpu_here, speed_or_none


@dataclass(frozen=True)
class Elsewhere:
    """A run on a machine, estimated from the model's shape."""

    machine: str
    estimate: Estimate
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """A run's cost.

    Attributes:
        seconds: here, by the model's measured speeds; None if it cannot be loaded here, which `why` says.
        elsewhere: of one of the six on each machine.
    """

    cost: Cost
    seconds: float | None
    why: str
    elsewhere: tuple[Elsewhere, ...] = ()


def forecast(plan: SuitePlan, out: str | Path, fetch: bool = True) -> list[Forecast]:
    """Of every run what it costs.

    Args:
        out: where the measured speeds are kept. fetch: whether models of the Hub are loaded to measure their speeds.
    """
    found: list[Forecast] = []
    cpu: Hardware | None = None
    speeds: dict[str, tuple[Trial | None, str]] = {}
    for planned in plan.runs:
        name = f"{planned.recipe.model.name} {planned.behaviour}"
        if name not in speeds:
            model = planned.recipe.model.name
            there = fetch or model == EMBEDDED or Path(model).exists()
            speeds[name] = speed_or_none(planned.recipe, out) if there else (None, "a plan fetches no model")
        trial, why = speeds[name]
        cost = cost_of(planned, plan, None if trial is None else trial.answer)
        elsewhere: tuple[Elsewhere, ...] = ()
        if planned.facts is not None:
            cpu = cpu or cpu_here(out)
            elsewhere = tuple(_elsewhere(cost, planned, planned.facts, cpu))
        found.append(Forecast(cost, None if trial is None else cost.seconds(trial.speed), why, elsewhere))
    return found


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
    found = []
    for name, hardware in places.items():
        one = estimate(facts.shape, hardware, planned.recipe.evaluation.rows, length)
        found.append(Elsewhere(name, one, cost.seconds(one.speed)))
    return found


def mean_length(cost: Cost, planned: Planned) -> float:
    """The mean tokens of a row, half of its answer written: what the keys and values of a step hold."""
    facts = planned.facts
    most = planned.recipe.evaluation.new_tokens
    answer = most if facts is None else min(most, facts.answer_tokens)
    return 100 + answer / 2


def lines_of(plan: SuitePlan, found: Sequence[Forecast]) -> list[str]:
    """The forecast as lines of text."""
    lines = [f"suite {plan.suite}, profile {plan.profile_name}: {len(plan.runs)} runs, {', '.join(plan.parts)}"]
    for one in found:
        work, planned = one.cost.work, one.cost.planned
        time = f"about {duration(one.seconds)} here" if one.seconds is not None else f"not measured here: {one.why}"
        lines.append(
            f"  {planned.name}: {_millions(work.written)} tokens written, {_millions(work.read)} read, "
            f"{_millions(work.scored)} scored; {time}; {one.cost.disk / 1e6:.0f} MB on disk"
        )
        lines += [f"    {note}" for note in planned.notes]
        for place in one.elsewhere:
            e = place.estimate
            fits = f"{e.needed / 1e9:.1f} GB with {e.rows} rows at once"
            if not e.fits:
                fits = f"does not fit: the weights alone are {e.weights / 1e9:.1f} GB"
            lines.append(f"    {place.machine}: about {duration(place.seconds)}, {fits}; an estimate")
    known = [one.seconds for one in found if one.seconds is not None]
    if len(known) == len(found):
        lines.append(f"  in all: about {duration(sum(known))} here")
    if any(one.elsewhere for one in found):
        shares = machines()
        lines.append(
            f"  Estimates follow from the model's shape and the makers' figures: {shares.compute_share:.0%} of the"
            f" operations and {shares.bandwidth_share:.0%} of the bandwidth are assumed to be reached (docs/paper.md)."
        )
    if "training" in plan.parts:
        lines.append("  The training baselines are not counted.")
    return lines


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


def as_json(plan: SuitePlan, found: Sequence[Forecast]) -> Mapping[str, Any]:
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
                "why": one.why,
                "notes": list(one.cost.planned.notes),
                "elsewhere": [
                    {"machine": place.machine, "seconds": place.seconds, **asdict(place.estimate)}
                    for place in one.elsewhere
                ],
            }
            for one in found
        ],
    }
