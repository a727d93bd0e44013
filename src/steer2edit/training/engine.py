"""An engine for trained checkpoints: an intervention that is named after one is the model with its weights.

So a bench, its journal and its measures take a checkpoint as they take an edit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..engines.base import GREEDY, Answer, Engine, Losses, Progress, Request, Sampling
from ..engines.transformers import TransformersEngine
from ..method.intervention import NOTHING, Intervention
from .weights import carrying

Pair = tuple[tuple[int, ...], tuple[int, ...]]


class TrainedEngine(Engine):
    """The engine of the base model, whose weights give way to a checkpoint's while that answers.

    Args:
        engine: of the base model, which it is again after every call, to the bit.
        checkpoints: name of an intervention → the file of the weights that it stands for. Others are run as they are.
    """

    def __init__(self, engine: TransformersEngine, checkpoints: Mapping[str, Path]):
        self.engine, self.checkpoints = engine, dict(checkpoints)
        self.tokenizer, self.chat = engine.tokenizer, engine.chat
        self.rows_on_stream, self.measures_prompts = engine.rows_on_stream, engine.measures_prompts

    @property
    def slots(self) -> int:
        return self.engine.slots

    @slots.setter
    def slots(self, slots: int) -> None:
        self.engine.slots = slots

    @property
    def context(self) -> int | None:
        return self.engine.context

    def interventions(self) -> dict[str, Intervention]:
        """What stands for each checkpoint in a table: an intervention that does nothing, by its name alone."""
        return {name: Intervention(name, {}) for name in self.checkpoints}

    def generate(
        self,
        requests: Sequence[Request],
        table: Sequence[Intervention],
        max_new_tokens: int,
        progress: Progress | None = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] | None = None,
    ) -> list[Answer]:
        """As the base model's engine does it; the requests of each checkpoint are a batch of their own."""
        trained = [row for row, intervention in enumerate(table) if intervention.name in self.checkpoints]
        plain = [i for i, request in enumerate(requests) if request.row not in trained]
        answers: dict[int, Answer] = {}
        if plain:
            some = [requests[i] for i in plain]
            generated = self.engine.generate(some, table, max_new_tokens, progress, sampling, stop)
            answers |= dict(zip(plain, generated, strict=True))
        for row in trained:
            mine = [i for i, request in enumerate(requests) if request.row == row]
            if not mine:
                continue
            some = [replace(requests[i], row=0) for i in mine]
            with self._as(table[row]):
                counted = _after(progress, len(answers), len(requests))
                generated = self.engine.generate(some, [NOTHING], max_new_tokens, counted, sampling, stop)
            answers |= dict(zip(mine, generated, strict=True))
        return [answers[i] for i in range(len(requests))]

    @torch.inference_mode()
    def losses(self, pairs: Sequence[Pair], table: Sequence[Intervention], progress: Progress | None = None) -> Losses:
        """KL and NLL per token of given answers under each intervention, against the base model."""
        trained = [row for row, intervention in enumerate(table) if intervention.name in self.checkpoints]
        if not trained:
            return self.engine.losses(pairs, table, progress)
        base = [self.engine.log_probabilities(*pair) for pair in pairs]  # each [m, vocabulary]
        kl, nll = torch.zeros(len(pairs), len(table)), torch.zeros(len(pairs), len(table))
        others = [row for row in range(len(table)) if row not in trained]
        if others:
            losses = self.engine.losses(pairs, [table[row] for row in others])
            kl[:, others], nll[:, others] = losses.kl, losses.nll
        for number, row in enumerate(trained):
            with self._as(table[row]):
                for i, pair in enumerate(pairs):
                    log = self.engine.log_probabilities(*pair)
                    kl[i, row] = (base[i].exp() * (base[i] - log)).sum(dim=-1).mean()
                    nll[i, row] = _nll(log, pair[1])
                    if progress:
                        progress(number * len(pairs) + i + 1, len(trained) * len(pairs))
        base_nll = torch.stack([_nll(log, answer) for log, (_, answer) in zip(base, pairs, strict=True)])
        return Losses(kl, nll, base_nll.cpu())

    @torch.inference_mode()
    def nll(self, pairs: Sequence[Pair], table: Sequence[Intervention], progress: Progress | None = None) -> Tensor:
        """NLL per token of given answers under each intervention, [answers, table]; the base model is not run."""
        nll = torch.zeros(len(pairs), len(table))
        others = [row for row, intervention in enumerate(table) if intervention.name not in self.checkpoints]
        if others:
            nll[:, others] = self.engine.nll(pairs, [table[row] for row in others])
        trained = [row for row in range(len(table)) if row not in others]
        for number, row in enumerate(trained):
            counted = _after(progress, number * len(pairs), len(trained) * len(pairs))
            with self._as(table[row]):
                nll[:, row] = self.engine.nll(pairs, [NOTHING], counted)[:, 0]
        return nll

    def prompt_losses(
        self, pairs: Sequence[Pair], prompts: Sequence[tuple[int, ...]], progress: Progress | None = None
    ) -> Losses:
        return self.engine.prompt_losses(pairs, prompts, progress)

    def _as(self, intervention: Intervention) -> AbstractContextManager[None]:
        """The model as an intervention stands for it, while the context lasts."""
        path = self.checkpoints.get(intervention.name)
        return contextlib.nullcontext() if path is None else carrying(self.engine.model, path)


def _nll(log: Tensor, answer: Sequence[int]) -> Tensor:
    """The negative log-likelihood per token, from log-probabilities [m, vocabulary]."""
    return -log.gather(1, torch.tensor(answer, device=log.device)[:, None]).mean()


def _after(progress: Progress | None, done: int, total: int) -> Progress | None:
    return None if progress is None else lambda now, _: progress(done + now, total)
