"""The guided command from the first question to the menu. The run directory's recipe is the record of every answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Interrupted, RecipeError, Steer2EditError
from ..models.load import load_config
from ..pipeline.exports import check_exports
from ..pipeline.keys import ORDER
from ..pipeline.reporting import read_study
from ..pipeline.run import Run
from ..pipeline.stages import run_all
from ..pipeline.tasks import check_tasks
from ..progress import say, showing
from ..recipe import Recipe, load_recipe, overridden, refuse_code
from ..searching.choice import chosen_edit, picked
from .change import Change, asked_change, going_on, is_run, place_of, recipe_of, with_keys
from .menu import Wishes, fulfil, show_menu, show_results
from .pick import RULE, ask_pick
from .questions import Questions, can_ask, know_arrow_keys
from .timing import about, interventions, measured, rounded, seconds_of
from .work import prompts_of, tried_of, work_of

# Stages in which the model works.
_ASK_THE_MODEL = ("traces", "probe", "score", "search", "evaluate")


@dataclass(frozen=True)
class Answers:
    """What the flags say; None is a question.

    Attributes:
        model: a Hub id, folder, file or embedded:…; or a run directory, whose run goes on.
        yes: take the default of every question that no flag answers.
        pick: "rule", a number on the front, or an edit's id.
    """

    model: str
    change: Change
    out: Path | None = None
    yes: bool = False
    pick: str | None = None
    wishes: Wishes = field(default_factory=Wishes)
    trust_code: bool = False


def guide(answers: Answers, ask: Questions | None = None) -> None:
    """Asks what the flags leave open, runs, lets the person pick, and offers what comes next.

    Args:
        ask: where the questions are put; by default the terminal, or nowhere if there is none.

    Raises:
        RecipeError: there is no terminal, and a flag is missing. Interrupted: the person stops.
    """
    answers.change.check()
    answers.wishes.check()
    if ask is None and can_ask():
        know_arrow_keys()
        ask = Questions()
    _refuse_silence(answers, ask)
    with _stopping(None):
        folder, recipe = _agreed(answers, ask)
    check_exports(recipe.exports)
    check_tasks(recipe)
    with _stopping(folder), contextlib.ExitStack() as stack:
        host = Run(folder, recipe).host
        stack.callback(host.close)
        run = Run(folder, recipe, host)
        if not _cost_is_accepted(run, answers, ask):
            say("Nothing was run.")
            return
        run = _ran(run, host, answers, ask)
    with _stopping(folder):
        show_results(run)
        fulfil(run, answers.wishes)
        if ask is not None and not answers.yes and not answers.wishes.are_some:
            show_menu(run, ask)


def _refuse_silence(answers: Answers, ask: Questions | None) -> None:
    """Raises RecipeError if a question would be left, and nobody can be asked."""
    if ask is not None or (answers.yes and (answers.change.is_complete or is_run(answers.model))):
        return
    raise RecipeError(
        "there is no terminal on which to ask what to change",
        got="input or messages that go elsewhere",
        fix="Give --recipe NAME, or --more TEXT and --less TEXT, and --yes; --pick, --save, --benchmark, --push and"
        " --chat answer what comes after.",
    )


@contextlib.contextmanager
def _stopping(folder: Path | None) -> Iterator[None]:
    """Turns Ctrl-C and the end of the input into one sentence.

    Args:
        folder: the run directory, if there is one yet.
    """
    try:
        yield
    except KeyboardInterrupt:
        if folder is None or not (folder / "recipe.yaml").is_file():
            raise Interrupted("nothing was written") from None
        raise Interrupted(f"`{going_on(folder)}` goes on from here") from None


# What to change ----------------------------------------------------------------------------------------------------


def _agreed(answers: Answers, ask: Questions | None) -> tuple[Path, Recipe]:
    """The run directory, and the recipe that is run there."""
    change = answers.change
    if is_run(answers.model):
        if change.recipe or change.more or change.less or answers.out:
            raise RecipeError(
                "a run has its recipe and its directory already",
                got=answers.model,
                fix="Give the run alone, or a model to begin another.",
            )
        folder, recipe = Path(answers.model), overridden(load_recipe(answers.model), change.overrides)
    else:
        _look_at(answers)
        recipe = _asked_recipe(answers, ask)
        folder, recipe = place_of(recipe, answers.out, change.overrides, ask)
    refuse_code(recipe, answers.trust_code)
    return folder, recipe


def _look_at(answers: Answers) -> None:
    """Raises ModelError if there is no such model, before anything is asked.

    Keys of the model section may say how its configuration is read: then it is read with the recipe.
    """
    if not any(override.startswith("model.") for override in answers.change.overrides):
        load_config(answers.model)


def _asked_recipe(answers: Answers, ask: Questions | None) -> Recipe:
    while True:
        change = asked_change(answers.change, ask)
        try:
            return recipe_of(change, answers.model)
        except Steer2EditError as error:
            if ask is None or answers.change.is_complete:
                raise
            ask.say(str(error))


# What it costs -----------------------------------------------------------------------------------------------------


def _cost_is_accepted(run: Run, answers: Answers, ask: Questions | None) -> bool:
    """Shows what will be done and what it takes here, and asks whether to go on."""
    waiting = [stage for stage in ORDER if not run.is_whole(stage)]
    if not waiting:
        return True
    tell = say if ask is None else ask.say
    for name, value in _plan(run, waiting).items():
        tell(f"{name:10}  {value}")
    if answers.yes or ask is None:
        return True
    return ask.yes("Go on")


def _plan(run: Run, waiting: list[str]) -> dict[str, str]:
    """What will be done, line by line: name → text."""
    recipe = run.recipe
    tried = tried_of(recipe.search, len(recipe.behaviour.asking()))
    others = tried.changed - tried.edits + tried.prompts
    lines = {
        "model": recipe.model.name,
        "change": f"{recipe.name}: {recipe.behaviour.attribute.title}",
        "search": f"up to {tried.edits} edits, and {others} candidates of other methods to compare them with",
        "directory": f"{run.folder}/",
    }
    if len(waiting) < len(ORDER):
        lines["left"] = ", ".join(waiting)
    if any(stage in _ASK_THE_MODEL for stage in waiting):
        lines |= _cost(run, waiting)
    return lines


def _cost(run: Run, waiting: list[str]) -> dict[str, str]:
    """Tokens and time, from a short timing of the model; the model stays loaded."""
    recipe, engine = run.recipe, run.engine
    prompts = prompts_of(engine, run.items("validation"), recipe.behaviour.system)
    with showing("timing") as progress:
        speed = measured(engine, prompts, interventions(engine, recipe), recipe, progress)
    work = work_of(run, engine)
    seconds = seconds_of(work, speed, waiting)
    written = sum(part.written for part in work)
    read = sum(part.read + part.compared + part.passed for part in work)
    longest = sorted((stage for stage in seconds if seconds[stage] >= 20), key=lambda stage: -seconds[stage])[:3]
    parts = ", ".join(f"{stage} {about(seconds[stage]).removeprefix('about ')}" for stage in longest)
    tasks = ", without the utility tasks" if recipe.data.utility or recipe.data.attacks else ""
    return {
        "tokens": f"up to {rounded(written)} to write, about {rounded(read)} to read{tasks}",
        "time": f"{about(sum(seconds.values()))} on this machine{f' ({parts})' if parts else ''}",
    }


# The run -----------------------------------------------------------------------------------------------------------


def _ran(run: Run, host: Any, answers: Answers, ask: Questions | None) -> Run:
    """The run with every stage done: up to the search, then the choice, then what follows from it."""
    if answers.pick is not None or not run.is_whole("edit"):
        run_all(run, until="search")
        pick = _pick(run, answers, ask)
        if pick != run.recipe.search.pick:
            run = Run(run.folder, with_keys(run.recipe, search__pick=pick), host)
    run_all(run)
    return run


def _pick(run: Run, answers: Answers, ask: Questions | None) -> int | str | None:
    """The value for the recipe's `search.pick`; None leaves the choice to the rule."""
    if answers.pick == RULE:
        return None
    if answers.pick is not None:
        trials, aim = read_study(run).trials, run.recipe.aim
        of_person, of_rule = picked(trials, aim, answers.pick), chosen_edit(trials, aim, None)
        same = of_rule is not None and of_rule.candidate.id == of_person.candidate.id
        return None if same else of_person.candidate.id
    if ask is None or answers.yes or run.recipe.search.pick is not None:
        return run.recipe.search.pick
    return ask_pick(run, ask)
