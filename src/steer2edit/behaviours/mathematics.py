"""The answer of a worked solution, and whether two answers are the same number."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\boxed\s*\{")
# A minus sign belongs to a number only if nothing but white space stands before it: "10-20" ends in 20.
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?")


def final_answer(text: str) -> str | None:
    r"""What a solution ends in: its last \boxed{…}, else its last number; None if it has neither.

    >>> final_answer(r"So 3 + 4 = 7, that is \boxed{7}."), final_answer("She has 12 apples and pays $1,050.50.")
    ('7', '1050.50')
    """
    if (boxed := last_boxed(text)) is not None:
        return boxed
    numbers = _NUMBER.findall(text.replace("−", "-"))
    return re.sub(r"[$,\s]", "", numbers[-1]) if numbers else None


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{…} of a text holds; None if there is none, or it is not closed.

    >>> last_boxed(r"\boxed{A}, no: \boxed{ \text{B} }")
    '\\text{B}'
    """
    starts = [match.end() for match in _BOXED.finditer(text)]
    boxed = _until_closed(text[starts[-1] :]) if starts else None
    return None if boxed is None else boxed.strip()


def _until_closed(text: str) -> str | None:
    """The text up to the brace that closes the one before it."""
    depth = 1
    for i, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:i]
    return None


def is_right(text: str, answer: str) -> bool:
    """Whether a solution ends in the answer: the same number to two decimals, or the same text.

    Args:
        answer: the reference; what stands after `####`, if it is a worked solution as GSM8K has them.

    >>> is_right("That makes 42 dollars.", "42"), is_right("It is 41.", "6 * 7 = 42 #### 42")
    (True, False)
    """
    given, wanted = final_answer(text), answer.rpartition("####")[2].strip()
    if given is None:
        return False
    a, b = _value(given), _value(wanted)
    if a is None or b is None:
        return given == wanted
    return round(a, 2) == round(b, 2)


def _value(text: str) -> float | None:
    plain = text.replace("−", "-").replace("{,}", "")
    plain = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{\s*([^{}]*?)\s*\}", r"\1", plain)
    plain = re.sub(r"\\?[$,%]|\\[!;]|\s", "", plain)
    over = re.fullmatch(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}|(-?\d+)/(\d+)", plain)
    if over:
        top, bottom = over[1] or over[3], over[2] or over[4]
        return float(top) / float(bottom) if float(bottom) else None
    try:
        return float(plain)
    except ValueError:
        return None
