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

# Of a token, in characters; and a few tokens more than `max_tokens`, since the last ones may be special.
LONGEST_TOKEN, _MORE = 512, 8


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
    encoded, is_whole = _encoded(tokenizer, text, max_tokens, chat)
    ids = encoded["input_ids"]
    # The space that sets a response off is the model's to write: where it is a token of its own, it belongs to it.
    first, last = len(prompt) + first - (len(gap) if first == 0 else 0), len(prompt) + last
    holds = [i for i, (start, end) in enumerate(encoded["offset_mapping"]) if end > first and start < last]
    special = set(tokenizer.all_special_ids)
    while holds and ids[holds[-1]] in special:
        holds.pop()
    if not holds:
        return None, not is_whole
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


def _encoded(tokenizer: Any, text: str, max_tokens: int, chat: Chat) -> tuple[Any, bool]:
    """The tokens of a text, and whether they are all. A text of megabytes is read as far as `max_tokens` can reach."""
    if len(text) > (most := LONGEST_TOKEN * (max_tokens + _MORE)):
        encoded = _tokenised(tokenizer, text[:most], chat)
        if len(encoded["input_ids"]) > max_tokens + _MORE:
            return encoded, False
    return _tokenised(tokenizer, text, chat), True


def _tokenised(tokenizer: Any, text: str, chat: Chat) -> Any:
    return tokenizer(text, add_special_tokens=chat.adds_special_tokens, return_offsets_mapping=True)
