"""What tasks ask of an engine, under every candidate at once and journalled: log-probabilities and answers.

Own tasks and lm-eval's come here alike. A batch holds all candidates, and what it gave is one journal line, so that a
killed evaluation goes on from its last whole batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engines.answers import answer_of
from ..engines.base import Answer, Engine, Progress, Request, Sampling
from ..method.intervention import NOTHING, Intervention
from ..searching.candidates import Candidate
from ..searching.journal import Journal
from ..searching.statistics import finite
from .encoding import Ids

# Continuations whose log-probabilities are journalled at once, and windows of long texts.
PAIRS, WINDOWS = 32, 4
Pair = tuple[Ids, Ids]


@dataclass(frozen=True)
class Group:
    """Candidates that read the same prompts: the original model with all that acts inside it, or one system prompt.

    Attributes:
        name: what its journal lines carry. system: the system prompt; None without one.
        candidates: their numbers. table: their interventions.
    """

    name: str
    system: str | None
    candidates: tuple[int, ...]
    table: tuple[Intervention, ...]


def groups(tried: Sequence[Candidate], intervention: Callable[[Candidate], Intervention]) -> list[Group]:
    """The groups of the candidates; that of the original model comes first."""
    inside = tuple(i for i, candidate in enumerate(tried) if candidate.kind != "system")
    first = Group("", None, inside, tuple(intervention(tried[i]) for i in inside))
    prompted = [
        Group(f" {candidate.id}", candidate.config["system"], (i,), (NOTHING,))
        for i, candidate in enumerate(tried)
        if candidate.kind == "system"
    ]
    return [first, *prompted]


@dataclass(frozen=True)
class Scored:
    """A continuation under each candidate of a group.

    Attributes:
        log_p: its log-probability, in nats.
        greedy: whether it is the greedy continuation; None if the engine does not measure that.
    """

    log_p: tuple[float, ...]
    greedy: tuple[bool, ...] | None


class Asking:
    """Asks an engine and keeps what it gave.

    Args:
        engine: None if the journal is only read.
        tried: the candidates; journal lines hold their ids.
        rows: how many answers are journalled at once.
    """

    def __init__(self, engine: Engine | None, journal: Journal, tried: Sequence[Candidate], rows: int):
        self._engine, self.journal, self.tried, self.rows = engine, journal, tried, rows

    @property
    def engine(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def _ids(self, group: Group) -> list[str]:
        return [self.tried[i].id for i in group.candidates]

    def scored(
        self,
        name: str,
        group: Group,
        texts: Sequence[Any],
        pair: Callable[[int], Pair],
        progress: Progress | None = None,
        at_once: int = PAIRS,
    ) -> list[Scored]:
        """The log-probability of each continuation under each candidate of the group.

        Args:
            name: of the task. texts: what each pair stands for, as JSON. pair: i → context and continuation.
            at_once: how many pairs are journalled at once.
        """
        scored: list[Scored] = []
        for number, first in enumerate(range(0, len(texts), at_once)):
            here = range(first, min(first + at_once, len(texts)))

            def make(here: range = here) -> dict[str, Any]:
                return self._scored([pair(i) for i in here], group.table)

            asked = [self._ids(group), [texts[i] for i in here]]
            line = self.journal.keep(f"{name}{group.name}", "log_p", number, asked, make)
            numbers = [[float("nan") if x is None else x for x in row] for row in line["log_p"]]
            greedy = line["greedy"] or [None] * len(numbers)
            scored += [
                Scored(tuple(row), None if flags is None else tuple(flags))
                for row, flags in zip(numbers, greedy, strict=True)
            ]
            if progress:
                progress(len(scored), len(texts))
        return scored

    def _scored(self, pairs: Sequence[Pair], table: Sequence[Intervention]) -> dict[str, Any]:
        changed = [i for i, intervention in enumerate(table) if intervention.terms]
        losses = self.engine.losses(pairs, [table[i] for i in changed])
        lengths = torch.tensor([len(continuation) for _, continuation in pairs], dtype=torch.float64)
        column = {i: at for at, i in enumerate(changed)}

        def columns(base: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
            """[pairs, table]: the original model's numbers wherever a row of the table does nothing."""
            return torch.stack([others[:, column[i]] if i in column else base for i in range(len(table))], dim=1)

        log_p = -columns(losses.base_nll, losses.nll).double() * lengths[:, None]
        greedy = None
        if losses.greedy is not None and losses.base_greedy is not None:
            greedy = columns(losses.base_greedy, losses.greedy).tolist()
        return {"log_p": [finite(row) for row in log_p.tolist()], "greedy": greedy}

    def generated(
        self,
        name: str,
        work: Sequence[tuple[int, int, int]],
        messages: Callable[[int, int], Any],
        ids: Callable[[int, int], Ids],
        table: Sequence[Intervention],
        max_new_tokens: int,
        sampling: Sampling,
        *,
        seed: int = 0,
        stop: Sequence[str] | None = None,
        early: int = 0,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """The answers in the order of the work, each with text, early, tokens and ended.

        Args:
            work: question, candidate and sample of each answer.
            messages, ids: of a question for a candidate, the prompt as JSON and as tokens.
            table: an intervention for each candidate.
            early: also keep the text of this many first tokens; 0 keeps none.
        """
        answers: list[dict[str, Any]] = []
        settings: list[Any] = [max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k, early]
        settings += [] if stop is None else [list(stop)]
        for number, first in enumerate(range(0, len(work), self.rows)):
            batch = work[first : first + self.rows]

            def make(batch: Sequence[tuple[int, int, int]] = batch, first: int = first) -> dict[str, Any]:
                requests = [Request(ids(q, c), c, _seed(seed, s, messages(q, 0))) for q, c, s in batch]

                def counted(done: int, _: int) -> None:
                    if progress:
                        progress(first + done, len(work))

                generated = self.engine.generate(requests, table, max_new_tokens, counted, sampling, stop)
                return {"answers": [self._row(*pair, early, stop) for pair in zip(requests, generated, strict=True)]}

            asked = [[[self.tried[c].id, messages(q, c), s] for q, c, s in batch], [*settings, seed]]
            answers += self.journal.keep(name, "answers", number, asked, make)["answers"]
        return answers

    def _row(self, request: Request, answer: Answer, early: int, stop: Sequence[str] | None) -> dict[str, Any]:
        row = {"text": answer.text, "start": answer.start, "tokens": len(answer.ids), "ended": answer.ended}
        if early:
            ends = self.engine.chat.stop if stop is None else stop
            begun = answer_of(self.engine.tokenizer, request, answer.ids[:early], False, ends)
            row["early"] = begun.text[begun.start :]
        return row


def _seed(seed: int, sample: int, messages: Any) -> int:
    """The same for every candidate, so that they are compared on the same draws."""
    return int.from_bytes(hashlib.sha256(f"{seed} {sample} {messages}".encode()).digest()[:4], "little")
