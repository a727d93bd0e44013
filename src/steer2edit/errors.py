"""Errors that a user can act on: what is wrong, what was got, what to do.

The command line prints such an error as one sentence and exits with code 2. Any other exception is a bug of ours and
keeps its traceback.
"""

from __future__ import annotations

import errno
from typing import Any

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What a disk, a folder or a path says no to, whatever this program does.
_REFUSED = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
}


class Steer2EditError(Exception):
    """A mistake that the user can fix.

    Args:
        what: what is wrong.
        got: what was found instead.
        fix: what to do about it.

    >>> print(Steer2EditError("the strength must be finite", got=float("inf"), fix="1.0 is the edit as scored."))
    the strength must be finite (got: inf). 1.0 is the edit as scored.
    """

    def __init__(self, what: str, *, got: object, fix: str):
        self.what, self.got, self.fix = what, str(got), fix
        super().__init__(f"{what} (got: {got}). {fix}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Without this, pickle would copy only the message, and Ray pickles exceptions of other processes.
        return _again, (type(self), self.what, self.got, self.fix)


def _again(kind: type[Steer2EditError], what: str, got: str, fix: str) -> Steer2EditError:
    return kind(what, got=got, fix=fix)


def is_full(error: OSError) -> bool:
    """Whether a disk, a quota or a limit on files has no room for what was written."""
    return error.errno in _FULL


def refused_by_the_system(error: OSError) -> Steer2EditError | None:
    """The sentence for an error of the machine that the user can act on; None for one that may be a bug of ours.

    >>> refused_by_the_system(OSError(errno.ENOSPC, "No space left on device")).what
    'the disk is full'
    """
    if is_full(error):
        fix = "Free some space and run the same command again."
        return Steer2EditError("the disk is full", got=error.filename or "no space left", fix=fix)
    if error.errno in _REFUSED:
        what = f"{error.filename or 'a file'} cannot be used"
        return Steer2EditError(what, got=error.strerror, fix="Check the path, its rights and its disk.")
    return None


class Interrupted(Exception):
    """The user stopped the work. The text says what goes on from there."""


class ModelError(Steer2EditError):
    """The model is not supported, cannot be used here, or is not the expected one."""


class TraceError(Steer2EditError):
    """The traces cannot be used."""


class ProbeError(Steer2EditError):
    """A pass over the traces gave a value that a mean must not contain."""


class EditError(Steer2EditError):
    """An edit cannot be created, applied or reverted."""


class FileError(Steer2EditError):
    """A file is missing, cut short, or not what it claims to be."""


class TaskError(Steer2EditError):
    """A utility task or a set of attacks was not measured; everything else was."""


class RecipeError(Steer2EditError):
    """A recipe has a key or a value that cannot be used."""
