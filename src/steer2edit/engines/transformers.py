"""The engine that runs anywhere: a transformers model with a decode loop of our own.

Every row of a batch carries its own intervention. A prefix that all prompts share (system prompt, template) is run once
for each intervention; the rest of a prompt is run without the language-model head; rows leave when their turn ends and
waiting ones take their slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from ..engines.base import Answer, Engine, Losses, Progress, Request
from ..errors import Steer2EditError
from ..method.intervention import NOTHING, Intervention
from ..models.architectures import ARCHITECTURES
from ..models.hooks import Interventions
from ..models.weights import device_of
from ..probing.chat import CHAT, THOUGHT, Chat, answer_start, begins_thinking
from ..probing.collect import batches_by_length
from ..progress import say
from .slots import SlotCache

# Logits held at once while scoring: 64 M numbers, 256 MB in fp32.
LOGITS = 64_000_000

# Tokens of prompts that are run at once: enough to fill the cores, few enough to stay in a CPU's cache.
PREFILL = 2048

# Layers whose state is keys and values, a position each: what the slots can hold.
ATTENTION = {"full_attention", "sliding_attention"}


class TransformersEngine(Engine):
    """Makes and scores text with a model in this process.

    Args:
        rows: slots of the decode batch. Part of the batch plan: bf16 results depend on it, fp32 ones in the last bits.
            `slots` holds what is left of them where memory ran out.
        chat: what the chat template is told; plain text for base models.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, rows: int = 64, chat: Chat = CHAT):
        self.model, self.tokenizer, self.slots, self.chat = model, tokenizer, rows, chat
        whole: Any = model.config
        self.config: Any = whole.get_text_config()
        self.device = device_of(model)
        known = any(whole.model_type in a.model_types for a in ARCHITECTURES)
        # Other layers keep a state of their own (linear attention), and of unknown families it is not known.
        self.slotted = known and set(getattr(self.config, "layer_types", None) or ATTENTION) <= ATTENTION
        self.stops = stop_ids(model, tokenizer)
        self.forward_passes = 0
        self.logits = LOGITS

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        table: Sequence[Intervention],
        max_new_tokens: int,
        progress: Progress | None = None,
    ) -> list[Answer]:
        """Greedy answers, in the order of the requests.

        Args:
            requests: prompts of at least one token, each with its row of `table`.
            max_new_tokens: an answer is cut there.

        Where the memory of the device does not do, the rows are halved, for good, and the requests run again.
        """
        if max_new_tokens < 1:
            raise Steer2EditError("no token was asked for", got=max_new_tokens, fix="Ask for at least one new token.")
        if not requests:
            return []
        longest = max(len(r.ids) for r in requests)
        self._check_length(longest + max_new_tokens)
        generate = self._generate_in_slots if self.slotted else self._generate_in_step
        while True:
            try:
                return generate(requests, table, max_new_tokens, progress)
            except RuntimeError as error:
                if self.slots == 1 or not should_reduce_batch_size(error):
                    raise
            # Outside the handler, whose traceback holds the tensors of the try that failed.
            self.slots = max(1, min(self.slots, len(requests)) // 2)
            clear_device_cache(garbage_collection=True)
            say(f"  out of memory: going on with {self.slots} rows at once")

    def _generate_in_slots(
        self, requests: Sequence[Request], table: Sequence[Intervention], max_new_tokens: int, progress: Progress | None
    ) -> list[Answer]:
        longest = max(len(r.ids) for r in requests)
        prefix = _common_prefix([r.ids for r in requests])
        made: list[list[int]] = [[] for _ in requests]
        ended = [False] * len(requests)
        waiting = list(range(len(requests)))
        slots: list[int | None] = [None] * min(self.slots, len(requests))  # slot → request
        cache = SlotCache(self.config.num_hidden_layers, len(slots), longest + max_new_tokens)
        token = torch.zeros(len(slots), dtype=torch.long)  # the next token to feed, of each slot
        at = torch.zeros(len(slots), dtype=torch.long)  # and its position
        with Interventions(self.model, table) as running:
            shared = self._prefix_cache(prefix, running, [r.row for r in requests])
            while waiting or any(slot is not None for slot in slots):
                free = [i for i, slot in enumerate(slots) if slot is None]
                if waiting and 4 * len(free) >= len(slots):
                    new = [waiting.pop(0) for _ in free[: len(waiting)]]
                    # Prompts of about the same length together: next to nothing is padding.
                    for part in batches_by_length([len(requests[i].ids) - len(prefix) for i in new], PREFILL):
                        self._admit([requests[new[i]] for i in part], [free[i] for i in part], cache, running, shared)
                    for slot, i in zip(free, new, strict=False):
                        slots[slot] = i
                        token[slot], at[slot] = requests[i].ids[-1], len(requests[i].ids) - 1
                    self._announce(running, slots, requests)
                elif free and not waiting and 4 * len(free) >= len(slots):
                    kept = [i for i, slot in enumerate(slots) if slot is not None]
                    rows = torch.tensor(kept)
                    cache.keep(rows)
                    slots, token, at = [slots[i] for i in kept], token[rows], at[rows]
                    self._announce(running, slots, requests)
                logits = self._step(token, at, cache)
                token = logits.argmax(dim=-1).cpu()
                at = at + 1
                for slot, request in enumerate(slots):
                    if request is None:
                        token[slot], at[slot] = 0, 0
                        continue
                    new_token = int(token[slot])
                    if new_token in self.stops:
                        ended[request] = True
                    else:
                        made[request].append(new_token)
                    if ended[request] or len(made[request]) == max_new_tokens:
                        slots[slot] = None
                        token[slot], at[slot] = 0, 0
                if progress:
                    # Answers under way count by their share of the tokens that they may have, so that an ETA is smooth.
                    under_way = [len(made[i]) for i in slots if i is not None]
                    whole = len(requests) - len(waiting) - len(under_way)
                    progress(whole + sum(under_way) // max_new_tokens, len(requests))
        return [answer_of(self.tokenizer, *one) for one in zip(requests, made, ended, strict=True)]

    def _generate_in_step(
        self, requests: Sequence[Request], table: Sequence[Intervention], max_new_tokens: int, progress: Progress | None
    ) -> list[Answer]:
        """As `generate`, by transformers' own loop: the rows of a batch go on until the last one ends."""
        from transformers import GenerationConfig

        model: Any = self.model
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=sorted(self.stops) or None,
            pad_token_id=min(self.stops, default=0),
        )
        answers: list[Answer] = []
        with Interventions(self.model, table) as running:
            for some in _chunks(list(range(len(requests))), self.slots):
                width = max(len(requests[i].ids) for i in some)
                ids = torch.zeros(len(some), width, dtype=torch.long)
                mask = torch.zeros_like(ids)
                for row, i in enumerate(some):  # padding on the left, so that all rows write at the end
                    ids[row, width - len(requests[i].ids) :] = torch.tensor(requests[i].ids)
                    mask[row, width - len(requests[i].ids) :] = 1
                running.rows([requests[i].row for i in some])
                out = model.generate(ids.to(self.device), attention_mask=mask.to(self.device), generation_config=config)
                self.forward_passes += out.shape[1] - width
                for i, made in zip(some, out[:, width:].tolist(), strict=True):
                    end = next((i for i, token in enumerate(made) if token in self.stops), len(made))
                    answers.append(answer_of(self.tokenizer, requests[i], made[:end], end < len(made)))
                if progress:
                    progress(len(answers), len(requests))
        return answers

    @torch.inference_mode()
    def losses(
        self,
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        table: Sequence[Intervention],
        progress: Progress | None = None,
    ) -> Losses:
        """KL and NLL per token of given answers under each intervention.

        One answer under all interventions is one batch without padding, beside the base model's row.

        Args:
            pairs: prompt ids and answer ids, neither empty.

        Where the memory of the device does not do, fewer interventions run at once.
        """
        # Logits of one intervention on the longest answer.
        each = self.config.vocab_size * max((len(answer) for _, answer in pairs), default=1)
        while True:
            rows = max(2, min(1 + len(table), self.logits // each))
            try:
                return self._losses(pairs, table, rows, progress)
            except RuntimeError as error:
                if rows == 2 or not should_reduce_batch_size(error):
                    raise
            self.logits = rows // 2 * each
            clear_device_cache(garbage_collection=True)

    def _losses(
        self,
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        table: Sequence[Intervention],
        rows_at_once: int,
        progress: Progress | None,
    ) -> Losses:
        full = [NOTHING, *table]
        kl, nll = torch.zeros(len(pairs), len(full)), torch.zeros(len(pairs), len(full))
        if not pairs:
            return Losses(kl[:, 1:], nll[:, 1:], nll[:, 0])
        longest = max(len(p) + len(a) for p, a in pairs)
        self._check_length(longest)
        prefix = _common_prefix([p for p, _ in pairs]) if self.slotted else ()
        with Interventions(self.model, full) as running:
            for first in range(0, len(full), rows_at_once):
                rows = list(range(first, min(first + rows_at_once, len(full))))
                rows = rows if first == 0 else [0, *rows]  # the base model's row leads every batch
                cache = self._prefix_cache(prefix, running, rows, capacity=longest)
                if cache is None and self.slotted:
                    cache = SlotCache(self.config.num_hidden_layers, len(rows), longest)
                running.rows(rows)
                for i, (prompt, answer) in enumerate(pairs):
                    ids = torch.tensor([*prompt[len(prefix) :], *answer[:-1]])[None].expand(len(rows), -1)
                    logits = self._run(ids, cache, len(prefix), head=len(answer))  # [rows, m, vocabulary]
                    wanted = torch.tensor(answer, device=logits.device)
                    log_base = logits[0].float().log_softmax(dim=-1)
                    p_base = log_base.exp()
                    for j, row in enumerate(rows):
                        log_row = log_base if j == 0 else logits[j].float().log_softmax(dim=-1)
                        kl[i, row] = (p_base * (log_base - log_row)).sum(dim=-1).mean()
                        nll[i, row] = -log_row.gather(1, wanted[:, None]).mean()
                    if progress:
                        progress(first * len(pairs) + (i + 1) * (len(rows) - (first > 0)), len(full) * len(pairs))
        return Losses(kl[:, 1:], nll[:, 1:], nll[:, 0])

    def _check_length(self, tokens: int) -> None:
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit and tokens > limit:
            raise Steer2EditError(
                "a prompt and its answer are longer than the model can read",
                got=f"{tokens} tokens, at most {limit}",
                fix="Shorten the prompt, or ask for fewer new tokens.",
            )

    def _announce(self, running: Interventions, slots: Sequence[int | None], requests: Sequence[Request]) -> None:
        running.rows([0 if i is None else requests[i].row for i in slots])

    def _prefix_cache(
        self, prefix: tuple[int, ...], running: Interventions, rows: Sequence[int], capacity: int = 0
    ) -> SlotCache | None:
        """The shared prefix run once under each intervention that is needed; row i of the cache is the i-th of them."""
        if not prefix:
            return None
        self._prefix_row = {row: i for i, row in enumerate(dict.fromkeys(rows))}
        running.rows(list(self._prefix_row))
        cache = SlotCache(self.config.num_hidden_layers, len(self._prefix_row), max(capacity, len(prefix)))
        self._run(torch.tensor(prefix)[None].expand(cache.rows, -1), cache, 0)
        return cache

    def _admit(
        self,
        requests: Sequence[Request],
        into: Sequence[int],
        cache: SlotCache,
        running: Interventions,
        shared: SlotCache | None,
    ) -> None:
        """Runs the prompts, all but their last token, and puts them into the cache's slots."""
        start = shared.capacity if shared else 0
        rest = [r.ids[start:-1] for r in requests]
        width = max(map(len, rest))
        staged = SlotCache(self.config.num_hidden_layers, len(requests), start + width)
        everyone = torch.arange(len(requests))
        if shared:
            staged.copy(shared, torch.tensor([self._prefix_row[r.row] for r in requests]), everyone, start)
        if width:
            # Padding stands on the right: what is written there is overwritten, or masked, until the row gets there.
            ids = torch.zeros(len(requests), width, dtype=torch.long)
            for i, tail in enumerate(rest):
                ids[i, : len(tail)] = torch.tensor(tail, dtype=torch.long)
            running.rows([r.row for r in requests])
            self._run(ids, staged, start)
        if start + width:
            cache.copy(staged, everyone, torch.tensor(list(into)), start + width)

    def _run(self, ids: Tensor, cache: SlotCache | None, start: int, head: int = 0) -> Tensor:
        """Runs tokens [rows, time] from position `start` on; the logits of the last `head` positions if asked."""
        if cache is None:
            self.forward_passes += 1
            return self.model(ids.to(self.device), use_cache=False, logits_to_keep=head).logits
        time = ids.shape[1]
        cache.write_from(start, time)
        positions = torch.arange(start, start + time, device=self.device)
        mask = None
        if start:
            mask = self._mask(positions[None, None, :, None], start + time)
        inputs: dict[str, Any] = {
            "input_ids": ids.to(self.device),
            "attention_mask": mask,
            "position_ids": positions[None].expand(len(ids), -1),
            "past_key_values": cache,
            "use_cache": True,
        }
        self.forward_passes += 1
        if head:
            return self.model(**inputs, logits_to_keep=head).logits
        body: Any = getattr(self.model, "base_model", self.model)
        return body(**inputs).last_hidden_state

    def _step(self, token: Tensor, at: Tensor, cache: SlotCache) -> Tensor:
        """One token of every slot, at the slot's own position; logits [slots, vocabulary]."""
        at = at.to(self.device)
        cache.write_at(at)
        self.forward_passes += 1
        return self.model(
            input_ids=token[:, None].to(self.device),
            attention_mask=self._mask(at[:, None, None, None], cache.cursor.length),
            position_ids=at[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]

    def _mask(self, positions: Tensor, length: int) -> Tensor | dict[str, Tensor]:
        """What each query may see: keys up to its own position, within the sliding window where a layer has one.

        Args:
            positions: of the queries, [rows or 1, 1, time, 1].

        Returns:
            One mask for all layers, or one for each of the model's layer types.
        """
        keys = torch.arange(length, device=self.device)
        window = getattr(self.config, "sliding_window", None)
        types = set(getattr(self.config, "layer_types", None) or [])
        masks = {"full_attention": keys <= positions}
        if types != {"full_attention"}:
            near = keys > positions - window if window else torch.ones_like(keys, dtype=torch.bool)
            masks["sliding_attention"] = masks["full_attention"] & near
        if self.config._attn_implementation != "sdpa":
            dtype: Any = self.model.dtype
            masks = {name: torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype) for name, seen in masks.items()}
        return masks if len(types) > 1 else masks.get("sliding_attention", masks["full_attention"])


def answer_of(tokenizer: Any, request: Request, ids: Sequence[int], ended: bool) -> Answer:
    """The answer that generated ids are, without the end-of-turn token."""
    text, raw = (tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False))
    start = answer_start(raw, begins_thinking(tokenizer.decode(list(request.ids[-8:]))))
    if start and raw != text:  # the tags are special tokens, which the text is without
        ends = next((i for i in range(len(ids)) if THOUGHT in tokenizer.decode(ids[: i + 1])), len(ids))
        thought = tokenizer.decode(ids[: ends + 1], skip_special_tokens=True)
        start = len(thought) + len(text[len(thought) :]) - len(text[len(thought) :].lstrip())
    return Answer(tuple(ids), text, ended, start)


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a turn, as the model's configurations and the tokenizer name them."""
    found: set[Any] = set()
    for value in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        found |= set(value) if isinstance(value, list | tuple) else {value}
    return {i for i in found if i is not None}


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _common_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens that all prompts begin with, short of the last token of each."""
    shortest = min(len(p) for p in prompts) - 1
    length = 0
    while length < shortest and len({p[length] for p in prompts}) == 1:
        length += 1
    return prompts[0][:length]
