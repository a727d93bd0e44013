"""The stages in order: recipe → traces → probe → scores → search → edit → export → evaluate → report.

Each stage reads files of the run directory and writes files there, so that it can be run alone, and a killed run goes
on from its last whole stage. The manifest holds for each stage a key of all that its result depends on; a stage whose
key and files still match is not run again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from .config import Recipe
from .edit import Edit, Scores
from .errors import FileError, RecipeError
from .files import clear_temporaries, read_json, read_jsonl, remove, sha256, write_json, write_jsonl, write_text
from .progress import say, showing

MANIFEST = "manifest.json"
# The model card of an export; a checkpoint comes with the base's, and the report writes its own over it.
CARD = "README.md"


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
    def engine(self) -> Any:
        from .engines.transformers import TransformersEngine
        from .models import load_section

        m = self.recipe.model
        say(f"loading {m.name}")
        model, tokenizer = load_section(m)
        return TransformersEngine(model, tokenizer, rows=self.recipe.evaluation.rows, chat=m.chat)

    @cached_property
    def scores(self) -> Scores:
        return Scores.load(self.path("scores.safetensors"))

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
        if "engine" in self.__dict__:
            model = self.engine.model
            entry["model"] = {"dtype": str(model.dtype).removeprefix("torch."), "device": str(self.engine.device)}
        manifest["stages"][stage] = entry
        write_json(self.path(MANIFEST), manifest)


def _keys(recipe: Recipe) -> dict[str, str]:
    """Stage → hash of what its result depends on: its parts of the recipe, and the stage before."""
    r = recipe.model_dump(mode="json")
    prompts = recipe.data.prompts
    text = prompts if prompts.startswith("builtin:") else (sha256(prompts) if Path(prompts).is_file() else "missing")
    search = r["search"]
    plan = {k: v for k, v in r["evaluation"].items() if k != "resamples"}
    parts: dict[str, Any] = {
        "traces": [
            _local_files(recipe.model.name),
            r["seed"],
            r["model"],
            r["behaviour"],
            r["data"]["probe"],
            text,
            r["evaluation"]["rows"],
        ],
        "probe": {k: v for k, v in r["probe"].items() if k != "expert_tokens"},
        "score": r["probe"]["expert_tokens"],
        "search": [{k: v for k, v in search.items() if k != "limits"}, r["data"]["validation"], plan],
        "edit": search["limits"],
        "export": r["exports"],
        "evaluate": [r["data"]["test"], r["evaluation"]["resamples"]],
        "report": r["name"],
    }
    keys, before = {}, importlib.metadata.version("steer2edit")
    for stage in STAGES:
        before = hashlib.sha256(json.dumps([before, stage, parts[stage]]).encode()).hexdigest()[:16]
        keys[stage] = before
    return keys


def _local_files(name: str) -> list[Any]:
    """A local model's files, by their sizes and times: other weights under the same name are another model."""
    path = Path(name)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def _traces(run: Run) -> list[str]:
    from .behaviours.safety import load_prompts, make_traces
    from .traces import write_traces

    b, data = run.recipe.behaviour, run.recipe.data
    prompts = load_prompts(data.prompts, "probe", {str(k): n for k, n in data.probe.items()})
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
    from .probe import collect
    from .traces import read_traces

    p = run.recipe.probe
    engine = run.engine
    with showing("probe") as progress:
        probe = collect(
            engine.model,
            engine.tokenizer,
            read_traces(run.path("traces.jsonl")),
            chat=engine.chat,
            part=p.part,
            positions=p.positions,
            max_tokens=p.max_tokens,
            batch_tokens=p.batch_tokens,
            progress=progress,
        )
    for what in ("skipped_empty", "cut_at_max_tokens"):
        for label, count in probe.counts[what].items():
            if count:
                say(f"  {label}: {count} traces {what.replace('_', ' ')}")
    probe.save(run.path("probe.safetensors"))
    return ["probe.safetensors"]


def _score(run: Run) -> list[str]:
    from .probe import Probe
    from .scoring import score

    scores = score(
        run.engine.model, Probe.load(run.path("probe.safetensors")), expert_tokens=run.recipe.probe.expert_tokens
    )
    if few := scores.provenance["experts_left_alone"]:
        say(f"  {len(few)} experts, reached by fewer than {run.recipe.probe.expert_tokens} tokens, are left alone")
    scores.save(run.path("scores.safetensors"))
    run.__dict__.pop("scores", None)
    return ["scores.safetensors"]


def _search(run: Run) -> list[str]:
    from .behaviours.safety import load_prompts
    from .search import candidates, run_trials

    data = run.recipe.data
    prompts = load_prompts(data.prompts, "validation", {str(k): n for k, n in data.validation.items()})
    tried = candidates(run.recipe)
    journal = run.path(f"search/journal-{run.keys['search']}.jsonl")
    journal.parent.mkdir(exist_ok=True)
    with showing(f"sweep of {len(tried) - 1} configurations") as progress:
        trials = run_trials(run.engine, run.scores, tried, prompts, run.recipe, journal, progress)
    write_jsonl(run.path("search/trials.jsonl"), ({k: v for k, v in t.items() if k != "texts"} for t in trials))
    return ["search/trials.jsonl"]


