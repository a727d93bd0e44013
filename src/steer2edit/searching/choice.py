"""The choice, on validation: what the recipe's rule takes of each method, or the edit that a person picks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..behaviours.base import UTILITY_LOSS
from ..errors import EditError
from .candidates import Trial, of_kind
from .front import Aim, choose, cost_of, hypervolume_interval, pareto
from .grid import evenly
from .study import Study


def offered(trials: Sequence[Trial], aim: Aim) -> list[Trial]:
    """The edits that a person may pick by number, by rising cost: their front and what the rule takes.

    The front is of all edits, whatever the limits. Without one, since no cost was measured, every edit is offered.
    """
    edits = of_kind(trials, "edit")
    shown = {trial.candidate.id: trial for trial in pareto(edits, aim) or edits}
    chosen = choose(edits, aim)
    if chosen is not None:
        shown.setdefault(chosen.candidate.id, chosen)
    return sorted(shown.values(), key=cost_of)


def picked(trials: Sequence[Trial], aim: Aim, pick: int | str) -> Trial:
    """The edit that a person picked, within the limits or not.

    Args:
        pick: its number in `offered`, from 1 on, or the id of any edit that was tried.

    Raises:
        EditError: there is no such edit.
    """
    front = offered(trials, aim)
    number = int(pick) if isinstance(pick, int) or pick.isdecimal() else 0
    if 1 <= number <= len(front):
        return front[number - 1]
    for trial in of_kind(trials, "edit"):
        if trial.candidate.id == pick:
            return trial
    names = ", ".join(trial.candidate.id for trial in front)
    raise EditError(
        "search.pick names no edit that was tried",
        got=pick,
        fix=f"Give a number from 1 to {len(front)}, or one of: {names}." if front else "Raise ρ or α (smaller edits).",
    )


def chosen_edit(trials: Sequence[Trial], aim: Aim, pick: int | str | None) -> Trial | None:
    """The edit that a person picked, or else the one that the rule takes; None if none is within the limits."""
    return choose(of_kind(trials, "edit"), aim) if pick is None else picked(trials, aim, pick)


def require_choice(trials: Sequence[Trial], aim: Aim) -> Trial:
    """The edit that the rule takes. Raises EditError if none is within the limits."""
    edits = of_kind(trials, "edit")
    if not edits:
        raise EditError("no edit is left to choose from", got="all discarded", fix="Raise ρ or α (smaller edits).")
    chosen = choose(edits, aim)
    if chosen is None:
        gentlest = min(edits, key=cost_of)
        raise EditError(
            "no edit stays within the limits on validation",
            got=f"the gentlest has {'; '.join(aim.missed(gentlest))}",
            fix="Raise search.rho_attn, search.rho_mlp or search.alpha (smaller edits), or the limits.",
        )
    return chosen


def moved(trial: Trial, base: Trial, aim: Aim) -> bool:
    """Whether a trial is better than the original model at all, by the measure that ranks."""
    mean, of_base = trial.mean(aim.ranking.name), base.mean(aim.ranking.name)
    return mean is not None and of_base is not None and aim.ranking.gain(mean) > aim.ranking.gain(of_base)


# Which block types an edit may change, in the order of tables: by the keys of its configuration that are numbers.
BLOCKS = {"attention alone": ("rho_attn",), "MLP alone": ("rho_mlp",), "both": ("rho_attn", "rho_mlp")}


def by_block(study: Study, aim: Aim, resamples: int, seed: int) -> dict[str, Any]:
    """The edits by the block types that they may change (paper, figures 11 to 13: the other ρ is ∞), at equal budgets.

    Each has as many configurations as the one with the fewest, spread evenly over those that were tried, and its best
    by the rule. Nothing if the search tried one sort alone.
    """
    sorts: dict[str, list[Trial]] = {}
    for name, on in BLOCKS.items():
        some = [
            trial
            for trial in study.of_kind("edit")
            if all((trial.candidate.config[rho] is not None) == (rho in on) for rho in ("rho_attn", "rho_mlp"))
        ]
        if some:
            sorts[name] = some
    if len(sorts) < 2:
        return {}
    most = min(map(len, sorts.values()))
    shown: dict[str, Any] = {}
    for name, every in sorts.items():
        some = evenly(every, most)
        chosen = choose(some, aim)
        shown[name] = {
            "tried": len(every),
            "compared": len(some),
            "hypervolume": hypervolume_interval([t for t in some if _allowed(t, aim)], aim, resamples, seed),
            "best": None if chosen is None else brief(chosen),
        }
    return shown


def _allowed(trial: Trial, aim: Aim) -> bool:
    """Whether a trial is within the limits but for that of the utility loss, for which the reference stands."""
    return replace(aim, limits={m: limit for m, limit in aim.limits.items() if m != UTILITY_LOSS}).allows(trial)


def brief(trial: Trial) -> dict[str, Any]:
    """What `choice.json` says of a trial that was chosen."""
    c = trial.candidate
    return {"id": c.id, "config": dict(c.config)} | trial.means()


def summary(study: Study, aim: Aim, method: str, resamples: int, seed: int) -> dict[str, Any]:
    """What was tried, at which budget, and each method's front and hypervolume on validation.

    A front is of the trials within the limits, but for that of the utility loss, for which the reference stands.
    """
    shown: dict[str, Any] = {
        "method": method,
        "attribute": aim.attribute.to_json(),
        "ranking": aim.ranking.to_json(),
        "rule": aim.describe_rule(),
        "limits": {measure.name: limit for measure, limit in aim.limits.items()},
        "reference": aim.reference,
        "tried": {kind: len(study.of_kind(kind)) for kind in study.evaluations},
        "discarded": len(study.discarded),
        "evaluations": study.evaluations,
        "refined": study.refined,
        "front": {},
        "hypervolume": {},
    }
    for kind in study.evaluations:
        allowed = [trial for trial in study.of_kind(kind) if _allowed(trial, aim)]
        shown["front"][kind] = [trial.candidate.id for trial in pareto(allowed, aim)]
        shown["hypervolume"][kind] = hypervolume_interval(allowed, aim, resamples, seed)
    return shown
