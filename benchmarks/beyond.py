"""Edits that preserve against the paper's edit and every rival, over several draws of probe, validation and test.

For each seed the bundled safety prompts are pooled and divided anew, by kind and style. The probe, the scores and the
rivals are made as the demo makes them; every method gets as many strengths, at equal KL; the rule takes one of each on
validation; test says what they do. `--behaviour sentiment` (lists, pirate) does the same for a style.

Every batch is journalled in the folder, so that a run that was killed goes on. The folder then holds `results.json`,
`tables.md` and, apart since they differ from run to run, `costs.json`.

Run: python benchmarks/beyond.py --out runs/beyond
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import steer2edit as s2e
from beyond_numbers import markdown, results_of
from steer2edit.behaviours.base import SPLITS, Item, Source, Split
from steer2edit.behaviours.prompts import data_path, load_neutral
from steer2edit.edits import Edit
from steer2edit.engines.base import GREEDY, Answer, Progress, Request, Sampling
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import Steer2EditError
from steer2edit.files.reading import read_journal, read_json, read_jsonl
from steer2edit.files.writing import append_jsonl, write_json, write_jsonl, write_text
from steer2edit.method.intervention import Intervention
from steer2edit.method.rivals import RIVALS
from steer2edit.models.embedded import EMBEDDED
from steer2edit.probing.rivals import rival_edit
from steer2edit.probing.traces import read_traces, write_traces
from steer2edit.progress import be_quiet, say, showing
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
        keys = [
            "" if table[r.row].terms else f"{max_new_tokens} {' '.join(map(str, r.ids))}" for r in requests
        ]  # "" is not the original model
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
            self.probe = self._probe()
            self.scores = {"full": s2e.score(self.model, self.probe)}
        with self.clock("rivals"):
            rivals = {kind: rival_edit(self.model, self.probe, self.scores["full"], kind) for kind in self._rivals}
        bench = self._bench("validation", rivals)
        with self.clock("calibration"):
            tried = self._strengths(bench)
        candidates = list({c.id: c for strengths in tried.values() for c, _ in strengths}.values())
        with self.clock("validation"), showing(f"seed {self.seed}, validation") as progress:
            on_validation = {t.candidate.id: t for t in bench.run([BASE, *candidates], "validation", progress)}
        aim = self.recipe.aim
        of = {method: [on_validation[c.id] for c, _ in strengths] for method, strengths in tried.items()}
        front = {method: [t.candidate.id for t in pareto(trials, aim)] for method, trials in of.items()}
        taken = {method: choose(trials, aim) for method, trials in of.items()}
        chosen = {method: _id(taken[method] or self._nearest(tried, taken, method)) for method in of}
        wanted = {id for ids in front.values() for id in ids} | {id for id in chosen.values() if id}
        wanted |= {c.id for method in self.plan.curves for c, _ in tried.get(method, [])}
        asked = [c for c in candidates if c.id in wanted]
        on_test_bench = self._bench("test", rivals)
        with self.clock("test"), showing(f"seed {self.seed}, test") as progress:
            on_test = {t.candidate.id: t for t in on_test_bench.run([BASE, *asked], "test", progress)}
        return {
            "seed": self.seed,
            "items": {"validation": _counts(bench.items), "test": _counts(on_test_bench.items)},
            "base": {"test": _values(on_test["base"])},
            "methods": {
                method: [
                    {"id": c.id, "config": dict(c.config), "target": target}
                    | {"validation": _values(on_validation[c.id]), "test": _values(on_test.get(c.id))}
                    for c, target in strengths
                ]
                for method, strengths in tried.items()
            },
            "front": front,
            "chosen": chosen,
            "within_limits": [method for method, trial in taken.items() if trial is not None],
            "sets": self._sets(rivals, chosen, {c.id: c for c in candidates}),
        }

    def _probe(self) -> s2e.Probe:
        path, traces_path = self.folder / "probe.safetensors", self.folder / "traces.jsonl"
        if not traces_path.is_file():
            items = self.behaviour.items(self.source, "probe")
            with showing(f"seed {self.seed}, own answers") as progress:
                write_traces(traces_path, self.behaviour.make_traces(self.engine, items, progress))
        if not path.is_file():
            preserve = self.behaviour.preserved if NEED_EVIDENCE & set(self.plan.methods) else ()
            with showing(f"seed {self.seed}, probe") as progress:
                s2e.collect(
                    *(self.model, self.engine.tokenizer, read_traces(traces_path)),
                    chat=self.engine.chat,
                    preserve=preserve,
                    progress=progress,
                ).save(path)
        return s2e.Probe.load(path)

    @property
    def _rivals(self) -> list[Any]:
        return [kind for kind in RIVALS if kind in self.plan.methods]

    def _bench(self, split: Split, rivals: Mapping[str, Edit]) -> Bench:
        """As a run opens it, with the recipe's own items and neutral prompts."""
        recipe, count = self.recipe, self.recipe.evaluation.utility_prompts
        items = self.behaviour.completed(self.engine, self.behaviour.items(self.source, split))
        neutral = [item for item in items if item.kind == self.behaviour.neutral and not item.choices][:count]
        if recipe.utility.prompts is not None:
            neutral = load_neutral(recipe.utility.prompts, split, 0 if split == "validation" else count, count)
        return Bench(
            *(self.engine, self.scores, items, self.behaviour, recipe.evaluation, self.folder / f"{split}.jsonl"),
            neutral=neutral,
            probe=self.probe,
            rivals=rivals,
            seed=self.seed,
        )

    def _strengths(self, bench: Bench) -> dict[str, list[tuple[Candidate, float | None]]]:
        """Method → its strengths from weak to strong, each with the KL that it was set at."""
        plan, methods = self.plan, self.plan.methods
        search = Search(
            rho_mlp=[None],
            span=plan.span,
            points=plan.points,
            layers=[MIDDLE],
            steering="auto" if "steering" in methods else [],
            baselines=[kind for kind in ("system", "layer", "direction", *RIVALS) if kind in methods],
        )
        search = with_numbered_layers(search, self.scores["full"])
        middle, targets = search.layers[0], targets_of(plan.span, plan.points)
        ladders = {
            method: edit_ladder(
                *(self.scores, targets, search.alpha[0], {"attn": 1.0}, {"mlp": None}),
                None if layers is None else middle,
                variant,
            )
            for method, (layers, variant) in EDITS.items()
            if method in methods
        }
        others = baseline_ladders(search, plan.points, tried_layers(self.probe))
        climb([*ladders.values(), *others], bench.kl, f"seed {self.seed}, calibration")
        found: dict[str, list[tuple[Candidate, float | None]]] = {
            method: list(ladder.points()) for method, ladder in ladders.items()
        }
        for ladder in others:
            for candidate, target in ladder.points():
                found.setdefault(candidate.kind, []).append((candidate, target))
        for ladder in (*ladders.values(), *others):
            if why := ladder.why_left_off():
                say(f"  {ladder.name} is left off: {why}")
        if prompts := prompts_that_ask(bench, search):
            found["system"] = [(candidate, None) for candidate in prompts]
        return {method: found[method] for method in METHODS if found.get(method)}

    def _nearest(
        self, tried: Mapping[str, Any], taken: Mapping[str, Trial | None], method: str
    ) -> Candidate | Trial | None:
        """Where none of a method's strengths is within the limits: the one at the KL of the edit that was chosen."""
        reference = next((trial for name in EDITS if (trial := taken.get(name)) is not None), None)
        with_target = [(c, target) for c, target in tried[method] if target is not None]
        if reference is None or not with_target:
            return None
        at = next(t for name in EDITS for c, t in tried.get(name, []) if c.id == reference.candidate.id)
        return min(with_target, key=lambda pair: abs(pair[1] - at))[0]

    def _sets(
        self, rivals: Mapping[str, Edit], chosen: Mapping[str, str | None], by_id: Mapping[str, Candidate]
    ) -> dict[str, dict[str, list[float]]]:
        """Set → system → whether each prompt was refused: of what was chosen of the edits and of steering."""
        if self.plan.sets is None or not self.plan.is_safety:
            return {}
        items = []
        for name, (file, kind) in SETS.items():
            rows = read_jsonl(self.plan.sets / file)
            some = random.Random(self.seed).sample(rows, min(self.plan.set_items, len(rows)))
            items += [Item(kind, row["prompt"], target=name) for row in some]
        systems = {method: chosen[method] for method in (*EDITS, "steering") if chosen.get(method)}
        asked = list(dict.fromkeys(systems.values()))
        bench = Bench(
            *(self.engine, self.scores, items, self.behaviour, self.recipe.evaluation, self.folder / "sets.jsonl"),
            probe=self.probe,
            rivals=rivals,
            seed=self.seed,
        )
        with self.clock("prompts of others"), showing(f"seed {self.seed}, prompts of others") as progress:
            bench.run([BASE, *(by_id[id] for id in asked if id)], "sets", progress)
        refused = {"harmful": "refusal", "benign": "over_refusal"}
        found: dict[str, dict[str, list[float]]] = {name: {} for name in SETS}
        for system, id in {"base": "base", **systems}.items():
            for item, label in zip(items, bench.labels[str(id)], strict=True):
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


