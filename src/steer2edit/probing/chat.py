"""How a prompt becomes text and tokens: the chat template, and where thinking ends and the answer starts."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any
from unittest import mock

from ..errors import ModelError

# What ends a model's thinking, and begins it (where the prompt's template does not).
THOUGHT, _THINK = "</think>", "<think>"


@dataclass(frozen=True)
class Chat:
    """How messages become the text that a model sees: the same today and next year.

    Attributes:
        plain: no chat template, for base models: the contents, one after the other, are the text that a response goes
            on.
        enable_thinking: what the template is told, if it asks; None leaves the model's own default.
        date: what a template that writes today's date is told, as YYYY-MM-DD.
        stop: strings that end an answer; its text is cut before the first of them.
    """

    plain: bool = False
    enable_thinking: bool | None = None
    date: str = "2026-01-01"
    stop: tuple[str, ...] = ()

    def apply(self, tokenizer: Any, messages: list[dict[str, str]]) -> str:
        """The tokenizer's template, on the day that `date` says."""
        from transformers.utils import chat_template_utils

        day = datetime.datetime.fromisoformat(self.date)
        told = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        # Templates ask transformers for the time; it hands them no function of ours.
        clock = type("clock", (datetime.datetime,), {"now": classmethod(lambda cls, tz=None: day)})
        with mock.patch.object(chat_template_utils, "datetime", clock):
            return tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, date_string=day.strftime("%d %b %Y"), **told
            )


CHAT = Chat()


def answer_start(response: str, thinking: bool = False) -> int:
    """Where the answer starts in what a model said: after its thinking, at the end if that never ended, else at 0.

    Args:
        thinking: the prompt has begun the thinking already, as some templates do.
    """
    if THOUGHT in response:
        after = response.index(THOUGHT) + len(THOUGHT)
        return after + len(response[after:]) - len(response[after:].lstrip())
    return len(response) if thinking or response.lstrip().startswith(_THINK) else 0


def begins_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends inside the model's thinking."""
    return prompt.rstrip().endswith(_THINK)


def render(tokenizer: Any, messages: list[dict[str, str]], chat: Chat = CHAT) -> str:
    """The prompt as the model sees it, up to where its answer begins, to the last character (templates often end in
    a newline, which is part of it).

    Raises:
        ModelError: if the tokenizer has no chat template and `chat.plain` is off.
    """
    if chat.plain:
        return "\n".join(m["content"] for m in messages)
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the tokenizer has no chat template",
            got=getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__,
            fix="Give the chat model's tokenizer, or set plain=True (in a recipe: model.plain: true).",
        )
    return chat.apply(tokenizer, messages)


def prompt_tokens(tokenizer: Any, messages: list[dict[str, str]], chat: Chat = CHAT) -> list[int]:
    """Token ids of a rendered prompt. A template writes the special tokens itself, so that none is added twice."""
    return list(tokenizer(render(tokenizer, messages, chat), add_special_tokens=chat.plain)["input_ids"])
