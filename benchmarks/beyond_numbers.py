"""The numbers of benchmarks/beyond.py: what the tests of several seeds say together. Nothing here runs a model.

A seed's row is what `beyond.py` writes into `seed-N/trials.json`: for each method its strengths, weak to strong, each
with the values of every test item. Intervals are percentile bootstraps over seeds and, within them, over prompts; all
methods share the draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from steer2edit.behaviours.base import NLL_RISE, UTILITY_LOSS, Measure
from steer2edit.searching.front import hypervolume

# A seed's row: base, and method → its strengths.
Seed = Mapping[str, Any]
_LOW_HIGH = (2.5, 97.5)


def interpolated(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    """y where x reaches a level, on the line between the first two neighbours that have it between them.

    Args:
        x, y: along a method's strengths, from the weakest on; pairs with a NaN are left out.

    Returns:
        None if no two neighbours have the level between them, whether x rises or falls.

    >>> interpolated([0.0, 0.4, 0.8], [0.0, 0.1, 0.3], 0.6)
    0.2
    >>> interpolated([0.0, 0.4, 0.8], [0.0, 0.1, 0.3], 0.9) is None
    True
    """
    points = [(a, b) for a, b in zip(x, y, strict=True) if not np.isnan(a) and not np.isnan(b)]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= level <= x1 and x1 > x0:
            return float(round(y0 + (y1 - y0) * (level - x0) / (x1 - x0), 12))
    return None


@dataclass
class Draw:
    """One draw of seeds, and in each of them of items: what a bootstrap measures once.

    Attributes:
        seeds: the rows drawn. items: for each of them how many items a measure has → the numbers of those drawn; None
            takes every item once.
    """

    seeds: Sequence[Seed]
    items: Sequence[dict[tuple[str, int], np.ndarray]] | None = None
    random: Any = field(default=None, repr=False)
    curves: dict[tuple[str, str], list[float]] = field(default_factory=dict, repr=False)

    @cached_property
    def each(self) -> list[Draw]:
        """Every seed as a draw of its own, with the same items."""
        items = self.items
        return [Draw([seed], None if items is None else [items[i]], self.random) for i, seed in enumerate(self.seeds)]

    def means(self, which: int, values: Mapping[str, np.ndarray], measure: str) -> float:
        """A measure's mean over the drawn items of one seed; NaN if it was not measured there, or is not finite."""
        numbers = values.get(measure)
        if numbers is None or not len(numbers):
            return float("nan")
        if self.items is None:
            return float(numbers.mean())
        # KL and the rise of the NLL are of the same answers, so that they share their draws.
        group = UTILITY_LOSS.name if measure == NLL_RISE.name else measure
        drawn = self.items[which]
        key = (group, len(numbers))
        if key not in drawn:
            drawn[key] = self.random.integers(0, len(numbers), len(numbers))
        return float(numbers[drawn[key]].mean())

    def curve(self, method: str, measure: str) -> list[float]:
        """A measure's mean over seeds at strength 0 and at each strength of a method, which were set at equal KL."""
        if (method, measure) not in self.curves:
            self.curves[method, measure] = self._curve(method, measure)
        return self.curves[method, measure]

    def _curve(self, method: str, measure: str) -> list[float]:
        base = [self.means(i, seed["base"]["test"], measure) for i, seed in enumerate(self.seeds)]
        rows = [base]
        for target in _targets(self.seeds, method):
            at = []
            for i, seed in enumerate(self.seeds):
                found = [one for one in seed["methods"].get(method, []) if one["target"] == target and one["test"]]
                at.append(self.means(i, found[0]["test"], measure) if found else float("nan"))
            rows.append(at)
        return [_mean(row) for row in rows]

    def volume(self, method: str, attribute: Measure, reference: float) -> float:
        """The mean over seeds of the hypervolume on test of the front that validation chose."""
        volumes = []
        for i, seed in enumerate(self.seeds):
            front = [one for one in seed["methods"].get(method, []) if one["id"] in seed["front"].get(method, [])]
            points = []
            for one in front:
                cost = self.means(i, one["test"], UTILITY_LOSS.name)
                points.append((cost, attribute.scaled(self.means(i, one["test"], attribute.name))))
            volumes.append(hypervolume([p for p in points if not np.isnan(p).any()], reference))
        return _mean(volumes)

    def chosen(self, method: str, measure: str) -> float:
        """The mean over seeds of what the rule took of a method on validation, on test."""
        at = []
        for i, seed in enumerate(self.seeds):
            found = [one for one in seed["methods"].get(method, []) if one["id"] == seed["chosen"].get(method)]
            at.append(self.means(i, found[0]["test"], measure) if found else float("nan"))
        return _mean(at)


