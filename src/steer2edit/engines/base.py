"""What every engine takes and gives: requests, sampling, answers and losses, and the engine itself."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import Steer2EditError
from ..method.intervention import Intervention
from ..probing.chat import Chat, begins_thinking, prompt_tokens
from ..probing.spans import LONGEST_TOKEN

Progress = Callable[[int, int], None]

# A prompt of more characters may be longer than any model can read.
LONG = 1_000_000


@dataclass(frozen=True)
class Request:
    """A prompt's token ids, the row of its intervention in the table, and the seed (0 or more) of its draws."""

    ids: tuple[int, ...]
    row: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the model's distribution.

    Attributes:
        temperature: 0 takes the likeliest token; otherwise the logits are divided by it and a token is drawn.
        top_p: draw from the likeliest tokens that together have this probability.
        top_k: draw from this many of the likeliest tokens; 0 is all of them.

    Raises:
        Steer2EditError: a value outside these ranges.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1 and self.top_k >= 0):
            raise Steer2EditError(
                "a sampling value is out of its range",
                got=f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}",
                fix="Give a temperature of 0 or more, a top_p above 0 and up to 1, and a top_k of 0 or more.",
            )


GREEDY = Sampling()


@dataclass(frozen=True)
class Answer:
    """What was generated.

    Attributes:
        ids: tokens of the answer, without the end-of-turn token and without tokens of a stop string.
        text: the text up to the end of the turn or the first stop string.
        ended: whether the model ended its turn or wrote a stop string.
        start: the character at which the answer starts, after the model's thinking.
        thinking: how many of the tokens stand before the answer.
    """

    ids: tuple[int, ...]
    text: str
    ended: bool
    start: int = 0
    thinking: int = 0


@dataclass(frozen=True)
class Losses:
    """How far interventions move a model on given answers.

    Attributes:
        kl: [answers, interventions] KL(base ‖ intervened) per token, in nats.
        nll: [answers, interventions] negative log-likelihood per token, in nats.
        base_nll: [answers] the same under the base model.
        greedy: [answers, interventions] whether every token of the answer is the likeliest one; None if not measured.
        base_greedy: [answers] the same under the base model.
    """

    kl: Tensor
    nll: Tensor
    base_nll: Tensor
    greedy: Tensor | None = None
    base_greedy: Tensor | None = None


class Engine(ABC):
    """Makes and scores text under interventions.

    Attributes:
        tokenizer, chat: they turn messages into token ids; `chat.stop` ends answers.
        slots: rows that run at once; an engine may lower it, and a resumed study sets it to the lowered number.
        rows_on_stream: whether it runs terms u(aᵀx) on the residual stream; constants it always does.
        measures_prompts: whether it has `prompt_losses`.
        context: the most tokens of a prompt and its answer; None if no limit is known.
    """

    tokenizer: Any
    chat: Chat
    slots: int
    rows_on_stream: bool = True
    measures_prompts: bool = False

    @property
    def context(self) -> int | None:
        return None

    def tokens(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        """A prompt's token ids, up to where the answer begins.

        Raises:
            Steer2EditError: it has megabytes, and more than the model can read: its tokens would fill the memory.
        """
        characters = sum(len(message["content"]) for message in messages)
        if characters > LONG and (limit := self.context) and characters > LONGEST_TOKEN * limit:
            raise Steer2EditError(
                "a prompt is longer than the model can read",
                got=f"{characters} characters, at most {limit} tokens",
                fix="Shorten the prompt.",
            )
        return tuple(prompt_tokens(self.tokenizer, messages, self.chat))

    def begins_thinking(self, ids: Sequence[int]) -> bool:
        """Whether a prompt ends inside the model's thinking, as with some templates."""
        return begins_thinking(self.tokenizer.decode(list(ids[-8:])))

    @abstractmethod
    def generate(
        self,
        requests: Sequence[Request],
        table: Sequence[Intervention],
        max_new_tokens: int,
        progress: Progress | None = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Answers in the order of the requests, each up to `max_new_tokens` tokens.

        With a temperature above 0 each request draws by its own seed, so that its answer does not depend on the other
        requests.

        Args:
            stop: strings that end an answer in place of `chat.stop`.
        """

    @abstractmethod
    def losses(
        self,
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        table: Sequence[Intervention],
        progress: Progress | None = None,
    ) -> Losses:
        """KL and NLL per token of given answers under each intervention.

        Args:
            pairs: prompt ids and answer ids.
        """

    def nll(
        self,
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        table: Sequence[Intervention],
        progress: Progress | None = None,
    ) -> Tensor:
        """NLL per token of given answers under each intervention, [answers, table], where KL is not asked for.

        Engines that need not run the base model for it are faster here than in `losses`.
        """
        return self.losses(pairs, table, progress).nll

    def prompt_losses(
        self,
        pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        prompts: Sequence[tuple[int, ...]],
        progress: Progress | None = None,
    ) -> Losses:
        """KL and NLL per token of given answers after other prompts, against the same model after their own.

        Args:
            pairs: prompt ids and answer ids. prompts: the other prompt of each answer.

        Returns:
            Losses with one column.
        """
        raise NotImplementedError(f"{type(self).__name__} does not measure losses under other prompts")