def _id(one: Trial | Candidate | None) -> str | None:
    if one is None:
        return None
    return one.candidate.id if isinstance(one, Trial) else one.id


def _values(trial: Trial | None) -> dict[str, list[float | None]] | None:
    return None if trial is None else {name: list(values) for name, values in trial.values.items() if values}


def _counts(items: Sequence[Item]) -> dict[str, int]:
    kinds = [item.kind for item in items]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


# All seeds ----------------------------------------------------------------------------------------------------------


class Clock:
    """Adds up the seconds of each part, of a run that was killed as well, in a file of its own."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds: dict[str, float] = read_json(path)["seconds"] if path.is_file() else {}

    def __call__(self, part: str) -> Clock:
        self.part = part
        return self

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.part] = self.seconds.get(self.part, 0.0) + time.monotonic() - self.began
        write_json(self.path, {"seconds": self.seconds})

    def rows(self, seeds: int) -> dict[str, str]:
        return {part: f"{took / seeds:.0f} s a seed" for part, took in self.seconds.items()}


def run(plan: Plan, seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """Every seed that is not whole yet, then the tables."""
    out.mkdir(parents=True, exist_ok=True)
    clock = Clock(out / "costs.json")
    model, tokenizer = s2e.load_model(plan.model, dtype="float32", device="cpu")
    engine = Remembered(TransformersEngine(model, tokenizer, rows=128), out / "base_answers.jsonl")
    rows, began = [], time.monotonic()
    for number, seed in enumerate(seeds, start=1):
        rows.append(SeedRun(plan, engine, model, seed, out / f"seed-{seed}", clock).row())
        took = time.monotonic() - began
        left = took / number * (len(seeds) - number)
        say(f"seed {seed}: done, {number} of {len(seeds)}; {took:.0f} s so far, about {left:.0f} s left")
    behaviour = load_recipe("demo" if plan.is_safety else plan.behaviour).behaviour
    results = results_of(
        rows,
        behaviour.measures,
        curves=plan.curves,
        levels=plan.levels,
        kls=plan.kls,
        reference=plan.reference,
        resamples=plan.resamples,
    )
    write_json(out / "results.json", results)
    first = out / f"seed-{seeds[0]}"
    costs = clock.rows(len(seeds)) | _megabytes(first)
    write_text(out / "tables.md", markdown(results, TITLE, costs))
    return results


def _megabytes(folder: Path) -> dict[str, str]:
    """What the evidence adds to a probe's file."""
    probe = s2e.Probe.load(folder / "probe.safetensors")
    if probe.evidence is None:
        return {}
    size = sum(t.numel() * t.element_size() for t in probe.evidence.tensors().values())
    return {
        "evidence in the probe": f"{size / 1e6:.1f} MB of {(folder / 'probe.safetensors').stat().st_size / 1e6:.1f}"
    }


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := [name for name in names if name not in METHODS]:
        raise Steer2EditError("there is no such method", got=unknown[0], fix=f"Known: {', '.join(METHODS)}.")
    return names


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(x) for x in text.split(",") if x.strip())


