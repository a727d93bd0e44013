"""What to change in which model: the recipe that the answers make, and the run directory that it gets."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..behaviours.prompts import data_path
from ..errors import FileError, RecipeError
from ..pipeline.keys import stage_keys
from ..pipeline.make import made_recipe
from ..recipe import Recipe, load_recipe, overridden, parse_recipe, shipped_recipes
from .questions import Questions

# The choice beside the shipped recipes.
OWN = "own"
_RECIPE = "recipe.yaml"
# How much of an instruction is in the name of a run directory, in characters.
_NAME = 32


@dataclass(frozen=True)
class Change:
    """What should change, as flags say it; None is a question.

    Attributes:
        recipe: a shipped recipe's name, or a file. more, less: instructions, or files of responses.
        title, prompts, score: of two instructions or files, as `steer2edit make` takes them.
        overrides: keys of the recipe, `key.sub=value`.
    """

    recipe: str | None = None
    more: str | None = None
    less: str | None = None
    title: str | None = None
    prompts: str | None = None
    score: str | None = None
    overrides: Sequence[str] = field(default_factory=tuple)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to ask."""
        return self.recipe is not None or (self.more is not None and self.less is not None)

    def check(self) -> None:
        """Raises RecipeError for flags that cannot stand together."""
        of_sides = {"--more": self.more, "--less": self.less, "--title": self.title}
        of_sides |= {"--prompts": self.prompts, "--score": self.score}
        given = [name for name, value in of_sides.items() if value is not None]
        if self.recipe is not None and given:
            raise RecipeError(
                "a recipe says itself what to change",
                got=f"--recipe {self.recipe} with {', '.join(given)}",
                fix="Give --recipe, or --more and --less.",
            )


def is_run(place: str) -> bool:
    """Whether a name is a run directory. A model's folder that was pushed with its recipe is none."""
    return (Path(place) / _RECIPE).is_file() and not (Path(place) / "config.json").is_file()


def slug(text: str) -> str:
    """A text as a part of a folder's name.

    >>> slug("Answer like a pirate."), slug("Qwen/Qwen2.5-1.5B-Instruct"), slug("…")
    ('answer-like-a-pirate', 'qwen-qwen2.5-1.5b-instruct', 'run')
    """
    short = re.sub(r"[^a-z0-9._]+", "-", text.lower())[:_NAME].strip("-._")
    return short or "run"


def short_name(model: str) -> str:
    """A model's own name, without its owner, its folder or what stands before a colon.

    >>> short_name("embedded:smollm2-135m-instruct"), short_name("Qwen/Qwen3-0.6B"), short_name("models/a.gguf")
    ('smollm2-135m-instruct', 'Qwen3-0.6B', 'a.gguf')
    """
    return Path(model.rpartition(":")[2]).name or model


def asked_change(change: Change, ask: Questions | None) -> Change:
    """The change with every question answered.

    Args:
        ask: None where nobody can be asked: then the flags have said it all.
    """
    change.check()
    if change.is_complete or ask is None:
        return change
    more = change.more
    if more is None and change.less is None:
        ask.say("What should change? Take a recipe that ships, or describe a change of your own.")
        taken = ask.one_of("Number or name", {**_headlines(), OWN: "two instructions, or two files of responses"})
        if taken != OWN:
            of_recipe = replace(change, recipe=taken)
            of_recipe.check()
            return of_recipe
    if more is None:
        ask.say("What should the model do more? Write an instruction, such as: Answer like a pirate.")
        more = ask.text("More (or a .jsonl file of responses)")
    less = change.less
    if less is None:
        ask.say("And what in its place now? Such as: Answer plainly.")
        less = ask.text("Less (or a .jsonl file of responses)")
    return replace(change, more=more, less=less)


def _headlines() -> dict[str, str]:
    """Each shipped recipe with the line that it begins with."""
    return {name: text.splitlines()[0].lstrip("# ") for name, text in shipped_recipes().items()}