def _edit(run: Run) -> list[str]:
    from .search import choose, edit_of, require_choice

    trials = read_jsonl(run.path("search/trials.jsonl"))
    chosen = require_choice(trials, run.recipe)
    steered = choose(trials, "steering", run.recipe)
    edit_of(chosen, run.scores).save(run.path("edit.safetensors"))
    brief = (
        "id",
        "config",
        "refusal",
        "over_refusal",
        "over_refusal_borderline",
        "degenerate",
        "utility_loss",
        "nll_rise",
    )
    choice = {
        "rule": "highest refusal rate on validation within the limits; of equals the smallest utility loss",
        "limits": run.recipe.search.limits.model_dump(),
        "tried": {kind: sum(t["kind"] == kind for t in trials) for kind in ("steering", "edit")},
        "edit": {k: chosen[k] for k in brief},
        "steering": None if steered is None else {k: steered[k] for k in brief},
    }
    write_json(run.path("choice.json"), choice)
    other = steered["id"] if steered else "no steering strength within the limits"
    say(f"  chosen on validation: {chosen['id']}, {other}")
    return ["edit.safetensors", "choice.json"]


def _export(run: Run) -> list[str]:
    from .export.adapter import obstacle
    from .models import HUB_NAMES

    edit = Edit.load(run.path("edit.safetensors"))
    files: list[str] = []
    for old in ("adapter", "checkpoint"):
        remove(run.path(old))
    wanted: set[str] = set(run.recipe.exports)
    if "adapter" in wanted and (reason := obstacle(edit)):
        say(f"  PEFT cannot hold this edit ({reason}): a checkpoint is written in the adapter's place")
        wanted = {"checkpoint"}
    if "adapter" in wanted:
        folder = edit.save_adapter(
            run.path("adapter"), base=HUB_NAMES.get(run.recipe.model.name, run.recipe.model.name)
        )
        files += [f"adapter/{file.name}" for file in sorted(folder.iterdir())]
        if any(site.site.expert is not None for site in edit.edited().values()):
            say("  the experts' edits are LoRAs of fused parameters (target_parameters); PEFT mixes none in a batch")
    if "checkpoint" in wanted:
        from .export.checkpoint import export_checkpoint
        from .models import local_folder

        export_checkpoint(local_folder(run.recipe.model.name, run.recipe.model.revision), edit, run.path("checkpoint"))
        here = sorted(run.path("checkpoint").iterdir())
        files += [f"checkpoint/{f.name}" for f in here if f.is_file() and f.name != CARD]
    return files


def _evaluate(run: Run) -> list[str]:
    from .behaviours.safety import load_prompts
    from .evaluate import interval, paired_difference
    from .search import BASE, Candidate, run_trials

    data, plan, seed = run.recipe.data, run.recipe.evaluation, run.recipe.seed
    choice = read_json(run.path("choice.json"))
    tried = [BASE]
    tried += [Candidate(choice[k]["id"], k, choice[k]["config"]) for k in ("steering", "edit") if choice[k]]
    prompts = load_prompts(data.prompts, "test", {str(k): n for k, n in data.test.items()})
    journal = run.path(f"evaluation/journal-{run.keys['evaluate']}.jsonl")
    journal.parent.mkdir(exist_ok=True)
    with showing("test") as progress:
        rows = run_trials(run.engine, run.scores, tried, prompts, run.recipe, journal, progress)
    systems = {}
    for row in rows:
        flags = row["flags"]
        systems[row["kind"]] = {
            "id": row["id"],
            "refusal": interval(flags["harmful"], plan.resamples, seed),
            "over_refusal": interval(flags.get("benign", []), plan.resamples, seed),
            "over_refusal_borderline": interval(flags.get("borderline", []), plan.resamples, seed),
            "degenerate": interval(flags["degenerate"], plan.resamples, seed),
            "nll_rise": interval(row["losses"]["nll_rise"], plan.resamples, seed),
            "utility_loss": interval(row["losses"]["kl"], plan.resamples, seed),
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
        "agreement": _agreement(run, prompts[0].text),
    }
    write_json(run.path("evaluation/results.json"), result)
    answers = (
        {"prompt": p.text, "kind": p.kind} | {row["kind"]: row["texts"][i] for row in rows}
        for i, p in enumerate(prompts)
    )
    write_jsonl(run.path("evaluation/answers.jsonl"), answers)
    return ["evaluation/results.json", "evaluation/answers.jsonl"]


def _agreement(run: Run, prompt: str) -> dict[str, Any]:
    """Largest difference of logits between the edit as an intervention and baked into the weights, on one prompt.

    Not measured, and said so, where the weights cannot be written: quantised or offloaded ones.
    """
    import torch

    from .behaviours.safety import messages
    from .errors import ModelError

    edit, engine = Edit.load(run.path("edit.safetensors")), run.engine
    ids = torch.tensor([engine.tokens(messages(prompt, run.recipe.behaviour.system))], device=engine.device)
    with torch.inference_mode():
        with edit.applied(engine.model):
            hooked = engine.model(ids).logits.float()
        try:
            report = edit.apply(engine.model)
        except ModelError as error:  # the intervention has just run, so that it is the edit's base
            return {"not_measured": str(error)}
        baked = engine.model(ids).logits.float()
        edit.revert(engine.model)
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
    for kind in ("adapter", "checkpoint"):
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
    "export": _export,
    "evaluate": _evaluate,
    "report": _report,
}


def run_all(run: Run) -> None:
    """Every stage that is not whole yet, and all after it."""
    _prepare(run)
    fresh = False
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
