"""The parts of a suite that an ordinary run does not have: many candidates on test, which validation has named.

Each part asks its candidates in batches that a journal keeps, and leaves one file in the run's directory.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..behaviours.base import UTILITY_LOSS
from ..edits import Scores
from ..errors import FileError, Steer2EditError
from ..files.reading import read_json, sha256
from ..method.variants import FULL, PAPERS, SCORED, Variant
from ..pipeline.names import CHOICE, SCORES, TRAINED_CHOICE
from ..pipeline.reporting import read_study
from ..pipeline.run import Run
from ..pipeline.stages import chosen_of
from ..pipeline.tasks import each_task, tasks_journal
from ..pipeline.trained import engine_on_test, is_trained, rounds_on_test
from ..probing.score import score
from ..progress import say, showing
from ..searching.bench import Bench
from ..searching.calibrate import Ladder, climb, edit_ladder, steering_ladder, targets_of
from ..searching.candidates import BASE, BASELINES, TITLES, Candidate, Trial, edited, intervention_of, of_kind
from ..searching.front import Aim, choose, cost_of, hypervolume_interval, pareto
from ..searching.grid import evenly, short
from ..searching.journal import Journal
from ..tasks.asking import Asking, groups
from .facts import Profile
from .plan import Part, Planned
from .rows import Condition, Front, PartResult, Tried

FOLDER = "paper"
ALONE = {"attn": "attention alone", "mlp": "MLP alone"}
NO_ANSWERS = "the original model answers no neutral prompt, so that there is no KL"
BUDGETS = {"attn": "ρ_attn", "mlp": "ρ_mlp"}
# Row of a table: method, condition, candidate, and the KL that it was found for.
Wanted = tuple[str, Condition, Candidate, float | None]


def part_file(run: Run, part: str) -> Path:
    return run.path(f"{FOLDER}/{part}.json")


def measure_part(part: Part, run: Run, planned: Planned, profile: Profile) -> PartResult:
    """A part of a run that is whole up to its choice; what its file holds already is not measured again."""
    key = _key(part, run, profile)
    path = part_file(run, part)
    if path.is_file() and (known := PartResult.load(path)).key == key:
        say(f"  {part}: done before")
        return known
    say(f"  {part}:")
    run.path(FOLDER).mkdir(exist_ok=True)
    result = _MEASURES[part](_Work(part, key, run, planned, profile))
    result.save(path)
    return result


def _key(part: str, run: Run, profile: Profile) -> str:
    """Of everything that a part depends on."""
    measured = "evaluate" if part == "training" else "measured"
    keys = [run.keys[name] for name in ("edit", "test answers", measured, "search")]
    sizes = [
        profile.stars,
        profile.swept,
        profile.ablations.model_dump(mode="json"),
        profile.sensitivity.model_dump(mode="json"),
    ]
    files = [sha256(run.path(name)) for name in (SCORES, CHOICE)]
    text = json.dumps([importlib.metadata.version("steer2edit"), part, keys, sizes, files])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Work:
    """A part under way: the run, its benches and the journals of this part."""

    def __init__(self, part: str, key: str, run: Run, planned: Planned, profile: Profile):
        self.part, self.key, self.run, self.planned, self.profile = part, key, run, planned, profile
        self.choice: Mapping[str, Any] = read_json(run.path(CHOICE))
        self.aim: Aim = run.recipe.aim
        self.config: Mapping[str, Any] = self.choice["edit"]["config"]
        # What the run's own test asked.
        self.chosen = chosen_of(self.choice)

    def journal(self, name: str) -> Path:
        return self.run.path(f"{FOLDER}/{self.part}-{name}-{self.key}.jsonl")

    def scores(self, variants: Sequence[Variant] = ()) -> dict[str, Scores]:
        """The run's scores, and those of variants that score in another way, each made once."""
        scores = dict(self.run.scores)
        for variant in variants:
            path = self.run.path(f"{FOLDER}/scores-{variant}-{self.run.basis('score')}.safetensors")
            if not path.is_file():
                few = self.run.recipe.probe.expert_tokens
                make = partial(score, probe=self.run.probe, expert_tokens=few, variant=variant)
                self.run.host.call(make).save(path)
            scores[variant] = Scores.load(path)
        return scores

    def on_validation(self, scores: Mapping[str, Scores]) -> Bench:
        return self.run.bench("validation", self.journal("validation"), self.run.engine, scores=scores)

    def on_test(
        self,
        wanted: Sequence[Wanted],
        scores: Mapping[str, Scores],
        fronts: Sequence[Front] = (),
        most: int | None = None,
    ) -> PartResult:
        """Every candidate on test, each asked once though it may stand in several rows. What the run's own test asked
        is known.

        Args:
            most: at most this many prompts of each kind are asked; None is all.
        """
        tried = list({c.id: c for c in [BASE, *(candidate for _, _, candidate, _ in wanted)]}.values())
        trials: dict[str, Trial] = {}
        if most is None:
            bench = self.run.bench("test", self.run.journal("test"), self.run.engine, scores=scores)
            trials = {trial.candidate.id: trial for trial in bench.run(self.chosen, "test")}
        else:
            bench = self.run.bench("test", self.journal("test"), self.run.engine, scores=scores, most=most)
        left = [candidate for candidate in tried if candidate.id not in trials]
        with showing(f"{self.part}, test") as progress:
            # The key: another part of this name, with other settings, is another round of the same journal.
            new = bench.run(left, f"{self.part} {self.key}", progress) if left else []
        trials |= {trial.candidate.id: trial for trial in new}
        values, about, first = self._tasks(tried, scores)
        every: list[Wanted] = [("original", "original", BASE, None), *wanted]
        rows = [
            Tried(method, how, c.id, dict(c.config), trials[c.id].values, values.get(c.id, {}), target)
            for method, how, c, target in every
        ]
        return PartResult(self.part, self.key, tuple(rows), tuple(fronts), about, first)

    def _tasks(
        self, tried: Sequence[Candidate], scores: Mapping[str, Scores]
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Any], dict[str, str]]:
        """Candidate → task's measure → values; what is said of each task; and the measure that stands for it."""
        values: dict[str, dict[str, Any]] = {candidate.id: {} for candidate in tried}
        about: dict[str, Any] = {}
        first: dict[str, str] = {}
        data = self.run.recipe.data
        if not data.utility and not data.attacks:
            return values, about, first
        for path, some in self._asked_of(tried):
            asking = Asking(self.run.engine, Journal(path), some, self.run.recipe.evaluation.rows)
            of_candidates = groups(
                some, lambda candidate: intervention_of(candidate, scores, self.run.probe, self.run.rivals)
            )
            for name, of_task in each_task(self.run, asking, of_candidates):
                if isinstance(of_task, Steer2EditError):
                    about[name] = {"not_measured": str(of_task)}
                    continue
                about[name] = of_task.about
                means = [metric for metric in of_task.metrics if metric.aggregate is None and metric.measure.column]
                if means:
                    first[name] = means[0].name
                for candidate, of_candidate in zip(some, of_task.values, strict=True):
                    numbers = {metric.name: tuple(of_candidate[metric.name]) for metric in means}
                    values.setdefault(candidate.id, {}).update(numbers)
        return values, about, first

    def _asked_of(self, tried: Sequence[Candidate]) -> list[tuple[Path, list[Candidate]]]:
        """Which candidates are asked tasks together, and the journal of each group: the run's own test has its own.

        With a system prompt among them all are asked together: a question that is too long after that prompt is left
        out for all.
        """
        known = {candidate.id for candidate in self.chosen}
        left = [candidate for candidate in tried if candidate.id not in known]
        if any(candidate.kind == "system" for candidate in self.chosen):
            return [(self.journal("tasks"), list(tried))]
        groups_of_all = [(tasks_journal(self.run), self.chosen), (self.journal("tasks"), left)]
        return [(path, some) for path, some in groups_of_all if some]


