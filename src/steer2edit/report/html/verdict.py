"""What the edit bought and cost, in words made from the numbers of `results.json`, and where it does not win."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...behaviours.base import UTILITY_LOSS
from ...searching.candidates import TITLES

Outcome = Literal["better", "worse", "not told apart"]


@dataclass(frozen=True)
class Verdict:
    """One sentence, and where the edit does not win."""

    sentence: str
    remarks: tuple[str, ...]


def verdict(results: Mapping[str, Any]) -> Verdict | None:
    """None if the results have no measures, or the attribute has no mean."""
    systems = results["systems"]
    measures = {m["name"]: m for m in results.get("measures", [])}
    attribute = measures.get(results["attribute"])
    if attribute is None or "edit" not in systems or "base" not in systems:
        return None
    before = systems["base"][attribute["name"]]["mean"]
    after = systems["edit"][attribute["name"]]["mean"]
    if before is None or after is None:
        return None
    difference = results["differences"]["edit - base"]
    outcome = outcome_of(difference, attribute)
    counted = f"On {difference['n']} test prompts the edit "
    change = f"{attribute['title']} from {_number(before)} to {_number(after)} ({_difference(difference)})"
    bought = {
        "better": f"takes {change}",
        "worse": f"makes it worse: it takes {change}",
        "not told apart": f"does not move {attribute['title']} beyond chance: {_number(before)} becomes"
        f" {_number(after)} ({_difference(difference)})",
    }[outcome]
    return Verdict(
        f"{counted}{bought}; {_costs(results, measures)}{_against(results, attribute)}.",
        (*_others(results, measures, attribute), *_sets(results, measures, attribute)),
    )


def outcome_of(difference: Mapping[str, Any], measure: Mapping[str, Any]) -> Outcome:
    """What a paired difference says: its interval is on one side of 0, or it is not told apart from 0."""
    if difference["mean"] is None:
        return "not told apart"
    low, high = difference["low"], difference["high"]
    if measure["better"] == "lower":
        low, high = -high, -low
    if low > 0:
        return "better"
    return "worse" if high < 0 else "not told apart"


def _costs(results: Mapping[str, Any], measures: Mapping[str, Any]) -> str:
    """The utility loss, and the measures that got worse, to two decimals."""
    base, edit = results["systems"]["base"], results["systems"]["edit"]
    paid = []
    loss = edit.get(UTILITY_LOSS.name, {})
    if loss.get("mean") is not None:
        paid.append(f"{_number(loss['mean'])} {UTILITY_LOSS.title}")
    elif loss.get("not_finite"):
        paid.append(f"a {UTILITY_LOSS.title} that is not finite on {loss['not_finite']} of {loss['n']} prompts")
    for name, measure in measures.items():
        if name in (UTILITY_LOSS.name, results["attribute"]) or not measure["column"]:
            continue
        before, after = base[name]["mean"], edit[name]["mean"]
        if before is not None and after is not None and _beats(before, after, measure):
            paid.append(f"{measure['title']} {_number(before)} → {_number(after)}")
    return f"it costs {_listed(paid)}" if paid else "it costs nothing that was measured"


def _against(results: Mapping[str, Any], attribute: Mapping[str, Any]) -> str:
    """The other methods, by whether the edit is better, worse or not told apart."""
    by_outcome: dict[str, list[str]] = {"better": [], "not told apart": [], "worse": []}
    for kind in _compared(results):
        by_outcome[outcome_of(results["differences"][f"edit - {kind}"], attribute)].append(TITLES[kind])
    said = []
    if by_outcome["better"]:
        said.append(f"it does better than {_listed(by_outcome['better'])}")
    if by_outcome["not told apart"]:
        said.append(f"it is not told apart from {_listed(by_outcome['not told apart'])}")
    if by_outcome["worse"]:
        said.append(f"it does worse than {_listed(by_outcome['worse'])}")
    return "".join(f"; {one}" for one in said)


def _others(results: Mapping[str, Any], measures: Mapping[str, Any], attribute: Mapping[str, Any]) -> list[str]:
    """The methods that the edit does not beat, and those that cost less."""
    systems, cost = results["systems"], UTILITY_LOSS.name
    remarks = []
    for kind in _compared(results):
        difference = results["differences"][f"edit - {kind}"]
        outcome = outcome_of(difference, attribute)
        other = systems[kind].get(cost, {}).get("mean")
        own = systems["edit"].get(cost, {}).get("mean")
        cheaper = other is not None and own is not None and f"{other:.2f}" != f"{own:.2f}" and other < own
        price = f"costs less ({_number(other)} against {_number(own)} {UTILITY_LOSS.title})" if cheaper else ""
        title = TITLES[kind]
        if outcome == "worse":
            remark = (
                f"{_capital(title)} does better: the edit's {attribute['title']} differs by {_difference(difference)}"
            )
            remarks.append(f"{remark}, and {title} {price}." if price else f"{remark}.")
        elif outcome == "not told apart":
            remark = f"{_capital(title)} is not told apart from the edit ({_difference(difference)})"
            remarks.append(f"{remark}, and {price}." if price else f"{remark}.")
        elif price:
            remarks.append(f"{_capital(title)} does less, but {price}.")
    return remarks


def _sets(results: Mapping[str, Any], measures: Mapping[str, Any], attribute: Mapping[str, Any]) -> list[str]:
    """The measures by which another method has a better mean than the edit."""
    systems = results["systems"]
    remarks = []
    for name, measure in measures.items():
        own = systems["edit"][name]["mean"]
        if name in (attribute["name"], UTILITY_LOSS.name) or not measure["column"] or own is None:
            continue
        means = {kind: systems[kind][name]["mean"] for kind in _compared(results)}
        better = {kind: mean for kind, mean in means.items() if mean is not None and _beats(mean, own, measure)}
        if better:
            named = _listed([f"{TITLES[kind]} {_number(mean)}" for kind, mean in better.items()])
            remarks.append(f"{measure['title']}: the edit has {_number(own)}, {named}.")
    return remarks


def _compared(results: Mapping[str, Any]) -> list[str]:
    return [kind for kind in results["systems"] if kind not in ("base", "edit")]


def _beats(one: float, other: float, measure: Mapping[str, Any]) -> bool:
    """Whether a mean is better than another in what the page shows of them."""
    if f"{one:.2f}" == f"{other:.2f}":
        return False
    return one > other if measure["better"] == "higher" else one < other


def _capital(title: str) -> str:
    """A title as a sentence begins with it: `rank-1 LoRA` keeps its capitals."""
    return title[:1].upper() + title[1:]


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _difference(d: Mapping[str, Any]) -> str:
    if d["mean"] is None:
        return "not measured"
    return f"{d['mean']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]".replace("-", "−")


def _listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"
