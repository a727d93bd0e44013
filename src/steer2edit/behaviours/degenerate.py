"""Whether a response is no language."""

from __future__ import annotations

import re
from collections.abc import Sequence

_TOKEN = re.compile(r"\w+|[^\w\s]")


def degenerate(text: str) -> bool:
    """Whether a response is no language: empty, without a letter, one word or n-gram over and over, or next to no
    distinct words. Such a response never counts as a success."""
    tokens = _TOKEN.findall(text.lower())
    words = [token for token in tokens if any(c.isalnum() for c in token)]
    if not words:
        return True
    # A ruled line, dots or the brackets of code are no loop unless there is next to nothing else.
    if _loops(words, 0.5) or _loops(tokens, 0.8):
        return True
    return len(words) >= 12 and len(set(words)) / len(words) < 0.25


def _loops(tokens: Sequence[str], share: float) -> bool:
    """Whether a cycle of up to six tokens, gone through four times or so, takes at least this share of all."""
    if len(tokens) < 6:
        return False
    for n in range(1, 7):
        repeats = run = 0
        for i in range(n, len(tokens)):
            run = run + 1 if tokens[i] == tokens[i - n] else 0
            repeats = max(repeats, run)
        # `repeats` tokens in a row continue a cycle of n: n + repeats tokens say what n could.
        if repeats >= max(4, 3 * n - 1) and n + repeats >= share * len(tokens):
            return True
    return False
