"""The stages in order: recipe → traces → probe → scores → search → edit → export → evaluate → report.

Each stage reads files of the run directory and writes files there, so that it can be run alone, and a killed run goes
on from its last whole stage. The manifest holds for each stage a key of all that its result depends on; a stage whose
key and files still match is not run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Recipe, Variant
from .edit import Edit, Scores
from .errors import FileError, RecipeError
from .export.stage import CARD, EXPORTS, export
from .files import clear_temporaries, read_json, read_jsonl, sha256, write_json, write_jsonl, write_text
from .progress import say, showing

if TYPE_CHECKING:
    from .behaviours.safety import Prompt, Split
    from .engines import Engine
    from .trials import Bench

MANIFEST = "manifest.json"


class Run:
    """A run directory and its recipe; the model is loaded when a stage first needs it.

    Args:
        folder: made if missing.
        recipe: what to run.
    """

    def __init__(self, folder: str | Path, recipe: Recipe):
        self.folder, self.recipe = Path(folder), recipe
        if self.folder.exists() and not self.folder.is_dir():
            raise RecipeError("the run directory is a file", got=self.folder, fix="Give another --out.")
        self.keys = _keys(recipe)

    def path(self, name: str) -> Path:
        return self.folder / name

    @cached_property
    def host(self) -> Any:
        """Where the model is: a Host here, or a RayEngine, which has the same `engine`, `call` and `close`."""
        model, plan, rows = self.recipe.model, self.recipe.engine, self.recipe.evaluation.rows
        if plan.distributed == "ray":
            from .engines.ray import RayEngine

            return RayEngine(model, plan, rows=rows)
        from .engines.host import Host

        return Host(model, plan, rows)

    @property
    def engine(self) -> Engine:
        return self.host.engine

    def close(self) -> None:
        """Lets worker processes and replicas go."""
        if host := self.__dict__.pop("host", None):
            host.close()

    @cached_property
    def scores(self) -> dict[str, Scores]:
        """The full method's, and those of the variants that score in another way."""
        return {name: Scores.load(self.path(file)) for name, file in _score_files(self.recipe).items()}

    def prompts(self, split: Split) -> list[Prompt]:
        """A split's prompts. Those of test cannot be read before the choice is made."""
        from .behaviours.safety import load_prompts

        if split == "test" and not self.is_whole("edit"):
            raise FileError(
                "the test prompts are not read before an edit is chosen", got=self.folder, fix="Run the stage edit."
            )
        counts = getattr(self.recipe.data, split)
        return load_prompts(self.recipe.data.prompts, split, {str(k): n for k, n in counts.items()})

    def bench(self, stage: str, split: Split, journal: str) -> Bench:
        """Where a stage tries candidates on a split, with its journal."""
        from .evaluate import load_questions
        from .trials import Bench

        q = self.recipe.data.questions
        first, count = (0, 0) if q is None else (0, q.validation) if split == "validation" else (q.validation, q.test)
        path = self.path(f"{journal}/journal-{self.keys[stage]}.jsonl")
        path.parent.mkdir(exist_ok=True)
        questions = [] if q is None else load_questions(q.file, first, count)
        return Bench(self.engine, self.scores, self.prompts(split), self.recipe, path, questions)

    def manifest(self) -> dict[str, Any]:
        path = self.path(MANIFEST)
        found = read_json(path) if path.is_file() else {"stages": {}}
        if not (isinstance(found, dict) and isinstance(found.get("stages"), dict)):
            raise FileError(f"{path} is not a run's manifest", got=type(found).__name__, fix="Give another --out.")
        return found

    def is_whole(self, stage: str) -> bool:
        entry = self.manifest()["stages"].get(stage)
        if entry is None or entry["key"] != self.keys[stage]:
            return False
        return all(
            self.path(name).is_file() and sha256(self.path(name)) == digest for name, digest in entry["files"].items()
        )

    def record(self, stage: str, seconds: float, files: Sequence[str]) -> None:
        manifest = self.manifest()
        manifest["steer2edit"] = importlib.metadata.version("steer2edit")
        manifest["recipe"] = self.recipe.model_dump(mode="json")
        manifest["machine"] = {"python": platform.python_version(), "platform": platform.machine()}
        manifest["versions"] = {n: importlib.metadata.version(n) for n in ("torch", "transformers", "peft", "numpy")}
        entry = {
            "key": self.keys[stage],
            "seconds": round(seconds, 1),
            "files": {name: sha256(self.path(name)) for name in files},
        }
        if "host" in self.__dict__ and (where := self.host.where()):
            entry["model"] = where
        manifest["stages"][stage] = entry
        write_json(self.path(MANIFEST), manifest)