def _kinds(text: str) -> dict[str, int]:
    """`harmful=15,benign=8` → {"harmful": 15, "benign": 8}"""
    return {kind: int(count) for kind, _, count in (part.partition("=") for part in text.split(","))}


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Raises Steer2EditError for a method that is not known, or one that the behaviour gives no evidence for."""
    safety, quick = arguments.behaviour == "safety", arguments.quick
    without_evidence = tuple(name for name in METHODS if name not in NEED_EVIDENCE)
    methods = _names(arguments.methods) if arguments.methods else (METHODS if safety else without_evidence)
    if not safety and (some := NEED_EVIDENCE & set(methods)):
        raise Steer2EditError(
            "a style has no prompts at which nothing is to change", got=min(some), fix="Leave it out of --methods."
        )
    curves = _names(arguments.curves) if arguments.curves else tuple(m for m in (*EDITS, "steering") if m in methods)
    counts: dict[Split, Mapping[str, int]] = {}
    if safety:
        texts = arguments.probe, arguments.validation, arguments.test
        counts = {split: _kinds(text) for split, text in zip(SPLITS, texts, strict=True)}
    evaluation = {"rows": 128, "batch": 512}  # the rest as the recipe has it
    if quick:
        small = "harmful=3,benign=2,borderline=2" if safety else "prompt=4"
        counts = {split: _kinds(small) for split in SPLITS}
        evaluation = {"new_tokens": 4, "utility_prompts": 2, "utility_tokens": 4, "rows": 16, "batch": 16}
    return Plan(
        behaviour=arguments.behaviour,
        model=arguments.model,
        methods=methods,
        curves=curves,
        span=(0.02, 0.2) if safety else (0.05, 0.4),
        points=2 if quick else 5,
        counts=counts,
        evaluation=evaluation,
        reference=0.3 if safety else 0.5,
        levels=_numbers(arguments.levels) if safety else (),
        kls=_numbers(arguments.kls),
        resamples=50 if quick else 1000,
        sets=arguments.sets,
        set_items=2 if quick else arguments.set_items,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/beyond"), help="where the journals and the tables lie")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--behaviour", choices=["safety", "sentiment", "lists", "pirate"], default="safety")
    parser.add_argument("--methods", default="", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--curves", default="", help="methods of which every strength is tested, the first against all")
    parser.add_argument("--levels", default="0.5,0.6,0.7", help="of refusal, at which methods are compared")
    parser.add_argument("--kls", default="0.03,0.06,0.12", help="of KL, at which methods are compared")
    parser.add_argument("--probe", default="harmful=80,benign=80,borderline=80")
    parser.add_argument("--validation", default="harmful=15,benign=8,borderline=12")
    parser.add_argument("--test", default="harmful=36,benign=18,borderline=24")
    parser.add_argument("--sets", type=Path, help="a folder with prompts of others")
    parser.add_argument("--set-items", type=int, default=60)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--quick", action="store_true", help="a few prompts, to see that it runs")
    arguments = parser.parse_args(argv)
    be_quiet(False)
    try:
        run(plan_of(arguments), [int(seed) for seed in arguments.seeds.split(",")], arguments.out)
    except Steer2EditError as error:
        raise SystemExit(str(error)) from None
    print((arguments.out / "tables.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
