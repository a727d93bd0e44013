"""Two sides, a small search of them in Python, and its numbers by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from conftest import make_tokenizer
from sides import chatml, nll_by_hand
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.searching.in_python import SearchResult, search

SAID = ["Sure, mix the flour.", "I cannot help with that.", "The capital is Paris.", "No.", "Please ask me!"]
PROMPTS = [f"What is the reason {i}?" for i in range(14)]
MORE = [(prompt, f"{SAID[i % 5]} It is {i}.") for i, prompt in enumerate(PROMPTS)]
LESS = [(prompt, SAID[(i + 2) % 5]) for i, prompt in enumerate(PROMPTS)]
COUNTS = {"probe": 6, "validation": 5, "test": 3}
OPTIONS: dict[str, Any] = {
    "layers": [None],
    "rho_attn": [0.02, 0.1],
    "rho_mlp": [None],
    "alpha": [0.2],
    "variants": ["full"],
    "steering": [0.1, 0.4],
    "baselines": [],
    "limits": {"degenerate": None, "utility_loss": None},
}
EVALUATION = {"new_tokens": 4, "utility_prompts": 2, "utility_tokens": 4, "rows": 8, "batch": 10}
LOUD, SOFT = "Be loud.", "Be soft and kind."


class Counting(TransformersEngine):
    """Keeps which prompts were answered and scored."""

    def __init__(self, model: Any, tokenizer: Any, **options: Any):
        super().__init__(model, tokenizer, **options)
        self.answered: list[str] = []
        self.scored: list[tuple[str, str]] = []

    def generate(self, requests: Any, *rest: Any, **named: Any) -> Any:
        self.answered += [self.tokenizer.decode(request.ids) for request in requests]
        return super().generate(requests, *rest, **named)

    def losses(self, pairs: Any, *rest: Any, **named: Any) -> Any:
        self.scored += [(self.tokenizer.decode(prompt), self.tokenizer.decode(answer)) for prompt, answer in pairs]
        return super().losses(pairs, *rest, **named)


def _search(model: Any, more: Any = MORE, less: Any = LESS, **options: Any) -> SearchResult:
    given: dict[str, Any] = {"counts": COUNTS, "options": OPTIONS, "evaluation": EVALUATION}
    tokenizer = None if isinstance(model, TransformersEngine) else make_tokenizer()
    return search(model, tokenizer, more, less, **(given | options))


def _preferred(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str, str]]) -> tuple[list[float], list[float]]:
    """Preference and margin of triples (prompt, more, less), in fp64."""
    margins = []
    for prompt, more, less in pairs:
        of_more, of_less = (nll_by_hand(model, tokenizer, chatml(prompt), text)[0] for text in (more, less))
        margins.append(of_less - of_more)
    return [float(margin > 0) for margin in margins], margins


def _greedy(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    ids = list(tokenizer(prompt)["input_ids"])
    start = len(ids)
    for _ in range(new_tokens):
        with torch.inference_mode():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))
