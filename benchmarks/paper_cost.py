"""How well the cost of a model follows from its shape: random models of three sizes and the embedded one, predicted
from a few operations of this machine, against what the engine takes.

Each speed is predicted once and measured by the same engine that suites use: tokens of prompts that are read, tokens
that are written, and tokens of given texts that are scored. Tokens of a training step of every weight are printed, too.

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
from steer2edit.paper.machine import Shape, Speed, estimate
from steer2edit.paper.speed import _seconds, _steps, cpu_here
from timing import report

# Layers, width, heads, heads of keys and values, neurons, vocabulary.
SIZES = {
    "10 M": (6, 320, 5, 5, 960, 8192),
    "40 M": (12, 512, 8, 4, 1408, 8192),
    "161 M": (20, 832, 13, 13, 2240, 8192),
    "embedded, 135 M": (30, 576, 9, 3, 1536, 49152),
}
ROWS, PROMPT, TOKENS, GIVEN = 32, 64, 16, 24
EMBEDDED = "embedded:smollm2-135m-instruct"
# Predicted by measured.
LOWEST, HIGHEST = 0.7, 1.3


def main() -> None:
    real, tokenizer = load_model(EMBEDDED, dtype="float32", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        hardware = cpu_here(Path(folder))
    print(f"operations {hardware.compute / 1e9:.0f} G/s, memory {hardware.bandwidth / 1e9:.1f} GB/s, fp32")
    ratios: list[float] = []
    for name, (layers, d, heads, kv_heads, neurons, vocabulary) in SIZES.items():
        shape = Shape(
            model_type="llama",
            layers=layers,
            d=d,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=64,
            neurons=neurons,
            vocabulary=vocabulary,
            tied=True,
        )
        predicted = estimate(shape, hardware, ROWS, PROMPT + TOKENS / 2).speed
        taken = measured(real if name.startswith("embedded") else random_model(shape), tokenizer)
        for what in ("read", "written", "scored", "full"):
            expected, found = getattr(predicted, what), getattr(taken, what)
            if what != "full":
                ratios.append(expected / found)
            print(f"{name}: {what} {found:.0f} tokens/s, predicted {expected:.0f}: {expected / found:.2f}")
    report("lowest ratio of a predicted speed to the measured one", min(ratios), (">=", LOWEST))
    report("highest ratio of a predicted speed to the measured one", max(ratios), ("<=", HIGHEST))


def random_model(shape: Shape) -> torch.nn.Module:
    config = AutoConfig.for_model(
        shape.model_type, vocab_size=shape.vocabulary, hidden_size=shape.d, intermediate_size=shape.neurons,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, tie_word_embeddings=shape.tied, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def measured(model: torch.nn.Module, tokenizer: object) -> Speed:
    """The speeds that the model has; training last, since it changes the model."""
    engine = TransformersEngine(model, tokenizer, rows=ROWS)
    engine.stops = set()
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, 8192, (ROWS, PROMPT), generator=draw).tolist()
    requests = [Request(tuple(ids)) for ids in prompts]
    engine.generate(requests[:2], [NOTHING], 2)
    one = _seconds(lambda: engine.generate(requests, [NOTHING], 1), 2)
    many = _seconds(lambda: engine.generate(requests, [NOTHING], 1 + TOKENS), 2)
    pairs = [(tuple(prompts[0]), tuple(ids[:GIVEN])) for ids in prompts[1:9]]
    rows = 1 + 8  # the original model's row, and one for each of the table
    read, written = ROWS * PROMPT / one, ROWS * TOKENS / (many - one)
    # Every row reads the prompt once.
    scored = _seconds(lambda: engine.losses(pairs, [NOTHING] * 8), 2) - rows * PROMPT / read
    every, lora = _steps(model, 8)
    return Speed(written, read, len(pairs) * GIVEN * rows / scored, lora=lora, full=every)


if __name__ == "__main__":
    main()
