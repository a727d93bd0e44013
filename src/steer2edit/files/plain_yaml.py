"""YAML from strangers: read into plain values, within bounds, whatever it holds."""

from __future__ import annotations

from typing import Any

import yaml

from ..errors import RecipeError

# More than any recipe needs. PyYAML takes seconds for a megabyte, and a few lines stand for billions of values
# if their aliases name each other.
_CHARACTERS, _VALUES, _DEPTH = 1_000_000, 100_000, 50


def read_yaml(text: str, what: str) -> Any:
    """The values of a YAML text.

    Args:
        what: what the text is, for the error: "mine.yaml".

    Raises:
        RecipeError: it is not YAML, too large, nested too deeply, contains itself, or holds a text that no file can.

    >>> read_yaml("alpha: [0.4, 0.8]", "mine.yaml")
    {'alpha': [0.4, 0.8]}
    """
    if len(text) > _CHARACTERS:
        raise RecipeError(f"{what} is too long", got=f"{len(text)} characters", fix=f"At most {_CHARACTERS} are read.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{what} is not YAML", got=str(error).replace("\n", " "), fix="Mend its syntax.") from None
    except RecursionError:
        raise RecipeError(
            f"{what} is nested too deeply", got="more levels than can be read", fix="Write it flat."
        ) from None
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        # PyYAML lets through what its readers of dates, numbers and tags raise: 2001-99-99, !!int x, !!float _.
        raise RecipeError(
            f"{what} holds a value that is not YAML", got=str(error), fix="Quote it, or mend it."
        ) from None
    _check(value, what)
    return value


def _check(value: Any, what: str) -> None:
    """Raises RecipeError for values without end, where aliases count as what they name, and for texts of no file."""
    waiting, count = [(value, 1)], 0
    while waiting:
        one, depth = waiting.pop()
        count += 1
        if count > _VALUES or depth > _DEPTH:
            raise RecipeError(
                f"{what} holds too many values, or one that contains itself",
                got=f"more than {_VALUES} values" if count > _VALUES else f"more than {_DEPTH} levels",
                fix="Look at its anchors (&) and aliases (*).",
            )
        if isinstance(one, dict):
            waiting += [(inside, depth + 1) for pair in one.items() for inside in pair]
        elif isinstance(one, list | tuple | set):
            waiting += [(inside, depth + 1) for inside in one]
        elif isinstance(one, str) and not _can_be_written(one):
            raise RecipeError(
                f"{what} holds a text that no file can hold", got=ascii(one)[:80], fix="Write whole characters, no NUL."
            )


def _can_be_written(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text
