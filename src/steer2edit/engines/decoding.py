"""The decode loop: requests wait for slots, every step gives each slot one token, and finished requests leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..models.hooks import Interventions
from ..probing.collect import batches_by_length
from .answers import StopStrings, answer_of
from .base import Answer, Progress, Request
from .sampling import Sampler
from .slots import SlotCache

# Tokens of prompts that run at once: enough to fill the cores, few enough to stay in a CPU's cache.
PREFILL = 2048


class SlotRunner(Protocol):
    """The model behind the slots: what the decoder uses of TransformersEngine.

    Attributes:
        tokenizer, slots: as every engine has them.
        config: of the model's text part. stops: tokens that end a turn.
    """

    tokenizer: Any
    slots: int
    config: Any
    stops: set[int]

    def prefix_cache(
        self, prefix: tuple[int, ...], running: Interventions, rows: Sequence[int]
    ) -> SlotCache | None: ...

    def prefill(
        self,
        requests: Sequence[Request],
        into: Sequence[int],
        cache: SlotCache,
        running: Interventions,
        shared: SlotCache | None,
    ) -> None: ...

    def next_logits(self, token: Tensor, at: Tensor, cache: SlotCache) -> Tensor: ...


class SlotDecoder:
    """Moves one call's requests through the slots. The engine runs the model; this class tracks slots and tokens.

    Args:
        running: the interventions, whose hooks are in the model.
        prefix: tokens that all prompts begin with.
        stop: strings that end an answer.
    """

    def __init__(
        self,
        engine: SlotRunner,
        requests: Sequence[Request],
        max_new_tokens: int,
        running: Interventions,
        sampler: Sampler,
        prefix: tuple[int, ...],
        stop: Sequence[str],
    ):
        self.engine, self.requests, self.max_new_tokens = engine, requests, max_new_tokens
        self.running, self.sampler, self.prefix = running, sampler, prefix
        self.stop, self.strings = stop, StopStrings(engine.tokenizer, stop)
        self.new_ids: list[list[int]] = [[] for _ in requests]
        self.ended = [False] * len(requests)
        self.waiting = list(range(len(requests)))
        self.slots: list[int | None] = [None] * min(engine.slots, len(requests))  # slot → request
        self.token = torch.zeros(len(self.slots), dtype=torch.long)  # the next token to feed, of each slot
        self.at = torch.zeros(len(self.slots), dtype=torch.long)  # its position
        longest = max(len(r.ids) for r in requests)
        self.cache = SlotCache(engine.config.num_hidden_layers, len(self.slots), longest + max_new_tokens)
        self.shared = engine.prefix_cache(prefix, running, [r.row for r in requests])

    def run(self, progress: Progress | None) -> list[Answer]:
        """Answers in the order of the requests."""
        while self.waiting or any(request is not None for request in self.slots):
            free = [slot for slot, request in enumerate(self.slots) if request is None]
            # Admitting costs a pass and compacting a copy, so both wait until a quarter of the slots is free.
            if 4 * len(free) >= len(self.slots):
                if self.waiting:
                    self.admit(free)
                elif free:
                    self.compact()
            self.step()
            if progress:
                self._report(progress)
        answers = zip(self.requests, self.new_ids, self.ended, strict=True)
        return [answer_of(self.engine.tokenizer, *answer, self.stop) for answer in answers]

    def admit(self, free: Sequence[int]) -> None:
        """Puts waiting requests into the free slots and runs their prompts."""
        new = [self.waiting.pop(0) for _ in free[: len(self.waiting)]]
        # Prompts of about the same length run together, which needs little padding.
        lengths = [len(self.requests[i].ids) - len(self.prefix) for i in new]
        for part in batches_by_length(lengths, PREFILL):
            requests = [self.requests[new[i]] for i in part]
            self.engine.prefill(requests, [free[i] for i in part], self.cache, self.running, self.shared)
        for slot, i in zip(free, new, strict=False):
            self.slots[slot] = i
            self.token[slot], self.at[slot] = self.requests[i].ids[-1], len(self.requests[i].ids) - 1
        self._announce()

    def compact(self) -> None:
        """Drops the free slots."""
        kept = [slot for slot, request in enumerate(self.slots) if request is not None]
        rows = torch.tensor(kept)
        self.cache.keep(rows)
        self.slots = [self.slots[slot] for slot in kept]
        self.token, self.at = self.token[rows], self.at[rows]
        self._announce()

    def step(self) -> None:
        """One token of every slot; slots whose answer has ended become free."""
        logits = self.engine.next_logits(self.token, self.at, self.cache)
        self.token = self.sampler.choose(logits, self.slots)
        self.at = self.at + 1
        for slot, request in enumerate(self.slots):
            if request is None or self._take(request, int(self.token[slot])):
                self.slots[slot] = None
                self.token[slot], self.at[slot] = 0, 0

    def _take(self, request: int, token: int) -> bool:
        """Adds a token to an answer. Returns whether the answer is complete."""
        new_ids = self.new_ids[request]
        if token in self.engine.stops:
            self.ended[request] = True
            return True
        new_ids.append(token)
        return len(new_ids) == self.max_new_tokens or self.strings.end(new_ids)

    def _announce(self) -> None:
        self.running.rows([0 if i is None else self.requests[i].row for i in self.slots])

    def _report(self, progress: Progress) -> None:
        # Unfinished answers count by the share of their tokens that they have, so that an ETA is smooth.
        under_way = [len(self.new_ids[i]) for i in self.slots if i is not None]
        whole = len(self.requests) - len(self.waiting) - len(under_way)
        progress(whole + sum(under_way) // self.max_new_tokens, len(self.requests))
