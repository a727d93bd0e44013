"""How well the cost of a model follows from its shape: random models of three sizes, predicted from a matrix product
and a product with a vector, against what the engine takes.

Each speed is predicted once and measured by the same engine that suites use.

Run: python benchmarks/paper_cost.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.method.intervention import NOTHING
from steer2edit.models.load import load_model
from steer2edit.paper.machine import Shape, estimate
from steer2edit.paper.speed import _seconds, cpu_here
from timing import report

# Layers, width, heads, heads of keys and values, neurons.
SIZES = {"10 M": (6, 320, 5, 5, 960), "40 M": (12, 512, 8, 4, 1408), "161 M": (20, 832, 13, 13, 2240)}
ROWS, PROMPT, TOKENS = 32, 64, 16


def main() -> None:
    _, tokenizer = load_model("embedded:smollm2-135m-instruct", dtype="float32", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        hardware = cpu_here(Path(folder))
    print(f"operations {hardware.compute / 1e9:.0f} G/s, memory {hardware.bandwidth / 1e9:.1f} GB/s, fp32")
    worst = 1.0
    for name, (layers, d, heads, kv_heads, neurons) in SIZES.items():
        shape = Shape(
            model_type="llama",
            layers=layers,
            d=d,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=64,
            neurons=neurons,
            vocabulary=8192,
            tied=True,
        )
        found = estimate(shape, hardware, ROWS, PROMPT + TOKENS / 2)
        read, written = measured(shape, tokenizer)
        for what, predicted, taken in (("read", found.speed.read, read), ("written", found.speed.written, written)):
            ratio = taken / predicted
            worst = max(worst, ratio, 1 / ratio)
            print(f"{name}: {what} {taken:.0f} tokens/s, predicted {predicted:.0f}: {ratio:.2f}")
    report("largest factor between a speed and its prediction", worst, ("<=", 2.0))


def measured(shape: Shape, tokenizer: object) -> tuple[float, float]:
    """Tokens read and tokens written a second."""
    config = AutoConfig.for_model(
        shape.model_type, vocab_size=shape.vocabulary, hidden_size=shape.d, intermediate_size=shape.neurons,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, tie_word_embeddings=shape.tied, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    engine = TransformersEngine(model, tokenizer, rows=ROWS)
    engine.stops = set()
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, shape.vocabulary, (ROWS, PROMPT), generator=draw).tolist()
    requests = [Request(tuple(ids)) for ids in prompts]
    one = _seconds(lambda: engine.generate(requests, [NOTHING], 1), 3)
    many = _seconds(lambda: engine.generate(requests, [NOTHING], 1 + TOKENS), 3)
    return ROWS * PROMPT / one, ROWS * TOKENS / (many - one)


if __name__ == "__main__":
    main()
