"""What can be done with a finished run: chat, save, push, benchmark, report. Each as a question, and as a flag."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..edits import load_any
from ..errors import FileError, RecipeError, Steer2EditError
from ..files.reading import read_json
from ..pipeline.apply import KINDS, write
from ..pipeline.exports import EXPORTS, SUMMARY
from ..pipeline.names import ANSWERS, EDIT
from ..pipeline.options import console
from ..pipeline.run import Run
from ..pipeline.share import push, write_share
from ..pipeline.stages import load_results, run_all
from ..recipe import Recipe, load_recipe, task_overrides
from ..report.html.render import PAGE
from ..report.page import print_run
from ..tasks.known import TASKS
from .change import with_keys
from .questions import Questions

QUIT = "quit"
_CHOICES = {
    "chat": "talk to the edited model, beside the original one",
    "save": "as an adapter, a checkpoint, a GGUF adapter or an edit file",
    "push": "to the Hub, with its card and its recipe",
    "benchmark": "utility tasks: what the edit costs on known test sets",
    "report": "the results again, and where the page is",
    QUIT: "",
}
# The name of one thing to save, where it is a file and not a folder.
_FILES = {"gguf": "adapter.gguf", "gguf-model": "edited.gguf", "edit": EDIT}


@dataclass(frozen=True)
class Wishes:
    """What flags ask for, in the order in which it is done.

    Attributes:
        save: kinds; `to` is where a single one goes. benchmark: names of tasks, with commas; `sets` is a folder of
            their sets, `items` how many questions of each. push: a repository. chat: talk to it.
    """

    save: Sequence[str] = field(default_factory=tuple)
    to: Path | None = None
    benchmark: str | None = None
    sets: str | None = None
    items: int | None = None
    push: str | None = None
    private: bool = False
    chat: bool = False

    @property
    def are_some(self) -> bool:
        return bool(self.save or self.benchmark or self.push or self.chat)

    def check(self) -> None:
        """Raises RecipeError for a kind that is none, and for a place without one thing to put there."""
        for kind in self.save:
            if kind not in KINDS:
                raise RecipeError("an edit cannot be saved as that", got=kind, fix=f"Use one of {', '.join(KINDS)}.")
        if self.to is not None and len(self.save) != 1:
            got = f"--to {self.to} with {len(self.save)} --save"
            raise RecipeError("--to is where one thing is saved", got=got, fix="Give --save once.")
        if self.items is not None and self.benchmark is None:
            raise RecipeError("--items says how many questions", got="no --benchmark", fix="Name tasks, too.")


def fulfil(run: Run, wishes: Wishes) -> None:
    """Does what the flags ask for. Raises Steer2EditError for the first thing that cannot be done."""
    for kind in wishes.save:
        print(save(run.folder, kind, wishes.to))
    if wishes.benchmark is not None:
        benchmark(run.folder, wishes.benchmark, wishes.sets, wishes.items)
        show_results(run)
    if wishes.push is not None:
        print(push(run.folder, wishes.push, None, wishes.private))
    if wishes.chat:
        chat(run.folder)


def show_menu(run: Run, ask: Questions) -> None:
    """Until the person quits. A mistake is one sentence, and the menu comes back."""
    actions: dict[str, Callable[[Path, Questions], None]] = {
        "chat": lambda folder, _: chat(folder),
        "save": _ask_save,
        "push": _ask_push,
        "benchmark": _ask_benchmark,
        "report": lambda folder, _: show_results(Run(folder, load_recipe(folder))),
    }
    while True:
        ask.say()
        taken = ask.one_of("What now", _CHOICES, QUIT)
        if taken == QUIT:
            return
        try:
            actions[taken](run.folder, ask)
        except Steer2EditError as error:
            ask.say(str(error))


def show_results(run: Run) -> None:
    """The results of the test, and where the page is."""
    print_run(console(), load_results(run.folder), run.path(ANSWERS))
    print(f"Report, figures, edit and adapter: {run.folder}/, the page is {run.path(PAGE)}")


# Save --------------------------------------------------------------------------------------------------------------


def _ask_save(folder: Path, ask: Questions) -> None:
    kind = ask.one_of("Save as", dict.fromkeys(KINDS, ""), "adapter")
    place = Path(ask.text("Where to", str(own_place(folder, kind)))).expanduser()
    ask.say(f"Saved: {save(folder, kind, place)}")


def own_place(folder: Path, kind: str) -> Path:
    """Where a run itself has what is saved."""
    if kind in ("edit", "gguf-model"):
        return folder / _FILES[kind]
    return folder / kind / _FILES[kind] if kind in _FILES else folder / kind


def save(folder: Path, kind: str, to: Path | None = None) -> Path:
    """Writes a finished run's edit for other tools; gives where it is.

    In the run's own place it is an export of the recipe, with a card, and the recipe says so. Elsewhere, and of a kind
    that a recipe does not export, it is what `steer2edit apply` writes.

    Raises:
        Steer2EditError: it cannot be written.
    """
    own = own_place(folder, kind)
    if to is not None and to.resolve() != own.resolve():
        write(load_any(folder / EDIT), kind, to, load_recipe(folder).model.name)
        return to
    if kind == "edit":
        return own
    recipe = load_recipe(folder)
    if kind not in EXPORTS:
        write(load_any(folder / EDIT), kind, own, recipe.model.name)
        return own
    exports = recipe.exports if kind in recipe.exports else [*recipe.exports, kind]
    with _or_as_before(folder, recipe):
        run_all(Run(folder, with_keys(recipe, exports=exports)))
        if not own.exists():
            reason = read_json(folder / SUMMARY).get(kind, {}).get("not_written", "nothing")
            raise FileError(f"the {kind} was not written", got=reason, fix="Save it as something else.")
    return own


@contextlib.contextmanager
def _or_as_before(folder: Path, recipe: Recipe) -> Iterator[None]:
    """Makes the run whole again with its recipe, if what was added to it cannot be done."""
    try:
        yield
    except Steer2EditError:
        with contextlib.suppress(Steer2EditError):
            run_all(Run(folder, recipe))
        raise


# Push --------------------------------------------------------------------------------------------------------------


def _ask_push(folder: Path, ask: Questions) -> None:
    repository = ask.text("Repository, as owner/name, or a new folder that only gets what would be pushed")
    if repository.startswith((".", "/", "~")):
        ask.say(f"Written: {write_share(folder, Path(repository).expanduser())}")
        return
    private = ask.yes("Private, if it is new")
    ask.say(push(folder, repository, None, private))


# Benchmark ---------------------------------------------------------------------------------------------------------


def _ask_benchmark(folder: Path, ask: Questions) -> None:
    tasks = ask.text(f"Tasks, with commas between them ({', '.join(TASKS)}, or any of lm-eval's)")
    sets = ask.text("A folder of their sets, or hub", "hub")

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise RecipeError("that is no number of questions", got=text, fix="Write 1 or more.")
        return int(text)

    items = ask.checked("At most how many questions of each", number, "100")
    benchmark(folder, tasks, None if sets == "hub" else sets, items)
    show_results(Run(folder, load_recipe(folder)))


def benchmark(folder: Path, tasks: str, sets: str | None, items: int | None) -> None:
    """Measures utility tasks on what a finished run has chosen; they join those that its recipe has.

    Raises:
        Steer2EditError: a task or its set is not there, or was not measured.
    """
    before = load_recipe(folder)
    with _or_as_before(folder, before):
        run_all(Run(folder, load_recipe(folder, task_overrides(folder, tasks, sets, items))))


def chat(folder: Path) -> None:
    """The chat on this terminal, with the run's edit."""
    from ..serving.verbs import chat as talk

    # Whoever ran the recipe has agreed to its code.
    talk([str(folder)], trust_remote_code=load_recipe(folder).model.trust_remote_code)
