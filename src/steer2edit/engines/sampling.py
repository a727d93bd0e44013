"""The choice of the next token: the likeliest one, or a draw by each request's own generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .base import Request, Sampling


class Draw:
    """How the tokens of one request are chosen. A request's draws depend only on its own seed, not on other rows."""

    def __init__(self, sampling: Sampling, seed: int):
        self.sampling = sampling
        self.greedy = sampling.temperature == 0
        self._generator = None if self.greedy else torch.Generator().manual_seed(seed)

    def number(self) -> float:
        """The next number in [0, 1); one is taken per token."""
        return float(torch.rand((), generator=self._generator))


def choose(logits: Tensor, draws: Sequence[Draw | None]) -> Tensor:
    """The next token of each row, on the CPU.

    Args:
        logits: [rows, vocabulary].
        draws: how each row's token is chosen; None for a row without a request, whose token means nothing.
    """
    if all(draw is None or draw.greedy for draw in draws):
        return logits.argmax(dim=-1).cpu()
    by_sampling: dict[Sampling, list[int]] = {}
    for row, draw in enumerate(draws):
        if draw is not None:
            by_sampling.setdefault(draw.sampling, []).append(row)
    tokens = torch.zeros(len(draws), dtype=torch.long)
    for sampling, rows in by_sampling.items():
        some = logits if len(rows) == len(draws) else logits[torch.tensor(rows, device=logits.device)]
        if sampling.temperature == 0:
            tokens[rows] = some.argmax(dim=-1).cpu()
        else:
            numbers = [draw.number() for row in rows if (draw := draws[row]) is not None]
            tokens[rows] = _drawn(some, sampling, torch.tensor(numbers))
    return tokens


def _drawn(logits: Tensor, sampling: Sampling, numbers: Tensor) -> Tensor:
    """One token for each row of logits [rows, vocabulary], by a number in [0, 1) each."""
    scores = logits.float()
    # The likeliest token gets the score 0, so that a temperature close to 0 does not overflow.
    scores = scores - scores.amax(dim=-1, keepdim=True)
    unused: Any = None  # the warpers take the tokens so far and do not read them
    cumulative = _warpers(sampling)(unused, scores).softmax(dim=-1).cumsum(dim=-1)  # [rows, vocabulary]
    # The first token whose cumulative probability is above the number. Filtered tokens add nothing and are never it.
    threshold = numbers.to(cumulative)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    # Logits that are not finite have no such token.
    return drawn.clamp_max(logits.shape[-1] - 1).cpu()


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


class ChosenOnly(LogitsProcessor):
    """Leaves each row of transformers' own loop only the token that is chosen for it."""

    def __init__(self, draws: Sequence[Draw]):
        self.draws = draws

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = choose(scores, self.draws).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


def draws_of(sampling: Sampling, requests: Sequence[Request]) -> list[Draw]:
    """A draw for each request, by its own seed."""
    return [Draw(sampling, request.seed) for request in requests]
