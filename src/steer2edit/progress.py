"""Progress with an ETA: a bar on a terminal, a plain line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Progress = Callable[[int, int], None]

_quiet = False


def be_quiet(quiet: bool = True) -> None:
    global _quiet
    _quiet = quiet


def say(text: str) -> None:
    """A line about the work, on stderr, so that stdout stays with the results."""
    if not _quiet:
        print(text, file=sys.stderr, flush=True)


def is_quiet() -> bool:
    return _quiet


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
    if _quiet:
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
