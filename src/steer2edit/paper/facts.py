"""What the suites know from data files: the six models, what was published, the profiles, the machines of a plan.

The files stand in `recipes/paper/`. Each is checked when it is read, as a recipe is.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BeforeValidator, Field

from ..errors import RecipeError
from ..files.schema import Count, Many, Positive, Section, nearest, parse
from ..searching.plan import Alpha, Rho
from ..training.plan import Training

# The paper's behaviours, as the suites name them.
BEHAVIOURS = ("safety", "truthfulness", "efficiency")
# Two that are not the paper's.
STYLES = ("lists", "pirate")
PROFILES = ("paper", "cpu", "smoke")


def _axis(value: Any) -> Any:
    """First, last and step become all values; `off` and None are a block type that is left alone."""
    if value in (None, False, "off"):
        return [None]
    if isinstance(value, list) and len(value) == 3:
        first, last, step = value
        return [float(f"{x:.6g}") for x in np.arange(first, last + step / 2, step)]
    raise ValueError("Write the first number, the last and the step, or off")


Axis = Annotated[list[Rho], BeforeValidator(_axis)]


class Grid(Section):
    """Every number of each budget that the paper's refined grid of a model has."""

    rho_attn: Axis
    rho_mlp: Axis
    alpha: Annotated[list[Alpha], BeforeValidator(_axis)]


class Best(Section):
    """A configuration."""

    rho_attn: Rho
    rho_mlp: Rho
    alpha: Alpha


class Shape(Section):
    """What a decoder's cost depends on."""

    model_type: str
    layers: Many
    d: Many
    heads: Many
    kv_heads: Many
    head_dim: Many
    neurons: Many
    vocabulary: Many
    tied: bool


class Draws(Section):
    """How answers are drawn."""

    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Count = 0


class PaperModel(Section):
    """One of the six models of the paper."""

    title: str
    hub: str
    behaviour: Literal["safety", "truthfulness", "efficiency"]
    shape: Shape
    grid: Grid
    best: Best
    sampling: Draws
    answer_tokens: Many
    system: str | None = None
    attacks: dict[str, str] = {}
    labelled: str | None = None


class Samples(Section):
    """Answers to each prompt: of the behaviour's own prompts and attacks, and of the tasks."""

    answers: Many = 1
    tasks: Many = 1


class Ablations(Section):
    """Each method's strengths: their number, whose KL per token spans `span`. `prompts`: at most this many of each kind
    are asked on test; null is all."""

    points: Many
    span: tuple[Positive, Positive]
    prompts: Many | None = None


class Sensitivity(Section):
    """The budgets that are swept: numbers or, where there are none, as many as `points` says, found by KL. `prompts`:
    as above."""

    values: list[Positive]
    points: Many
    span: tuple[Positive, Positive]
    prompts: Many | None = None


class Coarse(Section):
    """The grid of a model that has none of its own, and how fine the second one is."""

    rho_attn: list[Rho]
    rho_mlp: list[Rho]
    alpha: list[Alpha]
    refine: Count


class OfBehaviour(Section):
    """A behaviour's parts of a recipe, and its samples where they differ from the profile's."""

    behaviour: dict[str, Any]
    data: dict[str, Any]
    search: dict[str, Any]
    evaluation: dict[str, Any]
    samples: Samples | None = None


class Profile(Section):
    """The sizes of every suite. `coarse: null` leaves the strengths to the search of the recipe.

    `stars`: how many of the best edits on validation stand in the trade-off. `swept`: how many steering strengths of
    validation's front do, at most; null is the whole sweep. `styles`: the behaviours that are not the paper's.
    """

    needs_folder: bool
    sampled: bool
    samples: Samples
    seeds: Many
    stars: Many
    swept: Many | None = None
    ablations: Ablations
    sensitivity: Sensitivity
    training: Training
    coarse: Coarse | None
    model: dict[str, Any] = {}
    behaviours: dict[str, OfBehaviour]
    styles: dict[str, OfBehaviour] = {}
    utility: dict[str, list[str]]
    utility_items: Many | None = None
    search: dict[str, Any] = {}  # an anchor that the behaviours share


