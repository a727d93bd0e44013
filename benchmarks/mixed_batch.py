"""What interventions cost: tokens/s of a batch whose rows carry 16 different edits against the base model's.

Run: python benchmarks/mixed_batch.py
"""

from __future__ import annotations

from steer2edit.behaviours.base import Source
from steer2edit.behaviours.safety import BUILTIN, Safety
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.method.intervention import NOTHING
from timing import ratio
from workload import base_model, scores

TOKENS = 32


def main() -> None:
    model, tokenizer = base_model()
    engine = TransformersEngine(model, tokenizer, rows=64)
    engine.stops = set()  # every answer takes TOKENS tokens, so that both sides make the same number
    found = scores()
    grid = [(rho, alpha) for rho in (0.2, 0.3, 0.4, 0.5) for alpha in (0.0, 0.02, 0.04, 0.06)]
    edits = [found.edit(rho_attn=rho, rho_mlp=rho, alpha=a).intervention(f"{rho}-{a}") for rho, a in grid]
    assert all(len(edit.terms) == 60 for edit in edits), "each edit must touch all sites"
    prompts = Safety().items(Source(BUILTIN, {"probe": {"benign": 64}}), "probe")
    ids = [engine.tokens(p.messages(None)) for p in prompts]

    def mixed() -> None:
        engine.generate([Request(x, i % 16) for i, x in enumerate(ids)], edits, TOKENS)

    def base() -> None:
        engine.generate([Request(x) for x in ids], [NOTHING], TOKENS)

    # Both make the same number of tokens, so tokens/s of the mixed batch over the base's is base's time over its own.
    ratio(base, mixed, 7, (">=", 0.9), "tokens/s with 16 different edits in the batch / tokens/s of the base model")


if __name__ == "__main__":
    main()
