"""The stages in order: recipe → traces → probe → scores → search → edit → export → evaluate → report.

Each stage reads files of the run directory and writes files there, so that it can be run alone, and a killed run goes
on from its last whole stage. The manifest holds for each stage a key of all that its result depends on; a stage whose
key and files still match is not run again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..edits import Edit
from ..errors import FileError
from ..files.reading import read_json, read_jsonl
from ..files.writing import clear_temporaries, write_json, write_jsonl, write_text
from ..progress import say, showing
from .exports import CARD, EXPORTS, export
from .keys import _score_files
from .run import Run


def _traces(run: Run) -> list[str]:
    from ..behaviours.safety import make_traces
    from ..probing.traces import write_traces

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
    from ..engines.plan import load_tokenizer
    from ..probing.collect import plan_pass, probe_of
    from ..probing.traces import read_traces

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
    from ..probing.probe import Probe
    from ..probing.score import score

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
    from ..report.live import watching
    from ..search.study import run_study

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
    from ..search.candidates import edit_of
    from ..search.front import choose
    from ..search.study import Study, require_choice, summary

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
    from ..search.candidates import BASE, Candidate
    from ..search.statistics import interval, paired_difference

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

    from ..errors import ModelError
    from ..models.weights import device_of

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
    from ..report.card import model_card
    from ..report.figures import heat_map, trade_off
    from ..report.page import markdown

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