# The trade-off -----------------------------------------------------------------------------------------------------


def _trade_off(work: _Work) -> PartResult:
    """The steering sweep, and the best edits by the rule's ranking on validation; what was chosen stands first."""
    study = read_study(work.run)
    chosen = work.config
    wanted = chosen_rows(work.chosen)
    stars = ranked(of_kind(study.trials, "edit"), work.aim)[: work.profile.stars]
    wanted += [(FULL, "star", trial.candidate, None) for trial in stars if trial.candidate.config != chosen]
    swept = swept_of(of_kind(study.trials, "steering"), work.choice["front"].get("steering", ()), work.profile.swept)
    wanted += [("steering", "swept", candidate, None) for candidate in swept]
    return work.on_test(wanted, work.scores(), _fronts(work.choice, ("edit", *BASELINES)))


def chosen_rows(chosen: Sequence[Candidate]) -> list[Wanted]:
    """Rows of what validation chose of each method: the edit, steering, then the others."""
    order = ["edit", "steering", *(kind for kind in TITLES if kind not in ("base", "edit", "steering"))]
    of_methods = sorted((c for c in chosen if c is not BASE), key=lambda c: order.index(c.kind))
    return [(FULL if c.kind == "edit" else c.kind, "chosen", c, None) for c in of_methods]


