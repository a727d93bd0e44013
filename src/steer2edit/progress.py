"""What the work says while it goes on: messages by `logging`, progress with an ETA.

As a library nothing is printed: messages go to the logger "steer2edit", which a program may listen to, and there is no
bar. The command line shows both on stderr, so that stdout stays with the results.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Progress = Callable[[int, int], None]
_LOGGER = logging.getLogger("steer2edit")


class _Stderr(logging.Handler):
    """Plain lines, on what stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


_shown = _Stderr()


def be_quiet(quiet: bool = True) -> None:
    """Shows messages and progress on stderr, or no longer."""
    if quiet:
        _LOGGER.removeHandler(_shown)
    else:
        _LOGGER.setLevel(logging.INFO)
        _LOGGER.addHandler(_shown)


def say(text: str) -> None:
    """A message about the work."""
    _LOGGER.info(text)


def is_quiet() -> bool:
    return _shown not in _LOGGER.handlers


def columns() -> tuple[Any, ...]:
    """Of a bar on a terminal: what, how far, how much, how long. Until the total is known, no count is shown."""
    from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Count(MofNCompleteColumn):
        def render(self, task: Task) -> Text:
            return Text("starting") if task.total is None else super().render(task)

    return TextColumn("{task.description}"), BarColumn(), Count(), TimeRemainingColumn()


@contextlib.contextmanager
def showing(label: str) -> Iterator[Progress]:
    """Gives a function to call with (done, in all)."""
    if is_quiet():
        yield lambda done, total: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(*columns(), console=Console(stderr=True)) as bar:
            task = bar.add_task(f"  {label}", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _Lines(label)


def megabytes(progress: Progress) -> Progress:
    """For work that counts bytes."""
    return lambda done, total: progress(done // 10**6, total // 10**6)


class _Lines:
    """One line every ten seconds, so that a log file tells what is going on and how long it will take."""

    def __init__(self, label: str, every: float = 10.0):
        self.label, self.every = label, every
        self.started = self.last = time.monotonic()
        self.first: int | None = None
        self.whole = False

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = done
        if self.whole:
            return
        self.whole = done >= total
        if now - self.last < self.every and done < total:
            return
        if done >= total and now - self.started < 2:
            return
        self.last = now
        gained = done - self.first
        left = (now - self.started) * (total - done) / gained if gained else None
        eta = "" if done >= total or left is None else f", about {left:.0f} s left"
        say(f"  {self.label}: {done}/{total}{eta}")
