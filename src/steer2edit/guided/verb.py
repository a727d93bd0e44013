"""The verb `guided`, which `steer2edit MODEL` stands for; heavy imports stand inside the functions."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..pipeline.options import Quiet, TrustCode
from ..progress import be_quiet

_VERB = "guided"


def names_a_model(word: str) -> bool:
    """Whether a first word that is no verb is meant as a model: a folder, a file, OWNER/NAME, or embedded:NAME."""
    return word.startswith("embedded:") or "/" in word or word.endswith(".gguf") or os.path.isdir(word)


class VerbOrModel(TyperGroup):
    """`steer2edit MODEL …` is `steer2edit guided MODEL …`; a verb comes first where a word is both."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word = args[0]
        if word not in self.commands:
            if names_a_model(word):
                args = [_VERB, *args]
            elif not get_close_matches(word, self.commands):
                ctx.fail(
                    f"No such command {word!r}. A model is a folder, a .gguf file, OWNER/NAME on the Hub or"
                    f" embedded:NAME; any other name stands behind `steer2edit {_VERB}`."
                )
        return super().resolve_command(ctx, args)


def register(app: typer.Typer) -> None:
    """Adds the verb to the command line."""
    app.command(name=_VERB)(guided)


def guided(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|RUN", help="Hub id, folder, .gguf file or embedded:…; or a run to go on with."),
    ],
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="What to change: a shipped recipe's name, or a recipe file.")
    ] = None,
    more: Annotated[str | None, typer.Option(help="Or what to show: an instruction, or a .jsonl file.")] = None,
    less: Annotated[str | None, typer.Option(help="And what not to show: an instruction, or a .jsonl file.")] = None,
    title: Annotated[str | None, typer.Option(help="With --more: what it is called in tables.")] = None,
    prompts: Annotated[str | None, typer.Option(help="With --more: a .jsonl file with prompts.")] = None,
    score: Annotated[str | None, typer.Option(help="With --more: how it is measured, {phrases: [ahoy]}.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A recipe key to override; may be given again: seed=1.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run directory; runs/RECIPE-MODEL by default.")] = None,
    yes: Annotated[
        bool,
        typer.Option("--yes", help="Take the default of every question that no option answers, and skip the menu."),
    ] = False,
    pick: Annotated[
        str | None, typer.Option(help="The edit to take: a number on the front, an edit's id, or rule.")
    ] = None,
    save: Annotated[
        list[str] | None, typer.Option("--save", help="Save as adapter, checkpoint, gguf or edit; may be given again.")
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Where a single --save goes; in the run by default.")] = None,
    benchmark: Annotated[str | None, typer.Option(help="Utility tasks: gsm8k,arc_easy, or any of lm-eval's.")] = None,
    sets: Annotated[str | None, typer.Option("--sets", help="With --benchmark: a folder of sets, not the Hub.")] = None,
    items: Annotated[
        int | None, typer.Option(help="With --benchmark: at most this many questions each.", min=1)
    ] = None,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Push it to the Hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: a new repository is private.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Talk to it at the end.")] = False,
    trust_recipe_code: TrustCode = False,
    quiet: Quiet = False,
) -> None:
    """Ask what to change, say what it costs, run, let you pick, and offer what comes next.

    `steer2edit MODEL` is short for it. Every question has an option. The recipe in the run directory is the record of
    the answers.
    """
    be_quiet(quiet)
    from .change import Change
    from .flow import Answers, guide
    from .menu import Wishes

    guide(
        Answers(
            model,
            Change(recipe, more, less, title, prompts, score, tuple(overrides or ())),
            out,
            yes,
            pick,
            Wishes(tuple(save or ()), to, benchmark, sets, items, push, private, chat),
            trust_recipe_code,
        )
    )
