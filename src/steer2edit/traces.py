"""Traces: what a model, or a person, answered, and which side of a behaviour the answer shows.

Also the token span of a response. One tokenisation of the whole text decides it, since a prompt that is tokenised
apart from its response can merge differently at the boundary.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from unittest import mock

from .errors import ModelError, TraceError
from .files import numbered_jsonl, write_jsonl

Label = Literal["positive", "negative"]
LABELS: tuple[Label, ...] = get_args(Label)
Positions = Literal["predicting", "response"]
# Which part of a thinking model's response counts.
Part = Literal["both", "thinking", "answer"]
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
    """

    plain: bool = False
    enable_thinking: bool | None = None
    date: str = "2026-01-01"

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


@dataclass(frozen=True)
class Trace:
    """One response to one prompt.

    A label's mean is the mean over its groups of each group's mean over responses, so two halves of a set weigh alike
    whatever their sizes.

    Attributes:
        prompt: the user's text, or a list of chat messages ({"role": …, "content": …}).
        response: the answer's text, without an end-of-turn token.
        label: "positive" shows the behaviour, "negative" does not.
        system: a system prompt, if any.
        group: the part of its label's set that the trace belongs to.
        source: where the trace came from, for people.
        answer_start: the character of the response at which the answer starts, after a model's thinking; 0 without any.
    """

    prompt: str | Sequence[Mapping[str, str]]
    response: str
    label: Label
    system: str | None = None
    group: str = ""
    source: str = ""
    answer_start: int = 0

    def messages(self) -> list[dict[str, str]]:
        given = [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else map(dict, self.prompt)
        return ([{"role": "system", "content": self.system}] if self.system is not None else []) + list(given)


def write_traces(path: str | Path, traces: Iterable[Trace]) -> None:
    """JSON Lines, one trace a line; fields that hold their default are left out."""
    defaults = {"system": None, "group": "", "source": "", "answer_start": 0}
    write_jsonl(path, ({k: v for k, v in vars(t).items() if (k, v) not in defaults.items()} for t in traces))


def read_traces(path: str | Path) -> list[Trace]:
    """Raises TraceError, with the line, where a line is not a trace, and FileError where it is not JSON."""
    traces = []
    for number, row in numbered_jsonl(path):
        unknown = set(row) - set(Trace.__dataclass_fields__)
        missing = {"prompt", "response", "label"} - set(row)
        if unknown or missing:
            raise TraceError(
                f"line {number} of {path} is not a trace",
                got=f"missing {sorted(missing)}, unknown {sorted(unknown)}",
                fix='Write {"prompt": …, "response": …, "label": "positive" or "negative"} and no other keys.',
            )
        if row["label"] not in LABELS:
            raise TraceError(
                f"line {number} of {path} has an unknown label", got=repr(row["label"]), fix=f"Use one of {LABELS}."
            )
        texts = [row["response"], row.get("group", ""), row.get("source", ""), row.get("system") or ""]
        start = row.get("answer_start", 0)
        fits = type(start) is int and isinstance(row["response"], str) and 0 <= start <= len(row["response"])
        if not all(isinstance(text, str) for text in texts) or not _is_prompt(row["prompt"]) or not fits:
            raise TraceError(
                f"line {number} of {path} holds a value of the wrong type",
                got=repr({k: type(v).__name__ for k, v in row.items()}),
                fix="A prompt is a text or a list of {role, content} messages, answer_start one of the response's "
                "characters; everything else is a text.",
            )
        traces.append(Trace(**row))
    return traces


def _is_prompt(value: Any) -> bool:
    def is_message(m: Any) -> bool:
        return isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))

    return isinstance(value, str) or (isinstance(value, list) and len(value) > 0 and all(map(is_message, value)))


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


@dataclass(frozen=True)
class Span:
    """The tokens up to the last position that counts, and the positions that the mean runs over: [first, last)."""

    ids: tuple[int, ...]
    first: int
    last: int


def response_span(
    tokenizer: Any,
    trace: Trace,
    *,
    chat: Chat = CHAT,
    part: Part = "both",
    positions: Positions = "predicting",
    max_tokens: int = 4096,
) -> tuple[Span | None, bool]:
    """The span of a trace's response, and whether `max_tokens` cut something off its right.

    The response starts at the first token that holds a character of it. With "predicting" the positions are
    [start − 1, end − 1), those whose outputs predict the response's tokens (as in the published code of
    arXiv 2602.09870); with "response" [start, end). An end-of-turn token is not part of a response.

    Args:
        part: "thinking" is the response up to `trace.answer_start`, "answer" from there on.

    Returns:
        (None, …) where there is no token of the part, since it is empty or was cut off whole.
    """
    first, last = {
        "both": (0, len(trace.response)),
        "thinking": (0, trace.answer_start),
        "answer": (trace.answer_start, len(trace.response)),
    }[part]
    if not trace.response[first:last].strip():
        return None, False
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            "the tokenizer cannot tell where its tokens lie in the text",
            got=type(tokenizer).__name__,
            fix="Load a fast tokenizer (AutoTokenizer.from_pretrained(…, use_fast=True)).",
        )
    prompt = render(tokenizer, trace.messages(), chat)
    encoded = tokenizer(prompt + trace.response, add_special_tokens=chat.plain, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    first, last = len(prompt) + first, len(prompt) + last
    holds = [i for i, (start, end) in enumerate(encoded["offset_mapping"]) if end > first and start < last]
    special = set(tokenizer.all_special_ids)
    while holds and ids[holds[-1]] in special:
        holds.pop()
    if not holds:
        return None, False
    start, end = holds[0], holds[-1] + 1
    cut = end > max_tokens
    end = min(end, max_tokens)
    if start >= end:
        return None, cut
    shift = 1 if positions == "predicting" else 0
    if start < shift:
        raise TraceError(
            "a response has nothing before it, so that no position predicts its first token",
            got=f"an empty prompt before {trace.response[:40]!r}",
            fix='Give a prompt, or take the mean over positions="response".',
        )
    return Span(tuple(ids[: end - shift]), start - shift, end - shift), cut
