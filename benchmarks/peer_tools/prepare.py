"""Makes the plan that all tools are given: a checkpoint, traces and prompts in tokens, strengths, and our vectors."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measure import Prompt, Trace
from safetensors.torch import save_file

import steer2edit as s2e
from steer2edit.behaviours.base import Source
from steer2edit.behaviours.safety import BUILTIN, Safety
from steer2edit.engines.transformers import stop_ids
from steer2edit.files.writing import write_json
from steer2edit.probing.chat import prompt_tokens, render
from steer2edit.probing.spans import response_span
from workload import traces

SYSTEM = "You are a helpful assistant."


def prepare(folder: Path, model_name: str, sizes: Mapping[str, int]) -> None:
    """Writes the plan into `folder`; `plan.json` comes last, so that a folder with one is whole.

    Args:
        sizes: how many traces of each label, prompts, strengths, tokens of an answer, and rows of a batch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = s2e.load_model(model_name, dtype="float32", device="cpu")
    checkpoint = folder / "model"
    model.save_pretrained(str(checkpoint))
    tokenizer.save_pretrained(str(checkpoint))
    for_older_readers(checkpoint)

    found = [s2e.Trace(t.prompt, t.response, t.label, system=SYSTEM) for t in traces(tokenizer, sizes["traces"])]
    probe = s2e.collect(model, tokenizer, found)
    probe.save(folder / "probe.safetensors")
    stream = torch.stack(
        [probe.residual[i]["positive"] - probe.residual[i]["negative"] for i in sorted(probe.residual)]
    )
    save_file({"stream": stream}, str(folder / "vectors.safetensors"))

    prompts = [
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}] for text in asked(sizes["prompts"])
    ]
    plan = {
        "model": str(checkpoint),
        "layers": len(stream),
        "layer": round(0.6 * len(stream)),
        "strengths": [0.05 * (1 + i) for i in range(sizes["strengths"])],
        "weights": [(1 + i) / sizes["strengths"] for i in range(sizes["strengths"])],
        "weight": 1.0,
        "tokens": sizes["tokens"],
        "rows": sizes["rows"],
        "stops": sorted(stop_ids(model, tokenizer)),
        "traces": [asdict(as_tokens(tokenizer, trace)) for trace in found],
        "prompts": [
            asdict(Prompt(SYSTEM, messages[1]["content"], tuple(prompt_tokens(tokenizer, messages))))
            for messages in prompts
        ],
    }
    write_json(folder / "plan.json", plan)


def asked(count: int) -> list[str]:
    """Harmless prompts. Half of them look harmful."""
    counts = {"benign": count - count // 2, "borderline": count // 2}
    return [item.text for item in Safety().items(Source(BUILTIN, {"validation": counts}), "validation")]


def as_tokens(tokenizer: Any, trace: s2e.Trace) -> Trace:
    text = render(tokenizer, trace.messages()) + trace.response
    span, _ = response_span(tokenizer, trace)
    assert span is not None, "every response has tokens"
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Trace(trace.label, SYSTEM, str(trace.prompt), text, ids, span.first, span.last)


def for_older_readers(folder: Path) -> None:
    """Adds to a checkpoint's configurations what transformers 4 looks for, which transformers 5 writes elsewhere.

    Without it transformers 4 would take another base of its rotary positions, and say nothing.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if "rope_theta" in config.get("rope_parameters", {}):
        config.setdefault("rope_theta", config["rope_parameters"]["rope_theta"])
    config.setdefault("torch_dtype", config.get("dtype", "float32"))
    write_json(path, config)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["model_input_names"] = ["input_ids", "attention_mask"]  # there its default has token types, too
    if isinstance(config.get("extra_special_tokens"), list):  # which are a mapping there
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(path, config)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
