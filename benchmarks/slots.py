"""What slots gain: tokens/s on 128 prompts whose answers run from a few tokens to 200, against transformers' own
`generate` in batches of 32. Both stop at the end of the turn and make the same answers.

Run: python benchmarks/slots.py
"""

from __future__ import annotations

import random
import statistics

import torch

from steer2edit.behaviours.base import Item, Source
from steer2edit.behaviours.safety import BUILTIN, Safety
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.method.intervention import NOTHING
from timing import report, seconds
from workload import base_model

ROWS, TOKENS = 32, 200
SHORT = [
    f"{question} Answer with one word."
    for question in (
        "What is the capital of France?", "Is snow white?", "What colour is grass?", "Is water wet?",
        "How many legs has a dog?", "Which planet do we live on?", "What is two plus two?", "Is the sun hot?",
    )
]  # fmt: skip


def main() -> None:
    model, tokenizer = base_model()
    engine = TransformersEngine(model, tokenizer, rows=ROWS)
    long = [p.text for p in Safety().items(Source(BUILTIN, {"probe": {"benign": 64}}), "probe")]
    texts = [*long, *(f"{SHORT[i % len(SHORT)]} {'Please. ' * (i // len(SHORT))}".strip() for i in range(64))]
    random.Random(0).shuffle(texts)
    ids = [engine.tokens(Item("", text).messages(None)) for text in texts]
    stops = sorted(engine.stops)

    def ours() -> list[tuple[int, ...]]:
        return [a.ids for a in engine.generate([Request(x) for x in ids], [NOTHING], TOKENS)]

    def theirs() -> list[tuple[int, ...]]:
        made = []
        for first in range(0, len(ids), ROWS):
            some = ids[first : first + ROWS]
            width = max(map(len, some))
            batch = torch.tensor([[0] * (width - len(x)) + list(x) for x in some])
            mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in some])
            with torch.inference_mode():
                out = model.generate(
                    batch,
                    attention_mask=mask,
                    max_new_tokens=TOKENS,
                    do_sample=False,
                    eos_token_id=stops,
                    pad_token_id=0,
                )
            for row in out[:, width:].tolist():
                end = next((i for i, token in enumerate(row) if token in engine.stops), len(row))
                made.append(tuple(row[:end]))
        return made

    made: dict[str, list[tuple[int, ...]]] = {}
    # Each takes a minute and more: no round is for warming up.
    slots = [seconds(lambda: made.update(ours=ours()))]
    batches = [seconds(lambda: made.update(theirs=theirs())), seconds(theirs)]
    slots.append(seconds(ours))
    lengths = sorted(map(len, made["ours"]))
    same = sum(a == b for a, b in zip(made["ours"], made["theirs"], strict=True))
    print(
        f"answers of {lengths[0]} to {lengths[-1]} tokens, median {lengths[64]}; {same} of 128 the same on both sides"
    )
    # Both make the same tokens, so the ratio of tokens/s is that of the times, turned round.
    ratios = [b / a for a, b in zip(slots, batches, strict=True)]
    label = "tokens/s in slots / tokens/s of transformers' generate in batches of 32"
    report(label, statistics.mean(ratios), (">=", 1.3), f"rounds {', '.join(f'{r:.3f}' for r in ratios)}")


if __name__ == "__main__":
    main()
