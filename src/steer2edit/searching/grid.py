"""The grid: every combination, or the best series of them alone; then a finer one around the best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from ..method.variants import FULL
from .candidates import Candidate, Trial, edited
from .front import Aim, choose, cost_of
from .plan import Search
from .study import Study

Axes = Mapping[str, Sequence[Any]]
T = TypeVar("T")


def axes_of(s: Search) -> dict[str, Sequence[Any]]:
    return {"rho_attn": s.rho_attn, "rho_mlp": s.rho_mlp, "alpha": s.alpha, "layers": s.layers, "variant": s.variants}


def _grid(s: Search, axes: Axes) -> list[Candidate]:
    """Every combination, without those that switch both block types off; l2, which takes no α, under the first only."""
    candidates = [edited(*values) for values in itertools.product(*axes.values()) if values[0] or values[1]]
    first_alpha = axes["alpha"][0]
    kept = [c for c in candidates if c.config.get("variant") != "l2" or c.config["alpha"] == first_alpha]
    return list({c.id: c for c in kept}.values())


def coarse_grid(s: Search) -> list[Candidate]:
    """Every combination of the recipe's lists."""
    return _grid(s, axes_of(s))


def planned_edits(s: Search, coarse: Sequence[Candidate]) -> int:
    """How many edits a search will try, at most."""
    if s.method == "tpe":
        return s.trials
    refinable = _refinable(s)
    refined = s.refine ** len(refinable) if s.refine and refinable else 0
    return tried_of_series(s, [len(one) for one in _series(coarse)]) + refined


def tried_of_series(s: Search, lengths: Sequence[int]) -> int:
    """How many candidates of one kind are tried, at most, if its series are this long."""
    return len(lengths) + max(lengths, default=1) - 1 if s.narrow else sum(lengths)


def strengths_each(s: Search, edits: int, series: int) -> int:
    """How many strengths each series of a baseline has: together at least as many as there are edits."""
    return s.points if s.narrow and series > 1 else max(2, math.ceil(edits / series))


def grid(s: Search, coarse: Sequence[Candidate], aim: Aim, study: Study) -> Iterator[list[Candidate]]:
    """The coarse grid; then, if asked for, a finer one around what the rule takes of it (paper, section 5).

    With `narrow`, of the coarse grid first the middle of each series, and then the series that the rule takes.
    """
    series = _series(coarse)
    if s.narrow and len(series) > 1:
        yield middles(series)
        yield rest_of_best(series, study, aim)
    else:
        yield list(coarse)
    if not s.refine or (best := _best(study, aim, "edit")) is None:
        return
    config = best.candidate.config
    axes: dict[str, Sequence[Any]] = {
        name: [config.get(name, FULL if name == "variant" else None)] for name in axes_of(s)
    }
    alike = [candidate.config for candidate in coarse if _shape(candidate.config) == _shape(config)]
    for name in _refinable(s):
        # The strengths that were found for each α are others.
        neighbours = [c for c in alike if name == "alpha" or c["alpha"] == config["alpha"]]
        axes[name] = _around(config[name], [c[name] for c in neighbours], s.refine)
    tried = study.known()
    study.refined = {"around": best.candidate.id, **{name: list(values) for name, values in axes.items()}}
    yield [candidate for candidate in _grid(s, axes) if candidate.id not in tried]


def middles(series: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """The middle strength of each series."""
    return [one[len(one) // 2] for one in series]


def rest_of_best(series: Sequence[Sequence[Candidate]], study: Study, aim: Aim) -> list[Candidate]:
    """What was not tried of the series, all of one kind, that the rule takes; nothing if there is no trial of them."""
    best = _best(study, aim, series[0][0].kind)
    if best is None:
        return []
    better = next(one for one in series if best.candidate.id in [candidate.id for candidate in one])
    return [candidate for candidate in better if candidate.id not in study.known()]


def _best(study: Study, aim: Aim, kind: str) -> Trial | None:
    """What the rule takes of a kind so far; None if there is none at all."""
    trials = study.of_kind(kind)
    # If nothing is within the limits, the good region is where they are missed least: at the smallest cost.
    return choose(trials, aim) or min(trials, key=lambda t: (cost_of(t), aim.gain(t) or 0.0), default=None)


def _series(coarse: Sequence[Candidate]) -> list[list[Candidate]]:
    """The candidates that differ in ρ alone, in their order."""
    found: dict[tuple[Any, ...], list[Candidate]] = {}
    for candidate in coarse:
        found.setdefault((*_shape(candidate.config), candidate.config["alpha"]), []).append(candidate)
    return list(found.values())


def _shape(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must be the same for two configurations to lie on one grid: all but the numbers."""
    return config["rho_attn"] is None, config["rho_mlp"] is None, config.get("layers"), config.get("variant")


def short(x: float, digits: int) -> float:
    """A number as it is printed."""
    return float(f"{x:.{digits}g}")


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, spread evenly, the first and the last among them.

    >>> evenly("abcdefg", 3)
    ['a', 'd', 'g']
    """
    if len(items) <= most:
        return list(items)
    return [items[round(float(place))] for place in np.linspace(0, len(items) - 1, most)]


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
    return list(dict.fromkeys(short(x, 6) for x in np.linspace(low, high, count)))
