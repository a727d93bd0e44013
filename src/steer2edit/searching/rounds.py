"""The search: which edits are tried, in rounds, and as many steering strengths beside them; all on validation.

A round is a list of candidates that are evaluated at once. The grid is one round, or two; TPE proposes one after the
other, each from what the rounds before it showed. Nothing is kept but the journal: a killed study proposes the same
rounds again, finds them in the journal, and goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from ..behaviours.base import DEGENERATE, UTILITY_LOSS
from ..edits import Scores
from ..engines.base import Progress
from ..errors import EditError, RecipeError
from ..files.reading import read_jsonl
from ..method.rivals import WITH_EVIDENCE
from ..method.site import numbered_layers
from ..method.variants import FULL
from ..progress import say
from .bench import Bench
from .calibrate import Scale, find_scale
from .candidates import BASE, TITLES, Candidate, asked, steered, tried_layers
from .front import Aim
from .grid import coarse_grid, grid, middles, planned_edits, rest_of_best, short, tried_of_series
from .plan import AUTO, Range, Search
from .study import Discarded, Study
from .tpe import tpe


def run_study(
    bench: Bench,
    search: Search,
    aim: Aim,
    seed: int,
    progress: Progress | None = None,
    on_round: Callable[[Study], None] | None = None,
) -> Study:
    """Every round of the recipe's search.

    Args:
        progress: called with the steps done and planned; an edit that is discarded counts as done.
        on_round: called after each round.

    Raises:
        RecipeError: TPE without neutral items, on which the utility loss is measured.
    """
    if search.method == "tpe" and not bench.own:
        raise RecipeError(
            f"TPE weighs {aim.attribute.title} against {UTILITY_LOSS.title}, which is measured on neutral prompts",
            got="none on validation",
            fix="Add some to data.validation or give utility.prompts, or use search.method: grid.",
        )
    study = Study()
    search = with_numbered_layers(search, bench.scores[FULL])
    search = without_impossible(bench, search)
    coarse = [] if AUTO in (search.rho_attn, search.rho_mlp) else coarse_grid(search)
    prompts = prompts_that_ask(bench, search)
    baselines: list[Sequence[Candidate]] = [prompts] if prompts else []
    layers = _layers_of_baselines(bench, search)
    if search.automatic or layers or any(kind in WITH_EVIDENCE for kind in search.baselines):
        scale = _calibrated(bench, search, layers, planned_edits(search, coarse) if coarse else None)
        study.scale = scale.to_json()
        search, calibrated = resolved(search, scale)
        coarse = calibrated or coarse or coarse_grid(search)
        baselines += [[candidate for candidate, _ in points] for points in scale.others.values()]
    return _Rounds(bench, search, coarse, baselines, aim, seed, study, progress, on_round).run()


def with_numbered_layers(search: Search, scores: Scores) -> Search:
    """The search with the layers of this model in place of shares of a depth."""
    layers = [None if text is None else numbered_layers(text, scores.depth) for text in search.layers]
    return search.model_copy(update={"layers": list(dict.fromkeys(layers))})


def without_impossible(bench: Bench, search: Search) -> Search:
    """The search without the baselines that cannot be tried here, of which it says why."""
    reasons: dict[str, str] = {}
    if not bench.can_direct:
        reasons["direction"] = "this engine adds only constants to the residual stream"
    for kind in search.rivals:
        if kind not in bench.rivals:
            reasons[kind] = "it was not made from the probe"
        elif kind in WITH_EVIDENCE and not bench.own:
            reasons[kind] = "its strengths are found by KL, and there are no neutral prompts"
    for impossible, reason in reasons.items():
        if impossible in search.baselines:
            say(f"  {TITLES[impossible]} is not tried: {reason}")
    return search.model_copy(update={"baselines": [kind for kind in search.baselines if kind not in reasons]})


def prompts_that_ask(bench: Bench, search: Search) -> list[Candidate]:
    """The system prompts that the edits are compared with."""
    if "system" not in search.baselines:
        return []
    if not bench.can_prompt:
        say("  no system prompt is tried: this engine does not measure losses under another prompt")
        return []
    return [asked(number, system) for number, system in enumerate(bench.behaviour.asking())]


def _layers_of_baselines(bench: Bench, search: Search) -> list[int]:
    """The layers at which the baselines on the residual stream are tried, or why there are none."""
    wanted = [TITLES[kind] for kind in ("layer", "direction", "rosi") if kind in search.baselines]
    if not wanted:
        return []
    reason = ""
    if bench.probe is None or not bench.probe.residual:
        reason = "the probe did not measure the residual stream"
    elif not bench.own:
        reason = "their strengths are found by KL, and there are no neutral prompts"
    if reason or bench.probe is None:
        say(f"  {' and '.join(wanted)} are not tried: {reason}")
        return []
    return tried_layers(bench.probe)


def _calibrated(bench: Bench, search: Search, layers: Sequence[int], planned: int | None) -> Scale:
    """Raises RecipeError without neutral items, EditError if no ladder of edits has a useful point."""
    if not bench.own:
        raise RecipeError(
            f"`auto` finds strengths by {UTILITY_LOSS.title}, which is measured on neutral prompts",
            got="none on validation",
            fix="Add some to data.validation or give utility.prompts, or write numbers in place of auto.",
        )
    scale = find_scale(search, bench.scores, bench.kl, layers, search.trials if search.method == "tpe" else planned)
    for line in scale.lines():
        say(f"  {line}")
    if AUTO in (search.rho_attn, search.rho_mlp) and not scale.edits:
        why = "; ".join(f"{name}: {reason}" for name, reason in scale.left_off.items())
        raise EditError(
            "nothing moved: no strength of any edit has a useful effect",
            got=why,
            fix="Check the traces (`steer2edit inspect`): do the two sides differ in what they show?",
        )
    return scale


def resolved(search: Search, scale: Scale) -> tuple[Search, list[Candidate]]:
    """The search with numbers in place of `auto`, and the calibrated edits, if it was edits that were calibrated."""
    edits = list({c.id: c for points in scale.edits.values() for c, _ in points}.values())
    changed: dict[str, Any] = {}
    for name in ("rho_attn", "rho_mlp"):
        if getattr(search, name) == AUTO:
            values = {candidate.config[name] for candidate in edits}
            off = [None] if None in values else []
            changed[name] = off + sorted(value for value in values if value is not None)
    if search.steering == AUTO:
        changed["steering"] = [candidate.config["gamma"] for candidate, _ in scale.steering]
    return search.model_copy(update=changed), edits


class _Rounds:
    """One study under way: what it has tried so far, and how much of the planned work is done."""

    def __init__(
        self,
        bench: Bench,
        search: Search,
        coarse: Sequence[Candidate],
        baselines: Sequence[Sequence[Candidate]],
        aim: Aim,
        seed: int,
        study: Study,
        progress: Progress | None,
        on_round: Callable[[Study], None] | None,
    ):
        self.bench, self.search, self.coarse, self.aim, self.seed = bench, search, coarse, aim, seed
        # Kind → its series of strengths.
        self.baselines: dict[str, list[Sequence[Candidate]]] = {}
        for one in baselines:
            self.baselines.setdefault(one[0].kind, []).append(one)
        self.progress, self.on_round = progress, on_round
        self.study = study
        self.simple = sanity_prompts()[: search.sanity]
        self.strengths = list(dict.fromkeys(search.steering)) if isinstance(search.steering, list) else []
        edits = planned_edits(search, coarse)
        steering = edits if isinstance(search.steering, Range) else len(self.strengths)
        others = sum(tried_of_series(search, [len(one) for one in series]) for series in self.baselines.values())
        self.planned = (1 + edits + steering + others) * bench.steps + edits * len(self.simple)
        self.done = 0

    def run(self) -> Study:
        s = self.search
        if s.method == "grid":
            rounds = grid(s, self.coarse, self.aim, self.study)
        else:
            rounds = tpe(s, self.aim, self.seed, self.study)
        narrowed = [series for series in self.baselines.values() if s.narrow and len(series) > 1]
        # These go with the first round's edits.
        others: list[Candidate] = [BASE, *map(steered, self.strengths)]
        for series in self.baselines.values():
            others += middles(series) if series in narrowed else [candidate for one in series for candidate in one]
        for number, proposed in enumerate(rounds):
            sound = self._sound(proposed, f"{number} sanity")
            self._take([*others, *sound], str(number))
            others = []
            if number == 0:  # with the second round's edits, if there is one
                others = [candidate for series in narrowed for candidate in rest_of_best(series, self.study, self.aim)]
        if others:
            self._take(others, "baselines")
        if isinstance(s.steering, Range):
            self._take(self._equal_budget(s.steering), "steering")
        if self.progress:
            self.progress(self.planned, self.planned)
        return self.study

    def _sound(self, proposed: Sequence[Candidate], name: str) -> list[Candidate]:
        """The candidates whose answers to simple prompts are not degenerate; the others are discarded."""
        if not self.simple:
            return list(proposed)
        shares = self.bench.sane(proposed, self.simple, name, self._part(len(proposed) * len(self.simple)))
        self.study.evaluations["edit"] += len(proposed) * len(self.simple)
        allowed = self.aim.limits.get(DEGENERATE) or 0.0
        sound = []
        for candidate, share in zip(proposed, shares, strict=True):
            if share <= allowed:
                sound.append(candidate)
                continue
            why = f"{share:.0%} of its answers to simple prompts are degenerate"
            self.study.discarded.append(Discarded(candidate, why))
        self._part((len(proposed) - len(sound)) * self.bench.steps)
        return sound

    def _take(self, tried: Sequence[Candidate], name: str) -> None:
        """One round: its trials go to the study, those whose losses are not finite to the discarded."""
        steps = self._part(len(tried) * self.bench.steps)
        if tried:
            self.study.rounds[name] = [candidate.id for candidate in tried]
        for trial in self.bench.run(tried, name, steps) if tried else []:
            kind = trial.candidate.kind
            if kind != "base":
                self.study.evaluations[kind] = self.study.evaluations.get(kind, 0) + self.bench.evaluations
            if kind != "base" and self.bench.own and trial.mean(UTILITY_LOSS.name) is None:
                self.study.discarded.append(Discarded(trial.candidate, "its losses are not finite"))
            else:
                self.study.trials.append(trial)
        if self.on_round:
            self.on_round(self.study)

    def _equal_budget(self, strengths: Range) -> list[Candidate]:
        """As many steering strengths as make their evaluations the edits', sanity checks included."""
        count = max(2, math.ceil(self.study.evaluations["edit"] / max(1, self.bench.evaluations)))
        return [steered(short(x, 6)) for x in np.linspace(strengths.low, strengths.high, count)]

    def _part(self, steps: int) -> Progress | None:
        """The progress of the next part, which has this many steps."""
        start = self.done
        self.done += steps
        if self.progress is None:
            return None
        report = self.progress
        return lambda now, _: report(min(start + now, self.planned), self.planned)


def sanity_prompts() -> list[str]:
    """Twenty short simple prompts."""
    return [row["prompt"] for row in read_jsonl(str(files("steer2edit") / "data" / "sanity_prompts.jsonl"))]
