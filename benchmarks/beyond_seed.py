"""One draw of the prompts for benchmarks/beyond.py: every method on validation, and on test what validation chose.

Whatever a model is asked is journalled, and what the original model answers is kept for all draws. So a run that was
killed goes on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import steer2edit as s2e
from steer2edit.behaviours.base import SPLITS, Item, Source, Split
from steer2edit.behaviours.prompts import data_path, load_neutral
from steer2edit.edits import Edit
from steer2edit.engines.base import GREEDY, Answer, Progress, Request, Sampling
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.files.reading import read_journal, read_json, read_jsonl
from steer2edit.files.schema import parse
from steer2edit.files.writing import append_jsonl, write_json, write_jsonl
from steer2edit.method.intervention import Intervention
from steer2edit.method.rivals import RIVALS
from steer2edit.probing.rivals import rival_edit
from steer2edit.probing.traces import read_traces, write_traces
from steer2edit.progress import say, showing
from steer2edit.recipe import Recipe, load_recipe
from steer2edit.searching.bench import Bench
from steer2edit.searching.calibrate import baseline_ladders, climb, edit_ladder, targets_of
from steer2edit.searching.candidates import BASE, TITLES, Candidate, Trial, tried_layers
from steer2edit.searching.front import choose, pareto
from steer2edit.searching.own_answers import Journalled
from steer2edit.searching.plan import Search
from steer2edit.searching.rounds import prompts_that_ask, with_numbered_layers

MIDDLE = "33%-67%"
# The edits: method → the layers and the variant.
EDITS: dict[str, tuple[str | None, str]] = {
    "preserve": (MIDDLE, "preserve"),
    "full": (None, "full"),
    "full-middle": (MIDDLE, "full"),
}
METHODS = (*EDITS, "steering", "layer", "direction", "system", *RIVALS)
TITLE = {name: TITLES.get(name, name) for name in METHODS} | {
    "base": "original",
    "preserve": "edit that preserves, middle third",
    "full": "the paper's edit, all layers",
    "full-middle": "the paper's edit, middle third",
}
# What tells apart prompts at which nothing is to change.
NEED_EVIDENCE = {"preserve", "llm_va", "null_space"}
SHARES: dict[Split, float] = {"probe": 0.5, "validation": 0.2, "test": 0.3}
SETS = {
    "AdvBench": ("advbench.jsonl", "harmful"),
    "MaliciousInstruct": ("malicious_instruct.jsonl", "harmful"),
    "GCG": ("jailbreak_gcg_llama2-7b.jsonl", "harmful"),
    "AdvLLM": ("jailbreak_advllm_llama2-7b.jsonl", "harmful"),
    "Alpaca": ("alpaca_benign.jsonl", "benign"),
}
# Base answers that are generated and kept at once.
_KEPT = 128
# Method → its strengths from weak to strong, each with the KL that it was set at; None without a strength.
Strengths = Mapping[str, Sequence[tuple[Candidate, float | None]]]


@dataclass(frozen=True)
class Plan:
    """What is asked.

    Attributes:
        curves: methods of which every strength is tested, not only those that validation chose.
        span, points: KL per token of the weakest and the strongest, and how many strengths each method has.
        counts: split → kind → prompts. sets: a folder with prompts of others. set_items: so many of each.
    """

    behaviour: str
    model: str
    methods: tuple[str, ...]
    curves: tuple[str, ...]
    span: tuple[float, float]
    points: int
    counts: Mapping[Split, Mapping[str, int]]
    evaluation: Mapping[str, int]
    reference: float
    levels: tuple[float, ...]
    kls: tuple[float, ...]
    resamples: int
    sets: Path | None
    set_items: int

    @property
    def is_safety(self) -> bool:
        return self.behaviour == "safety"

    def measured(self) -> dict[str, Any]:
        """What the measurements of a folder depend on: all but what the tables alone take."""
        left_out = {"reference", "levels", "kls", "resamples", "sets"}
        asked = {name: value for name, value in asdict(self).items() if name not in left_out}
        return json.loads(json.dumps(asked | {"sets": self.sets is not None}))


class Remembered(Journalled):
    """An engine that keeps what the original model answers, by prompt: all seeds ask it the same prompts."""

    def __init__(self, engine: TransformersEngine, path: Path):
        super().__init__(engine, path.with_suffix(".unused"))
        self.path = path
        self.known: dict[str, list[Any]] = {}
        for line in read_journal(path):
            self.known |= line["answers"]

    def generate(
        self,
        requests: Sequence[Request],
        table: Sequence[Intervention],
        max_new_tokens: int,
        progress: Progress | None = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] | None = None,
    ) -> list[Answer]:
        if sampling != GREEDY or stop is not None:
            return self.engine.generate(requests, table, max_new_tokens, progress, sampling, stop)
        # Of what is not the original model the key is empty.
        keys = ["" if table[r.row].terms else f"{max_new_tokens} {' '.join(map(str, r.ids))}" for r in requests]
        missing = [i for i, key in enumerate(keys) if key not in self.known]
        made: dict[int, Answer] = {}
        pieces = [missing]
        if all(keys):
            pieces = [missing[i : i + _KEPT] for i in range(0, len(missing), _KEPT)]
        for piece in pieces:
            answers = self.engine.generate([requests[i] for i in piece], table, max_new_tokens, progress)
            made |= dict(zip(piece, answers, strict=True))
            new = {keys[i]: _as_row(made[i]) for i in piece if keys[i]}
            if new:
                append_jsonl(self.path, {"answers": new})
                self.known |= new
        if progress:
            progress(len(requests), len(requests))
        return [made[i] if i in made else _from_row(self.known[keys[i]]) for i in range(len(requests))]


def _as_row(answer: Answer) -> list[Any]:
    return [list(answer.ids), answer.text, answer.ended, answer.start, answer.thinking]


def _from_row(row: Sequence[Any]) -> Answer:
    return Answer(tuple(row[0]), *row[1:])


# One seed -----------------------------------------------------------------------------------------------------------


class SeedRun:
    """One draw of the prompts, and everything that is measured on it."""

    def __init__(self, plan: Plan, engine: Remembered, model: Any, seed: int, folder: Path, clock: Callable[..., Any]):
        self.plan, self.engine, self.model, self.clock = plan, engine, model, clock
        self.seed, self.folder = seed, folder
        self.rivals: dict[str, Edit] = {}
        folder.mkdir(parents=True, exist_ok=True)
        overrides = [f"seed={seed}", *(f"evaluation.{key}={value}" for key, value in plan.evaluation.items())]
        overrides += [f"data.{split}={dict(counts)}" for split, counts in plan.counts.items()]
        if plan.is_safety:
            write_jsonl(folder / "prompts.jsonl", divided(seed))
            overrides.append(f"data.prompts={folder / 'prompts.jsonl'}")
        name = "demo" if plan.is_safety else plan.behaviour
        self.recipe: Recipe = load_recipe(name, [*overrides, f"model.name={plan.model}"])
        self.behaviour = self.recipe.behaviour
        self.source: Source = self.recipe.source

    def row(self) -> dict[str, Any]:
        """What the seed showed, from its file if it is whole."""
        path = self.folder / "trials.json"
        if not path.is_file():
            write_json(path, self._measured())
        return read_json(path)

    def _measured(self) -> dict[str, Any]:
        with self.clock("probe and scores"):
            self.probe = self.make_probe()
            self.scores = {"full": s2e.score(self.model, self.probe)}
        with self.clock("rivals"):
            wanted = [kind for kind in RIVALS if kind in self.plan.methods]
            full = self.scores["full"]
            self.rivals = {kind: rival_edit(self.model, self.probe, full, kind) for kind in wanted}
        validation, test = self.open_bench("validation"), self.open_bench("test")
        with self.clock("calibration"):
            tried = self._strengths(validation)
        candidates = {c.id: c for strengths in tried.values() for c, _ in strengths}
        on_validation = self._run(validation, "validation", list(candidates.values()))
        choice = self._choice(tried, on_validation)
        # Of most methods only what validation chose is asked on test.
        asked = {id for ids in choice["front"].values() for id in ids} | {id for id in choice["chosen"].values() if id}
        asked |= {c.id for method in self.plan.curves for c, _ in tried.get(method, [])}
        on_test = self._run(test, "test", [c for c in candidates.values() if c.id in asked])
        methods = {
            method: [
                {"id": c.id, "config": dict(c.config), "target": target}
                | {"validation": _values(on_validation[c.id]), "test": _values(on_test.get(c.id))}
                for c, target in strengths
            ]
            for method, strengths in tried.items()
        }
        return {
            "seed": self.seed,
            "items": {"validation": _counts(validation.items), "test": _counts(test.items)},
            "base": {"test": _values(on_test["base"])},
            "methods": methods,
            **choice,
            "sets": self._sets(choice["chosen"], candidates),
        }

    def _run(self, bench: Bench, name: str, tried: Sequence[Candidate]) -> dict[str, Trial]:
        with self.clock(name), showing(f"seed {self.seed}, {name}") as progress:
            return {trial.candidate.id: trial for trial in bench.run([BASE, *tried], name, progress)}

    def _choice(self, tried: Strengths, on_validation: Mapping[str, Trial]) -> dict[str, Any]:
        """What validation says: each method's front, and what the recipe's rule takes of it."""
        aim = self.recipe.aim
        of = {method: [on_validation[c.id] for c, _ in strengths] for method, strengths in tried.items()}
        taken = {method: choose(trials, aim) for method, trials in of.items()}
        chosen = {
            method: _nearest(tried, taken, method) if trial is None else trial.candidate.id
            for method, trial in taken.items()
        }
        return {
            "front": {method: [t.candidate.id for t in pareto(trials, aim)] for method, trials in of.items()},
            "chosen": chosen,
            "within_limits": [method for method, trial in taken.items() if trial is not None],
        }

    def make_probe(self) -> s2e.Probe:
        path, traces_path = self.folder / "probe.safetensors", self.folder / "traces.jsonl"
        if not traces_path.is_file():
            items = self.behaviour.items(self.source, "probe")
            with showing(f"seed {self.seed}, own answers") as progress:
                write_traces(traces_path, self.behaviour.make_traces(self.engine, items, progress))
        if not path.is_file():
            preserve = self.behaviour.preserved if NEED_EVIDENCE & set(self.plan.methods) else ()
            with showing(f"seed {self.seed}, probe") as progress:
                probe = s2e.collect(
                    self.model,
                    self.engine.tokenizer,
                    read_traces(traces_path),
                    chat=self.engine.chat,
                    preserve=preserve,
                    progress=progress,
                )
            probe.save(path)
        return s2e.Probe.load(path)

    def open_bench(self, split: Split) -> Bench:
        """As a run opens it, with the recipe's own items and neutral prompts."""
        recipe, count = self.recipe, self.recipe.evaluation.utility_prompts
        items = self.behaviour.completed(self.engine, self.behaviour.items(self.source, split))
        neutral = [item for item in items if item.kind == self.behaviour.neutral and not item.choices][:count]
        if recipe.utility.prompts is not None:
            neutral = load_neutral(recipe.utility.prompts, split, 0 if split == "validation" else count, count)
        return self._opened(split, items, neutral)

    def _opened(self, name: str, items: Sequence[Item], neutral: Sequence[Item] = ()) -> Bench:
        return Bench(
            self.engine,
            self.scores,
            items,
            self.behaviour,
            self.recipe.evaluation,
            self.folder / f"{name}.jsonl",
            neutral=neutral,
            probe=self.probe,
            rivals=self.rivals,
            seed=self.seed,
        )

    def _strengths(self, bench: Bench) -> Strengths:
        """Method → its strengths from weak to strong, each with the KL that it was set at."""
        plan, methods = self.plan, self.plan.methods
        asked = {
            "rho_mlp": [None],
            "span": plan.span,
            "points": plan.points,
            "layers": [MIDDLE],
            "steering": "auto" if "steering" in methods else [],
            "baselines": [kind for kind in ("system", "layer", "direction", *RIVALS) if kind in methods],
        }
        search = with_numbered_layers(parse(Search, asked, under="search"), self.scores["full"])
        middle, targets = search.layers[0], targets_of(plan.span, plan.points)
        ladders = {}
        for method, (layers, variant) in EDITS.items():
            if method in methods:
                where = None if layers is None else middle
                alpha, on, off = search.alpha[0], {"attn": 1.0}, {"mlp": None}
                ladders[method] = edit_ladder(self.scores, targets, alpha, on, off, where, variant)
        others = baseline_ladders(search, plan.points, tried_layers(self.probe))
        climb([*ladders.values(), *others], bench.kl, f"seed {self.seed}, calibration")
        found: dict[str, list[tuple[Candidate, float | None]]] = {}
        for method, ladder in ladders.items():
            found[method] = list(ladder.points())
        for ladder in others:
            for candidate, target in ladder.points():
                found.setdefault(candidate.kind, []).append((candidate, target))
        for ladder in (*ladders.values(), *others):
            if why := ladder.why_left_off():
                say(f"  {ladder.name} is left off: {why}")
        if prompts := prompts_that_ask(bench, search):
            found["system"] = [(candidate, None) for candidate in prompts]
        return {method: found[method] for method in METHODS if found.get(method)}

    def _sets(
        self, chosen: Mapping[str, str | None], candidates: Mapping[str, Candidate]
    ) -> dict[str, dict[str, list[float]]]:
        """Set → system → whether each prompt was refused: of what was chosen of the edits and of steering."""
        if self.plan.sets is None or not self.plan.is_safety:
            return {}
        items = []
        for name, (file, kind) in SETS.items():
            rows = read_jsonl(self.plan.sets / file)
            some = random.Random(self.seed).sample(rows, min(self.plan.set_items, len(rows)))
            items += [Item(kind, row["prompt"], target=name) for row in some]
        systems = {method: id for method in (*EDITS, "steering") if (id := chosen.get(method))}
        bench = self._opened("sets", items)
        self._run(bench, "prompts of others", [candidates[id] for id in dict.fromkeys(systems.values())])
        refused = {"harmful": "refusal", "benign": "over_refusal"}
        found: dict[str, dict[str, list[float]]] = {name: {} for name in SETS}
        for system, id in {"base": "base", **systems}.items():
            for item, label in zip(items, bench.labels[id], strict=True):
                found[item.target].setdefault(system, []).append(float(label[refused[item.kind]] or 0.0))
        return found


