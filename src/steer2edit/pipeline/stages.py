"""The stages in order: recipe → traces → probe → scores → search → edit → export → evaluate → report.

Each stage reads files of the run directory and writes files there, so that it can be run alone, and a killed run goes
on from its last whole stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..behaviours.base import WEAK_AGREEMENT
from ..edits import Edit
from ..engines.plan import load_tokenizer
from ..errors import FileError, ModelError, Steer2EditError, TaskError
from ..files.reading import read_json, read_jsonl, sha256
from ..files.writing import write_json, write_jsonl, write_text
from ..method.firing import firing
from ..method.rivals import RIVALS
from ..method.variants import FULL
from ..probing.collect import probe_of
from ..probing.plan import plan_pass
from ..probing.probe import Probe
from ..probing.rivals import rival_edit
from ..probing.score import score
from ..probing.traces import read_traces, write_traces
from ..progress import say, showing
from ..report.card import model_card
from ..report.figures import each_measure, heat_map, trade_off
from ..report.html.render import PAGE, write_page
from ..report.inspection import MANIFEST
from ..report.live import live_screen, watching
from ..report.page import markdown
from ..searching.bench import Bench
from ..searching.candidates import BASE, BASELINES, TITLES, Candidate, edit_of, of_kind
from ..searching.choice import brief, by_block, moved, picked, require_choice, summary
from ..searching.front import choose
from ..searching.own_answers import Journalled
from ..searching.rounds import run_study
from .answers import answers_on_test, answers_on_validation
from .exports import CARD, EXPORTS, SUMMARY, check_exports, export
from .keys import ORDER, rival_files, score_files, stages_of
from .names import (
    ANSWERS,
    CHOICE,
    DISCARDED,
    EDIT,
    OWN_TRACES,
    PROBE,
    RESULTS,
    SCORES,
    STUDY,
    TRACES,
    TRAINED_CHOICE,
    TRIALS,
    TRIED_ANSWERS,
)
from .reporting import contents_of, read_study, write_what_is_there
from .results import results_of
from .run import Run
from .tasks import check_tasks, measure_tasks
from .trained import engine_on_test, rounds_on_test, with_training
from .training import check_training, require_training, train_stage


def _traces(run: Run) -> list[str]:
    if _put_by_hand(run):
        traces = read_traces(run.path(TRACES))
        labels = [trace.label for trace in traces]
        count = f"{labels.count('positive')} positive, {labels.count('negative')} negative"
        say(f"  {TRACES} was put there by hand and is taken as it is: {count}")
        run.notes["by_hand"] = True
        return [TRACES]
    _keep_changed(run)
    if (given := run.recipe.behaviour.traces) is not None:
        write_traces(run.path(TRACES), read_traces(given))
        write_traces(run.path(OWN_TRACES), read_traces(given))
        return [TRACES]
    # Before the model is loaded: a mistake in the files that the recipe names shows at once.
    items = run.items("probe")
    engine = run.engine  # first: only a model that is loaded has its commit in the cache
    model = "" if run.commit is None else f"-{run.commit[:12]}"
    path = run.path(f"traces/journal-{run.keys['traces']}{model}.jsonl")
    path.parent.mkdir(exist_ok=True)
    with showing("own answers") as progress:
        traces = run.recipe.behaviour.make_traces(Journalled(engine, path), items, progress)
    # The copy is there first, so that after a kill these traces are known not to have been put here by hand.
    write_traces(run.path(OWN_TRACES), traces)
    write_traces(run.path(TRACES), traces)
    return [TRACES]


def _put_by_hand(run: Run) -> bool:
    """Whether the traces were put into the run directory, and not made by the stage."""
    path, own, entry = run.path(TRACES), run.path(OWN_TRACES), run.entry("traces")
    if not path.is_file():
        return False
    if entry is None:
        return not (own.is_file() and sha256(own) == sha256(path))
    return entry.get("by_hand", False)


def _keep_changed(run: Run) -> None:
    """Keeps, under another name, traces that are not as the stage wrote them, before it makes them again."""
    entry, path = run.entry("traces"), run.path(TRACES)
    if entry is not None and path.is_file() and entry["files"].get(TRACES) != sha256(path):
        kept = path.with_name("traces.changed.jsonl")
        path.replace(kept)
        say(f"  {TRACES} was changed after it was written: it is made again, the changed file is now {kept.name}")


def _probe(run: Run) -> list[str]:
    p, model = run.recipe.probe, run.recipe.model
    traces = read_traces(run.path(TRACES))
    plan = plan_pass(
        load_tokenizer(model),
        traces,
        chat=model.chat,
        part=p.part,
        positions=p.positions,
        max_tokens=p.max_tokens,
        preserve=run.recipe.preserved,
    )
    with showing("probe") as progress:
        sums = run.host.run_pass(plan, p.batch_tokens, progress)
        probe = probe_of(plan, sums, {"batch_tokens": p.batch_tokens})
    for what in ("skipped_empty", "cut_at_max_tokens"):
        for label, count in probe.counts[what].items():
            if count:
                say(f"  {label}: {count} traces {what.replace('_', ' ')}")
    agree = {block: cosine for block, cosine in probe.provenance["halves_agree"].items() if cosine is not None}
    if agree:
        shown = ", ".join(f"{block} {cosine:.2f}" for block, cosine in agree.items())
        say(f"  the vectors of two halves of the traces agree: cosine {shown}")
        if max(agree.values()) < WEAK_AGREEMENT:
            say("  that is hardly more than chance: the two sides of the traces differ too little, or are too few")
        run.recipe.behaviour.check_contrast(max(agree.values()))
    probe.save(run.path(PROBE))
    return [PROBE]


def _score(run: Run) -> list[str]:
    probe = Probe.load(run.path(PROBE))
    wanted = score_files(run.recipe)
    few = run.recipe.probe.expert_tokens
    for variant, file in wanted.items():
        scores = run.host.call(partial(score, probe=probe, expert_tokens=few, variant=variant))
        scores.save(run.path(file))
    if alone := scores.provenance["experts_left_alone"]:
        say(f"  {len(alone)} experts, reached by fewer than {few} tokens, are left alone")
    for name in ("scores", "probe", "rivals"):
        run.__dict__.pop(name, None)
    rivals = rival_files(run.recipe)
    for rival, file in rivals.items():
        run.host.call(partial(rival_edit, probe=probe, scores=run.scores[FULL], name=rival)).save(run.path(file))
    return [*wanted.values(), *rivals.values()]


def _search(run: Run) -> list[str]:
    recipe = run.recipe
    bench = run.bench("validation", run.journal("validation"), run.engine)
    with watching(recipe.behaviour.measures, recipe.aim) as (progress, on_round):
        study = run_study(bench, recipe.search, recipe.aim, recipe.seed, progress, on_round)
    _say_empty(bench)
    for row in study.discarded:
        say(f"  discarded: {row.candidate.id}, {row.why}")
    write_jsonl(run.path(TRIALS), (trial.to_json() for trial in study.trials))
    write_jsonl(run.path(DISCARDED), (row.to_json() for row in study.discarded))
    written = {"evaluations": study.evaluations, "refined": study.refined, "rounds": study.rounds, "scale": study.scale}
    write_json(run.path(STUDY), written)
    write_jsonl(run.path(TRIED_ANSWERS), answers_on_validation(bench, study))
    return [TRIALS, DISCARDED, STUDY, TRIED_ANSWERS]


def _say_empty(bench: Bench) -> None:
    if bench.empty:
        say(
            f"  {bench.empty} neutral prompts have an empty answer by the original model and are left out of the losses"
        )


def _edit(run: Run) -> list[str]:
    recipe, aim = run.recipe, run.recipe.aim
    study = read_study(run)
    pick = recipe.search.pick
    chosen = require_choice(study.trials, aim) if pick is None else picked(study.trials, aim, pick)
    compared = (*BASELINES, *RIVALS)
    others = {kind: choose(of_kind(study.trials, kind), aim) for kind in compared if study.of_kind(kind)}
    edit = edit_of(chosen.candidate.config, run.scores)
    edit.save(run.path(EDIT))
    if not edit.edited():
        say("  the chosen edit touches no component: every |g| is below the threshold ρα")
    base = of_kind(study.trials, "base")
    any_moved = not base or moved(chosen, base[0], aim)
    if not any_moved:
        say(f"  nothing moved: no edit within the limits has a better {aim.ranking.title} than the original model")
    shown = summary(study, aim, recipe.search.method, recipe.evaluation.resamples, recipe.seed)
    if blocks := by_block(study, aim, recipe.evaluation.resamples, recipe.seed):
        shown["by_block"] = blocks
    if (evidence := run.scores[FULL].evidence) is not None:
        shown["firing"] = [group.row() for group in firing(edit, evidence)]
    briefs = {kind: None if trial is None else brief(trial) for kind, trial in others.items()}
    shown |= {"steering": None, **briefs, "edit": brief(chosen), "moved": any_moved}
    if pick is not None:
        by_rule = choose(of_kind(study.trials, "edit"), aim)
        shown["picked"] = {"by_rule": None if by_rule is None else brief(by_rule), "missed": aim.missed(chosen)}
    write_json(run.path(CHOICE), shown)
    ids = [trial.candidate.id if trial else f"no {TITLES[kind]} within the limits" for kind, trial in others.items()]
    by = "" if pick is None else " (the edit was picked by a person)"
    say(f"  chosen on validation: {', '.join([chosen.candidate.id, *ids])}{by}")
    return [EDIT, CHOICE]


def _evaluate(run: Run) -> list[str]:
    recipe = run.recipe
    check_tasks(recipe)
    choice = read_json(run.path(CHOICE))
    tried = chosen_of(choice)
    bench = run.bench("test", run.journal("test"), engine_on_test(run))
    rounds = {"test": tried, **rounds_on_test(run, bench)}
    trials = []
    for name, candidates in rounds.items():
        with showing("test") as progress:
            trials += bench.run(candidates, name, progress)
    _say_empty(bench)
    results = results_of(trials, recipe)
    if "by_block" in choice:
        results["by_block"] = {"split": "validation", "rows": choice["by_block"]}
    failure = measure_tasks(run, tried, results)
    edit = Edit.load(run.path(EDIT))
    prompt = run.engine.tokens(bench.items[0].messages(recipe.behaviour.system))
    results["agreement"] = run.host.call(_agreement, edit, prompt)
    write_json(run.path(RESULTS), results)
    write_jsonl(run.path(ANSWERS), answers_on_test(bench, rounds))
    if failure is not None:  # what was measured is written; the stage is not whole
        raise TaskError(failure.what, got=failure.got, fix=failure.fix)
    return [RESULTS, ANSWERS]


def chosen_of(choice: Mapping[str, Any]) -> list[Candidate]:
    """The original model, and what a run's `choice.json` names of each method."""
    chosen = [(kind, choice[kind]) for kind in TITLES if choice.get(kind)]
    return [BASE, *(Candidate(row["id"], kind, row["config"]) for kind, row in chosen)]


