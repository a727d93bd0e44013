"""The grid: every combination, then a finer one around the best."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .candidates import Candidate, edited
from .front import choose
from .plan import Search
from .study import Study

Axes = Mapping[str, Sequence[Any]]


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
