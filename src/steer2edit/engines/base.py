"""Engines make text and score text under interventions, a different one in every row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..method.intervention import Intervention
from ..probing.chat import Chat, begins_thinking, prompt_tokens

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


GREEDY = Sampling()


@dataclass(frozen=True)
class Request:
    """A prompt's token ids, and which intervention of the table it runs under."""

    ids: tuple[int, ...]
    row: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What was generated: token ids without the end-of-turn token, the text, whether the model ended its turn, and
    where in the text its answer starts, after its thinking."""

    ids: tuple[int, ...]
    text: str
    ended: bool
    start: int = 0


@dataclass(frozen=True)
class Losses:
    """How far interventions move a model on given answers.

    Attributes:
        kl: [answers, interventions] KL(base ‖ intervened) per token, in nats.
        nll: [answers, interventions] negative log-likelihood per token, in nats.
        base_nll: [answers] the same under the base model.
    """

    kl: Tensor
    nll: Tensor
    base_nll: Tensor


class Engine(Protocol):
    """Makes and scores text under interventions.

    Attributes:
        tokenizer, chat: by which prompts become token ids.
        slots: rows that run at once; an engine may lower it, and a resumed study sets it to where it was.
    """

    tokenizer: Any
    chat: Chat
    slots: int

    def tokens(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        """A prompt's token ids, up to where the answer begins."""
        return tuple(prompt_tokens(self.tokenizer, messages, self.chat))

    def begins_thinking(self, ids: Sequence[int]) -> bool:
        """Whether a prompt ends inside the model's thinking, as some templates make it."""
        return begins_thinking(self.tokenizer.decode(list(ids[-8:])))

    def generate(
        self,
        requests: Sequence[Request],
        table: Sequence[Intervention],
        max_new_tokens: int,
        progress: Progress | None = None,
        sampling: Sampling = GREEDY,
    ) -> list[Answer]: ...

    def losses(
        self,
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        table: Sequence[Intervention],
        progress: Progress | None = None,
    ) -> Losses: ...
