"""The scale of a search, found and not guessed: which ρ and γ give a KL between hardly any and far too much.

The useful range of ρ moves tenfold from one model to the next, and with the behaviour. A ladder of strengths, measured
by KL on a few answers of the base model, shows where it lies: its rungs move in on the targets, which are spaced evenly
in log KL, so that every α, every block type and steering are compared at equal KL.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from torch import nn

from ..behaviours.base import Prompt
from ..edits import Scores
from ..engines.base import Engine
from ..files.schema import parse
from ..method.rivals import WITH_EVIDENCE
from ..method.variants import FULL
from ..probing.chat import CHAT, Chat
from .candidates import TITLES, Candidate, directed, edited, intervention_of, rival, steered, steered_at
from .grid import short, strengths_each, tried_of_series
from .plan import AUTO, Search
from .statistics import finite
from .utility import base_answers, engine_of, refuse_other_base

RUNGS = 6
ROUNDS = 5
_TIGHT = 2.0
# Strengths that are closer than this factor are not told apart: where the KL differs more there, it jumps.
_SAME = 1.001
# Many targets between the same two rungs need no rung each: those of one round are at least this factor apart.
_SPACED = 1.1
# What stands in for a KL of 0 in logarithms, in nats.
_FLOOR = 1e-6
# How far below and above the first rungs a ladder may be continued, and how far at once, as factors of the strength.
_REACH, _STEP = 1e4, 30

# Candidates → the KL per token of each, in nats; None where it is not finite.
MeasureKl = Callable[[Sequence[Candidate], str], Sequence[float | None]]


@dataclass
class Ladder:
    """Candidates of one kind, from weak to strong.

    Attributes:
        name: for people, like `ρ_attn at α 0.4`.
        make: strength → candidate, stronger for a larger number.
        low, high: strengths of the first rungs.
        floor: no strength below this one has any effect; 0 if every strength has some.
        targets: KL per token, in nats.
        kl: strength → KL of every candidate that was measured; infinite where it is not finite.
        first: how many rungs the first round has.
        tight: between two rungs whose KL differs by no more than this factor a strength is interpolated, not measured.
    """

    name: str
    make: Callable[[float], Candidate]
    low: float
    high: float
    floor: float
    targets: Sequence[float]
    kl: dict[float, float] = field(default_factory=dict)
    first: int = RUNGS
    tight: float = _TIGHT

    def rungs(self) -> list[float]:
        """The strengths to measure next; none once every target has its point, or cannot have one."""
        if not self.kl:
            return [float(x) for x in np.geomspace(self.low, self.high, self.first)]
        weakest, strongest = min(self.kl), max(self.kl)
        proposed: list[float] = []
        if self.kl[weakest] > self.targets[0] and weakest > max(self.floor, self.low / _REACH):
            proposed += np.geomspace(max(self.floor, weakest / _STEP), weakest, self.first + 1)[:-1].tolist()
        if max(self.kl.values()) < self.targets[-1] and strongest < self.high * _REACH:
            proposed += np.geomspace(strongest, strongest * _STEP, self.first + 1)[1:].tolist()
        for target in self.targets:
            bracket = self._bracket(target)
            if bracket and not self._tight(bracket) and bracket[1] / bracket[0] > _SAME:
                proposed.append(self._between(bracket, target))
        spaced: list[float] = []
        for strength in sorted(proposed):
            if not spaced or strength > _SPACED * spaced[-1]:
                spaced.append(strength)
        return spaced

    def points(self) -> list[tuple[Candidate, float]]:
        """For each target the candidate whose KL, interpolated in logarithms, it is; targets in a jump are left out."""
        by_id: dict[str, tuple[Candidate, float]] = {}
        for target in self.targets:
            bracket = self._bracket(target)
            if bracket and self._tight(bracket):
                candidate = self.make(self._between(bracket, target))
                by_id.setdefault(candidate.id, (candidate, target))
        return list(by_id.values())

    def missing(self) -> list[float]:
        """The targets that have no point."""
        reached = {kl for _, kl in self.points()}
        return [target for target in self.targets if target not in reached]

    def why_left_off(self) -> str:
        """Why there is no point; empty if there is one."""
        if self.points():
            return ""
        lowest = min(self.kl.values(), default=0.0)
        if lowest > self.targets[-1]:
            return f"the weakest strength has a KL of {lowest:.2g} already"
        highest = max(self.kl.values(), default=0.0)
        if highest < self.targets[0]:
            return f"no strength reaches a KL of {self.targets[0]:g}: the highest is {highest:.2g}"
        target = next(target for target in self.targets if self._bracket(target) or target == self.targets[-1])
        below = max((kl for kl in self.kl.values() if kl < target), default=0.0)
        above = min((kl for kl in self.kl.values() if kl > target), default=math.inf)
        above_in_words = "no finite number" if math.isinf(above) else f"{above:.2g}"
        return f"it jumps from a KL of {below:.2g} to {above_in_words}, from nothing to noise"

    def _bracket(self, target: float) -> tuple[float, float] | None:
        """The first two neighbouring rungs that have the target between them."""
        for weak, strong in pairwise(sorted(self.kl)):
            if self.kl[weak] <= target <= self.kl[strong]:
                return weak, strong
        return None

    def _tight(self, bracket: tuple[float, float]) -> bool:
        weak, strong = bracket
        return self.kl[strong] <= self.tight * self.kl[weak]

    def _between(self, bracket: tuple[float, float], target: float) -> float:
        """The strength at which the KL should be the target."""
        weak, strong = bracket
        low, high = math.log(max(self.kl[weak], _FLOOR)), math.log(max(self.kl[strong], _FLOOR))
        if self._tight(bracket):
            return weak * (strong / weak) ** ((math.log(target) - low) / (high - low) if high > low else 0.0)
        # Between distant rungs the curve may be far from a line: not too near an end.
        share = 0.5 if math.isinf(high) else (math.log(target) - low) / (high - low)
        return weak * (strong / weak) ** min(max(share, 0.2), 0.8)


def targets_of(span: Sequence[float], count: int) -> list[float]:
    """`count` KLs, evenly in log KL from the span's low end to its high end."""
    return [float(x) for x in np.geomspace(span[0], span[1], count)]


