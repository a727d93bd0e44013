"""What a suite runs: for each model and behaviour an ordinary recipe, and the parts that are measured beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import FileError, RecipeError
from ..files.schema import nearest
from ..models.embedded import EMBEDDED
from ..pipeline.tasks import check_tasks
from ..recipe import Recipe, overridden, parse_recipe
from ..training.course import check_packages
from ..training.plan import Training
from .facts import BEHAVIOURS, STYLES, PaperModel, Profile, known_model, paper_models, profile_named, short_name
from .sets import composed, sets_of

Part = Literal["trade_off", "ablations", "sensitivity", "training"]

# Suite → the parts that are measured of each of its runs.
SUITES: Mapping[str, tuple[Part, ...]] = {
    "safety": ("trade_off",),
    "truthfulness": ("trade_off",),
    "efficiency": ("trade_off",),
    "ablations": ("ablations",),
    "sensitivity": ("sensitivity",),
    "training": ("training",),
    "all": ("trade_off", "ablations", "sensitivity", "training"),
    # Not the paper's.
    "styles": ("trade_off", "training"),
}


@dataclass(frozen=True)
class Planned:
    """A run of a suite.

    Attributes:
        name: of its directory. model: what tables call the model. paper: which of the six it is; None is another.
        recipe: an ordinary one. notes: what is left out, and why.
    """

    name: str
    model: str
    paper: str | None
    behaviour: str
    seed: int
    recipe: Recipe
    notes: tuple[str, ...] = ()

    @property
    def facts(self) -> PaperModel | None:
        """What the paper did with the model; None where it did something else with it."""
        facts = paper_models().get(self.paper or "")
        return facts if facts is not None and facts.behaviour == self.behaviour else None


@dataclass(frozen=True)
class SuitePlan:
    """Everything that a suite runs.

    Attributes:
        seeds: how many runs each model and behaviour has.
    """

    suite: str
    profile_name: str
    profile: Profile
    seeds: int
    runs: tuple[Planned, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is measured; training only if the recipes ask for it."""
        trained = any(planned.recipe.training.methods for planned in self.runs)
        return tuple(part for part in SUITES[self.suite] if part != "training" or trained)


def plan_suite(
    suite: str,
    out: str | Path,
    *,
    model: str | None = None,
    like: str | None = None,
    profile: str = "cpu",
    data: str | Path | None = None,
    seeds: int | None = None,
    changes: Sequence[str] = (),
) -> SuitePlan:
    """The runs of a suite.

    Args:
        out: where prompts that are composed from a folder's files are written.
        model: one of the six by any of its names, or another model; None is the six in the profile `paper`, and the
            embedded model in the others.
        like: which of the six `model` is, where that is a folder with its weights.
        data: a folder of evaluation sets; None takes the prompts that come with the package.
        seeds: how many seeds; None is the profile's number.
        changes: `key=value` overrides of every recipe.

    Raises:
        RecipeError: no such suite, profile or model of the paper, or a change that cannot be made.
        FileError: the folder is not there or lacks prompts, or the profile needs one.
    """
    if suite not in SUITES:
        raise RecipeError("there is no such suite", got=suite, fix=nearest(suite, list(SUITES), "Suites"))
    sizes = profile_named(profile)
    if data is None and sizes.needs_folder:
        raise FileError(
            f"the profile {profile} asks the paper's prompts",
            got="no folder of them",
            fix="Give --data FOLDER (docs/paper.md lists its files), or --profile cpu.",
        )
    if suite == "styles" and not sizes.styles:
        raise RecipeError(
            "the styles are not the paper's, so that its profile has none", got=profile, fix="Give --profile cpu."
        )
    if data is not None and not Path(data).is_dir():
        raise FileError("the folder of the sets is not there", got=data, fix="Check --data.")
    count = sizes.seeds if seeds is None else seeds
    training = sizes.training if _trains(suite) else None
    runs = [
        _planned(name, key, behaviour, seed, count, sizes, data, Path(out), changes, training)
        for name, key, behaviour in _pairs(suite, profile, model, like)
        for seed in range(count)
    ]
    return SuitePlan(suite, profile, sizes, count, tuple(runs))


def _trains(suite: str) -> bool:
    """Whether a suite trains: one that has other parts only where the packages for it are installed.

    Raises:
        FileError: the suite is of training alone, and a package is not installed.
    """
    if "training" not in SUITES[suite]:
        return False
    try:
        check_packages()
    except FileError:
        if suite == "training":
            raise
        return False
    return True


