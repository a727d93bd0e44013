"""How a prompt becomes text and tokens: the chat template, and where thinking ends and the answer starts."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any
from unittest import mock

from ..errors import ModelError

# The tags that end and begin a model's thinking; some prompt templates already write the second one.
THOUGHT, _THINK = "</think>", "<think>"


@dataclass(frozen=True)
class Chat:
    """How messages become the text that a model sees, whatever today's date.

    Attributes:
        plain: no chat template: the messages' contents, line by line, are the text that a response continues.
        enable_thinking: the template's switch for thinking, if it has one; None leaves the model's own default.
        date: the date for templates that write today's, as YYYY-MM-DD.
        template: a Jinja chat template in place of the tokenizer's, for base models (see `named_template`). If it ends
            without white space, as in "Answer:", a space goes before a response that begins without any.
        stop: strings that end an answer; its text is cut before the first of them.

    >>> render(None, [{"role": "user", "content": "Once upon a time"}], Chat(plain=True))
    'Once upon a time'
    """

    plain: bool = False
    enable_thinking: bool | None = None
    date: str = "2026-01-01"
    template: str | None = None
    stop: tuple[str, ...] = ()

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer adds its special tokens; its own chat template already writes them."""
        return self.plain or self.template is not None

    def gap(self, prompt: str, response: str) -> str:
        """The text between a rendered prompt and a response: a space after a template like "Answer:", else nothing."""
        glued = prompt[-1:].strip() and response[:1].strip()
        return " " if self.template is not None and glued else ""

    def apply(self, tokenizer: Any, messages: list[dict[str, str]]) -> str:
        """The messages in the tokenizer's template, with `date` as today's date."""
        from transformers.utils import chat_template_utils

        day = datetime.datetime.fromisoformat(self.date)
        switches: dict[str, Any] = {}
        if self.enable_thinking is not None:
            switches["enable_thinking"] = self.enable_thinking
        if self.template is not None:
            switches["chat_template"] = self.template
        # Templates get the time from transformers, which lets nobody pass another clock.
        clock = type("clock", (datetime.datetime,), {"now": classmethod(lambda cls, tz=None: day)})
        with mock.patch.object(chat_template_utils, "datetime", clock):
            return tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, date_string=day.strftime("%d %b %Y"), **switches
            )


CHAT = Chat()
# For base models: a Jinja template, and the strings that end an answer.
_NAMED = {
    "qa": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
        "{% elif m.role == 'user' %}Question: {{ m.content }}\n{% else %}Answer: {{ m.content }}\n\n{% endif %}"
        "{% endfor %}Answer:",
        ("\nQuestion:",),
    ),
    "user-assistant": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
        "{% elif m.role == 'user' %}User: {{ m.content }}\n\n{% else %}Assistant: {{ m.content }}\n\n{% endif %}"
        "{% endfor %}Assistant:",
        ("\nUser:",),
    ),
}
TEMPLATES = tuple(_NAMED)


def named_template(name: str) -> Chat:
    """A Chat for base models, by the template's name: `qa` or `user-assistant`, each with its stop strings.

    Raises:
        ModelError: no template has that name.

    >>> named_template("qa").stop
    ('\\nQuestion:',)
    """
    if name not in _NAMED:
        raise ModelError("no chat template has that name", got=name, fix=f"Known: {', '.join(TEMPLATES)}.")
    template, stop = _NAMED[name]
    return Chat(template=template, stop=stop)


def answer_start(response: str, thinking: bool = False) -> int:
    """The character at which the answer starts: after the thinking, at the end if that never ended, else 0.

    Args:
        thinking: the prompt has already begun the thinking, as with some templates.
    """
    if THOUGHT in response:
        after = response.index(THOUGHT) + len(THOUGHT)
        return after + len(response[after:]) - len(response[after:].lstrip())
    return len(response) if thinking or response.lstrip().startswith(_THINK) else 0


def begins_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends inside the model's thinking."""
    return prompt.rstrip().endswith(_THINK)


def render(tokenizer: Any, messages: list[dict[str, str]], chat: Chat = CHAT) -> str:
    """The prompt as the model sees it, up to where its answer begins. A template's final newline is part of it.

    If the model's own template refuses a system role, as Gemma's does, the system prompt leads the first user message.

    Raises:
        ModelError: there is no chat template and `chat.plain` is off, the given template is not Jinja, or the model's
            own template refuses the messages.
    """
    if chat.plain:
        return "\n".join(m["content"] for m in messages)
    from jinja2 import TemplateError

    if chat.template is not None:
        try:
            return chat.apply(tokenizer, messages)
        except TemplateError as error:
            raise ModelError("the chat template cannot be used", got=error, fix="Correct its Jinja.") from None
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the tokenizer has no chat template",
            got=getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__,
            fix="Give the chat model's tokenizer, a template for base models (in a recipe: model.template: qa), or set"
            " plain=True (in a recipe: model.plain: true).",
        )
    try:
        return chat.apply(tokenizer, messages)
    except TemplateError as error:
        merged = _without_system_role(messages)
        if merged == messages:
            raise ModelError(
                "the model's chat template refuses the messages", got=error, fix="Write the prompt as it expects."
            ) from None
    return render(tokenizer, merged, chat)


def _without_system_role(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages with the leading system prompt at the beginning of the first user message."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return messages
    system, user, *rest = messages
    return [user | {"content": f"{system['content']}\n\n{user['content']}"}, *rest]


def prompt_tokens(tokenizer: Any, messages: list[dict[str, str]], chat: Chat = CHAT) -> list[int]:
    """Token ids of a rendered prompt. A tokenizer's own template writes special tokens, so none is added twice."""
    text = render(tokenizer, messages, chat)
    return list(tokenizer(text, add_special_tokens=chat.adds_special_tokens)["input_ids"])