def _keys(recipe: Recipe) -> dict[str, str]:
    """Stage → hash of what its result depends on: its parts of the recipe, and the stage before."""
    r = recipe.model_dump(mode="json")
    prompts = recipe.data.prompts
    text = prompts if prompts.startswith("builtin:") else _digest(prompts)
    search = r["search"]
    asked = recipe.data.questions
    questions = None if asked is None else [r["data"]["questions"], _digest(asked.file)]
    plan = {k: v for k, v in r["evaluation"].items() if k != "resamples"}
    parts: dict[str, Any] = {
        "traces": [
            r["engine"]["name"],
            _local_files(recipe.model.name),
            r["seed"],
            r["model"],
            r["behaviour"],
            r["data"]["probe"],
            text,
            r["evaluation"]["rows"],
        ],
        "probe": {k: v for k, v in r["probe"].items() if k != "expert_tokens"},
        "score": [r["probe"]["expert_tokens"], sorted(_score_files(recipe))],
        "search": [_searched(recipe), r["data"]["validation"], questions, plan],
        "edit": [search, r["evaluation"]["resamples"]],
        "export": r["exports"],
        "evaluate": r["data"]["test"],
        "report": r["name"],
    }
    keys, before = {}, importlib.metadata.version("steer2edit")
    for stage in STAGES:
        before = hashlib.sha256(json.dumps([before, stage, parts[stage]]).encode()).hexdigest()[:16]
        keys[stage] = before
    return keys


def _digest(path: str) -> str:
    return sha256(path) if Path(path).is_file() else "missing"


def _searched(recipe: Recipe) -> dict[str, Any]:
    """What of the search section the trials depend on: of the rule and the limits only where they steer the search."""
    s = recipe.search.model_dump(mode="json")
    steered = recipe.search.method == "tpe" or recipe.search.refine
    keys = set(s) - (set() if steered else {"limits", "rule", "tolerance", "reference"})
    found = {key: s[key] for key in sorted(keys)}
    return found | ({"degenerate": s["limits"]["degenerate"]} if recipe.search.sanity else {})


def _score_files(recipe: Recipe) -> dict[Variant, str]:
    from .variants import FULL, SCORED

    files: dict[Variant, str] = {FULL: "scores.safetensors"}
    return files | {name: f"scores-{name}.safetensors" for name in recipe.search.variants if name in SCORED}


def _local_files(name: str) -> list[Any]:
    """A local model's files, by their sizes and times: other weights under the same name are another model."""
    path = Path(name)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def _traces(run: Run) -> list[str]:
    from .behaviours.safety import make_traces
    from .traces import write_traces

    b = run.recipe.behaviour
    prompts = run.prompts("probe")
    with showing("own answers") as progress:
        traces, left_out = make_traces(
            run.engine,
            prompts,
            positive=b.positive,
            negative=b.negative,
            system=b.system,
            new_tokens=b.new_tokens,
            progress=progress,
        )
    if left_out:
        say(f"  {left_out} own answers to harmful prompts decline and were left out of the negative set")
    write_traces(run.path("traces.jsonl"), traces)
    return ["traces.jsonl"]


def _probe(run: Run) -> list[str]:
    from .models import load_tokenizer
    from .probe import plan_pass, probe_of
    from .traces import read_traces

    p, model = run.recipe.probe, run.recipe.model
    traces = read_traces(run.path("traces.jsonl"))
    plan = plan_pass(
        load_tokenizer(model), traces, chat=model.chat, part=p.part, positions=p.positions, max_tokens=p.max_tokens
    )
    with showing("probe") as progress:
        sums = run.host.run_pass(plan, p.batch_tokens, progress)
        probe = probe_of(plan, sums, {"batch_tokens": p.batch_tokens})
    for what in ("skipped_empty", "cut_at_max_tokens"):
        for label, count in probe.counts[what].items():
            if count:
                say(f"  {label}: {count} traces {what.replace('_', ' ')}")
    probe.save(run.path("probe.safetensors"))
    return ["probe.safetensors"]