def _pairs(suite: str, profile: str, model: str | None, like: str | None) -> list[tuple[str, str | None, str]]:
    """Model's name, which of the six it is, behaviour."""
    wanted: list[str] = [suite] if suite in BEHAVIOURS else list(STYLES if suite == "styles" else BEHAVIOURS)
    if model is None and profile == "paper":
        of_paper = paper_models()
        return [(facts.hub, key, facts.behaviour) for key, facts in of_paper.items() if facts.behaviour in wanted]
    if model is None:
        return [(EMBEDDED, None, behaviour) for behaviour in wanted]
    key = known_model(model if like is None else like)
    if like is not None and key is None:
        raise RecipeError(
            "the paper has no such model", got=like, fix=nearest(like, list(paper_models()), "Its models")
        )
    if key is None:
        return [(model, None, behaviour) for behaviour in wanted]
    facts = paper_models()[key]
    name = facts.hub if like is None else model
    # The paper steered each model to one behaviour.
    return [(name, key, behaviour) for behaviour in (wanted if suite in (*BEHAVIOURS, "styles") else [facts.behaviour])]


def _planned(
    model: str,
    key: str | None,
    behaviour: str,
    seed: int,
    seeds: int,
    profile: Profile,
    data: str | Path | None,
    out: Path,
    changes: Sequence[str],
    training: Training | None,
) -> Planned:
    facts = paper_models().get(key or "")
    label = short_name(model) if key is None else key
    name = f"{label}-{behaviour}" + (f"-seed-{seed}" if seeds > 1 else "")
    own = facts if facts is not None and facts.behaviour == behaviour else None
    raw = _raw(name, model, behaviour, seed, profile, own)
    if training is not None:
        raw["training"] = training.model_dump(mode="json")
    notes: list[str] = []
    if behaviour in STYLES:  # their prompts come with the package
        raw["data"] |= composed(behaviour, None, out)
    elif data is not None:
        notes += _of_folder(raw, behaviour, profile, own, Path(data), out)
    recipe = overridden(parse_recipe(raw), changes)
    recipe, left_out = _without_missing_tasks(recipe)
    return Planned(name, label, key, behaviour, seed, recipe, (*notes, *left_out))


def _raw(name: str, model: str, behaviour: str, seed: int, profile: Profile, own: PaperModel | None) -> dict[str, Any]:
    """The recipe without anything from a folder."""
    sizes = (profile.behaviours | profile.styles)[behaviour]
    raw: dict[str, Any] = {"name": name, "seed": seed, "model": {"name": model, **profile.model}, "exports": []}
    raw |= {key: dict(getattr(sizes, key)) for key in ("behaviour", "data", "search", "evaluation")}
    if own is not None and own.system is not None:
        raw["behaviour"]["system"] = own.system
    if profile.coarse is not None:
        grid = profile.coarse if own is None else own.grid
        raw["search"] |= grid.model_dump(mode="json")
    if profile.sampled:
        samples = sizes.samples or profile.samples
        raw["evaluation"] |= {"task_sampling": "model", "task_samples": samples.tasks}
        if behaviour != "truthfulness":  # it compares given answers
            draws = {"temperature": 1.0} if own is None else own.sampling.model_dump()
            raw["evaluation"] |= {**draws, "samples": samples.answers}
    return raw


def _of_folder(
    raw: dict[str, Any], behaviour: str, profile: Profile, own: PaperModel | None, folder: Path, out: Path
) -> list[str]:
    """Adds a folder's prompts, tasks and attacks to a recipe; gives what the folder lacks."""
    notes = []
    raw["data"] |= composed(behaviour, folder, out)
    if own is not None and own.labelled is not None:
        if (folder / own.labelled).is_file():
            raw["behaviour"]["answers"] = str(folder / own.labelled)
        else:
            notes.append(f"traces are the data set's answers: there is no {own.labelled}")
    attacks = {} if own is None else own.attacks
    attack_files = {name: str(folder / file) for name, file in attacks.items() if (folder / file).is_file()}
    notes += [
        f"{name} is not measured: there is no {file}" for name, file in attacks.items() if name not in attack_files
    ]
    if attack_files:
        raw["data"]["attacks"] = attack_files
    tasks, missing = sets_of(profile.utility.get(behaviour, []), folder)
    notes += missing
    raw["data"] |= {"utility": tasks, "sets": str(folder), "utility_items": profile.utility_items}
    return notes


def _without_missing_tasks(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe without tasks that need something that is not installed, and what that is."""
    kept, notes = [], []
    for name in recipe.data.utility:
        alone = recipe.model_copy(update={"data": recipe.data.model_copy(update={"utility": [name], "attacks": {}})})
        try:
            check_tasks(alone)
            kept.append(name)
        except FileError as error:
            notes.append(f"{name} is not measured: {error}")
    data = recipe.data.model_copy(update={"utility": kept})
    return recipe.model_copy(update={"data": data}), notes
