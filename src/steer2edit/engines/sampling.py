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


class Sampler:
    """Chooses tokens for the requests of one call.

    Every request has its own generator, seeded by `request.seed`, and takes one number per token from it. Its draws do
    not depend on the other rows.
    """

    def __init__(self, sampling: Sampling, requests: Sequence[Request]):
        self.greedy = sampling.temperature == 0
        self.generators: list[torch.Generator] = []
        self.warpers = LogitsProcessorList()
        if self.greedy:
            return
        self.generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        self.warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def choose(self, logits: Tensor, requests: Sequence[int | None]) -> Tensor:
        """The next token of each row, on the CPU.

        Args:
            logits: [rows, vocabulary].
            requests: which request each row is; None for a row without one, whose token means nothing.
        """
        if self.greedy:
            return logits.argmax(dim=-1).cpu()
        scores = logits.float()
        # The likeliest token gets the score 0, so that a temperature close to 0 does not overflow.
        scores = scores - scores.amax(dim=-1, keepdim=True)
        unused: Any = None  # the warpers take the tokens so far and do not read them
        warped = self.warpers(unused, scores)
        cumulative = warped.softmax(dim=-1).cumsum(dim=-1)  # [rows, vocabulary]
        draws = torch.tensor([0.0 if i is None else self._draw(i) for i in requests])
        # The first token whose cumulative probability is above the draw. Filtered tokens add nothing and are never it.
        return torch.searchsorted(cumulative, draws.to(cumulative)[:, None] * cumulative[:, -1:], right=True)[
            :, 0
        ].cpu()

    def _draw(self, request: int) -> float:
        return float(torch.rand((), generator=self.generators[request]))


class ChosenOnly(LogitsProcessor):
    """Leaves each row of transformers' own loop only the token that the sampler chooses.

    Args:
        requests: which request each row is.
    """

    def __init__(self, sampler: Sampler, requests: Sequence[int]):
        self.sampler, self.requests = sampler, requests

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self.sampler.choose(scores, self.requests).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)
