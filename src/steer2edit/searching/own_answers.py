"""An engine that journals its answers, so that a killed stage does not make them again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..engines.base import GREEDY, Answer, Engine, Losses, Progress, Request, Sampling
from ..method.intervention import Intervention
from .journal import Journal

# Answers that are journalled at once, or a quarter of the engine's rows if those are more: what a kill costs.
_BATCH = 32


class Journalled(Engine):
    """Answers from a journal where it has them, else from the engine.

    Args:
        path: the journal's file.
    """

    def __init__(self, engine: Engine, path: Path):
        self.engine, self.journal = engine, Journal(path)
        self.tokenizer, self.chat, self.slots = engine.tokenizer, engine.chat, engine.slots
        self.rows_on_stream, self.measures_prompts = engine.rows_on_stream, engine.measures_prompts
        self.batch = max(_BATCH, engine.slots // 4)
        self.calls = 0

    @property
    def context(self) -> int | None:
        return self.engine.context

    def tokens(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        return self.engine.tokens(messages)

    def begins_thinking(self, ids: Sequence[int]) -> bool:
        return self.engine.begins_thinking(ids)

    def generate(
        self,
        requests: Sequence[Request],
        table: Sequence[Intervention],
        max_new_tokens: int,
        progress: Progress | None = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] | None = None,
    ) -> list[Answer]:
        answers: list[Answer] = []
        self.calls += 1
        drawn = [sampling.temperature, sampling.top_p, sampling.top_k]
        for number, first in enumerate(range(0, len(requests), self.batch)):
            batch = requests[first : first + self.batch]

            def make(batch: Sequence[Request] = batch) -> dict[str, Any]:
                answered = self.engine.generate(batch, table, max_new_tokens, None, sampling, stop)
                rows = [[list(a.ids), a.text, a.ended, a.start, a.thinking] for a in answered]
                return {"answers": rows, "rows": self.engine.slots}

            asked = [[[list(r.ids), r.row, r.seed] for r in batch], [i.name for i in table], max_new_tokens, drawn]
            if stop is not None:
                asked.append(list(stop))
            line = self.journal.keep(f"own {self.calls}", "answers", number, asked, make)
            self.engine.slots = self.slots = line["rows"]
            answers += [Answer(tuple(ids), *rest) for ids, *rest in line["answers"]]
            if progress:
                progress(len(answers), len(requests))
        return answers

    def losses(
        self,
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        table: Sequence[Intervention],
        progress: Progress | None = None,
    ) -> Losses:
        return self.engine.losses(pairs, table, progress)

    def nll(
        self,
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        table: Sequence[Intervention],
        progress: Progress | None = None,
    ) -> Tensor:
        return self.engine.nll(pairs, table, progress)

    def prompt_losses(
        self,
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        prompts: Sequence[tuple[int, ...]],
        progress: Progress | None = None,
    ) -> Losses:
        return self.engine.prompt_losses(pairs, prompts, progress)
