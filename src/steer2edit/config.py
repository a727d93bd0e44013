"""The recipe: one YAML file is one reproducible run. This is its schema; `recipes/` holds the shipped ones."""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .architectures import Architecture
from .errors import FileError, RecipeError
from .files import read_text
from .traces import CHAT, Chat


def _off(value: Any) -> Any:
    # YAML reads an unquoted `off` as false.
    return None if value is False or value == "off" else value


def _number(value: Any) -> Any:
    # Pydantic takes true for 1, and YAML reads an unquoted `on` as true.
    if isinstance(value, bool):
        raise ValueError("Input should be a number")
    return value


def _with_harmful(counts: dict[Any, int]) -> dict[Any, int]:
    if "harmful" not in counts:
        raise ValueError("The refusal rate needs harmful prompts")
    return counts


def layers_of(text: str) -> range:
    """`8-20` → layers 8 to 20, both of them."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def _are_layers(text: str) -> str:
    if not re.fullmatch(r"\d+(-\d+)?", text) or not layers_of(text):
        raise ValueError("Write layers as first-last, like 8-20")
    return text


def _date(value: Any) -> Any:
    # YAML reads an unquoted date as one.
    value = value.isoformat() if type(value) is datetime.date else value
    if not isinstance(value, str) or not re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        raise ValueError("Write it as YYYY-MM-DD")
    return datetime.date.fromisoformat(value).isoformat()


def _named(value: Any) -> Any:
    # accelerate numbers its accelerators, and YAML reads those as numbers.
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else value


Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Rho = Annotated[Positive | None, BeforeValidator(_off)]
Alpha = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)]
Limit = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)] | None
Share = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)]
Count = Annotated[int, BeforeValidator(_number), Field(ge=0)]
Many = Annotated[int, BeforeValidator(_number), Field(ge=1)]
Layers = Annotated[str, AfterValidator(_are_layers)]
Variant = Literal["full", "k_mean", "k_svd", "g_dot", "l0", "l2"]
Judged = Annotated[dict[Literal["harmful", "benign", "borderline"], Many], AfterValidator(_with_harmful)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Section)


class Model(Section):
    """Which model, and how it is loaded."""

    name: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    max_memory: Annotated[dict[str, str] | None, BeforeValidator(_named)] = None
    offload_folder: str | None = None
    plain: bool = False
    enable_thinking: bool | None = None
    date: Annotated[str, BeforeValidator(_date)] = CHAT.date
    architecture: Architecture | None = None
    trust_remote_code: bool = False

    @property
    def chat(self) -> Chat:
        return Chat(self.plain, self.enable_thinking, self.date)


class Behaviour(Section):
    """What to change. Positive and negative say where the traces' responses come from."""

    name: Literal["safety"] = "safety"
    system: str | None = None
    positive: Literal["written", "own"] = "written"
    negative: Annotated[list[Literal["benign", "harmful"]], Field(min_length=1)] = ["benign", "harmful"]
    new_tokens: Many = 48


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


class Limits(Section):
    """What a configuration may cost on validation; null is no limit."""

    over_refusal: Limit = 0.2
    over_refusal_borderline: Limit = None
    utility_loss: Limit = None
    degenerate: Limit = 0.1
    accuracy_loss: Limit = None


class Range(Section):
    """Steering strengths from low to high, as many and as far apart as make its budget the edits'."""

    low: Positive
    high: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low >= self.high:
            raise ValueError("high must be above low")
        return self


class Search(Section):
    """The configurations that are tried, and the rule that chooses.

    `grid` tries every combination. `tpe` draws `trials` from the space that the lists span: from the smallest number to
    the largest, and off where the list has it.
    """

    method: Literal["grid", "tpe"] = "grid"
    rho_attn: list[Rho] = Field(min_length=1)
    rho_mlp: list[Rho] = Field(min_length=1)
    alpha: list[Alpha] = Field(min_length=1)
    layers: list[Layers | None] = Field([None], min_length=1)
    variants: list[Variant] = Field(["full"], min_length=1)
    sanity: Annotated[Count, Field(le=20)] = 0
    refine: Annotated[Count, Field(le=25)] = 0
    trials: Many = 60
    at_once: Many = 12
    steering: Range | list[Positive] = []
    rule: Literal["largest", "cheapest", "knee"] = "largest"
    tolerance: Share = 0.05
    reference: Positive = 1.0
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _edits(self) -> Search:
        if not any(rho is not None for rho in [*self.rho_attn, *self.rho_mlp]):
            raise ValueError("Both block types are off everywhere: give rho_attn or rho_mlp a number")
        if self.refine and self.method == "tpe":
            raise ValueError("refine is the grid's second stage: leave it out with method tpe")
        return self


class EnginePlan(Section):
    """What makes the text, and where.

    `vllm` needs the Python of an environment that has it; `options` are further fields of its EngineArgs.
    `distributed: ray` puts `replicas` of the engine on a Ray cluster, at `address` or, without one, on this machine;
    each reserves `cpus` and `gpus`.
    """

    name: Literal["transformers", "vllm"] = "transformers"
    python: str | None = None
    max_loras: Many = 8
    tensor_parallel: Many = 1
    pipeline_parallel: Many = 1
    options: dict[str, Any] = {}
    distributed: Literal["ray"] | None = None
    address: str | None = None
    replicas: Many = 2
    cpus: Annotated[float, BeforeValidator(_number), Field(ge=0)] = 1
    gpus: Annotated[float, BeforeValidator(_number), Field(ge=0)] = 0

    @model_validator(mode="after")
    def _fits(self) -> EnginePlan:
        if self.name == "vllm" and self.python is None:
            raise ValueError("vLLM runs in an environment of its own: give engine.python, the path of its interpreter")
        return self


class Evaluation(Section):
    """How answers are made and judged, in the search and on test, and the batch plan, which results may depend on."""

    new_tokens: Many = 24
    utility_prompts: Many = 24
    utility_tokens: Many = 64
    rows: Many = 128
    batch: Many = 512
    resamples: Many = 2000


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


def parse(section: type[S], raw: dict[str, Any]) -> S:
    """A recipe, or one of its sections. Raises RecipeError for the first key or value that is wrong."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        # Of a value that may be of several kinds the kind that it fits farthest.
        problem = max(error.errors(), key=lambda e: len(e["loc"]))
        path = [
            str(part) for part in problem["loc"] if not str(part).startswith(("function-", "constrained-", "list["))
        ]
        key = ".".join(path)
        if problem["type"] == "extra_forbidden":
            known = _known_keys(section, path[:-1])
            near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.4)
            fix = f"Did you mean {near[0]!r}?" if near else f"Known keys there: {', '.join(known)}."
            raise RecipeError(f"the recipe has an unknown key {key}", got=path[-1], fix=fix) from None
        if problem["type"] == "missing":
            raise RecipeError(f"the recipe has no {key}", got="nothing", fix=f"Add the key {key}.") from None
        message = problem["msg"].removeprefix("Value error, ")
        raise RecipeError(f"the recipe's {key} cannot be used", got=repr(problem["input"]), fix=f"{message}.") from None


def _known_keys(section: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        kind = section.model_fields[part].annotation if part in section.model_fields else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return []
        section = kind
    return list(section.model_fields)
