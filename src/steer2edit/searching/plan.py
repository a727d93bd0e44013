"""The recipe's sections on the search and on how answers are made and measured."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ..files.schema import Count, Many, Positive, Section, Share, Text, _number, at_most
from ..method.rivals import RIVALS, WITH_EVIDENCE, Rival
from ..method.site import are_layers
from ..method.variants import PRESERVE, Variant
from .front import Rule


def _off(value: Any) -> Any:
    # YAML reads an unquoted `off` as false.
    return None if value is False or value == "off" else value


def _are_layers(text: str) -> str:
    if not are_layers(text):
        raise ValueError("Write layers as first-last, like 8-20, or as shares of the depth, like 50%-100%")
    return text


Rho = Annotated[Positive | None, BeforeValidator(_off)]

Alpha = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)]

Limit = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_number)] | None

Layers = Annotated[str, AfterValidator(_are_layers)]


# What a search is to find by itself, see calibrate.py.
Auto = Literal["auto"]

AUTO: Auto = "auto"


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
    the largest, and off where the list has it. What is `auto` is found first: `points` strengths whose KL per token
    spans `span`, evenly in log KL, for each α. Edits are compared with `steering` and with the `baselines`, each of
    which gets as many strengths as there are edits; the closed-form rivals among these are off unless named.

    With `narrow`, of what is `auto` not every combination is tried: first the middle strength for each α, layer range
    and variant, then the others for those that the rule takes; likewise of each baseline on one layer.

    `pick` is a person's choice in place of the rule's: an edit's id, or its number on the front (choice.py).
    """

    method: Literal["grid", "tpe"] = "grid"
    rho_attn: Annotated[list[Rho], Field(min_length=1)] | Auto = AUTO
    rho_mlp: Annotated[list[Rho], Field(min_length=1)] | Auto = AUTO
    alpha: list[Alpha] = Field([0.4], min_length=1)
    span: tuple[Positive, Positive] = (0.02, 1.0)
    points: Annotated[int, Field(ge=2, le=50), BeforeValidator(_number)] = 4
    layers: list[Layers | None] = Field([None], min_length=1)
    variants: list[Variant] = Field(["full"], min_length=1)
    sanity: Annotated[int, Field(ge=0, le=20), BeforeValidator(_number)] = 0
    narrow: bool = False
    refine: Annotated[int, Field(ge=0, le=25), BeforeValidator(_number)] = 0
    trials: Many = 60
    at_once: Many = 12
    steering: Range | list[Positive] | Auto = []
    baselines: list[Literal["system", "layer", "direction", Rival]] = ["system", "layer", "direction"]
    rule: Rule = "largest"
    tolerance: Share = 0.05
    reference: Positive = 1.0
    limits: dict[str, Limit] = {}
    pick: Many | Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_auto(cls, raw: Any) -> Any:
        """If the strengths of edits are found automatically, so are those of steering; only their grid is narrowed."""
        if not isinstance(raw, dict):
            return raw
        automatic = AUTO in (raw.get("rho_attn", AUTO), raw.get("rho_mlp", AUTO))
        raw = ({"steering": AUTO} if automatic else {}) | raw
        return raw if automatic and raw.get("method") != "tpe" else raw | {"narrow": False}

    @property
    def automatic(self) -> bool:
        """Whether calibration has to find any strength."""
        return AUTO in (self.rho_attn, self.rho_mlp, self.steering)

    @property
    def rivals(self) -> list[Rival]:
        """The closed-form rivals that are tried, each once."""
        return [kind for kind in RIVALS if kind in self.baselines]

    @property
    def needs_evidence(self) -> list[str]:
        """What in the search needs the evidence of prompts that an edit should leave alone."""
        return [name for name in (PRESERVE, *WITH_EVIDENCE) if name in (*self.variants, *self.baselines)]

    @model_validator(mode="after")
    def _edits(self) -> Search:
        if self.span[0] >= self.span[1]:
            raise ValueError("span goes from a smaller KL to a larger one")
        if all(rhos != AUTO and not any(rhos) for rhos in (self.rho_attn, self.rho_mlp)):
            raise ValueError("Both block types are off everywhere: give rho_attn or rho_mlp a number")
        if self.refine and self.method == "tpe":
            raise ValueError("refine is the grid's second stage: leave it out with method tpe")
        return self


# Settings of the tasks, on which no answer of the search or of the behaviour's test depends.
TASK_SETTINGS = ("task_tokens", "task_samples", "task_sampling", "attack_tokens")


class Evaluation(Section):
    """How answers are made, in the search and on test, and the batch plan, which results may depend on.

    With a `temperature` above 0 answers are sampled, `samples` of each prompt; at 0 they are greedy. Utility tasks have
    their own settings: `task_sampling: model` samples as the model's generation_config says. Answers to attacks are
    `attack_tokens` long.
    """

    new_tokens: Many = 24
    utility_prompts: Many = 24
    utility_tokens: Many = 64
    samples: Many = 1
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_number)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1), BeforeValidator(_number)] = 1.0
    top_k: Count = 0
    rows: Many = 128
    batch: Many = 512
    resamples: Annotated[Many, at_most(100_000)] = 2000
    task_tokens: Many = 512
    task_samples: Many = 1
    task_sampling: Literal["greedy", "model"] = "greedy"
    attack_tokens: Annotated[int, Field(ge=100), BeforeValidator(_number)] = 128

    @model_validator(mode="after")
    def _samples_differ(self) -> Evaluation:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("Greedy answers are all the same: give a temperature above 0 with samples above 1")
        if self.task_samples > 1 and self.task_sampling == "greedy":
            raise ValueError("Greedy answers are all the same: write task_sampling: model with task_samples above 1")
        return self
