"""Judging a run's journalled answers again, without a model: after the detector of a behaviour has become better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..behaviours.base import Split
from ..errors import FileError
from ..files.reading import read_json, read_jsonl
from ..files.writing import write_json
from ..recipe import Recipe, load_recipe, refuse_code
from ..searching.bench import Bench
from ..searching.candidates import Candidate, Trial
from ..searching.choice import chosen_edit
from ..searching.rounds import run_study
from .names import CHOICE, DISCARDED, RESULTS, STUDY, TRIALS
from .results import results_of
from .run import Run
from .stages import chosen_of
from .tasks import judged_again
from .trained import rounds_on_test

JUDGED = "judged.json"


def judge(folder: str | Path, trust_code: bool = False) -> dict[str, Any]:
    """Judges what the run's systems answered on validation and on test, and writes `judged.json` beside the results.

    Nothing else of the run is changed, and nothing is generated.

    Args:
        trust_code: run the Python file that the recipe's score names.

    Returns:
        choice: which edit the rule takes, or a person picked, by the old judgement and by the new one; None if none is
        within the limits.
        changed: id → measure → [old mean, new mean] of the validation trials whose judgement differs. before, after:
        results on test, as in results.json.

    Raises:
        FileError: the folder is no finished run, or its journals do not hold the answers.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file() or not (folder / RESULTS).is_file():
        raise FileError("this is no finished run", got=folder, fix="Give a run directory with evaluation/results.json.")
    recipe = load_recipe(folder / "recipe.yaml")
    refuse_code(recipe, trust_code, loads_model=False)
    run = Run(folder, recipe)
    bench = run.bench("validation", _journal(run, "validation"), None)
    after = _on_validation(run, recipe, bench)
    choice, before = read_json(run.path(CHOICE)), read_json(run.path(RESULTS))
    results = results_of(_on_test(run, choice), recipe)
    judged_again(run, chosen_of(choice), before, results)
    chosen = chosen_edit(after, recipe.aim, recipe.search.pick)
    judged = {
        "choice": {"old": choice["edit"]["id"], "new": None if chosen is None else chosen.candidate.id},
        "changed": _changed(read_jsonl(run.path(TRIALS)), after),
        "before": before,
        "after": results,
    }
    write_json(run.path(JUDGED), judged)
    return judged


def _on_validation(run: Run, recipe: Recipe, bench: Bench) -> list[Trial]:
    """The trials that the run had, round by round: another judgement would propose others, which nobody answered."""
    rounds = read_json(run.path(STUDY)).get("rounds")
    if not rounds:  # an older run does not hold them
        return run_study(bench, recipe.search, recipe.aim, recipe.seed).trials
    rows = [*read_jsonl(run.path(TRIALS)), *read_jsonl(run.path(DISCARDED))]
    by_id = {row["id"]: Candidate(row["id"], row["kind"], row["config"]) for row in rows}
    thrown_out = {row["id"] for row in read_jsonl(run.path(DISCARDED))}
    trials = [trial for name, ids in rounds.items() for trial in bench.run([by_id[id] for id in ids], name)]
    return [trial for trial in trials if trial.candidate.id not in thrown_out]


def _on_test(run: Run, choice: dict[str, Any]) -> list[Trial]:
    bench = run.bench("test", _journal(run, "test"), None)
    trials = bench.run(chosen_of(choice), "test")
    for name, candidates in rounds_on_test(run, bench).items():
        trials += bench.run(candidates, name)
    return trials


def _journal(run: Run, split: Split) -> Path:
    """The journal of this recipe; of a run that an older version made, the only one that is there."""
    path = run.journal(split)
    others = sorted(path.parent.glob("journal-*.jsonl"))
    if path.is_file() or len(others) != 1:
        return path
    return others[0]


def _changed(before: list[dict[str, Any]], after: list[Trial]) -> dict[str, dict[str, list[float | None]]]:
    """Args: before: the rows of trials.jsonl, whose means stand beside the values."""
    old = {row["id"]: row for row in before}
    changed: dict[str, dict[str, list[float | None]]] = {}
    for trial in after:
        row = old.get(trial.candidate.id, {})
        moved = {name: [row.get(name), mean] for name, mean in trial.means().items() if row.get(name) != mean}
        if moved:
            changed[trial.candidate.id] = moved
    return changed
