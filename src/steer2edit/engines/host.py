"""A model in this process: as the engine that makes text or, for the probe and the scores, as weights and hooks.

With transformers both are one object. vLLM holds its own copy and takes most of the memory, so only one of the two is
loaded at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

from accelerate.utils.memory import clear_device_cache

from ..models.load import local_folder
from ..models.weights import device_of
from ..probing.collect import PassSums, run_pass
from ..probing.plan import Plan
from ..progress import say
from .base import Engine, Progress
from .plan import EnginePlan, Model, load_section, load_tokenizer

T = TypeVar("T")


class Host:
    """Loads the engine or the model when it is first needed.

    Args:
        rows: the engine's slots.
    """

    def __init__(self, model: Model, plan: EnginePlan, rows: int):
        self.section, self.plan, self.rows = model, plan, rows

    @cached_property
    def engine(self) -> Engine:
        """Raises ModelError if the model cannot be loaded, Steer2EditError if vLLM does not start."""
        model, plan = self.section, self.plan
        say(f"loading {model.name}")
        if plan.name == "transformers":
            from .transformers import TransformersEngine

            return TransformersEngine(*load_section(model), rows=self.rows, chat=model.chat)
        from .vllm import VllmEngine

        if self.__dict__.pop("_model", None) is not None:
            clear_device_cache(garbage_collection=True)  # vLLM measures the free memory when it starts
        assert plan.python is not None
        return VllmEngine(
            local_folder(model.name, model.revision),
            load_tokenizer(model),
            python=plan.python,
            rows=self.rows,
            chat=model.chat,
            dtype=model.dtype,
            max_loras=plan.max_loras,
            tensor_parallel_size=plan.tensor_parallel,
            pipeline_parallel_size=plan.pipeline_parallel,
            trust_remote_code=model.trust_remote_code,
            architecture=model.architecture,
            **plan.options,
        )

    @cached_property
    def _model(self) -> Any:
        say(f"loading {self.section.name}")
        return load_section(self.section)[0]

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs `function(model, *arguments)`."""
        if self.plan.name == "vllm":
            self.close()
            return function(self._model, *arguments)
        engine: Any = self.engine
        return function(engine.model, *arguments)

    def run_pass(self, plan: Plan, batch_tokens: int, progress: Progress | None = None) -> PassSums:
        """The probe's pass over all of a plan."""
        return self.call(run_pass, plan, None, batch_tokens, progress)

    def where(self) -> dict[str, str]:
        """What runs: the model's dtype and device, or vLLM's version."""
        engine = self.__dict__.get("engine")
        if version := getattr(engine, "version", None):
            return {"vllm": version}
        model = getattr(engine, "model", None)
        return {} if model is None else {"dtype": str(model.dtype)[6:], "device": str(device_of(model))}

    def close(self) -> None:
        """Drops the engine and ends its worker process if it has one."""
        engine = self.__dict__.pop("engine", None)
        if hasattr(engine, "close"):
            engine.close()
