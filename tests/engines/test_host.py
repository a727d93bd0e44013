"""What a host does between the transformers model and vLLM, and which options a recipe may give."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from steer2edit.engines import host as host_module
from steer2edit.engines import vllm
from steer2edit.engines.plan import EnginePlan, Model
from steer2edit.errors import RecipeError
from steer2edit.files.schema import parse


def test_the_models_memory_is_released_before_vllm_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Weights:
        pass

    events: list[str] = []
    references: list[Any] = []

    def load(_: Any) -> Any:
        weights = Weights()
        references.append(weakref.ref(weights))
        return weights, None

    def clear(garbage_collection: bool = False) -> None:
        assert garbage_collection
        gc.collect()
        events.append("cleared" if references[0]() is None else "cleared too early")

    monkeypatch.setattr(host_module, "load_section", load)
    monkeypatch.setattr(host_module, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(host_module, "local_folder", lambda *_: "")
    monkeypatch.setattr(host_module, "clear_device_cache", clear)
    monkeypatch.setattr(vllm, "VllmEngine", lambda *_, **__: events.append("vLLM") or object())
    host = host_module.Host(Model(name="m"), EnginePlan(name="vllm", python="python"), rows=2)
    host.call(lambda model: None)
    assert host.engine is not None
    assert events == ["cleared", "vLLM"]


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("dtype", "use model.dtype instead"),
        ("tokenizer", "the engine sets it itself"),
        ("max_num_seqs", "use evaluation.rows instead"),
        ("tensor_parallel_size", "use engine.tensor_parallel instead"),
        *((name, f"Leave {name} out") for name in sorted(vllm._OURS)),
    ],
)
def test_options_that_the_engine_sets_are_refused_with_the_right_key(name: str, fix: str) -> None:
    with pytest.raises(RecipeError, match=rf"(?s)options cannot be used.*{fix}"):
        parse(EnginePlan, {"name": "vllm", "python": "python", "options": {name: "x"}})


def test_other_options_are_passed_on() -> None:
    plan = parse(EnginePlan, {"name": "vllm", "python": "python", "options": {"max_model_len": 512, "block_size": 16}})
    assert plan.options == {"max_model_len": 512, "block_size": 16}