class Composed(Section):
    """Lines of a file that become prompts: from `first` on, `count` of those in which `where` holds."""

    file: str
    kind: str
    split: Literal["probe", "validation", "test"]
    where: dict[str, Any] = {}
    first: Count = 0
    count: Many | None = None


class Layout(Section):
    """What a folder of sets gives a behaviour: prompts that are composed, or the names of question files."""

    compose: list[Composed] = []
    prompts: str | None = None
    test_prompts: str | None = None


class Machine(Section):
    """An accelerator, by its maker's figures; a second each."""

    name: str
    like: str
    memory: Positive
    peak: Positive
    bandwidth: Positive
    disk: Positive


class CpuShares(Section):
    """The shares of what a matrix product reaches on a CPU that forward passes and steps of decoding reach."""

    forward: Positive
    decoding: Positive


class Machines(Section):
    """The accelerators that a plan estimates for, and the shares of their figures that are assumed to be reached; of a
    CPU those that were measured."""

    compute_share: Positive
    bandwidth_share: Positive
    machines: list[Machine]
    cpu: CpuShares


class Published(Section):
    """The paper's tables. models: model → variant → measure → number."""

    source: str
    headline: dict[str, float]
    overall: dict[str, dict[str, float]]
    models: dict[str, dict[str, dict[str, float]]]

    def number(self, model: str | None, variant: str, measure: str) -> float | None:
        """What the paper has for a measure; None where it has nothing."""
        return self.models.get(model or "", {}).get(variant, {}).get(measure)


def _read(name: str) -> Any:
    text = (files("steer2edit") / "recipes" / "paper" / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


@lru_cache(maxsize=1)
def paper_models() -> Mapping[str, PaperModel]:
    """Name → model, in the paper's order.

    >>> list(paper_models())[0], paper_models()["gemma-2-2b-it"].grid.rho_mlp
    ('llama-2-7b-chat', [None])
    """
    return {name: parse(PaperModel, raw, under=name) for name, raw in _read("models").items()}


@lru_cache(maxsize=1)
def published() -> Published:
    return parse(Published, _read("published"))


@lru_cache(maxsize=1)
def machines() -> Machines:
    return parse(Machines, _read("machines"))


@lru_cache(maxsize=1)
def layouts() -> Mapping[str, Layout]:
    return {name: parse(Layout, raw, under=name) for name, raw in _read("sets").items()}


@lru_cache(maxsize=4)
def profile_named(name: str) -> Profile:
    """Raises RecipeError if there is no such profile."""
    if name not in PROFILES:
        raise RecipeError("there is no such profile", got=name, fix=nearest(name, PROFILES, "Profiles"))
    return parse(Profile, _read(name), under=name)


def known_model(name: str) -> str | None:
    """Which of the six a name means: its own name, its title or its Hub id, in upper or lower case; else None.

    >>> known_model("google/gemma-2-2b-it"), known_model("LLaMA-2-7B-Chat"), known_model("gpt2")
    ('gemma-2-2b-it', 'llama-2-7b-chat', None)
    """
    for key, model in paper_models().items():
        if name.casefold() in (key, model.title.casefold(), model.hub.casefold()):
            return key
    return None


def short_name(name: str) -> str:
    """What a model is called in folders and tables: the last part of a Hub id or of a path.

    >>> short_name("embedded:smollm2-135m-instruct"), short_name("models/My Model/")
    ('smollm2-135m-instruct', 'my-model')
    """
    last = name.removeprefix("embedded:").rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return "".join(c if c.isalnum() or c in ".-_" else "-" for c in last.casefold()).strip(".-") or "model"