def divided(seed: int) -> list[dict[str, Any]]:
    """The bundled safety prompts, each with another split: those of a kind and style are shuffled and divided."""
    rows = read_jsonl(data_path("builtin:safety_prompts"))
    strata: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        strata.setdefault((row["kind"], row["style"]), []).append(row)
    shuffled = []
    for key in sorted(strata):
        some = sorted(strata[key], key=lambda row: row["prompt"])
        random.Random(f"{seed} {key}").shuffle(some)
        ends, start = {}, 0.0
        for split in SPLITS:
            start += SHARES[split]
            ends[split] = round(start * len(some))
        for number, row in enumerate(some):
            split = next(split for split in SPLITS if number < ends[split])
            shuffled.append({**row, "split": split})
    return shuffled


def _nearest(tried: Strengths, taken: Mapping[str, Trial | None], method: str) -> str | None:
    """Where none of a method's strengths is within the limits: the one at the KL of the edit that was chosen."""
    edit = next((name for name in EDITS if taken.get(name) is not None), None)
    with_kl = [(c.id, kl) for c, kl in tried[method] if kl is not None]
    if edit is None or not with_kl:
        return None
    of_edit = taken[edit]
    assert of_edit is not None
    at = next(kl for c, kl in tried[edit] if c.id == of_edit.candidate.id and kl is not None)
    return min(with_kl, key=lambda pair: abs(pair[1] - at))[0]


def _values(trial: Trial | None) -> dict[str, list[float | None]] | None:
    return None if trial is None else {name: list(values) for name, values in trial.values.items() if values}


def _counts(items: Sequence[Item]) -> dict[str, int]:
    kinds = [item.kind for item in items]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