def climb(ladders: Sequence[Ladder], measure: MeasureKl, name: str) -> None:
    """Measures all ladders, a round of rungs of all of them at once, until each target has its point.

    Args:
        measure: is given the candidates of a round, and the round's name.
    """
    for number in range(ROUNDS):
        rungs = [(ladder, strength) for ladder in ladders for strength in ladder.rungs()]
        if not rungs:
            return
        tried = [ladder.make(strength) for ladder, strength in rungs]
        for (ladder, strength), kl in zip(rungs, measure(tried, f"{name}, round {number + 1}"), strict=True):
            ladder.kl[strength] = math.inf if kl is None else max(0.0, kl)


# Which ladders there are -------------------------------------------------------------------------------------------


def edit_ladder(
    scores: Mapping[str, Scores],
    targets: Sequence[float],
    alpha: float,
    weights: Mapping[str, float],
    fixed: Mapping[str, float | None],
    layers: str | None = None,
    variant: str = FULL,
) -> Ladder:
    """Edits along which ρ falls: ρ of a block type is its weight / strength, or fixed.

    Args:
        weights, fixed: the block types "attn" and "mlp" are in one or the other; a fixed None is off.
    """
    largest = [_largest(scores, block, variant) / weight for block, weight in weights.items()]
    reach = max(largest, default=0.0) or 1.0
    # λ is 0 once ρα exceeds every |g|: no smaller strength has any effect.
    floor = 0.0 if variant == "l2" else alpha / reach
    low = floor * 1.02 if floor else 0.1 / reach

    def make(strength: float) -> Candidate:
        rho = dict(fixed) | {block: short(weight / strength, 4) for block, weight in weights.items()}
        return edited(rho["attn"], rho["mlp"], alpha, layers, variant)

    signs = " and ".join(f"ρ_{block}" for block in weights)
    signs += "".join(f", ρ_{block} {rho:g}," for block, rho in fixed.items() if rho is not None)
    where = "" if layers is None else f", layers {layers}"
    how = "" if variant == FULL else f", {variant}"
    return Ladder(f"{signs} at α {alpha:g}{where}{how}", make, low, 8 / reach, floor, targets)