def _targets(seeds: Sequence[Seed], method: str) -> list[float]:
    every = {one["target"] for seed in seeds for one in seed["methods"].get(method, []) if one["target"] is not None}
    return sorted(every)


def _mean(values: Sequence[float]) -> float:
    """The mean of what was measured; NaN if nothing was."""
    known = [value for value in values if not np.isnan(value)]
    return sum(known) / len(known) if known else float("nan")


def with_arrays(seed: Seed) -> dict[str, Any]:
    """A seed's row with arrays in place of lists, NaN where a number is not finite."""

    def arrays(values: Mapping[str, Any] | None) -> dict[str, np.ndarray] | None:
        return None if values is None else {name: np.array(of, dtype=np.float64) for name, of in values.items()}

    methods = {
        method: [one | {"test": arrays(one["test"])} for one in strengths]
        for method, strengths in seed["methods"].items()
    }
    return {**seed, "base": {"test": arrays(seed["base"]["test"])}, "methods": methods}


def draws(seeds: Sequence[Seed], resamples: int, seed: int) -> list[Draw]:
    """Bootstrap draws: seeds with replacement, and of each its own items with replacement."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(resamples):
        taken = [seeds[int(i)] for i in random.integers(0, len(seeds), len(seeds))]
        made.append(Draw(taken, [{} for _ in taken], random))
    return made


def summary(value: float | None, drawn: Sequence[float | None]) -> dict[str, Any]:
    """A number with its 95 % interval over bootstrap draws, and the share of these that have it."""
    known = [x for x in drawn if x is not None and np.isfinite(x)]
    shown = {"mean": None, "low": None, "high": None, "share": _share(len(known), len(drawn))}
    if value is None or not np.isfinite(value) or not known:
        return shown
    low, high = np.percentile(known, _LOW_HIGH)
    return shown | {"mean": _short(value), "low": _short(low), "high": _short(high)}


def _share(known: int, of: int) -> float:
    return _short(known / of) if of else 0.0


def _short(value: float) -> float:
    """As many digits as a table may need: the last bits of a mean depend on the machine."""
    return float(f"{value:.6g}")


def equal_level(
    whole: Draw,
    drawn: Sequence[Draw],
    methods: Sequence[str],
    x: str,
    costs: Sequence[str],
    levels: Sequence[float],
    *,
    each: bool = False,
) -> dict[str, Any]:
    """What each method's measures come to where `x` reaches a level on test, and their ratios to another method's.

    Args:
        each: read off in every seed by itself, then averaged over those that reach the level; a ratio is that of the
            means over those in which both methods do. Without it it is read off on the mean curve over the seeds.

    Returns:
        level → method → measure → a number with its interval; under "ratio", "of/to" → measure → the same of the ratio
        of the first method's number to the second's, where both reach the level.
    """
    parts = [d.each if each else [d] for d in (whole, *drawn)]
    table: dict[str, Any] = {}
    for level in levels:
        at: dict[str, dict[str, list[list[float | None]]]] = {
            method: {
                cost: [[interpolated(d.curve(method, x), d.curve(method, cost), level) for d in of] for of in parts]
                for cost in costs
            }
            for method in methods
        }
        row: dict[str, Any] = {
            method: {cost: _read_off([[(a, 1.0) for a in read] for read in reads]) for cost, reads in of_method.items()}
            for method, of_method in at.items()
        }
        row["ratio"] = {
            f"{methods[0]}/{other}": {
                cost: _read_off(
                    [list(zip(*both, strict=True)) for both in zip(at[methods[0]][cost], at[other][cost], strict=True)]
                )
                for cost in costs
            }
            for other in methods[1:]
        }
        table[f"{level:g}"] = row
    return table


def _read_off(reads: Sequence[Sequence[tuple[float | None, float | None]]]) -> dict[str, Any]:
    """What the draws read at a level, a pair for each of their curves: the sum of the first numbers by that of the
    second ones, over the pairs that have both. `share`: of how many curves the draws could read it, on average."""
    values, shares = [], []
    for pairs in reads:
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        below = sum(b for _, b in both)
        values.append(sum(a for a, _ in both) / below if below > 0 else None)
        shares.append(len(both) / len(pairs) if below > 0 else 0.0)
    drawn = shares[1:]
    return summary(values[0], values[1:]) | {"share": _short(sum(drawn) / len(drawn)) if drawn else 0.0}


def results_of(
    seeds: Sequence[Seed],
    measures: Sequence[Measure],
    *,
    curves: Sequence[str],
    levels: Sequence[float],
    kls: Sequence[float],
    reference: float,
    resamples: int,
) -> dict[str, Any]:
    """Everything that the page is made from.

    Args:
        measures: the attribute first. curves: methods of which every strength was tested. levels: of the attribute, at
            which they are compared; none leaves that out. kls: of KL, likewise.
    """
    attribute = measures[0]
    seeds = [with_arrays(seed) for seed in seeds]
    whole, drawn = Draw(seeds), draws(seeds, resamples, 0)
    methods = list(dict.fromkeys(method for seed in seeds for method in seed["methods"]))
    curves = [method for method in curves if method in methods]
    base = {m.name: whole.curve("", m.name)[0] for m in measures}
    shown = [m for m in measures if m.column and np.isfinite(base[m.name])]
    names = [m.name for m in shown]
    table: dict[str, Any] = {
        "seeds": [seed["seed"] for seed in seeds],
        "items": seeds[0]["items"],
        "attribute": attribute.name,
        "titles": {m.name: m.title for m in shown},
        "reference": reference,
        "hypervolume": {
            method: summary(
                whole.volume(method, attribute, reference), [d.volume(method, attribute, reference) for d in drawn]
            )
            for method in methods
        },
        "chosen": {
            method: {
                name: summary(whole.chosen(method, name), [d.chosen(method, name) for d in drawn]) for name in names
            }
            | {"within_limits": sum(method in seed["within_limits"] for seed in seeds)}
            for method in methods
        },
        "base": {name: _short(base[name]) for name in names},
        "curve": {
            method: {name: [_short_or_none(x) for x in whole.curve(method, name)] for name in names}
            for method in curves
        },
        "at_equal_kl": equal_level(
            whole, drawn, curves, UTILITY_LOSS.name, [name for name in names if name != UTILITY_LOSS.name], kls
        ),
        "sets": _sets(seeds),
    }
    if levels:
        costs = [m.name for m in shown if m.better == "lower"]
        compared = (whole, drawn, curves, attribute.name, costs, levels)
        table["at_equal_attribute"] = equal_level(*compared)
        table["at_equal_attribute_in_each"] = equal_level(*compared, each=True)
        table["levels_reached"] = {
            method: {
                f"{level:g}": [_reached(one, method, attribute.name, level) for one in whole.each] for level in levels
            }
            for method in curves
        }
    return table


def _reached(one: Draw, method: str, attribute: str, level: float) -> bool:
    curve = one.curve(method, attribute)
    return interpolated(curve, curve, level) is not None


def _short_or_none(value: float) -> float | None:
    return _short(value) if np.isfinite(value) else None


def _sets(seeds: Sequence[Seed]) -> dict[str, Any]:
    """Set → system → the share refused, over the prompts of all seeds, and how many they are."""
    joined: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        for name, systems in seed.get("sets", {}).items():
            for system, values in systems.items():
                joined.setdefault(name, {}).setdefault(system, []).extend(values)
    return {
        name: {system: {"mean": _short(sum(v) / len(v)), "n": len(v)} for system, v in systems.items()}
        for name, systems in joined.items()
    }


# As a page ----------------------------------------------------------------------------------------------------------


def markdown(results: Mapping[str, Any], titles: Mapping[str, str], costs: Mapping[str, Any]) -> str:
    """The tables, from which the page on the results is made.

    Args:
        titles: method → what people read. costs: seconds of each part, and megabytes.
    """
    names = results["titles"]
    seeds = ", ".join(map(str, results["seeds"]))
    items = "; ".join(
        f"{split} {', '.join(f'{n} {kind}' for kind, n in of.items())}" for split, of in results["items"].items()
    )
    lines = [f"Seeds {seeds}; each has {items}. In brackets: 95 % intervals over seeds and prompts.", ""]
    if "at_equal_attribute" in results:
        for level, row in results["at_equal_attribute"].items():
            lines += _level_table(f"Where {names[results['attribute']]} is {level} on test", row, titles, names)
        for level, row in results["at_equal_attribute_in_each"].items():
            reached = {method: sum(of[level]) for method, of in results["levels_reached"].items()}
            said = "; ".join(f"{titles[method]}: {n} of {len(results['seeds'])}" for method, n in reached.items())
            title = f"Where {names[results['attribute']]} is {level} on test, read off in each seed by itself"
            lines += _level_table(title, row, titles, names)
            lines += [f"Seeds that reach it: {said}. A ratio is that of the means over seeds that both reach.", ""]
    for level, row in results["at_equal_kl"].items():
        lines += _level_table(f"At a KL of {level} on test", row, titles, names, ratios=False)
    columns = [name for name in names if name in next(iter(results["chosen"].values()), {})]
    lines += ["### What the rule took on validation, on test", ""]
    lines += [
        "Of a method without a strength within the limits: the one set at the KL of the edit that was chosen.",
        "",
    ]
    lines += _table(
        ["method", "within limits", *(names[c] for c in columns)],
        [["original", "", *(_number(results["base"][c]) for c in columns)]]
        + [
            [titles[method], f"{row['within_limits']} of {len(results['seeds'])}", *(_cell(row[c]) for c in columns)]
            for method, row in results["chosen"].items()
        ],
    )
    lines += [
        f"### Hypervolume on test of the fronts that validation chose, up to a KL of {results['reference']:g}",
        "",
    ]
    volumes = sorted(results["hypervolume"].items(), key=lambda pair: -(pair[1]["mean"] or 0.0))
    lines += _table(["method", "hypervolume"], [[titles[method], _cell(value)] for method, value in volumes])
    if results["sets"]:
        systems = list(dict.fromkeys(system for of in results["sets"].values() for system in of))
        lines += ["### Prompts of others: the share refused", ""]
        rows = [
            [name, str(next(iter(of.values()))["n"]), *(_number(of[s]["mean"]) if s in of else "–" for s in systems)]
            for name, of in results["sets"].items()
        ]
        lines += _table(["set", "n", *(titles.get(s, s) for s in systems)], rows)
    lines += ["### Cost", ""]
    lines += _table(["part", "cost"], [[name, text] for name, text in costs.items()])
    return "\n".join(lines)


def _level_table(
    title: str, row: Mapping[str, Any], titles: Mapping[str, str], names: Mapping[str, str], ratios: bool = True
) -> list[str]:
    columns = [name for name in names if any(name in of for key, of in row.items() if key != "ratio")]
    cells = [[titles[m], *(_cell(of[c], "not reached") for c in columns)] for m, of in row.items() if m != "ratio"]
    if ratios:
        for pair, of in row["ratio"].items():
            one, other = pair.split("/")
            cells.append([f"{titles[one]} ÷ {titles[other]}", *(_cell(of[c], "not reached") for c in columns)])
    return [f"### {title}", "", *_table(["method", *(names[c] for c in columns)], cells)]


def _cell(value: Mapping[str, Any], missing: str = "–") -> str:
    if value["mean"] is None:
        return missing
    known = "" if value["share"] > 0.995 else f", in {value['share']:.0%}"
    return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]{known}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        f"| {' | '.join('---' for _ in header)} |",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