def _agreement(model: Any, edit: Edit, prompt: Sequence[int]) -> dict[str, Any]:
    """Largest difference of logits between the edit as an intervention and baked into the weights, on one prompt.

    Not measured, which the result says, where the weights cannot be written: quantised or offloaded ones.
    """
    import torch

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
    run.path("figures").mkdir(exist_ok=True)
    choice, study = with_training(run, read_json(run.path(CHOICE)), read_study(run))
    results = read_json(run.path(RESULTS))
    edit = Edit.load(run.path(EDIT))
    plan = run.recipe.evaluation
    drawing = {"resamples": plan.resamples, "seed": run.recipe.seed, "samples": plan.samples}
    trials, measures = study.trials, run.recipe.behaviour.measures
    files = trade_off(trials, choice, measures, run.path("figures/trade_off"), **drawing)
    files += each_measure(results, run.path("figures/measures"))
    files += heat_map(edit, run.path("figures/lambda"))
    write_text(run.path("report.md"), markdown(run.recipe, choice, results, edit))
    # Also if a task failed, for which the test is not whole.
    write_page(replace(contents_of(run), results=results, answers=read_jsonl(run.path(ANSWERS))), run.path(PAGE))
    for kind in EXPORTS:
        if run.path(kind).is_dir():
            write_text(run.path(f"{kind}/{CARD}"), model_card(run.recipe, edit, choice, results, kind))
            files.append(run.path(f"{kind}/{CARD}"))
    return ["report.md", PAGE, *(str(file.relative_to(run.folder)) for file in files)]


