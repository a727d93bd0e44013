"""The span of a response: the positions that its mean runs over.

One tokenisation of the whole text decides it, since a prompt that is tokenised without its response can merge
differently at the boundary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ModelError, TraceError
from .chat import CHAT, Chat, render
from .traces import Part, Positions, Trace


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
    """The span of a trace's response, and whether `max_tokens` cut off its end.

    The response starts at the first token that holds a character of it. With "predicting" the positions are
    [start − 1, end − 1), those whose outputs predict the response's tokens (as in the published code of
    arXiv 2602.09870). With "response" they are [start, end). An end-of-turn token is not part of a response.

    Args:
        part: "thinking" is the response up to `trace.answer_start`, "answer" from there on.

    Returns:
        (None, …) if the part has no token, because it is empty or was cut off completely.
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
    gap = chat.gap(prompt, trace.response)
    prompt += gap
    text = prompt + trace.response
    encoded = tokenizer(text, add_special_tokens=chat.adds_special_tokens, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    # The space that sets a response off is the model's to write: where it is a token of its own, it belongs to it.
    first, last = len(prompt) + first - (len(gap) if first == 0 else 0), len(prompt) + last
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
