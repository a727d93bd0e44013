"""The engine that runs anywhere: a transformers model with a decode loop of our own.

Every row of a batch carries its own intervention. A prefix that all prompts share (system prompt, template) runs once
for each intervention; the rest of a prompt runs without the language-model head. Rows leave when their turn ends, and
waiting ones take their slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from ..errors import Steer2EditError
from ..method.intervention import NOTHING, Intervention
from ..models.architectures import ARCHITECTURES
from ..models.hooks import Interventions
from ..models.weights import device_of
from ..probing.chat import CHAT, Chat
from ..progress import say
from .answers import EndAtStopString, StopStrings, answer_of
from .base import GREEDY, Answer, Engine, Losses, Progress, Request, Sampling
from .decoding import SlotDecoder, common_prefix
from .sampling import ChosenOnly, Draw, draws_of
from .slots import SlotCache

T = TypeVar("T")

# Logits held at once while scoring: 64 M numbers, 256 MB in fp32.
LOGITS = 64_000_000

# Layers whose state is keys and values for each position, which is what the slots can hold.
ATTENTION = {"full_attention", "sliding_attention"}


class TransformersEngine(Engine):
    """Makes and scores text with a model in this process.

    Args:
        rows: slots of the decode batch. Part of the batch plan: bf16 results depend on it, fp32 ones in the last bits.
            `slots` is lowered when memory runs out.
        chat: how messages become text, and the strings that end an answer.
    """

    measures_prompts = True

    def __init__(self, model: nn.Module, tokenizer: Any, *, rows: int = 64, chat: Chat = CHAT):
        self.model, self.tokenizer, self.slots, self.chat = model, tokenizer, rows, chat
        whole: Any = model.config
        self.config: Any = whole.get_text_config()
        self.device = device_of(model)
        known = any(whole.model_type in a.model_types for a in ARCHITECTURES)
        # Layers of linear attention keep another kind of state, and an unknown family may do so too.
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
        sampling: Sampling = GREEDY,
        stop: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Answers in the order of the requests.

        If the device runs out of memory, the number of rows is halved permanently and all requests run again.

        Args:
            requests: prompts of at least one token, each with its row of `table`.
            max_new_tokens: the most tokens of an answer.
            sampling: greedy by default; otherwise every request draws by its own seed.
            stop: strings that end an answer in place of `chat.stop`.

        Raises:
            Steer2EditError: fewer than one new token, or a prompt that is too long with its answer.
        """
        if max_new_tokens < 1:
            raise Steer2EditError("no token was asked for", got=max_new_tokens, fix="Ask for at least one new token.")
        if not requests:
            return []
        longest = max(len(r.ids) for r in requests)
        self._check_length(longest + max_new_tokens)
        generate = self._generate_in_slots if self.slotted else self._generate_in_step
        ends = self.chat.stop if stop is None else stop
        while True:
            try:
                return generate(requests, table, max_new_tokens, progress, draws_of(sampling, requests), ends)
            except RuntimeError as error:
                if self.slots == 1 or not should_reduce_batch_size(error):
                    raise
            # Outside the handler: its traceback holds the failed attempt's tensors.
            self.slots = max(1, min(self.slots, len(requests)) // 2)
            clear_device_cache(garbage_collection=True)
            say(f"  out of memory: continuing with {self.slots} rows at once")

    def _generate_in_slots(
        self,
        requests: Sequence[Request],
        table: Sequence[Intervention],
        max_new_tokens: int,
        progress: Progress | None,
        draws: Sequence[Draw],
        stop: Sequence[str],
    ) -> list[Answer]:
        prefix = common_prefix([r.ids for r in requests])
        with Interventions(self.model, table) as running:
            return SlotDecoder(self, requests, max_new_tokens, running, draws, prefix, stop).run(progress)

    def _generate_in_step(
        self,
        requests: Sequence[Request],
        table: Sequence[Intervention],
        max_new_tokens: int,
        progress: Progress | None,
        draws: Sequence[Draw],
        stop: Sequence[str],
    ) -> list[Answer]:
        """Like `generate`, with transformers' own loop: a batch runs until its last row ends."""
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        model: Any = self.model
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=sorted(self.stops) or None,
            pad_token_id=min(self.stops, default=0),
        )
        strings = StopStrings(self.tokenizer, stop)
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
                sampled = [] if draws[some[0]].greedy else [ChosenOnly([draws[i] for i in some])]
                out = model.generate(
                    ids.to(self.device),
                    attention_mask=mask.to(self.device),
                    generation_config=config,
                    logits_processor=LogitsProcessorList(sampled),
                    stopping_criteria=StoppingCriteriaList([EndAtStopString(strings, width)] if strings else []),
                )
                self.forward_passes += out.shape[1] - width
                for i, new_ids in zip(some, out[:, width:].tolist(), strict=True):
                    end = next((at for at, token in enumerate(new_ids) if token in self.stops), len(new_ids))
                    ended = end < len(new_ids)
                    answers.append(answer_of(self.tokenizer, requests[i], new_ids[:end], ended, stop))
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

        One answer under all interventions, with the base model's row, is one batch without padding. If the device runs
        out of memory, half as many rows run at once from then on.

        Args:
            pairs: prompt ids and answer ids, neither empty. The model does not read an answer's last token.
        """
        most = 1 + len(table) if table else len(pairs)
        if not table:
            return self._halving(pairs, most, lambda rows: self._base_losses(pairs, rows, progress))
        kl, nll, greedy = self._halving(
            pairs, most, lambda rows: self._under(pairs, [NOTHING, *table], rows, progress, base_leads=True)
        )
        return Losses(kl[:, 1:], nll[:, 1:], nll[:, 0], greedy[:, 1:], greedy[:, 0])

    @torch.inference_mode()
    def nll(
        self,
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        table: Sequence[Intervention],
        progress: Progress | None = None,
    ) -> Tensor:
        """As `losses`, without the base model's row in every batch."""
        _, nll, _ = self._halving(pairs, len(table), lambda rows: self._under(pairs, table, rows, progress))
        return nll

    def _halving(
        self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], most: int, run: Callable[[int], T]
    ) -> T:
        """What `run` gives with as many rows at once, `most` at most, as the logits of the longest answer allow.

        If the device runs out of memory, half as many from then on.
        """
        each = self.config.vocab_size * max((len(answer) for _, answer in pairs), default=1)
        while True:
            rows = max(2, min(most, self.logits // each))
            try:
                return run(rows)
            except RuntimeError as error:
                if rows == 2 or not should_reduce_batch_size(error):
                    raise
            self.logits = rows // 2 * each
            clear_device_cache(garbage_collection=True)

    def _base_losses(
        self,
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        rows_at_once: int,
        progress: Progress | None,
    ) -> Losses:
        """The losses of given answers under the model alone.

        Without interventions that share an answer, different answers share a batch. Padding stands on the right, where
        no token that counts sees it.
        """
        none = torch.zeros(len(pairs), 0)
        nll, greedy = torch.zeros(len(pairs)), torch.zeros(len(pairs), dtype=torch.bool)
        losses = Losses(none, none, nll, none.bool(), greedy)
        if not pairs:
            return losses
        longest = max(len(p) + len(a) for p, a in pairs)
        self._check_length(longest - 1)
        prefix = common_prefix([p for p, _ in pairs]) if self.slotted else ()
        start = len(prefix)
        by_length = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        # The head runs on every position, those of the prompt too.
        rows_at_once = max(1, min(rows_at_once, self.logits // (self.config.vocab_size * (longest - start))))
        with Interventions(self.model, [NOTHING]) as running:
            shared = self.prefix_cache(prefix, running, [0])
            running.rows([0])
            scored = 0
            for some in _chunks(by_length, rows_at_once):
                tails = [[*pairs[i][0][start:], *pairs[i][1][:-1]] for i in some]
                width = max(map(len, tails))
                ids = torch.zeros(len(some), width, dtype=torch.long)
                for row, tail in enumerate(tails):
                    ids[row, : len(tail)] = torch.tensor(tail)
                cache = SlotCache(self.config.num_hidden_layers, len(some), start + width) if self.slotted else None
                if cache is not None and shared is not None:
                    cache.copy(shared, torch.zeros(len(some), dtype=torch.long), torch.arange(len(some)), start)
                logits = self._run(ids, cache, start, head=width)  # [rows, width, vocabulary]
                for row, i in enumerate(some):
                    answer = torch.tensor(pairs[i][1], device=logits.device)
                    end = len(tails[row])
                    log_row = logits[row, end - len(answer) : end].float().log_softmax(dim=-1)
                    nll[i] = -log_row.gather(1, answer[:, None]).mean()
                    greedy[i] = (log_row.argmax(dim=-1) == answer).all()
                scored += len(some)
                if progress:
                    progress(scored, len(pairs))
        return losses

    def _under(
        self,
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        table: Sequence[Intervention],
        rows_at_once: int,
        progress: Progress | None,
        base_leads: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """KL, NLL and whether an answer is the greedy one, each [answers, table].

        Args:
            base_leads: the table's first row is the base model, and runs in every batch: KL is measured against it.
                Without it KL is 0.
        """
        kl, nll = torch.zeros(len(pairs), len(table)), torch.zeros(len(pairs), len(table))
        greedy = torch.zeros(len(pairs), len(table), dtype=torch.bool)
        if not pairs or not table:
            return kl, nll, greedy
        longest = max(len(p) + len(a) for p, a in pairs)
        self._check_length(longest - 1)
        prefix = common_prefix([p for p, _ in pairs]) if self.slotted else ()
        leads = [0] if base_leads else []
        with Interventions(self.model, table) as running:
            scored = 0  # pairs of an answer and a row
            for some in _chunks(list(range(len(leads), len(table))), rows_at_once - len(leads)):
                rows = [*leads, *some]
                fresh = len(some) if scored else len(rows)
                cache = self.prefix_cache(prefix, running, rows, capacity=longest)
                if cache is None and self.slotted:
                    cache = SlotCache(self.config.num_hidden_layers, len(rows), longest)
                running.rows(rows)
                for i, (prompt, answer) in enumerate(pairs):
                    # After the same prompt as before, as where choices are compared, the cache holds its keys already.
                    again = cache is not None and i > 0 and pairs[i - 1][0] == prompt
                    start = len(prompt) - 1 if again else len(prefix)
                    ids = torch.tensor([*prompt[start:], *answer[:-1]])[None].expand(len(rows), -1)
                    logits = self._run(ids, cache, start, head=len(answer))  # [rows, m, vocabulary]
                    wanted = torch.tensor(answer, device=logits.device)
                    log_base = logits[0].float().log_softmax(dim=-1)
                    p_base = log_base.exp() if base_leads else None
                    for j, row in enumerate(rows):
                        log_row = log_base if j == 0 else logits[j].float().log_softmax(dim=-1)
                        if p_base is not None:
                            kl[i, row] = (p_base * (log_base - log_row)).sum(dim=-1).mean()
                        nll[i, row] = -log_row.gather(1, wanted[:, None]).mean()
                        greedy[i, row] = (log_row.argmax(dim=-1) == wanted).all()
                    scored += fresh
                    if progress:
                        progress(scored, len(table) * len(pairs))
        return kl, nll, greedy

    @torch.inference_mode()
    def prompt_losses(
        self,
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        prompts: Sequence[tuple[int, ...]],
        progress: Progress | None = None,
    ) -> Losses:
        """As `losses`, with another prompt in place of an intervention; one pass for each prompt."""
        kl, nll = torch.zeros(len(pairs), 1), torch.zeros(len(pairs), 2)
        for i, ((own, answer), other) in enumerate(zip(pairs, prompts, strict=True)):
            self._check_length(max(len(own), len(other)) + len(answer))
            log_own = self.log_probabilities(own, answer)
            log_other = self.log_probabilities(other, answer)
            kl[i, 0] = (log_own.exp() * (log_own - log_other)).sum(dim=-1).mean()
            wanted = torch.tensor(answer, device=log_own.device)[:, None]
            nll[i, 0] = -log_own.gather(1, wanted).mean()
            nll[i, 1] = -log_other.gather(1, wanted).mean()
            if progress:
                progress(i + 1, len(pairs))
        return Losses(kl, nll[:, 1:], nll[:, 0])

    @torch.inference_mode()
    def log_probabilities(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        """What the model alone, as its weights are now, says to each token of an answer: [m, vocabulary], fp32."""
        ids = torch.tensor([[*prompt, *answer[:-1]]])
        return self._run(ids, None, 0, head=len(answer))[0].float().log_softmax(dim=-1)

    @property
    def context(self) -> int | None:
        return getattr(self.config, "max_position_embeddings", None)

    def _check_length(self, tokens: int) -> None:
        limit = self.context
        if limit and tokens > limit:
            raise Steer2EditError(
                "a prompt and its answer are longer than the model can read",
                got=f"{tokens} tokens, at most {limit}",
                fix="Shorten the prompt, or ask for fewer new tokens.",
            )

    def prefix_cache(
        self, prefix: tuple[int, ...], running: Interventions, rows: Sequence[int], capacity: int = 0
    ) -> SlotCache | None:
        """Runs the shared prefix once under each intervention of `rows`; row i of the cache is the i-th of them."""
        if not prefix:
            return None
        self._prefix_row = {row: i for i, row in enumerate(dict.fromkeys(rows))}
        running.rows(list(self._prefix_row))
        cache = SlotCache(self.config.num_hidden_layers, len(self._prefix_row), max(capacity, len(prefix)))
        self._run(torch.tensor(prefix)[None].expand(cache.rows, -1), cache, 0)
        return cache

    def prefill(
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
            # Padding stands on the right: what it writes is masked until the row gets there and overwrites it.
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

    def next_logits(self, token: Tensor, at: Tensor, cache: SlotCache) -> Tensor:
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


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a turn, as the model's configurations and the tokenizer name them."""
    ids: set[Any] = set()
    for value in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        ids |= set(value) if isinstance(value, list | tuple) else {value}
    return {i for i in ids if i is not None}


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
