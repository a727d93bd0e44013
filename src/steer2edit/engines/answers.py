"""From generated token ids to an answer: where it starts, and where a stop string ends it."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from ..probing.chat import THOUGHT, answer_start, begins_thinking
from .base import Answer, Request


def answer_of(tokenizer: Any, request: Request, ids: Sequence[int], ended: bool, stop: Sequence[str] = ()) -> Answer:
    """The answer that generated ids stand for, without the end-of-turn token.

    Args:
        stop: the first of these strings ends the answer. They are searched in the text with its special tokens, so that
            a special token can be one of them.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    raw = tokenizer.decode(ids, skip_special_tokens=False)
    cut = min((raw.find(string) for string in stop if string in raw), default=None)
    if cut is not None:
        raw = raw[:cut]
        ids, kept = _ids_within(tokenizer, ids, raw)
        # A token can begin before the stop string and end inside it: its characters before the string stay.
        text = tokenizer.decode(ids, skip_special_tokens=True) + raw[len(kept) :]
        ended = True
    start = raw_start = answer_start(raw, begins_thinking(tokenizer.decode(list(request.ids[-8:]))))
    if start and raw != text:  # the tags are special tokens, which `text` leaves out
        ends = next((i for i in range(len(ids)) if THOUGHT in tokenizer.decode(ids[: i + 1])), len(ids))
        thought = tokenizer.decode(ids[: ends + 1], skip_special_tokens=True)
        start = len(thought) + len(text[len(thought) :]) - len(text[len(thought) :].lstrip())
    return Answer(tuple(ids), text, ended, start, _thinking(tokenizer, ids, raw_start))


def _thinking(tokenizer: Any, ids: Sequence[int], start: int) -> int:
    """How many of the ids stand before the answer: the fewest whose text, special tokens too, reaches its start.

    Args:
        start: the character of the text with its special tokens at which the answer starts.
    """
    if not start:
        return 0
    counts = range(len(ids))
    return bisect.bisect_left(counts, start, key=lambda n: len(tokenizer.decode(ids[:n], skip_special_tokens=False)))


def _ids_within(tokenizer: Any, ids: Sequence[int], text: str) -> tuple[Sequence[int], str]:
    """The longest run of first ids whose text is a beginning of `text`, and that beginning."""
    for count in range(len(ids), 0, -1):
        decoded = tokenizer.decode(ids[:count], skip_special_tokens=False)
        if text.startswith(decoded):
            return ids[:count], decoded
    return ids[:0], ""


class StopStrings:
    """Whether an unfinished answer has reached a stop string.

    A stop string of n bytes takes n tokens at most, so only the last tokens are decoded. If they hold a stop string,
    the whole answer is decoded, since tokens decoded alone can give another text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self.tokenizer, self.stop = tokenizer, stop
        # A few tokens more, since some tokenizers drop the space before the first token.
        self.tail = 4 + max((len(string.encode()) for string in stop), default=0)

    def __bool__(self) -> bool:
        return bool(self.stop)

    def end(self, ids: Sequence[int]) -> bool:
        return bool(self.stop) and self._within(ids[-self.tail :]) and self._within(ids)

    def _within(self, ids: Sequence[int]) -> bool:
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        return any(string in text for string in self.stop)


class EndAtStopString(StoppingCriteria):
    """Ends the rows of transformers' own loop at a stop string.

    Args:
        width: length of the prompts, which are not searched.
    """

    def __init__(self, strings: StopStrings, width: int):
        self.strings, self.width = strings, width

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        rows = input_ids[:, self.width :].tolist()
        return torch.tensor([self.strings.end(row) for row in rows], device=input_ids.device)
