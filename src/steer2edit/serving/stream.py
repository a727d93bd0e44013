"""From tokens to pieces of text that can be shown at once, and that together are the answer's text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What a decoder gives for bytes that are no whole character, or not yet.
_INCOMPLETE = "\ufffd"


class TextStream:
    """Decodes an answer while it grows.

    A token may hold a part of a character, so text is given only up to where the characters are whole. The last
    characters wait if a stop string may begin in them.

    Args:
        stop: the strings that end the answer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.text = ""
        self.given = 0
        self._held = max((len(string) - 1 for string in stop), default=0)
        # ids[start:read] are in the text already. They are decoded again as the context of the next ones, since some
        # tokenizers drop the space before a first token.
        self._start = self._read = 0

    def push(self, ids: Sequence[int]) -> str:
        """The text that can be given now.

        Args:
            ids: all tokens of the answer so far.
        """
        known = self._decode(ids[self._start : self._read])
        text = self._decode(ids[self._start :])
        if not text.endswith(_INCOMPLETE) and text.startswith(known):
            self.text += text[len(known) :]
            if len(text) > len(known):
                self._start = self._read
            self._read = len(ids)
        return self._give(len(self.text) - self._held)

    def finish(self, text: str) -> str:
        """What is left to give of the whole answer's text."""
        self.text = text
        return self._give(len(text))

    def _give(self, until: int) -> str:
        piece = self.text[self.given : max(until, self.given)]
        self.given += len(piece)
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True) if ids else ""
