"""The recipe: one YAML file is one reproducible run. This is its schema; `recipes/` holds the shipped ones."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from .behaviours.base import SPLITS, Behaviour, Source, search_defaults
from .behaviours.known import BEHAVIOURS
from .engines.plan import EnginePlan, Model
from .errors import FileError, RecipeError
from .files.plain_yaml import read_yaml
from .files.reading import read_text
from .files.schema import Count, Many, Section, Text, _number, at_most, nearest, parse
from .method.variants import PRESERVE
from .searching.front import Aim
from .searching.plan import Evaluation, Search
from .training.plan import KINDS, Training


class Questions(Section):
    """A small multiple-choice set whose accuracy is measured too: JSON Lines with `question`, `choices` and `answer`,
    the number of the right choice from 0 on. Validation takes the first ones, test those after."""

    file: str
    validation: Many = 50
    test: Many = 100


class Utility(Section):
    """Prompts of their own for KL, the rise of the NLL and the base answers that both are measured on.

    JSON Lines with `prompt`. If its rows have `split`, each split takes its own; else validation takes the first ones
    and test those after. `evaluation.utility_prompts` says how many. Without it the behaviour's neutral prompts serve.
    """

    prompts: str | None = None


class AttackSet(Section):
    """Prompts that are made to break the behaviour: JSON Lines with `prompt`, of which the first `count` are asked."""

    file: Text
    count: Many | None = None


def _attack_sets(value: Any) -> Any:
    """Name → set; a file alone stands for a set of all its prompts."""
    if not isinstance(value, dict):
        raise ValueError("Write names with their files, like {gcg: FILE.jsonl}")
    sets: dict[str, AttackSet] = {}
    for name, of_set in value.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", str(name)):
            raise RecipeError(
                "a name in the recipe's data.attacks cannot be used",
                got=name,
                fix="Write small letters, digits and underscores, and begin with a letter.",
            )
        raw = {"file": of_set} if isinstance(of_set, str) else of_set
        if not isinstance(raw, dict | AttackSet):
            raise RecipeError(
                f"the recipe's data.attacks.{name} cannot be used", got=raw, fix="Write a file, or {file: …, count: …}."
            )
        sets[name] = raw if isinstance(raw, AttackSet) else parse(AttackSet, raw, under=f"data.attacks.{name}")
    return sets


class Data(Section):
    """The prompts, and how many of each kind every split takes; of a behaviour with one kind of prompts a number.

    What is left out is the behaviour's to say. `test_prompts` is another file, of which the test split is. `utility`
    names tasks, of which `utility_items` questions each are asked, the first ones or `sampled` by the seed; their sets
    come from the Hub, or from the folder `sets`. `attacks` are prompts against the behaviour. All of these are asked on
    test alone.
    """

    prompts: str | None = None
    test_prompts: str | None = None
    probe: dict[str, Many] | None = None
    validation: dict[str, Many] | None = None
    test: dict[str, Many] | None = None
    questions: Questions | None = None
    utility: list[Text] = []
    utility_items: Many | None = None
    utility_order: Literal["first", "sampled"] = "first"
    sets: Text | None = None
    attacks: Annotated[dict[str, AttackSet], BeforeValidator(_attack_sets)] = {}


class ProbePass(Section):
    """The pass over the traces.

    `preserve` names the groups of negative traces that an edit of the variant `preserve` should leave alone;
    without it the behaviour says which.
    """

    positions: Literal["predicting", "response"] = "predicting"
    part: Literal["both", "thinking", "answer"] = "both"
    max_tokens: Many = 4096
    batch_tokens: Many = 1024
    expert_tokens: Count = 16
    preserve: list[str] | None = None


def _behaviour(value: Any) -> Any:
    """The section of the behaviour that `name` names."""
    if isinstance(value, Behaviour):
        return value
    if not isinstance(value, dict):
        raise ValueError("Write the behaviour's name and its options as keys")
    name = value.get("name", "safety")
    if not isinstance(name, str) or name not in BEHAVIOURS:
        raise RecipeError(
            "the recipe's behaviour.name is not known",
            got=str(name),
            fix=nearest(name if isinstance(name, str) else "", list(BEHAVIOURS), "Known"),
        )
    return parse(BEHAVIOURS[name], value, under="behaviour")


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[^./\\][^/\\]*$")]
    seed: Annotated[int, Field(ge=0), BeforeValidator(_number), at_most(2**32 - 1)] = 0
    model: Model
    behaviour: Annotated[SerializeAsAny[Behaviour], BeforeValidator(_behaviour)]
    data: Data
    utility: Utility = Utility()
    probe: ProbePass = ProbePass()
    search: Search
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    engine: EnginePlan = EnginePlan()
    exports: list[Literal["adapter", "checkpoint", "gguf", "steering"]] = ["adapter"]

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, raw: Any) -> Any:
        """What the behaviour has by default: prompts, counts, and keys of other sections."""
        if not isinstance(raw, dict):
            return raw
        raw = {"behaviour": {}, "data": {}, "search": {}, "evaluation": {}, "utility": {}, **raw}
        section, evaluation = raw["behaviour"], raw["evaluation"]
        if isinstance(section, dict) and section.get("name") == "brevity" and isinstance(evaluation, dict):
            raw["behaviour"] = {"longest": evaluation.get("new_tokens", Evaluation().new_tokens)} | section
        behaviour = _behaviour(raw["behaviour"])
        data: dict[str, Any] = {} if behaviour.prompts is None else {"prompts": behaviour.prompts}
        for split in SPLITS:
            if (counts := getattr(behaviour, split)) is not None:
                data[split] = dict(counts)
        if isinstance(raw["data"], dict) and len(behaviour.kinds) == 1:
            numbers = {split: n for split in SPLITS if isinstance(n := raw["data"].get(split), int)}
            raw["data"] = raw["data"] | {split: {behaviour.kinds[0]: n} for split, n in numbers.items()}
        utility = {} if behaviour.neutral_prompts is None else {"prompts": behaviour.neutral_prompts}
        search = search_defaults(behaviour.search, raw["search"]) if isinstance(raw["search"], dict) else {}
        defaults = {"data": data, "evaluation": behaviour.evaluation, "search": search, "utility": utility}
        for key, values in defaults.items():
            if isinstance(raw[key], dict):
                raw[key] = {**values, **raw[key]}
        return raw

    @model_validator(mode="after")
    def _behaviours_words(self) -> Recipe:
        """Kinds and measures are the behaviour's own."""
        for split in SPLITS:
            counts = getattr(self.data, split)
            if counts is None and self.behaviour.required and not self.behaviour.divides:
                raise RecipeError(f"the recipe has no data.{split}", got="nothing", fix=f"Add the key data.{split}.")
            if counts is None:
                continue
            kinds = self.behaviour.probe_kinds if split == "probe" else self.behaviour.kinds
            for kind in counts:
                if kind not in kinds:
                    fix = nearest(kind, kinds, "Kinds of this behaviour there")
                    raise RecipeError(f"the recipe has an unknown key data.{split}.{kind}", got=kind, fix=fix)
            missing = [kind for kind in self.behaviour.required if kind not in counts]
            if missing and split != "probe":
                attribute = self.behaviour.attribute.title
                raise RecipeError(
                    f"the recipe's data.{split} cannot be used",
                    got=f"no {missing[0]} prompts",
                    fix=f"{attribute} is measured on {missing[0]} prompts: say how many.",
                )
        if self.data.prompts is None and not self.behaviour.divides:
            raise RecipeError("the recipe has no data.prompts", got="nothing", fix="Add the key data.prompts.")
        if self.data.test_prompts is not None and not self.behaviour.second_file:
            raise RecipeError(
                f"the behaviour {self.behaviour.name} does not read data.test_prompts",
                got=self.data.test_prompts,
                fix="Write `split` into each line of data.prompts.",
            )
        self._check_tasks()
        if self.search.needs_evidence and not self.preserved:
            key = "variants" if PRESERVE in self.search.variants else "baselines"
            raise RecipeError(
                f"the recipe's search.{key} cannot be used",
                got=f"{self.search.needs_evidence[0]}, and nothing to preserve",
                fix="Name in probe.preserve the groups of negative traces that an edit should leave alone.",
            )
        names = [measure.name for measure in self.behaviour.measures]
        for name in self.search.limits:
            if name not in names:
                fix = nearest(name, names, "Measures of this behaviour")
                raise RecipeError(f"the recipe has an unknown key search.limits.{name}", got=name, fix=fix)
        return self

    def _check_tasks(self) -> None:
        """Raises RecipeError for tasks or attacks that cannot stand together."""
        if twice := [name for i, name in enumerate(self.data.utility) if name in self.data.utility[:i]]:
            raise RecipeError("the recipe's data.utility names a task twice", got=twice[0], fix="Name it once.")
        if self.data.attacks and not self.behaviour.takes_attacks:
            raise RecipeError(
                f"the behaviour {self.behaviour.name} does not read data.attacks",
                got=", ".join(self.data.attacks),
                fix="Leave data.attacks out.",
            )
        own = {measure.name for measure in self.behaviour.measures}
        for name in self.data.attacks:
            if taken := own & {measure.name for measure in self.behaviour.attack_measures(name)}:
                raise RecipeError(
                    "a name in the recipe's data.attacks cannot be used",
                    got=f"{name}, whose {', '.join(sorted(taken))} is a measure already",
                    fix="Give it another name.",
                )

    @property
    def preserved(self) -> tuple[str, ...]:
        """The groups of negative traces of which the probe keeps evidence; none if nothing of the search needs it."""
        if not self.search.needs_evidence:
            return ()
        return tuple(self.behaviour.preserved if self.probe.preserve is None else self.probe.preserve)

    @property
    def source(self) -> Source:
        """Where the behaviour's items come from."""
        return Source(
            self.data.prompts, {split: getattr(self.data, split) for split in SPLITS}, self.seed, self.data.test_prompts
        )

    @property
    def aim(self) -> Aim:
        """What the search should improve, and what that may cost: the written limits, else the measures' own."""
        s = self.search
        default = self.behaviour.limits
        limits = {m: s.limits.get(m.name, default.get(m.name, m.limit)) for m in self.behaviour.measures}
        return Aim(self.behaviour.attribute, limits, s.rule, s.tolerance, s.reference, self.behaviour.ranked)

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
    """A recipe file, a run directory's, or a shipped recipe by its name, with `key.sub=value` overrides (values are
    YAML).

    Raises:
        RecipeError: an unknown key (with the nearest known one), or a value that its key cannot take.
        FileError: no such file and no such recipe.
    """
    shipped = shipped_recipes()
    of_run = Path(name) / "recipe.yaml"
    name = of_run if of_run.is_file() else name
    if str(name) in shipped and not Path(name).is_file():
        text = shipped[str(name)]
    elif Path(name).is_file():
        text = read_text(name)
    else:
        raise FileError("no such recipe", got=name, fix=f"Give a YAML file or a shipped recipe: {', '.join(shipped)}.")
    raw = read_yaml(text, str(name))
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
    place[last] = read_yaml(value, f"the value of {path}")


