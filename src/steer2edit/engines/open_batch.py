"""A decode batch that stays open: requests join it at any time, each under its own intervention, and leave it when
their answer is complete or is no longer wanted.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ..errors import ModelError, Steer2EditError
from ..method.intervention import NOTHING, Intervention
from ..models.few_rows import few_rows
from ..models.hooks import Interventions
from ..progress import say
from .answers import StopStrings
from .base import GREEDY, Request, Sampling
from .decoding import Row, Slots, common_prefix
from .sampling import Draw, choose
from .transformers import TransformersEngine

# By how many tokens a slot's room grows at once.
GROWTH = 256
# Interventions that stay in the model's hooks although no row runs under them: they are likely to be asked for again.
IDLE_INTERVENTIONS = 16


class OpenRow(Row):
    """A row of an open batch.

    Attributes:
        intervention: what it runs under.
        running: whether it has a slot.
        failure: why there is no answer, if it ended without one.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        ids: Sequence[int],
        intervention: Intervention = NOTHING,
        *,
        limit: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop: Sequence[str] = (),
    ):
        strings = StopStrings(engine.tokenizer, tuple(stop))
        super().__init__(Request(tuple(ids), 0, seed), limit, Draw(sampling, seed), strings)
        self.intervention = intervention
        self.running = False
        self.failure: Exception | None = None


