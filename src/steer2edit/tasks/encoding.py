"""From texts to the token ids that log-probabilities are measured of, as lm-eval's own models do it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Ids = tuple[int, ...]


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text with the tokenizer's special tokens, unless it begins with one of them already."""
    begins = tokenizer.decode(prefix_token(tokenizer))
    if begins and text.startswith(begins):
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(tokenizer.encode(text))


def prefix_token(tokenizer: Any) -> int:
    """The token before a text that has nothing before it: the first of a text, or else the last of one."""
    first = tokenizer.bos_token_id
    return int(tokenizer.eos_token_id if first is None else first)


def pair(tokenizer: Any, context: str, continuation: str) -> tuple[Ids, Ids]:
    """The tokens of a context and of what continues it: those of the whole text, divided where the context's end.

    Spaces at the context's end go to the continuation, whose first token usually begins with one.
    """
    if not context:
        ids = list(tokenizer.encode(continuation, add_special_tokens=False))
        first = prefix_token(tokenizer)
        return ((first,), tuple(ids)) if ids[0] != first else (tuple(ids[:1]), tuple(ids[1:]))
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = encode(tokenizer, context + continuation)
    before = len(encode(tokenizer, context))
    return tuple(whole[:before]), tuple(whole[before:])


def windows(ids: Sequence[int], first: int, longest: int) -> list[tuple[Ids, Ids]]:
    """A long text as pairs of context and continuation, so that each token is predicted once.

    Each window but the last predicts `longest` tokens after one token of context; the last one has as much context as
    fits.

    Args:
        first: the token before the text. longest: the most tokens that the model reads at once.

    >>> windows((1, 2, 3, 4, 5), 0, 2)
    [((0,), (1, 2)), ((2,), (3, 4)), ((3, 4), (5,))]
    """
    pairs: list[tuple[Ids, Ids]] = []
    text = (first, *ids)
    for start in range(0, len(ids), longest):
        end = min(start + longest, len(ids))
        context = max(0, end - longest)
        pairs.append((tuple(text[min(context, start) : start + 1]), tuple(text[start + 1 : end + 1])))
    return pairs


def fitting(context: Ids, continuation: Ids, longest: int) -> tuple[Ids, Ids]:
    """A pair that is cut on the left where it is longer than the model reads, less the last token, which it does not.

    >>> fitting((1, 2, 3), (4, 5), 3)
    ((2, 3), (4, 5))
    """
    keep = max(1, longest + 1 - len(continuation))
    return context[-keep:], continuation
