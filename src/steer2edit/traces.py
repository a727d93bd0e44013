"""Traces: what a model, or a person, answered, and which side of a behaviour the answer shows.

Also the token span of a response. One tokenisation of the whole text decides it, since a prompt that is tokenised
apart from its response can merge differently at the boundary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import ModelError, TraceError
from .files import numbered_jsonl, write_jsonl

Label = Literal["positive", "negative"]
LABELS: tuple[Label, ...] = get_args(Label)
Positions = Literal["predicting", "response"]


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
    """

    prompt: str | Sequence[Mapping[str, str]]
    response: str
    label: Label
    system: str | None = None
    group: str = ""
    source: str = ""

    def messages(self) -> list[dict[str, str]]:
        given = [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else map(dict, self.prompt)
        return ([{"role": "system", "content": self.system}] if self.system is not None else []) + list(given)


def write_traces(path: str | Path, traces: Iterable[Trace]) -> None:
    """JSON Lines, one trace a line; fields that hold their default are left out."""
    defaults = {"system": None, "group": "", "source": ""}
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
        if not all(isinstance(text, str) for text in texts) or not _is_prompt(row["prompt"]):
            raise TraceError(
                f"line {number} of {path} holds a value of the wrong type",
                got=repr({k: type(v).__name__ for k, v in row.items()}),
                fix="A prompt is a text or a list of {role, content} messages; everything else is a text.",
            )
        traces.append(Trace(**row))
    return traces


def _is_prompt(value: Any) -> bool:
    def is_message(m: Any) -> bool:
        return isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))

    return isinstance(value, str) or (isinstance(value, list) and len(value) > 0 and all(map(is_message, value)))


def render(tokenizer: Any, messages: list[dict[str, str]], plain: bool = False) -> str:
    """The prompt as the model sees it, up to where its answer begins, to the last character (templates often end in
    a newline, which is part of it).

    Args:
        plain: no template: the contents, one after the other, are the text that the response continues.

    Raises:
        ModelError: if the tokenizer has no chat template and `plain` is off.
    """
    if plain:
        return "\n".join(m["content"] for m in messages)
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the tokenizer has no chat template",
            got=getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__,
            fix="Give the chat model's tokenizer, or set plain=True (in a recipe: model.plain: true).",
        )
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def prompt_tokens(tokenizer: Any, messages: list[dict[str, str]], plain: bool = False) -> list[int]:
    """Token ids of a rendered prompt. A template writes the special tokens itself, so that none is added twice."""
    return list(tokenizer(render(tokenizer, messages, plain), add_special_tokens=plain)["input_ids"])


@dataclass(frozen=True)
class Span:
    """The tokens up to the last position that counts, and the positions that the mean runs over: [first, last)."""

    ids: tuple[int, ...]
    first: int
    last: int


def response_span(
    tokenizer: Any, trace: Trace, *, plain: bool = False, positions: Positions = "predicting", max_tokens: int = 4096
) -> tuple[Span | None, bool]:
    """The span of a trace's response, and whether `max_tokens` cut something off its right.

    The response starts at the first token that holds a character of it. With "predicting" the positions are
    [start − 1, end − 1), those whose outputs predict the response's tokens (as in the published code of
    arXiv 2602.09870); with "response" [start, end). An end-of-turn token is not part of a response.

    Returns:
        (None, …) where there is no token of the response, since the response is empty or was cut off whole.
    """
    if not trace.response.strip():
        return None, False
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            "the tokenizer cannot tell where its tokens lie in the text",
            got=type(tokenizer).__name__,
            fix="Load a fast tokenizer (AutoTokenizer.from_pretrained(…, use_fast=True)).",
        )
    prompt = render(tokenizer, trace.messages(), plain)
    encoded = tokenizer(prompt + trace.response, add_special_tokens=plain, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    holds = [i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt)]
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