def steering_ladder(targets: Sequence[float]) -> Ladder:
    return Ladder("steering", lambda gamma: steered(short(gamma, 4)), 0.03, 3.0, 0.0, targets, first=5, tight=4.0)


# The baselines whose direction is read after one layer: kind → (layer, strength) → candidate.
_AT_LAYER: dict[str, Callable[[int, float], Candidate]] = {
    "layer": steered_at,
    "direction": directed,
    "rosi": lambda layer, gamma: rival("rosi", gamma, layer=layer),
}
# The strengths of the first rungs. After every layer a small part of the way to the positive mean moves much. The mean
# of a weight's rows is short: ROSI needs a large strength.
_FIRST = {
    "layer": (0.2, 3.0),
    "direction": (0.005, 0.3),
    "rosi": (1.0, 100.0),
    "llm_va": (0.05, 2.0),
    "null_space": (0.05, 2.0),
}


def layer_ladder(kind: str, layer: int, targets: Sequence[float]) -> Ladder:
    make = _AT_LAYER[kind]
    low, high = _FIRST[kind]
    name = f"{TITLES[kind]} {layer}"
    # Their KL is close to a power of the strength, a line in logarithms: a few rungs show where it lies.
    return Ladder(name, lambda gamma: make(layer, short(gamma, 4)), low, high, 0.0, targets, first=4, tight=8.0)


def rival_ladder(kind: str, layers: str | None, targets: Sequence[float]) -> Ladder:
    """Of a rival that edits some layers; None is all of them."""
    low, high = _FIRST[kind]
    name = TITLES[kind] + ("" if layers is None else f", layers {layers}")
    return Ladder(
        name, lambda gamma: rival(kind, short(gamma, 4), layers=layers), low, high, 0.0, targets, first=4, tight=8.0
    )


def baseline_ladders(search: Search, edits: int, layers: Sequence[int]) -> list[Ladder]:
    """The ladders of what edits are compared with, each method with as many strengths as there are edits.

    Args:
        layers: at which the baselines of one layer are tried, with equal shares of the strengths; in a narrow search
            with as many as an edit's ladder has, of which those of one layer are tried to the end. Rivals that edit
            some layers have the same for each of the edits' own ranges.
    """
    ladders = []
    if search.steering == AUTO:
        ladders.append(steering_ladder(targets_of(search.span, max(2, edits))))
    for kind in _AT_LAYER:
        if kind in search.baselines and layers:
            targets = targets_of(search.span, strengths_each(search, edits, len(layers)))
            ladders += [layer_ladder(kind, layer, targets) for layer in layers]
    for kind in search.rivals:
        if kind in WITH_EVIDENCE:
            targets = targets_of(search.span, strengths_each(search, edits, len(search.layers)))
            ladders += [rival_ladder(kind, ranges, targets) for ranges in search.layers]
    return ladders


def _largest(scores: Mapping[str, Scores], block: str, variant: str) -> float:
    """The largest |g| of a block type."""
    sites = [s for s in scores.get(variant, scores[FULL]).sites.values() if s.site.block == block]
    return max((float(s.g.abs().max()) for s in sites), default=0.0)


def ladders_of(search: Search, scores: Mapping[str, Scores]) -> list[Ladder]:
    """The ladders of a recipe's edits: of each block type alone, for each α, layers and variant."""
    targets = targets_of(search.span, search.points)
    given = {"attn": search.rho_attn, "mlp": search.rho_mlp}
    ladders = []
    for variant, layers, alpha in itertools.product(search.variants, search.layers, search.alpha):
        if variant == "l2" and alpha != search.alpha[0]:  # it takes no α
            continue
        for block, other in (("attn", "mlp"), ("mlp", "attn")):
            others = given[other]
            if given[block] != AUTO:
                continue
            for fixed in others if isinstance(others, list) else [None]:
                ladders.append(edit_ladder(scores, targets, alpha, {block: 1.0}, {other: fixed}, layers, variant))
    return ladders