def swept_of(trials: Sequence[Trial], on_front: Sequence[str], most: int | None) -> list[Candidate]:
    """The strengths of a sweep that are asked on test: all, or at most this many of those on validation's front."""
    if most is None:
        return [trial.candidate for trial in trials]
    some = [trial.candidate for trial in trials if trial.candidate.id in on_front]
    some = some or [trial.candidate for trial in trials]
    return evenly(sorted(some, key=lambda candidate: candidate.config["gamma"]), most)


def _fronts(choice: Mapping[str, Any], kinds: Sequence[str]) -> list[Front]:
    """What a choice says of methods' fronts on validation, of those that were tried."""
    return [
        Front(
            FULL if kind == "edit" else kind,
            choice["tried"][kind],
            choice["evaluations"][kind],
            choice["hypervolume"][kind],
            "" if choice.get(kind) else "none stays within the limits",
            tuple(choice["front"].get(kind, ())),
        )
        for kind in kinds
        if choice["tried"].get(kind)
    ]


def ranked(trials: Sequence[Trial], aim: Aim) -> list[Trial]:
    """The best first: those within the limits before the others, then by the rule's measure, then by the smaller KL."""

    def place(trial: Trial) -> tuple[bool, float, float]:
        mean = trial.mean(aim.ranking.name)
        return not aim.allows(trial), math.inf if mean is None else -aim.ranking.gain(mean), cost_of(trial)

    return sorted(trials, key=place)


# Ablations and component-wise budgets --------------------------------------------------------------------------------


def _ablations(work: _Work) -> PartResult:
    """Every variant, each block type alone, and steering: with the same numbers, at equal budgets, and at equal KL.

    Every method gets as many strengths, whose KL per token lies on the same targets; what is reported on test is named
    on validation.
    """
    scores = work.scores([variant for variant in PAPERS if variant in SCORED])
    ladders = _ladders(work, scores)
    bench = work.on_validation(scores)
    _climb(ladders, bench, "ablations")
    points = {method: ladder.points() for method, ladder in ladders.items()}
    with showing("ablations, validation") as progress:
        tried = list({c.id: c for some in points.values() for c, _ in some}.values())
        trials = {trial.candidate.id: trial for trial in bench.run([BASE, *tried], "ablations", progress)}
    wanted: list[Wanted] = [
        (variant, "same numbers", edited(**_with_variant(work.config, variant)), None) for variant in PAPERS
    ]
    fronts = []
    for method, some in points.items():
        of_method = [trials[candidate.id] for candidate, _ in some]
        if not of_method:
            why = ladders[method].why_left_off() if bench.own else NO_ANSWERS
            fronts.append(Front(method, 0, 0, None, why))
            continue
        fronts.append(_front(method, of_method, work, bench.evaluations))
        best = choose(of_method, work.aim)
        if best is not None:
            wanted.append((method, "equal budget", best.candidate, dict(_by_id(some))[best.candidate.id]))
    target = _equal_kl(work, wanted)
    for some_method, some in points.items():
        wanted += [(some_method, "equal KL", candidate, kl) for candidate, kl in some if kl == target]
    return work.on_test(wanted, scores, fronts, work.profile.ablations.prompts)


def _front(method: str, trials: Sequence[Trial], work: _Work, each: int) -> Front:
    """As a run's own fronts: of the trials within the limits, but for that of KL."""
    limits = {measure: limit for measure, limit in work.aim.limits.items() if measure != UTILITY_LOSS}
    wide = replace(work.aim, limits=limits)
    allowed = [trial for trial in trials if wide.allows(trial)]
    volume = hypervolume_interval(allowed, wide, work.run.recipe.evaluation.resamples, work.run.recipe.seed)
    ids = tuple(trial.candidate.id for trial in pareto(allowed, wide))
    return Front(method, len(trials), len(trials) * each, volume, ids=ids)


def _equal_kl(work: _Work, wanted: Sequence[Wanted]) -> float:
    """The KL at which all methods meet: that of the full method's choice or, without one, the nearest to the run's."""
    for method, how, _, kl in wanted:
        if (method, how) == (FULL, "equal budget") and kl is not None:
            return kl
    of_run = max(work.choice["edit"]["utility_loss"] or 0.0, 1e-6)
    return min(_targets(work), key=lambda kl: abs(math.log(kl / of_run)))


def _targets(work: _Work) -> list[float]:
    sizes = work.profile.ablations
    return targets_of(sizes.span, sizes.points) if sizes.points > 1 else [sizes.span[1]]


def _by_id(points: Sequence[tuple[Candidate, float]]) -> list[tuple[str, float]]:
    return [(candidate.id, kl) for candidate, kl in points]


def _with_variant(config: Mapping[str, Any], variant: str) -> dict[str, Any]:
    return {**config, "variant": variant}