def recipe_of(change: Change, model: str) -> Recipe:
    """The recipe of a change in a model.

    A recipe's own model section holds for its own model alone: another model is loaded by the defaults.

    Raises:
        RecipeError, FileError: the recipe, a file or a key cannot be used.
    """
    if change.recipe is None:
        assert change.more is not None
        assert change.less is not None
        for named in (change.more, change.less, change.prompts):
            if named is not None and named.endswith(".jsonl"):
                data_path(named)  # a file that is not there is said now, and not by the first stage
        sides = {"title": change.title, "prompts": change.prompts, "score": change.score}
        recipe = made_recipe(model, change.more, change.less, name=slug(_own_name(change)), **sides)
        return overridden(recipe, change.overrides)
    recipe = load_recipe(change.recipe)
    raw: dict[str, Any] = recipe.model_dump(mode="json")
    if recipe.model.name != model:
        raw["model"] = {"name": model}
    return overridden(parse_recipe(raw), change.overrides)


def _own_name(change: Change) -> str:
    more = str(change.more)
    return change.title or (Path(more).stem if more.endswith(".jsonl") else more)


def folder_of(recipe: Recipe) -> Path:
    """The run directory of a recipe where nobody gave one."""
    return Path("runs") / f"{slug(recipe.name)}-{slug(short_name(recipe.model.name))}"


def begun(folder: Path, recipe: Recipe, overrides: Sequence[str]) -> Recipe | None:
    """The recipe asked for with what was picked, exported and measured in the run that the directory holds, if both are
    the same up to the end of the search; else None.
    """
    held = overridden(load_recipe(folder / _RECIPE), overrides)
    if stage_keys(held)["search"] != stage_keys(recipe)["search"]:
        return None
    asked, before = recipe.data, held.data
    return with_keys(
        recipe,
        exports=list(dict.fromkeys([*recipe.exports, *held.exports])),
        search__pick=held.search.pick if recipe.search.pick is None else recipe.search.pick,
        data__utility=list(dict.fromkeys([*asked.utility, *before.utility])),
        data__sets=asked.sets or before.sets,
        data__utility_items=asked.utility_items if asked.utility else before.utility_items,
        data__attacks={name: of.model_dump(mode="json") for name, of in (before.attacks | asked.attacks).items()},
        training=(recipe if recipe.training.methods else held).training.model_dump(mode="json"),
    )


def place_of(recipe: Recipe, out: Path | None, overrides: Sequence[str], ask: Questions | None) -> tuple[Path, Recipe]:
    """The run directory, and the recipe that is run there.

    Raises:
        FileError: the directory holds another run, and nobody can be asked for another one.
    """
    folder = out or folder_of(recipe)
    while (folder / _RECIPE).is_file():
        held = begun(folder, recipe, overrides)
        if held is not None:
            return folder, held
        if ask is None or out is not None:
            raise FileError(
                "the run directory holds another run",
                got=folder,
                fix=f"Give another --out, or go on with that run: {going_on(folder)}.",
            )
        ask.say(f"{folder} holds another run.")
        folder = Path(ask.text("Another run directory", str(_free(folder))))
    return folder, recipe


def going_on(folder: Path) -> str:
    """The command that goes on with a run. A word alone might be a verb.

    >>> going_on(Path("runs/a")), going_on(Path("demo"))
    ('steer2edit runs/a', 'steer2edit ./demo')
    """
    place = str(folder) if "/" in str(folder) else f"./{folder}"
    return f"steer2edit {shlex.quote(place)}"


def _free(folder: Path) -> Path:
    """A name beside the folder's that nothing has."""
    number = 2
    while folder.with_name(f"{folder.name}-{number}").exists():
        number += 1
    return folder.with_name(f"{folder.name}-{number}")


def with_keys(recipe: Recipe, **keys: Any) -> Recipe:
    """The recipe with keys of its sections in place of its own: `search__pick="edit-0.2-off-0.4"`."""
    return overridden(recipe, [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in keys.items()])
