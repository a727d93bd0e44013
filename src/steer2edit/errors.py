"""Errors that a user can act on: what is wrong, what was got, what to do.

The command line prints such an error as one sentence and leaves with exit code 2; anything else is our
own mistake and keeps its traceback.
"""

from __future__ import annotations

from typing import Any


class Steer2EditError(Exception):
    """A mistake that the user can mend.

    Args:
        what: what is wrong.
        got: what was found in its place.
        fix: what to do about it.
    """

    def __init__(self, what: str, *, got: object, fix: str):
        self.what, self.got, self.fix = what, str(got), fix
        super().__init__(f"{what} (got: {got}). {fix}")

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is copied by its message alone, which is how Ray would bring it from another process.
        return _again, (type(self), self.what, self.got, self.fix)


def _again(kind: type[Steer2EditError], what: str, got: str, fix: str) -> Steer2EditError:
    return kind(what, got=got, fix=fix)


class ModelError(Steer2EditError):
    """The model is not supported, not usable here, or not the one that is meant."""


class TraceError(Steer2EditError):
    """The traces cannot be used."""


class ProbeError(Steer2EditError):
    """A pass over the traces left something that no mean may hold."""


class EditError(Steer2EditError):
    """An edit cannot be made, applied or taken out."""


class FileError(Steer2EditError):
    """A file is missing, cut short, or not what it says it is."""


class RecipeError(Steer2EditError):
    """A recipe holds a key or a value that it must not."""