def joint_ladders(search: Search, scores: Mapping[str, Scores], alone: Sequence[Ladder]) -> list[Ladder]:
    """Both block types at once, if both are `auto`, in the proportion at which each alone has the same KL."""
    if search.rho_attn != AUTO or search.rho_mlp != AUTO:
        return []
    targets = targets_of(search.span, search.points)
    ladders = []
    for attn, mlp in zip(alone[::2], alone[1::2], strict=True):
        if attn.why_left_off() or mlp.why_left_off():
            continue
        of_attn = {kl: candidate for candidate, kl in attn.points()}
        of_mlp = {kl: candidate for candidate, kl in mlp.points()}
        equal = [kl for kl in of_attn if kl in of_mlp]
        if not equal:
            continue
        middle = equal[len(equal) // 2]
        config = of_attn[middle].config
        weights = {"attn": config["rho_attn"], "mlp": of_mlp[middle].config["rho_mlp"]}
        layers, variant = config.get("layers"), config.get("variant", FULL)
        ladders.append(edit_ladder(scores, targets, config["alpha"], weights, {}, layers, variant))
    return ladders


def find_scale(
    search: Search,
    scores: Mapping[str, Scores],
    measure: MeasureKl,
    layers: Sequence[int] = (),
    planned: int | None = None,
) -> Scale:
    """Finds the strengths that a recipe leaves open: every `auto`, and for each baseline as many strengths as edits.

    Args:
        layers: where the baselines of one layer are tried; none leaves them out.
        planned: how many edits the search tries; None is as many as are found here.
    """
    ladders = ladders_of(search, scores)
    climb(ladders, measure, "calibration")
    joint = joint_ladders(search, scores, ladders)
    climb(joint, measure, "calibration of both")
    ladders += joint
    lengths = [len(points) for ladder in ladders if (points := ladder.points())]
    edits = tried_of_series(search, lengths) if planned is None else planned
    others = baseline_ladders(search, edits, layers)
    climb(others, measure, "calibration of the baselines")
    return scale_of(ladders, others)


# What was found ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """What a calibration found.

    Attributes:
        edits, steering: the ladders' points: candidate and its KL per token in nats, from weak to strong.
        others: the points of the other baselines, a ladder for each layer.
        missing: ladders that have a point for some KLs alone: name → the KLs without one.
        left_off: the ladders without any point: name → why.

    >>> scale = Scale({"ρ_attn at α 0.4": [(edited(0.5, None, 0.4), 0.02)]}, [], {}, {})
    >>> candidate, kl = scale.edits["ρ_attn at α 0.4"][0]
    >>> dict(candidate.config)  # what `Scores.edit` takes
    {'rho_attn': 0.5, 'rho_mlp': None, 'alpha': 0.4}
    """

    edits: Mapping[str, Sequence[tuple[Candidate, float]]]
    steering: Sequence[tuple[Candidate, float]]
    missing: Mapping[str, Sequence[float]]
    left_off: Mapping[str, str]
    others: Mapping[str, Sequence[tuple[Candidate, float]]] = field(default_factory=dict)

    def __repr__(self) -> str:
        edits = sum(len(points) for points in self.edits.values())
        return f"Scale({edits} edits on {len(self.edits)} ladders, {len(self.steering)} steering strengths)"

    def lines(self) -> Iterator[str]:
        """One line a ladder, for people."""
        ladders = {**self.edits, **({"steering": self.steering} if self.steering else {}), **self.others}
        for name, points in ladders.items():
            ends = [points[0], points[-1]]
            line = f"{name}: " + " … ".join(f"KL {kl:.2g} at {_strength(candidate)}" for candidate, kl in ends)
            if name in self.missing:
                line += f"; no strength for KL {', '.join(f'{kl:.2g}' for kl in self.missing[name])}"
            yield line
        for name, why in self.left_off.items():
            yield f"{name} is left off: {why}"

    def to_json(self) -> dict[str, Any]:
        rows = {name: [[c.id, kl] for c, kl in points] for name, points in self.edits.items()}
        return {
            "edits": rows,
            "steering": [[c.id, kl] for c, kl in self.steering],
            "others": {name: [[c.id, kl] for c, kl in points] for name, points in self.others.items()},
            "missing": {name: list(targets) for name, targets in self.missing.items()},
            "left_off": dict(self.left_off),
        }


def _strength(candidate: Candidate) -> str:
    names = {"rho_attn": "ρ_attn", "rho_mlp": "ρ_mlp", "gamma": "γ"}
    shown = [f"{names[key]} {value:g}" for key, value in candidate.config.items() if key in names and value is not None]
    return ", ".join(shown)


def scale_of(ladders: Sequence[Ladder], baselines: Sequence[Ladder] = ()) -> Scale:
    every = [*ladders, *baselines]
    left_off = {ladder.name: why for ladder in every if (why := ladder.why_left_off())}
    kept = [ladder for ladder in every if ladder.name not in left_off]
    missing = {ladder.name: targets for ladder in kept if (targets := ladder.missing())}
    points = {ladder.name: ladder.points() for ladder in kept}
    edits = {ladder.name: points[ladder.name] for ladder in ladders if ladder.name in points}
    others = {name: of_ladder for name, of_ladder in points.items() if name not in edits}
    strengths = others.pop("steering", [])
    return Scale(edits, strengths, missing, left_off, others)


# In Python, without a recipe ---------------------------------------------------------------------------------------


def calibrate(
    model: Engine | nn.Module,
    scores: Scores,
    texts: Sequence[Prompt],
    *,
    tokenizer: Any = None,
    rho_attn: Literal["auto"] | None = AUTO,
    rho_mlp: Literal["auto"] | None = AUTO,
    alpha: Sequence[float] = (0.4,),
    span: tuple[float, float] = (0.02, 1.0),
    points: int = 4,
    new_tokens: int = 48,
    chat: Chat = CHAT,
) -> Scale:
    """The strengths of edits, for each α, and of steering whose KL per token spans a range, evenly in log KL.

    Args:
        model: an engine, or a transformers model with its tokenizer.
        scores: what the edits are made from.
        texts: a few prompts (texts, or chat messages); the KL is measured on the base model's own greedy answers.
        rho_attn, rho_mlp: "auto", or None to switch the block type off.
        span: KL per token of the weakest and of the strongest point, in nats.
        points: how many strengths of each kind of edit; steering gets as many as all edits together.
        new_tokens: at most this many tokens an answer.
        chat: how a model's prompts are written; an engine has its own.

    Returns:
        The points, with the KL that is interpolated for each. `scores.edit(**candidate.config)` is the edit of a point.

    Raises:
        RecipeError: a value is out of its range, or both block types are off.
        EditError: no text is given, the model answers none, or it is edited already. ModelError: the scores are of
            another model.

    >>> texts = ["How are you?", "Why?"]
    >>> scale = s2e.calibrate(model, scores, texts, tokenizer=tokenizer, rho_mlp=None, points=2, new_tokens=4)
    >>> candidate, kl = scale.edits["ρ_attn at α 0.4"][0]
    >>> scores.edit(**candidate.config).config["alpha"], kl
    (0.4, 0.02)
    """
    raw = {"rho_attn": rho_attn or [None], "rho_mlp": rho_mlp or [None], "alpha": list(alpha)}
    search = parse(Search, raw | {"span": span, "points": points, "steering": AUTO, "baselines": []}, under="search")
    engine = engine_of(model, tokenizer, chat)
    refuse_other_base(engine, scores.edit(rho_attn=1.0, rho_mlp=1.0, alpha=0.0))
    pairs = base_answers(engine, texts, new_tokens)
    named: dict[str, Scores] = {FULL: scores}

    def measure(tried: Sequence[Candidate], name: str) -> list[float | None]:
        table = [intervention_of(candidate, named) for candidate in tried]
        return finite(engine.losses(pairs, table).kl.mean(0).tolist())

    return find_scale(search, named, measure)
