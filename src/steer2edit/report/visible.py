"""Text of a model or a user, as it may be shown: control characters act on nothing, they are shown as text."""

from __future__ import annotations

import unicodedata

# Marks that turn the direction of the text around them. U+200D and other joiners stay: emoji and scripts need them.
_DIRECTION = {"\u061c", "\u200e", "\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
_KEPT = {"\n", "\t"}


def visible(text: str) -> str:
    r"""The text with every control character and mark of direction written as an escape; newlines and tabs stay.

    >>> print(visible("\x1b[31mred\r\u202e."))
    \x1b[31mred\r\u202e.
    """
    return "".join(c if _harmless(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(text: str, length: int | None = None) -> str:
    r"""The beginning of a text on one line, with nothing in it that acts on what stands around it.

    Args:
        length: how many characters of it, without runs of spaces; None is all.

    >>> one_line("a\n\n  b\x07", 5)
    'a b\\x07'
    """
    return visible(" ".join(text.split())[:length])


def in_markup(value: object) -> str:
    r"""A value as text in rich's markup, where nothing in it acts on the terminal or is taken for a style.

    >>> print(in_markup("\x1b[2J[bold]"))
    \x1b[2J\[bold]
    """
    from rich.markup import escape

    return escape(visible(str(value)))


def _harmless(c: str) -> bool:
    if c in _KEPT or " " <= c <= "~":
        return True
    return unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") and c not in _DIRECTION
