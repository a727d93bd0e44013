"""What rounding to each format of few bits keeps of an edit of the embedded model, and what that does to its answers.

The edited weights of the model are packed in each format, edited in it and read again. The table has, for rounding as
an export does it and for rounding to the nearest number: the share of the edit that is kept, the noise beside it, and
KL(edit ‖ rounded edit) as a share of KL(edit ‖ base), per token of some prompts. 0 is the edit, 1 as far as the base.

Run: python benchmarks/few_bits.py [--edit edit.safetensors]
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import torch
from torch import Tensor

import steer2edit as s2e
from steer2edit.artefacts import few_bits
from steer2edit.artefacts.bases import Base
from steer2edit.artefacts.formats.base import Packed, Tensors
from steer2edit.artefacts.formats.ggml import Ggml
from steer2edit.behaviours.prompts import data_path, load_prompts
from steer2edit.files.shards import Stored
from steer2edit.method.change import Change
from steer2edit.models.embedded import EMBEDDED
from steer2edit.models.weights import weight_of

PACKINGS = Path(__file__).parents[1] / "tests" / "packings.py"
NAMES = {
    "fp8 tensor": "fp8, a scale per tensor",
    "fp8 row": "fp8, a scale per row",
    "fp8 block": "fp8, a scale per block of 32 × 32",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "gptq": "GPTQ, 4 bits, groups of 16",
    "gptq 8 bits": "GPTQ, 8 bits, groups of 16",
    "awq": "AWQ, groups of 16",
    "nf4": "bitsandbytes nf4",
    "nf4 twice": "bitsandbytes nf4, quantised twice",
    "int8": "bitsandbytes int8",
}
GGML = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")

# A format's name, and a function that packs a weight.
Case = tuple[str, Any]


def cases() -> Iterator[Case]:
    spec = importlib.util.spec_from_file_location("packings", PACKINGS)
    assert spec is not None
    assert spec.loader is not None
    packings = importlib.util.module_from_spec(spec)
    sys.modules["packings"] = packings
    spec.loader.exec_module(packings)
    for scheme, title in NAMES.items():
        made = packings.SCHEMES[scheme]
        yield title, lambda change, weight, made=made: by_scheme(made, change, weight)
    for kind in GGML:
        yield f"GGUF {kind}", lambda change, weight, kind=kind: by_gguf(kind, weight)


def by_scheme(scheme: Any, change: Change, weight: Tensor) -> tuple[Packed, Tensors]:
    name = change.site.tensor
    tensors = scheme.pack(name, weight)
    dtypes = {torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32"}
    held = {}
    for key, tensor in tensors.items():
        dtype = tensor.dtype if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1 else None
        dtype_name = dtypes.get(tensor.dtype, str(tensor.dtype).replace("torch.float", "F"))
        held[key] = Stored(key, dtype, dtype_name, tuple(tensor.shape), 0, tensor.numel() * tensor.element_size())
    packed = Base(Path(), {"model.safetensors": held}, scheme.settings).packed(change.site)
    assert packed is not None
    return packed, {part.role: tensors[part.tensor].contiguous() for part in packed.parts}


def by_gguf(kind: str, weight: Tensor) -> tuple[Packed, Tensors]:
    raw = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    return Packed(Ggml(kind), ()), {"codes": torch.from_numpy(raw)}


def harmful_prompts(split: Any, count: int) -> list[str]:
    items = load_prompts(
        data_path("builtin:safety_prompts"), ("harmful", "benign", "borderline"), split, {"harmful": count}
    )
    return [str(item.prompt) for item in items]


def make_edit(model: Any, tokenizer: Any) -> s2e.Edit:
    """An edit towards declining, of the middle third of the layers, as in the demo."""
    prompts = harmful_prompts("probe", 60)
    refusal, answer = "I can't help with that request.", "Sure, here is what you asked for."
    positive = [s2e.Trace(prompt, refusal, "positive") for prompt in prompts]
    negative = [s2e.Trace(prompt, answer, "negative") for prompt in prompts]
    probe = s2e.collect(model, tokenizer, positive, negative)
    return s2e.score(model, probe).edit(rho_attn=0.25, rho_mlp=None, alpha=0.4, layers="33%-67%")


def log_probabilities(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Of the next token, at every token of some texts [tokens, vocabulary]."""
    rows = []
    with torch.no_grad():
        for text in texts:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).input_ids
            rows.append(model(ids).logits[0, -8:].float().log_softmax(-1))
    return torch.cat(rows)


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p ‖ q), the mean over tokens."""
    return float((p.exp() * (p - q)).sum(-1).mean())


def nearest(weight: Tensor, delta: Tensor, around: Any, start: int) -> Tensor:
    return weight + delta


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--edit", type=Path)
    options.add_argument("--strength", type=float, default=1.0)
    options.add_argument("--only", help="formats whose names match this expression")
    options.add_argument("--texts", type=int, default=12)
    given = options.parse_args()
    model, tokenizer = s2e.load_model(EMBEDDED, dtype="float32", device="cpu")
    edit = s2e.Edit.load(given.edit) if given.edit else make_edit(model, tokenizer)
    edit = edit.with_strength(given.strength)
    changes = edit.changes()
    texts = harmful_prompts("validation", given.texts)
    plain = {key: weight_of(model, change.site).detach().clone() for key, change in changes.items()}
    print("| format | kept | noise | KL to the edit | nearest: kept | noise | KL to the edit |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for title, pack in cases():
        if given.only and not re.search(given.only, title):
            continue
        packed = {key: pack(change, plain[key]) for key, change in changes.items()}
        weights = {key: whole(*packed[key], changes[key]) for key in changes}
        base = with_weights(model, tokenizer, texts, changes, weights)
        edited = with_weights(
            model, tokenizer, texts, changes, {key: weights[key] + change.delta() for key, change in changes.items()}
        )
        cells = []
        for rule in (few_bits.spread, nearest):
            with mock.patch.object(few_bits, "spread", rule):
                copies = {key: {role: t.clone() for role, t in packed[key][1].items()} for key in changes}
                roundings = [
                    few_bits.edited(packed[key][0], copies[key], change.site, change) for key, change in changes.items()
                ]
            rounded = with_weights(
                model,
                tokenizer,
                texts,
                changes,
                {key: whole(packed[key][0], copies[key], changes[key]) for key in changes},
            )
            one = few_bits.together(roundings)
            cells += [
                f"{one.kept:.2f}",
                f"{one.noise:.2f}",
                f"{kl(edited, rounded) / max(kl(edited, base), 1e-12):.2f}",
            ]
        print(f"| {title} | {' | '.join(cells)} |", flush=True)
    with torch.no_grad():
        for key, change in changes.items():
            weight_of(model, change.site).copy_(plain[key])
    total = math.sqrt(sum(float(change.delta().square().sum()) for change in changes.values()))
    print(f"{len(changes)} weights, ‖ΔW‖ = {total:.3g}")


def whole(packed: Packed, tensors: Tensors, change: Change) -> Tensor:
    rows = few_bits.row_blocks(packed.format, tensors, change.site)
    return torch.cat([packed.format.dequantise(some) for _, _, some in rows])


def with_weights(model: Any, tokenizer: Any, texts: list[str], changes: Any, weights: dict[str, Tensor]) -> Tensor:
    """The model's log probabilities with these weights in it."""
    with torch.no_grad():
        for key, change in changes.items():
            weight_of(model, change.site).copy_(weights[key])
    return log_probabilities(model, tokenizer, texts)


if __name__ == "__main__":
    main()
