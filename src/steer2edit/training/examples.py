"""What is trained on: the tokens of positive traces, and which of them the loss counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import TraceError
from ..probing.chat import CHAT, Chat
from ..probing.spans import Span, response_span
from ..probing.traces import Part, Trace


def examples_of(
    tokenizer: Any, traces: Sequence[Trace], *, chat: Chat = CHAT, part: Part = "both", max_tokens: int = 4096
) -> list[Span]:
    """The positive traces as tokens, whose loss counts the positions [first, last): those of the response.

    These are the tokens whose predicting positions the probe takes the mean over. The end-of-turn token is not among
    them: the probe leaves it out too, and of an own answer that was cut off nobody knows where it ends.

    Raises:
        TraceError: no positive trace has a response.
    """
    spans = []
    for trace in traces:
        if trace.label == "positive":
            span, _ = response_span(tokenizer, trace, chat=chat, part=part, positions="response", max_tokens=max_tokens)
            if span is not None and span.last > max(1, span.first):  # nothing predicts the first token of a text
                spans.append(span)
    if not spans:
        positive = sum(trace.label == "positive" for trace in traces)
        raise TraceError(
            "no trace can be trained on",
            got=f"{positive} positive traces, none with a response",
            fix="Training needs positive traces: run the stage traces first.",
        )
    return spans