def parse_recipe(raw: dict[str, Any]) -> Recipe:
    """Raises RecipeError for the first key or value that is wrong."""
    return parse(Recipe, raw)


def overridden(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with `key.sub=value` overrides. Raises RecipeError for one that is wrong."""
    if not overrides:
        return recipe
    raw = recipe.model_dump(mode="json")
    for override in overrides:
        _override(raw, override)
    return parse_recipe(raw)


def task_overrides(recipe: str | Path, tasks: str | None, sets: str | None, items: int | None) -> list[str]:
    """The command line's options on utility tasks as overrides of a recipe; tasks join those that it has.

    Args:
        tasks: names, with commas between them. sets: the folder of their sets. items: at most this many of each.
    """
    changes = []
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        both = list(dict.fromkeys([*load_recipe(recipe).data.utility, *names]))
        changes.append(f"data.utility={json.dumps(both)}")
    if sets is not None:
        changes.append(f"data.sets={json.dumps(sets)}")
    if items is not None:
        changes.append(f"data.utility_items={items}")
    return changes


def training_overrides(recipe: str | Path, methods: Sequence[str]) -> list[str]:
    """The training methods that the command line names as overrides of a recipe; none named takes the recipe's own.

    Raises:
        RecipeError: there is no such method.
    """
    known = list(KINDS)
    for method in methods:
        if method not in known:
            raise RecipeError("no such training method", got=method, fix=nearest(method, known, "Known"))
    own = load_recipe(recipe).training
    wanted = list(methods)
    if not wanted and not own.methods:
        wanted = known
    return [f"training.{method}={{}}" for method in wanted if getattr(own, method) is None]


def refuse_code(recipe: Recipe, trusted: bool, loads_model: bool = True) -> None:
    """Raises RecipeError if the recipe runs a Python file or the model's own code, and nobody said that it may.

    Args:
        loads_model: False where nothing is asked of the model.
    """
    if trusted:
        return
    if recipe.behaviour.runs_code:
        raise RecipeError(
            "the recipe's score runs a Python file",
            got=", ".join(recipe.behaviour.files),
            fix="Read that file; if you trust it, give --trust-recipe-code.",
        )
    if loads_model and recipe.model.trust_remote_code:
        raise RecipeError(
            "the recipe runs the code of its model",
            got=f"model.trust_remote_code: true, of {recipe.model.name}",
            fix="Read that code; if you trust it, give --trust-recipe-code.",
        )
