"""The decode loop: requests wait for slots, every step gives each slot one token, and finished requests leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..models.hooks import Interventions
from ..probing.collect import batches_by_length
from .answers import StopStrings, answer_of
from .base import Answer, Progress, Request
from .sampling import Draw, choose
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


class Row:
    """One request on its way through the slots.

    Args:
        limit: the most tokens of its answer.
        strings: the stop strings that end it.

    Attributes:
        ids: the tokens of its answer so far.
        ended: whether the model ended its turn or wrote a stop string. done: whether the answer is complete.
    """

    def __init__(self, request: Request, limit: int, draw: Draw, strings: StopStrings):
        self.request, self.limit, self.draw, self.strings = request, limit, draw, strings
        self.ids: list[int] = []
        self.ended = self.done = False

    def take(self, token: int, stops: set[int]) -> None:
        """Adds a token to the answer, which may end with it."""
        if token in stops:
            self.ended = self.done = True
            return
        self.ids.append(token)
        self.done = len(self.ids) == self.limit or self.strings.end(self.ids)

    def answer(self, tokenizer: Any) -> Answer:
        return answer_of(tokenizer, self.request, self.ids, self.ended, self.strings.stop)

    def so_far(self) -> Request:
        """The request with the tokens that its answer has, after which it goes on."""
        return replace(self.request, ids=(*self.request.ids, *self.ids)) if self.ids else self.request


class Slots:
    """The rows of the decode batch: they are admitted, get a token a step, and leave.

    Args:
        running: the interventions, whose hooks are in the model.
        count: how many slots. capacity: the most tokens of a slot, prompt and answer.
    """

    def __init__(self, engine: SlotRunner, running: Interventions, count: int, capacity: int):
        self.engine, self.running = engine, running
        self.rows: list[Row | None] = [None] * count
        self.token = torch.zeros(count, dtype=torch.long)  # the next token to feed, of each slot
        self.at = torch.zeros(count, dtype=torch.long)  # its position
        self.cache = SlotCache(engine.config.num_hidden_layers, count, capacity)

    def free(self) -> list[int]:
        return [slot for slot, row in enumerate(self.rows) if row is None]

    def occupied(self) -> list[Row]:
        return [row for row in self.rows if row is not None]

    def admit(self, rows: Sequence[Row], shared: SlotCache | None, prefix: int) -> None:
        """Puts rows into free slots and runs their prompts.

        Args:
            shared: the cache of the prefix that all their prompts begin with, of `prefix` tokens.
        """
        free = self.free()
        self.cache.clear(free[: len(rows)])  # the last row may have left numbers that are not finite
        requests = [row.so_far() for row in rows]
        # Prompts of about the same length run together, which needs little padding.
        for part in batches_by_length([len(request.ids) - prefix for request in requests], PREFILL):
            some = [requests[i] for i in part]
            self.engine.prefill(some, [free[i] for i in part], self.cache, self.running, shared)
        for slot, row, request in zip(free, rows, requests, strict=False):
            self.rows[slot] = row
            self.token[slot], self.at[slot] = request.ids[-1], len(request.ids) - 1
        self.announce()

    def resize(self, count: int, capacity: int) -> None:
        """Makes room for `count` slots, not fewer than now, of `capacity` tokens."""
        more = count - len(self.rows)
        self.cache.resize(count, capacity)
        self.rows += [None] * more
        self.token = torch.nn.functional.pad(self.token, (0, more))
        self.at = torch.nn.functional.pad(self.at, (0, more))

    def compact(self) -> None:
        """Drops the free slots."""
        kept = [slot for slot, row in enumerate(self.rows) if row is not None]
        index = torch.tensor(kept)
        self.cache.keep(index)
        self.rows = [self.rows[slot] for slot in kept]
        self.token, self.at = self.token[index], self.at[index]
        self.announce()

    def step(self) -> None:
        """One token of every slot; slots whose answer is complete become free."""
        logits = self.engine.next_logits(self.token, self.at, self.cache)
        self.take(choose(logits, [None if row is None else row.draw for row in self.rows]))

    def take(self, tokens: Tensor) -> None:
        """Adds the next tokens [slots] to the answers."""
        self.token = tokens
        self.at = self.at + 1
        for slot, row in enumerate(self.rows):
            if row is not None:
                row.take(int(tokens[slot]), self.engine.stops)
            if row is None or row.done:
                self.release(slot)

    def release(self, slot: int) -> None:
        """Makes a slot free."""
        self.rows[slot] = None
        self.token[slot], self.at[slot] = 0, 0

    def announce(self) -> None:
        """Tells the hooks which slot runs under which intervention."""
        self.running.rows([0 if row is None else row.request.row for row in self.rows])


class SlotDecoder:
    """Moves one call's requests through the slots.

    Args:
        running: the interventions, whose hooks are in the model.
        draws: how the tokens of each request are chosen.
        prefix: tokens that all prompts begin with.
        stop: strings that end an answer.
    """

    def __init__(
        self,
        engine: SlotRunner,
        requests: Sequence[Request],
        max_new_tokens: int,
        running: Interventions,
        draws: Sequence[Draw],
        prefix: tuple[int, ...],
        stop: Sequence[str],
    ):
        self.engine, self.max_new_tokens, self.prefix = engine, max_new_tokens, prefix
        strings = StopStrings(engine.tokenizer, stop)
        self.rows = [Row(*one, strings) for one in zip(requests, [max_new_tokens] * len(requests), draws, strict=True)]
        self.waiting = list(self.rows)
        longest = max(len(r.ids) for r in requests)
        self.slots = Slots(engine, running, min(engine.slots, len(requests)), longest + max_new_tokens)
        self.shared = engine.prefix_cache(prefix, running, [r.row for r in requests])

    def run(self, progress: Progress | None) -> list[Answer]:
        """Answers in the order of the requests."""
        slots = self.slots
        while self.waiting or slots.occupied():
            free = slots.free()
            # Admitting costs a pass and compacting a copy, so both wait until a quarter of the slots is free.
            if 4 * len(free) >= len(slots.rows):
                if self.waiting:
                    new, self.waiting = self.waiting[: len(free)], self.waiting[len(free) :]
                    slots.admit(new, self.shared, len(self.prefix))
                elif free:
                    slots.compact()
            slots.step()
            if progress:
                self._report(progress)
        return [row.answer(self.engine.tokenizer) for row in self.rows]

    def _report(self, progress: Progress) -> None:
        # Unfinished answers count by the share of their tokens that they have, so that an ETA is smooth.
        under_way = [len(row.ids) for row in self.slots.occupied()]
        whole = len(self.rows) - len(self.waiting) - len(under_way)
        progress(whole + sum(under_way) // self.max_new_tokens, len(self.rows))


def common_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens that all prompts begin with, short of the last token of each."""
    shortest = min(len(p) for p in prompts) - 1
    length = 0
    while length < shortest and len({p[length] for p in prompts}) == 1:
        length += 1
    return prompts[0][:length]
