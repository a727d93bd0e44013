"""What the report is made from: a run directory, whole or not, as the page wants it."""

from __future__ import annotations

from typing import Any

from ..edits import Edit, Scores
from ..files.reading import read_json, read_jsonl
from ..progress import say
from ..report.html.contents import Contents, StageState, State
from ..report.html.render import PAGE, write_page
from ..searching.candidates import Trial
from ..searching.study import Discarded, Study
from .keys import stages_of
from .names import ANSWERS, CHOICE, DISCARDED, EDIT, RESULTS, SCORES, STUDY, TRIALS, TRIED_ANSWERS
from .run import Run
from .trained import tried_answers, with_training


def read_study(run: Run) -> Study:
    """What the stage search wrote."""
    trials = [Trial.from_json(row) for row in read_jsonl(run.path(TRIALS))]
    discarded = [Discarded.from_json(row) for row in read_jsonl(run.path(DISCARDED))]
    return Study(trials, discarded, **read_json(run.path(STUDY)))


def contents_of(run: Run) -> Contents:
    """What a run directory holds of this recipe. Nothing is read of a stage that is not whole."""
    stages = [
        StageState(name, _state(run, name), run.entry(name) or {}) for name in stages_of(run.recipe) if name != "report"
    ]
    whole = {stage.name for stage in stages if stage.state == "whole"}
    shown: dict[str, Any] = {}
    if "search" in whole:
        shown["study"] = read_study(run)
        if run.path(TRIED_ANSWERS).is_file():  # an older run does not have them
            shown["tried_answers"] = read_jsonl(run.path(TRIED_ANSWERS))
    if "edit" in whole:
        shown |= {"choice": read_json(run.path(CHOICE)), "edit": Edit.load(run.path(EDIT))}
    if "train" in whole and {"study", "choice"} <= set(shown):
        shown["choice"], shown["study"] = with_training(run, shown["choice"], shown["study"])
        shown["tried_answers"] = tried_answers(run, shown.get("tried_answers", []))
    if "edit" not in whole and "score" in whole:
        shown["scores"] = Scores.load(run.path(SCORES))
    if "evaluate" in whole:
        shown |= {"results": read_json(run.path(RESULTS)), "answers": read_jsonl(run.path(ANSWERS))}
    return Contents(run.recipe, run.manifest(), stages, **shown)


def _state(run: Run, stage: str) -> State:
    entry = run.entry(stage)
    if entry is None:
        return "missing"
    if entry["key"] != run.keys[stage]:
        return "stale"
    return "whole" if run.is_whole(stage) else "changed"


def write_what_is_there(run: Run) -> None:
    """The page of a run that is not finished, beside whatever it has."""
    contents = contents_of(run)
    write_page(contents, run.path(PAGE))
    missing = ", ".join(stage.name for stage in contents.unfinished)
    say(f"  {run.path(PAGE)} shows what is there" + (f"; missing: {missing}" if missing else ""))
