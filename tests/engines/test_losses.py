"""How many rows a batch of losses has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steer2edit.engines.transformers import TransformersEngine
from steer2edit.method.intervention import steering


@pytest.mark.parametrize("interventions", [0, 1, 2, 3, 4, 7])
def test_no_batch_has_more_rows_than_the_limit(pico: Any, tokenizer: Any, prompts: Any, interventions: int) -> None:
    model = pico()
    table = [steering({"0.attn": torch.ones(32)}, 0.1 * (i + 1)) for i in range(interventions)]
    pairs = [(p, (5, 6, 7)) for p in prompts]
    whole = TransformersEngine(model, tokenizer).losses(pairs, table)
    engine = TransformersEngine(model, tokenizer)
    engine.logits = 3 * model.config.vocab_size * 3  # three rows of three tokens
    sizes: list[int] = []
    model.register_forward_hook(lambda _, args, kwargs, out: sizes.append(len(out.logits)), with_kwargs=True)
    seen: list[tuple[int, int]] = []
    losses = engine.losses(pairs, table, lambda *steps: seen.append(steps))
    assert max(sizes) <= 3
    for name in ("kl", "nll", "base_nll"):
        torch.testing.assert_close(getattr(losses, name), getattr(whole, name), atol=1e-6, rtol=1e-4)
    assert seen[-1] == (5 * (1 + interventions),) * 2
    assert seen == sorted(seen)