@dataclass(frozen=True)
class Stage:
    """What a stage does, and which files of the stages before it reads."""

    work: Callable[[Run], list[str]]
    reads: tuple[str, ...] = ()


STAGES: dict[str, Stage] = {
    "traces": Stage(_traces),
    "probe": Stage(_probe, (TRACES,)),
    "score": Stage(_score, (PROBE,)),
    "search": Stage(_search, (SCORES,)),
    "edit": Stage(_edit, (TRIALS, DISCARDED, STUDY)),
    "export": Stage(export, (EDIT,)),
    "evaluate": Stage(_evaluate, (EDIT, TRAINED_CHOICE)),
    "report": Stage(_report, (EDIT, TRIALS, TRIED_ANSWERS, CHOICE, RESULTS, ANSWERS, SUMMARY, TRAINED_CHOICE)),
}
assert tuple(STAGES) == ORDER
# Only of a recipe that asks for it, see `stages_of`.
TRAIN = Stage(train_stage, (TRACES, TRIALS, DISCARDED, STUDY))


def run_all(run: Run, until: str = "report") -> None:
    """Every stage that is not whole. If the export or a task fails, what comes after it is made all the same.

    Args:
        until: the last stage that is run.

    Raises:
        FileError: an export or a task needs a package or a file that is not there, before anything is run.
    """
    check_exports(run.recipe.exports)
    check_tasks(run.recipe)
    if not run.is_whole("train"):
        check_training(run.recipe)
    failure: Steer2EditError | None = None
    stages = stages_of(run.recipe)
    with run.working(), live_screen(stages) as mark:
        for number, stage in enumerate(stages[: stages.index(until) + 1], start=1):
            if run.is_whole(stage):
                say(f"{number}/{len(stages)} {stage}: done before")
                mark(stage, "done")
                continue
            mark(stage, "running")
            try:
                no_export = _run_stage_or_no_export(run, stage)
                mark(stage, "failed" if no_export else "done")
                failure = no_export or failure
            except TaskError as error:  # which one was said when it failed
                mark(stage, "failed")
                failure = failure or error
            except Steer2EditError:
                mark(stage, "failed")
                write_what_is_there(run)
                raise
    if failure is not None:
        raise failure


