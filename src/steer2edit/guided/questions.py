"""Questions to a person on a terminal. Each answer has a flag of the command line, so that no question is needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import Steer2EditError
from ..report.visible import visible

T = TypeVar("T")

# The screen's width where the terminal does not say its own.
_WIDTH = 80


def can_ask() -> bool:
    """Whether a person can read a question and answer it: what asks is stderr, since stdout holds results."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def know_arrow_keys() -> None:
    """Lets `input` know the arrow keys, where this Python can."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return


class Questions:
    """Asks until an answer can be used.

    Args:
        console: rich's, on stderr.
        read: shows a prompt and gives the next line; it raises EOFError at the end of the input.
    """

    def __init__(self, console: Any = None, read: Callable[[str], str] | None = None):
        self.console = console or error_console()
        self._read = read or _read_line

    def say(self, text: str = "") -> None:
        """Writes a text as it is: nothing in it is markup."""
        self.console.print(visible(text), markup=False, highlight=False)

    def show(self, renderable: Any) -> None:
        self.console.print(renderable)

    def text(self, question: str, default: str | None = None) -> str:
        """A line; an empty one stands for the default.

        Raises:
            KeyboardInterrupt: the person stops, or the input ends.
        """
        shown = visible(f"{question} [{default}]: " if default else f"{question}: ")
        while True:
            try:
                line = self._read(shown).strip()
            except EOFError:
                raise KeyboardInterrupt from None
            if line or default is not None:
                return line or str(default)
            self.say("  Write an answer, or stop with Ctrl-C.")

    def checked(self, question: str, check: Callable[[str], T], default: str | None = None) -> T:
        """What `check` makes of an answer; where it raises Steer2EditError, the question is asked again."""
        while True:
            try:
                return check(self.text(question, default))
            except Steer2EditError as error:
                self.say(f"  {error}")

    def one_of(self, question: str, choices: Mapping[str, str], default: str | None = None) -> str:
        """The key of a choice. It is answered by the choice's number, its name, or a beginning that only it has.

        Args:
            choices: name → what it is for, one line each.
        """
        width = max(map(len, choices))
        for number, (name, about) in enumerate(choices.items(), start=1):
            self.say(f"  {number:>2}  {name:{width}}  {about}".rstrip())
        while True:
            answer = self.text(question, default)
            if answer in choices:
                return answer
            if answer.isdecimal() and 1 <= int(answer) <= len(choices):
                return list(choices)[int(answer) - 1]
            begun = [name for name in choices if name.startswith(answer.lower())]
            if len(begun) == 1:
                return begun[0]
            self.say(f"  Write a number from 1 to {len(choices)}, or a name.")

    def yes(self, question: str, default: bool = True) -> bool:
        while True:
            answer = self.text(question, "Y/n" if default else "y/N").lower()
            if answer in ("y/n", "y", "yes"):
                return default if answer == "y/n" else True
            if answer in ("n", "no"):
                return False
            self.say("  Write y or n.")


def _read_line(prompt: str) -> str:
    """A line of the terminal. Where `input` can draw the prompt itself, the arrow keys leave it in its place."""
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def error_console() -> Any:
    """A console on stderr, as wide as the terminal."""
    from rich.console import Console

    known = sys.stderr.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    return Console(stderr=True, width=None if known else _WIDTH)