def _score(run: Run) -> list[str]:
    from .probe import Probe
    from .scoring import score

    probe = Probe.load(run.path("probe.safetensors"))
    wanted = _score_files(run.recipe)
    for variant, file in wanted.items():
        few = run.recipe.probe.expert_tokens
        scores = run.host.call(partial(score, probe=probe, expert_tokens=few, variant=variant))
        scores.save(run.path(file))
    if alone := scores.provenance["experts_left_alone"]:
        say(f"  {len(alone)} experts, reached by fewer than {run.recipe.probe.expert_tokens} tokens, are left alone")
    run.__dict__.pop("scores", None)
    return list(wanted.values())


def _search(run: Run) -> list[str]:
    from .report.live import watching
    from .search import run_study

    bench = run.bench("search", "validation", "search")
    with watching() as (progress, told):
        study = run_study(bench, run.recipe, progress, told)
    for row in study.discarded:
        say(f"  discarded: {row['id']}, {row['why']}")
    write_jsonl(run.path("search/trials.jsonl"), ({k: v for k, v in t.items() if k != "texts"} for t in study.trials))
    write_jsonl(run.path("search/discarded.jsonl"), study.discarded)
    write_json(run.path("search/study.json"), {"evaluations": study.evaluations, "refined": study.refined})
    return ["search/trials.jsonl", "search/discarded.jsonl", "search/study.json"]


def _edit(run: Run) -> list[str]:
    from .front import choose
    from .search import Study, require_choice, summary
    from .trials import edit_of

    s = run.recipe.search
    trials = read_jsonl(run.path("search/trials.jsonl"))
    chosen = require_choice(trials, run.recipe)
    steered = choose([t for t in trials if t["kind"] == "steering"], s.rule, s.limits.model_dump(), s.tolerance)
    edit_of(chosen["config"], run.scores).save(run.path("edit.safetensors"))
    left_out = ("counts", "flags", "losses", "round", "kind")
    brief = {
        k: None if t is None else {n: v for n, v in t.items() if n not in left_out}
        for k, t in (("edit", chosen), ("steering", steered))
    }
    study = Study(trials, read_jsonl(run.path("search/discarded.jsonl")), **read_json(run.path("search/study.json")))
    write_json(run.path("choice.json"), summary(study, run.recipe) | brief)
    other = steered["id"] if steered else "no steering strength within the limits"
    say(f"  chosen on validation: {chosen['id']}, {other}")
    return ["edit.safetensors", "choice.json"]


def _evaluate(run: Run) -> list[str]:
    from .evaluate import interval, paired_difference
    from .trials import BASE, Candidate

    plan, seed = run.recipe.evaluation, run.recipe.seed
    choice = read_json(run.path("choice.json"))
    tried = [BASE]
    tried += [Candidate(choice[k]["id"], k, choice[k]["config"]) for k in ("steering", "edit") if choice[k]]
    bench = run.bench("evaluate", "test", "evaluation")
    with showing("test") as progress:
        rows = bench.run(tried, "test", progress)
    systems = {}
    for row in rows:
        flags = row["flags"]
        systems[row["kind"]] = {
            "id": row["id"],
            "config": row["config"],
            "refusal": interval(flags["harmful"], plan.resamples, seed),
            "over_refusal": interval(flags.get("benign", []), plan.resamples, seed),
            "over_refusal_borderline": interval(flags.get("borderline", []), plan.resamples, seed),
            "degenerate": interval(flags["degenerate"], plan.resamples, seed),
            "nll_rise": interval(row["losses"]["nll_rise"], plan.resamples, seed),
            "utility_loss": interval(row["losses"]["kl"], plan.resamples, seed),
            "accuracy": interval(flags["right"], plan.resamples, seed),
        }
    by_kind = {row["kind"]: row for row in rows}
    differences = {
        f"edit - {other}": paired_difference(
            by_kind["edit"]["flags"]["harmful"], by_kind[other]["flags"]["harmful"], plan.resamples, seed
        )
        for other in by_kind
        if other != "edit"
    }
    result = {
        "split": "test",
        "systems": systems,
        "refusal_differences": differences,
        "agreement": run.host.call(_agreement, Edit.load(run.path("edit.safetensors")), bench.ids[0]),
    }
    write_json(run.path("evaluation/results.json"), result)
    answers = (
        {"prompt": p.text, "kind": p.kind} | {row["kind"]: row["texts"][i] for row in rows}
        for i, p in enumerate(bench.prompts)
    )
    write_jsonl(run.path("evaluation/answers.jsonl"), answers)
    return ["evaluation/results.json", "evaluation/answers.jsonl"]


