"""The recipe's sections on the model and the engine, and how they are loaded."""

from __future__ import annotations

import datetime
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ..errors import ModelError
from ..files.reading import read_text
from ..files.schema import Many, Section, _number
from ..models.architectures import Architecture
from ..models.load import _loading, _source, load_model
from ..probing.chat import CHAT, TEMPLATES, Chat, named_template
from .base import GREEDY, Sampling

if TYPE_CHECKING:
    from torch import nn


def _date(value: Any) -> Any:
    # YAML reads an unquoted date as a date, not as a string.
    value = value.isoformat() if type(value) is datetime.date else value
    if not isinstance(value, str) or not re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        raise ValueError("Write it as YYYY-MM-DD")
    return datetime.date.fromisoformat(value).isoformat()


def _named(value: Any) -> Any:
    # accelerate names accelerators by number, which YAML reads as integers.
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
    template: str | None = None
    stop: list[str] | None = None
    enable_thinking: bool | None = None
    date: Annotated[str, BeforeValidator(_date)] = CHAT.date
    architecture: Architecture | None = None
    trust_remote_code: bool = False

    @property
    def chat(self) -> Chat:
        """How messages become text. Raises ModelError or FileError if the template cannot be read."""
        chat = Chat(self.plain, self.enable_thinking, self.date)
        if self.template in TEMPLATES:
            named = named_template(str(self.template))
            chat = replace(chat, template=named.template, stop=named.stop)
        elif self.template is not None:
            chat = replace(chat, template=read_text(self.template))
        return chat if self.stop is None else replace(chat, stop=tuple(self.stop))

    @model_validator(mode="after")
    def _one_template(self) -> Model:
        if self.plain and self.template is not None:
            raise ValueError("model.plain is text without a template: leave plain or template out")
        return self


# Fields of vLLM's EngineArgs that the engine sets itself, and the recipe's key for each; "" if there is none.
_SET_BY_ENGINE = {
    "model": "model.name",
    "model_folder": "model.name",
    "revision": "model.revision",
    "dtype": "model.dtype",
    "trust_remote_code": "model.trust_remote_code",
    "architecture": "model.architecture",
    "chat": "model.plain",
    "python": "engine.python",
    "max_loras": "engine.max_loras",
    "tensor_parallel_size": "engine.tensor_parallel",
    "pipeline_parallel_size": "engine.pipeline_parallel",
    "rows": "evaluation.rows",
    "max_num_seqs": "evaluation.rows",
    **dict.fromkeys(("tokenizer", "worker_extension_cls", "enforce_eager", "skip_tokenizer_init"), ""),
    **dict.fromkeys(("generation_config", "disable_log_stats", "enable_lora", "max_lora_rank", "max_cpu_loras"), ""),
    "lora_target_modules": "",
}


def _are_free(options: dict[str, Any]) -> dict[str, Any]:
    for name in options:
        if name in _SET_BY_ENGINE:
            key = _SET_BY_ENGINE[name]
            raise ValueError(f"Leave {name} out, " + (f"use {key} instead" if key else "the engine sets it itself"))
    return options


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
    options: Annotated[dict[str, Any], AfterValidator(_are_free)] = {}
    distributed: Literal["ray"] | None = None
    address: str | None = None
    replicas: Many = 2
    cpus: Annotated[float, Field(ge=0), BeforeValidator(_number)] = 1
    gpus: Annotated[float, Field(ge=0), BeforeValidator(_number)] = 0

    @model_validator(mode="after")
    def _fits(self) -> EnginePlan:
        if self.name == "vllm" and self.python is None:
            raise ValueError("vLLM runs in an environment of its own: give engine.python, the path of its interpreter")
        return self


def refuse_remote_code(section: Model, trusted: bool) -> None:
    """Raises ModelError if a recipe, which may be a stranger's, lets the model's code run, and the user does not."""
    if section.trust_remote_code and not trusted:
        raise ModelError(
            "the recipe's model runs code of its own",
            got=section.name,
            fix="Read that code; if you trust it, give --trust-remote-code.",
        )


def load_section(section: Model) -> tuple[nn.Module, Any]:
    """The model that a recipe's model section describes, and its tokenizer."""
    names = (
        "dtype", "device", "revision", "trust_remote_code",
        "device_map", "max_memory", "offload_folder", "architecture",
    )  # fmt: skip
    return load_model(section.name, **{name: getattr(section, name) for name in names})


def load_sampling(section: Model) -> Sampling:
    """How the model's own generation_config has its tokens chosen.

    Greedy if it says so, or there is none; where it says nothing of sampling or of a temperature, drawn at 1.
    """
    from transformers import GenerationConfig

    source, _ = _source(section.name, section.revision, section.trust_remote_code)
    try:
        config = GenerationConfig.from_pretrained(source, revision=section.revision or "main")
    except OSError:
        return GREEDY
    if config.do_sample is False:
        return GREEDY
    given = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    return Sampling(**({"temperature": 1.0} | {name: value for name, value in given.items() if value is not None}))


def load_tokenizer(section: Model) -> Any:
    """The tokenizer alone of the model that a recipe's model section describes."""
    from transformers import AutoTokenizer

    source, where = _source(section.name, section.revision, section.trust_remote_code)
    with _loading(section.name):
        return AutoTokenizer.from_pretrained(source, **where)
