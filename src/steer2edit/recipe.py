"""The recipe: one YAML file is one reproducible run. This is its schema; `recipes/` holds the shipped ones."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field

from .behaviours.plan import Behaviour
from .engines.plan import EnginePlan, Model
from .errors import FileError, RecipeError
from .files.reading import read_text
from .files.schema import Count, Many, Section, parse
from .search.plan import Evaluation, Search


def _with_harmful(counts: dict[Any, int]) -> dict[Any, int]:
    if "harmful" not in counts:
        raise ValueError("The refusal rate needs harmful prompts")
    return counts


Judged = Annotated[dict[Literal["harmful", "benign", "borderline"], Many], AfterValidator(_with_harmful)]


class Questions(Section):
    """A small multiple-choice set whose accuracy is measured too: JSON Lines with `question`, `choices` and `answer`,
    the number of the right choice from 0 on. Validation takes the first ones, test those after."""

    file: str
    validation: Many = 50
    test: Many = 100


class Data(Section):
    """The prompts, and how many of each kind every split takes."""

    prompts: str = "builtin:safety"
    probe: dict[Literal["harmful", "benign"], Many] = {"harmful": 80, "benign": 80}
    validation: Judged
    test: Judged
    questions: Questions | None = None


class ProbePass(Section):
    """The pass over the traces."""

    positions: Literal["predicting", "response"] = "predicting"
    part: Literal["both", "thinking", "answer"] = "both"
    max_tokens: Many = 4096
    batch_tokens: Many = 1024
    expert_tokens: Count = 16


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[^./\\][^/\\]*$")]
    seed: Count = 0
    model: Model
    behaviour: Behaviour = Behaviour()
    data: Data
    probe: ProbePass = ProbePass()
    search: Search
    evaluation: Evaluation = Evaluation()
    engine: EnginePlan = EnginePlan()
    exports: list[Literal["adapter", "checkpoint", "gguf", "steering"]] = ["adapter"]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def shipped_recipes() -> dict[str, str]:
    """Name → YAML text of the recipes that come with the package."""
    folder = files("steer2edit") / "recipes"
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    }


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe file, or a shipped recipe by its name, with `key.sub=value` overrides (values are YAML).

    Raises:
        RecipeError: an unknown key (with the nearest known one), or a value that its key cannot take.
        FileError: no such file and no such recipe.
    """
    shipped = shipped_recipes()
    if str(name) in shipped and not Path(name).is_file():
        text = shipped[str(name)]
    elif Path(name).is_file():
        text = read_text(name)
    else:
        raise FileError("no such recipe", got=name, fix=f"Give a YAML file or a shipped recipe: {', '.join(shipped)}.")
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not YAML", got=str(error).replace("\n", " "), fix="Mend its syntax.") from None
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{name} is not a recipe", got=type(raw).__name__, fix="Write keys and values, see `steer2edit recipes`."
        )
    for override in overrides:
        _override(raw, override)
    return parse_recipe(raw)


def _override(raw: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals:
        raise RecipeError("an override is not key=value", got=override, fix="Write it like search.steering=[0.1,0.2].")
    *parents, last = path.split(".")
    place: Any = raw
    for parent in parents:
        place = place.setdefault(parent, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise RecipeError("an override goes through a key that holds a plain value", got=path, fix="Check the key.")
    try:
        place[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"the value of {path} is not YAML", got=value, fix="Quote it.") from None


def parse_recipe(raw: dict[str, Any]) -> Recipe:
    """Raises RecipeError for the first key or value that is wrong."""
    return parse(Recipe, raw)
