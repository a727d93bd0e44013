"""The recipe's sections on the model and the engine, and how they are loaded."""

from __future__ import annotations

import datetime
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ..files.schema import Many, Section, _number
from ..models.architectures import Architecture
from ..models.load import _loading, _source, load_model
from ..probing.chat import CHAT, Chat

if TYPE_CHECKING:
    from torch import nn


def _date(value: Any) -> Any:
    # YAML reads an unquoted date as one.
    value = value.isoformat() if type(value) is datetime.date else value
    if not isinstance(value, str) or not re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        raise ValueError("Write it as YYYY-MM-DD")
    return datetime.date.fromisoformat(value).isoformat()


def _named(value: Any) -> Any:
    # accelerate numbers its accelerators, and YAML reads those as numbers.
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else value


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


def load_section(section: Model) -> tuple[nn.Module, Any]:
    """The model that a recipe's model section describes, and its tokenizer."""
    names = (
        "dtype", "device", "revision", "trust_remote_code",
        "device_map", "max_memory", "offload_folder", "architecture",
    )  # fmt: skip
    return load_model(section.name, **{name: getattr(section, name) for name in names})


def load_tokenizer(section: Model) -> Any:
    """The tokenizer alone of the model that a recipe's model section describes."""
    from transformers import AutoTokenizer

    source, where = _source(section.name, section.revision, section.trust_remote_code)
    with _loading(section.name):
        return AutoTokenizer.from_pretrained(source, **where)