def _agreement(model: Any, edit: Edit, prompt: Sequence[int]) -> dict[str, Any]:
    """Largest difference of logits between the edit as an intervention and baked into the weights, on one prompt.

    Not measured, and said so, where the weights cannot be written: quantised or offloaded ones.
    """
    import torch

    from .errors import ModelError
    from .weights import device_of

    ids = torch.tensor([prompt], device=device_of(model))
    with torch.inference_mode():
        with edit.applied(model):
            hooked = model(ids).logits.float()
        try:
            report = edit.apply(model)
        except ModelError as error:  # the intervention has just run, so that it is the edit's base
            return {"not_measured": str(error)}
        baked = model(ids).logits.float()
        edit.revert(model)
    return {"largest_logit_difference": float((hooked - baked).abs().max()), "rounding_loss": report.rounding_loss}


def _report(run: Run) -> list[str]:
    from .report.card import model_card
    from .report.figures import heat_map, trade_off
    from .report.page import markdown

    run.path("figures").mkdir(exist_ok=True)
    trials = read_jsonl(run.path("search/trials.jsonl"))
    choice, results = read_json(run.path("choice.json")), read_json(run.path("evaluation/results.json"))
    files = trade_off(trials, choice, run.path("figures/trade_off"))
    files += heat_map(Edit.load(run.path("edit.safetensors")), run.path("figures/lambda"))
    edit = Edit.load(run.path("edit.safetensors"))
    write_text(run.path("report.md"), markdown(run.recipe, choice, results, edit))
    for kind in EXPORTS:
        if run.path(kind).is_dir():
            write_text(run.path(f"{kind}/{CARD}"), model_card(run.recipe, edit, results, kind))
            files.append(run.path(f"{kind}/{CARD}"))
    return ["report.md", *(str(file.relative_to(run.folder)) for file in files)]


STAGES: dict[str, Callable[[Run], list[str]]] = {
    "traces": _traces,
    "probe": _probe,
    "score": _score,
    "search": _search,
    "edit": _edit,
    "export": export,
    "evaluate": _evaluate,
    "report": _report,
}


def run_all(run: Run) -> None:
    """Every stage that is not whole yet, and all after it."""
    _prepare(run)
    fresh = False
    with contextlib.closing(run):
        for stage in STAGES:
            if not fresh and run.is_whole(stage):
                say(f"{stage}: there already")
                continue
            fresh = True
            _run_stage(run, stage)


def run_stage(run: Run, stage: str, recipe_name: str) -> None:
    """One stage, anew. Raises FileError if a stage before it is not whole."""
    for before in STAGES:
        if before == stage:
            break
        if not run.is_whole(before):
            raise FileError(
                f"the stage {before} has not been run with this recipe",
                got=run.folder,
                fix=f"Run `steer2edit {before} {recipe_name}` first, or all with `steer2edit run {recipe_name}`.",
            )
    _prepare(run)
    with contextlib.closing(run):
        _run_stage(run, stage)


def _prepare(run: Run) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    for place in (".", "search", "evaluation", "figures"):
        clear_temporaries(run.path(place))
    write_text(run.path("recipe.yaml"), run.recipe.to_yaml())


def _run_stage(run: Run, stage: str) -> None:
    say(f"{stage}:")
    started = time.monotonic()
    files = STAGES[stage](run)
    run.record(stage, time.monotonic() - started, files)


def load_results(folder: str | Path) -> Mapping[str, Any]:
    return read_json(Path(folder) / "evaluation/results.json")