class OpenBatch:
    """The rows that run now, and those that wait for a slot. One thread uses it, in inference mode.

    Args:
        engine: its `slots` are the most rows at once; the number is halved when memory runs out.

    Raises:
        ModelError: the model's family keeps another kind of state than keys and values.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
    >>> tokenizer = type("Tokenizer", (), {"eos_token_id": None})()
    >>> engine = TransformersEngine(model, tokenizer)
    >>> engine.stops = set()
    >>> batch = OpenBatch(engine)
    >>> first, second = (OpenRow(engine, [1, 2], limit=limit) for limit in (3, 4))
    >>> batch.add(first)
    >>> batch.step() == [first]
    True
    >>> batch.add(second)
    >>> len(batch.step()), len(batch.step()), first.done, len(batch.step()), len(batch.step()), second.done
    (2, 2, True, 1, 1, True)
    """

    def __init__(self, engine: TransformersEngine):
        if not engine.slotted:
            raise ModelError(
                "requests of this family cannot share an open batch",
                got=engine.config.model_type,
                fix="Use a family whose layers keep keys and values alone; `steer2edit run` works with this one.",
            )
        self.engine = engine
        self.waiting: deque[OpenRow] = deque()
        self._joining: list[OpenRow] = []  # out of the queue, not yet in a slot
        self._slots: Slots | None = None
        self._table: list[Intervention] = []
        self._hooks = contextlib.ExitStack()
        self._hooked = False
        self._running: Interventions | None = None

    @property
    def rows(self) -> list[OpenRow]:
        """The rows that have a slot."""
        return [] if self._slots is None else [row for row in self._slots.occupied() if isinstance(row, OpenRow)]

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.rows)

    def add(self, row: OpenRow) -> None:
        """Lets a row wait for a slot."""
        self.waiting.append(row)

    def drop(self, row: OpenRow) -> None:
        """Lets a row go whose answer is no longer wanted."""
        with contextlib.suppress(ValueError):
            self.waiting.remove(row)
        if self._slots is not None and row in self._slots.rows:
            self._slots.release(self._slots.rows.index(row))
            if not self._slots.occupied():
                self._rest()

    def step(self) -> list[OpenRow]:
        """Admits waiting rows where there are slots, and gives every row a token. Returns the rows that had a slot.

        If memory runs out, all rows wait again and at most half as many run at once from then on; the tokens that they
        have are kept. A row whose numbers are not finite fails alone.
        """
        try:
            self._admit()
            return self._step()
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            rows = self._evict()
        # Outside the handler: its traceback holds the failed attempt's tensors.
        clear_device_cache(garbage_collection=True)
        if len(rows) > 1:
            self.engine.slots = len(rows) // 2
            self.waiting.extendleft(reversed(rows))
            say(f"  out of memory: continuing with {self.engine.slots} rows at once")
            return []
        for row in rows:
            row.done = True
            row.failure = Steer2EditError(
                "the device has not enough memory for this request",
                got=f"{len(row.request.ids)} tokens",
                fix="Shorten the prompt, or ask for fewer tokens.",
            )
        return rows

    def fail(self, error: Exception) -> list[OpenRow]:
        """Ends all rows with an error, also those that wait, and takes the hooks out of the model."""
        rows = [*self._evict(), *self.waiting]
        self.waiting.clear()
        for row in rows:
            row.done, row.failure = True, error
        self.close()
        return rows

    def close(self) -> None:
        """Takes the hooks out of the model."""
        self._table, self._running = [], None
        self._rest()

    def _rest(self) -> None:
        """An idle model has no cache and no hooks; the table is kept."""
        self._slots = None
        self._hooks.close()
        self._hooked = False

    def _step(self) -> list[OpenRow]:
        slots, rows = self._slots, self.rows
        if slots is None or not rows:
            return []
        needed = 1 + int(slots.at.max())
        if needed > slots.cache.capacity:
            slots.cache.resize(len(slots.rows), _rounded(needed))
        logits = self.engine.next_logits(slots.token, slots.at, slots.cache)
        finite = logits.amax(dim=-1).isfinite().tolist()
        tokens = choose(logits, [None if row is None else row.draw for row in slots.rows])
        for slot, row in enumerate(slots.rows):
            if isinstance(row, OpenRow) and not finite[slot]:
                row.done = True
                row.failure = Steer2EditError(
                    "the model's numbers are not finite under this edit",
                    got=row.intervention.name,
                    fix="Use a smaller strength.",
                )
                slots.release(slot)
                tokens[slot] = 0
        slots.take(tokens)
        if not slots.occupied():
            self._rest()
        return rows

    def _admit(self) -> None:
        count = min(len(self.waiting), self.engine.slots - len(self.rows))
        if count <= 0:
            self._compact()
            return
        self._joining = new = [self.waiting.popleft() for _ in range(count)]
        running = self._set_table([row.intervention for row in new])
        needed = _rounded(max(len(row.so_far().ids) for row in new))
        if self._slots is None:
            self._slots = Slots(self.engine, running, count, needed)
        slots = self._slots
        total = max(len(slots.rows), len(self.rows) + count)
        if total > len(slots.rows) or needed > slots.cache.capacity:
            slots.resize(total, max(needed, slots.cache.capacity))
        for row in new:
            row.request = replace(row.request, row=self._index(row.intervention))
        prefix = common_prefix([row.so_far().ids for row in new]) if len(new) > 1 else ()
        shared = self.engine.prefix_cache(prefix, running, [row.request.row for row in new])
        slots.admit(new, shared, len(prefix))
        self._joining = []
        for row in new:
            row.running = True

    def _compact(self) -> None:
        slots = self._slots
        if slots is not None and slots.occupied() and 4 * len(slots.free()) >= len(slots.rows):
            slots.compact()
            needed = _rounded(1 + int(slots.at.max()))
            if 2 * needed <= slots.cache.capacity:
                slots.resize(len(slots.rows), needed)

    def _evict(self) -> list[OpenRow]:
        rows = [*self.rows, *self._joining]
        self._joining = []
        for row in rows:
            row.running = False
        self._rest()
        return rows

    def _index(self, intervention: Intervention) -> int:
        return next(i for i, one in enumerate(self._table) if one is intervention)

    def _set_table(self, needed: Sequence[Intervention]) -> Interventions:
        """Puts hooks into the model for these interventions, and for those of the rows that run."""
        known = {id(one) for one in self._table}
        running = self._running
        if running is None or not all(id(one) in known for one in needed):
            wanted = {id(one): one for one in [NOTHING, *(row.intervention for row in self.rows), *needed]}
            idle = [one for one in self._table if id(one) not in wanted]
            self._table = [*wanted.values(), *idle[-IDLE_INTERVENTIONS:]]
            self._running = running = Interventions(self.engine.model, self._table)
            self._hooks.close()
            self._hooked = False
        if not self._hooked:
            self._hooks.enter_context(running)
            self._hooks.enter_context(few_rows(self.engine.model))
            self._hooked = True
        if self._slots is not None and self._slots.running is not running:
            for row in self.rows:
                row.request = replace(row.request, row=self._index(row.intervention))
            self._slots.running = running
            self._slots.announce()
        return running


def _rounded(tokens: int) -> int:
    return -(-tokens // GROWTH) * GROWTH