def run_stage(run: Run, stage: str, recipe_name: str) -> None:
    """One stage, even if it is whole; what its journal holds is not made again.

    Raises:
        FileError: a stage before it is not whole.
    """
    _require_before(run, stage, recipe_name)
    stages = stages_of(run.recipe)
    with run.working(), live_screen(stages) as mark:
        for before in stages[: stages.index(stage)]:
            mark(before, "done" if run.is_whole(before) else "waiting")
        mark(stage, "running")
        _run_stage(run, stage)
        mark(stage, "done")


def run_training(run: Run, recipe_name: str) -> None:
    """Trains, and adds the chosen checkpoints to the results and the report of a run. Nothing else is made again.

    Raises:
        FileError: a stage before it is not whole, or a package is not installed.
        RecipeError: the recipe asks for no training, or its engine cannot try checkpoints.
    """
    require_training(run.recipe)
    _require_before(run, "train", recipe_name)
    failure: Steer2EditError | None = None
    with run.working():
        for stage in ("train", "export", "evaluate", "report"):
            if not run.is_whole(stage):
                failure = _run_stage_or_no_export(run, stage) or failure
    if failure is not None:
        raise failure


def _require_before(run: Run, stage: str, recipe_name: str) -> None:
    """Raises FileError if a stage that another one builds on is not whole."""
    order = stages_of(run.recipe)
    for before in order[: order.index(stage)]:
        needed = before not in ("export", "evaluate") or stage == "report"
        if needed and not run.is_whole(before) and not _hand_made(run, before, stage):
            if stage == "report" and run.path(MANIFEST).is_file():
                with run.working():
                    write_what_is_there(run)
            raise FileError(
                f"the stage {before} has not been run with this recipe",
                got=run.folder,
                fix=f"Run `steer2edit {before} {recipe_name}` first, or all with `steer2edit run {recipe_name}`.",
            )


def _hand_made(run: Run, before: str, stage: str) -> bool:
    """Whether traces were put into the run directory in place of the stage that makes them."""
    return before == "traces" and stage == "probe" and _put_by_hand(run)


def _run_stage_or_no_export(run: Run, stage: str) -> Steer2EditError | None:
    """As `_run_stage`. An export that fails is said and given back, since what comes after it needs none."""
    try:
        _run_stage(run, stage)
    except Steer2EditError as error:
        if stage != "export":
            raise
        say(f"  the export failed, the run goes on without it: {error}")
        return error
    return None


def _run_stage(run: Run, stage: str) -> None:
    stages = stages_of(run.recipe)
    say(f"{stages.index(stage) + 1}/{len(stages)} {stage}:")
    started = time.monotonic()
    todo = TRAIN if stage == "train" else STAGES[stage]
    with run.during(stage):
        files = todo.work(run)
    run.record(stage, time.monotonic() - started, files, todo.reads)


def load_results(folder: str | Path) -> Mapping[str, Any]:
    return read_json(Path(folder) / RESULTS)