def _ladders(work: _Work, scores: Mapping[str, Scores]) -> dict[str, Ladder]:
    """Method → its strengths, in the proportion of the chosen budgets; of each block type alone ρ = ∞ for the other."""
    targets, config = _targets(work), work.config
    rhos = {"attn": config["rho_attn"], "mlp": config["rho_mlp"]}
    on = {block: rho for block, rho in rhos.items() if rho is not None}
    off = dict.fromkeys(set(rhos) - set(on))
    layers = config.get("layers")
    ladders: dict[str, Ladder] = {
        variant: edit_ladder(scores, targets, config["alpha"], on, off, layers, variant) for variant in PAPERS
    }
    for block, name in ALONE.items():
        other = {"attn": "mlp", "mlp": "attn"}[block]
        ladders[name] = edit_ladder(scores, targets, config["alpha"], {block: 1.0}, {other: None}, layers)
    ladders["steering"] = steering_ladder(targets)
    return ladders


def _climb(ladders: Mapping[str, Ladder], bench: Bench, name: str) -> None:
    """Measures the ladders' KL; without an answer to measure it on they have no points."""
    if bench.own:
        climb(list(ladders.values()), bench.kl, name)


# Sensitivity -------------------------------------------------------------------------------------------------------


def _sensitivity(work: _Work) -> PartResult:
    """Of each block type a sweep of its budget, with ρ = ∞ for the other, at the α of the choice."""
    scores = work.scores()
    swept = _by_numbers(work) if work.profile.sensitivity.values else _by_kl(work, scores)
    wanted: list[Wanted] = []
    fronts = []
    for method, some in swept.items():
        wanted += [(method, "swept", candidate, kl) for candidate, kl in some]
        fronts.append(Front(method, len(some), 0, None, "" if some else "no strength has a KL in the span"))
    return work.on_test(wanted, scores, fronts, work.profile.sensitivity.prompts)


def _swept(config: Mapping[str, Any], block: str, rho: float) -> Candidate:
    rhos = {"attn": None, "mlp": None} | {block: short(rho, 4)}
    return edited(rhos["attn"], rhos["mlp"], config["alpha"], config.get("layers"))


def _by_numbers(work: _Work) -> dict[str, list[tuple[Candidate, float | None]]]:
    """The profile's numbers, and those of the model's own grid."""
    facts = work.planned.facts
    swept: dict[str, list[tuple[Candidate, float | None]]] = {}
    for block, name in BUDGETS.items():
        own = [] if facts is None else getattr(facts.grid, f"rho_{block}")
        numbers = sorted({*work.profile.sensitivity.values, *(rho for rho in own if rho is not None)})
        swept[name] = [(_swept(work.config, block, rho), None) for rho in numbers]
    return swept


def _by_kl(work: _Work, scores: Mapping[str, Scores]) -> dict[str, list[tuple[Candidate, float | None]]]:
    sizes = work.profile.sensitivity
    targets, config = targets_of(sizes.span, sizes.points), work.config
    ladders = {
        name: edit_ladder(
            scores, targets, config["alpha"], {block: 1.0}, dict.fromkeys(set(BUDGETS) - {block}), config.get("layers")
        )
        for block, name in BUDGETS.items()
    }
    _climb(ladders, work.on_validation(scores), "sensitivity")
    return {name: [*ladder.points()] for name, ladder in ladders.items()}


# Training ----------------------------------------------------------------------------------------------------------


def _training(work: _Work) -> PartResult:
    """The checkpoints that the run's rule took on validation, beside its edit and its steering, on test.

    Utility tasks are not asked of checkpoints.
    """
    run = work.run
    if not is_trained(run):
        raise FileError("the training baselines are not whole", got=run.folder, fix="Run the suite again.")
    trained = read_json(run.path(TRAINED_CHOICE))
    bench = run.bench("test", run.journal("test"), engine_on_test(run), scores=work.scores())
    rounds = {"test": work.chosen, **rounds_on_test(run, bench)}
    trials: dict[str, Trial] = {}
    tried: list[Candidate] = []
    for name, candidates in rounds.items():
        with showing("training, test") as progress:
            trials |= {trial.candidate.id: trial for trial in bench.run(candidates, name, progress)}
        tried += candidates
    every: list[Wanted] = [("original", "original", BASE, None), *chosen_rows(tried)]
    rows = [Tried(method, how, c.id, dict(c.config), trials[c.id].values) for method, how, c, _ in every]
    fronts = [*_fronts(work.choice, ("edit", *BASELINES)), *_fronts(trained, tuple(trained["tried"]))]
    return PartResult(work.part, work.key, tuple(rows), tuple(fronts))


_MEASURES: Mapping[str, Callable[[_Work], PartResult]] = {
    "trade_off": _trade_off,
    "ablations": _ablations,
    "sensitivity": _sensitivity,
    "training": _training,
}
