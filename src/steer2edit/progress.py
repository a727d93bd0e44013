"""Messages through `logging`, and progress with an ETA.

The library prints nothing: messages go to the logger "steer2edit", and there is no progress bar. The command line shows
both on stderr, so that stdout holds only results. A screen, once it is opened (report/live.py), takes every bar.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Progress = Callable[[int, int], None]
_LOGGER = logging.getLogger("steer2edit")


class _Stderr(logging.Handler):
    """Writes plain lines to the current `sys.stderr`. What a terminal would act on is written as an escape."""

    def emit(self, record: logging.LogRecord) -> None:
        print("".join(map(_harmless, self.format(record))), file=sys.stderr, flush=True)


def _harmless(c: str) -> str:
    return c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii")


_shown = _Stderr()


def be_quiet(quiet: bool = True) -> None:
    """Hides messages and progress; with False, shows them on stderr."""
    if quiet:
        _LOGGER.removeHandler(_shown)
    else:
        _LOGGER.setLevel(logging.INFO)
        _LOGGER.addHandler(_shown)


def say(text: str) -> None:
    """Logs a message about the work."""
    _LOGGER.info(text)


def is_quiet() -> bool:
    return _shown not in _LOGGER.handlers


def on_a_terminal() -> bool:
    """Whether stderr is a terminal that can draw a line again."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@dataclass(frozen=True)
class Sample:
    """An answer that a person may see while the work goes on.

    Attributes:
        kind, config: what gave it, as a candidate has them.
    """

    kind: str
    config: Mapping[str, Any]
    prompt: str
    answer: str


class Screen(Protocol):
    """Shows all the work in one place while it lasts."""

    def bar(self, label: str) -> contextlib.AbstractContextManager[Progress]: ...

    def show_answers(self, samples: Sequence[Sample]) -> None: ...


_screens: list[Screen] = []


def current_screen() -> Screen | None:
    return _screens[-1] if _screens else None


@contextlib.contextmanager
def shown_on(screen: Screen) -> Iterator[None]:
    """While it lasts, bars and answers go to the screen."""
    _screens.append(screen)
    try:
        yield
    finally:
        _screens.remove(screen)


def columns(width: int = 80) -> tuple[Any, ...]:
    """The columns of a progress bar: label, bar, count and time left. There is no count until the total is known.

    Args:
        width: of the terminal.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Count(MofNCompleteColumn):
        def render(self, task: Task) -> Text:
            return Text("starting") if task.total is None else super().render(task)

    length = min(40, max(5, width - 40))
    return TextColumn("{task.description}"), BarColumn(length), Count(), TimeRemainingColumn()


@contextlib.contextmanager
def showing(label: str) -> Iterator[Progress]:
    """Shows the progress of one piece of work. Yields a function to call with (done, total)."""
    if is_quiet():
        yield lambda done, total: None
    elif (screen := current_screen()) is not None:
        with screen.bar(label) as progress:
            yield progress
    elif on_a_terminal():
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        with Progress(*columns(console.width), console=console, refresh_per_second=4) as bar:
            task = bar.add_task(f"  {label}", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _Lines(label)


def megabytes(progress: Progress) -> Progress:
    """Wraps a progress function so that it takes bytes and shows megabytes."""
    return lambda done, total: progress(done // 10**6, total // 10**6)


class _Lines:
    """One line every ten seconds, so that a log file shows the progress and the time left."""

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
