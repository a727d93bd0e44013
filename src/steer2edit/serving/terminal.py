"""The chat in a terminal: answers are streamed, and commands that begin with / change what comes next."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import Steer2EditError
from ..report.visible import visible
from .conversation import EDIT, Conversation, Messages, Settings

HELP = """\
/strength 0.5         the edit's strength from now on; /strength NAME 0.5 of one edit among several
/compare              the last question again, to all systems side by side; /compare TEXT asks another one
/system TEXT          a system prompt, and a new conversation; without TEXT none
/save FILE            the edit at its strength as FILE.safetensors, or a part of a recipe as FILE.yaml
/new                  a new conversation
/help, /quit"""


class TerminalChat:
    """Reads lines, and answers them.

    Args:
        read: gives the next line, and raises EOFError at the end.
        console: rich's, for the comparison. Text goes to the same stream.
    """

    def __init__(
        self, conversation: Conversation, settings: Settings, console: Any, read: Callable[[str], str] = input
    ):
        self.conversation, self.settings, self.console, self.read = conversation, settings, console, read
        self.system = ""
        self.history: Messages = []
        self.commands: dict[str, Callable[[str], None]] = {
            "/strength": self.set_strength,
            "/compare": self.compare,
            "/system": self.set_system,
            "/save": self.save,
            "/new": self.start_anew,
            "/help": lambda _: self.say(HELP),
        }

    def run(self) -> None:
        """Until /quit or the end of the input. A mistake is one line, and the chat goes on."""
        self.say("Ask something; /help lists the commands.")
        while True:
            try:
                line = self.read("> ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.say("\n/quit ends the chat.")
                continue
            word, _, rest = line.partition(" ")
            if word in ("/quit", "/exit"):
                return
            try:
                if word in self.commands:
                    self.commands[word](rest.strip())
                elif word.startswith("/"):
                    self.say(f"There is no command {word}; /help lists them.")
                elif line:
                    self.answer(line)
            except Steer2EditError as error:
                self.say(str(error))
            except OSError as error:
                self.say(f"{error.filename or 'the file'} cannot be written: {error.strerror}.")

    def say(self, text: str, end: str = "\n") -> None:
        """Writes text as it is: nothing in it is markup or a control sequence."""
        self.console.file.write(visible(text) + end)
        self.console.file.flush()

    def messages(self, question: str) -> Messages:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.history, {"role": "user", "content": question}]

    def answer(self, question: str) -> None:
        """Streams the edited model's answer; Ctrl-C stops it."""
        shown = ""
        turns = self.conversation.ask({EDIT: self.messages(question)}, self.settings)
        with contextlib.closing(turns):
            try:
                for turn in turns:
                    text = turn.texts[EDIT]
                    self.say(text[len(shown) :], end="")
                    shown = text
                    if failure := turn.failures.get(EDIT):
                        self.say(failure)
                        return
            except KeyboardInterrupt:
                self.say(" (stopped)", end="")
        self.say("")
        self.history += [{"role": "user", "content": question}, {"role": "assistant", "content": shown}]

    def compare(self, question: str) -> None:
        asked = [message["content"] for message in self.history if message["role"] == "user"]
        if not (question or asked):
            self.say("There is no question yet: write it behind /compare.")
            return
        before = self.history
        if not question:
            question, self.history = asked[-1], before[:-2]
        turn = None
        try:
            turns = self.conversation.ask(
                dict.fromkeys(self.conversation.systems, self.messages(question)), self.settings
            )
            with contextlib.closing(turns), self._live() as show:
                for turn in turns:
                    show(self._table({**turn.texts, **turn.failures}))
        except KeyboardInterrupt:
            self.say("(stopped)")
        except Steer2EditError:
            self.history = before
            raise
        if turn is None or EDIT in turn.failures:
            self.history = before
        else:
            said = {"role": "assistant", "content": turn.texts[EDIT]}
            self.history += [{"role": "user", "content": question}, said]

    @contextlib.contextmanager
    def _live(self) -> Any:
        """Yields a function that shows a table: again and again on a terminal, once at the end elsewhere."""
        if self.console.is_terminal:
            from rich.live import Live

            with Live(console=self.console, refresh_per_second=8, vertical_overflow="visible") as live:
                yield live.update
            return
        last: list[Any] = []
        yield lambda table: last.__setitem__(slice(None), [table])
        for table in last:
            self.console.print(table)

    def _table(self, texts: Any) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(*texts, expand=True)
        table.add_row(*(Text(visible(text)) for text in texts.values()))
        return table

    def set_strength(self, text: str) -> None:
        name, _, number = text.rpartition(" ")
        name = name.strip() or self.conversation.sources[0].name
        try:
            strength = float(number)
        except ValueError:
            strength = float("nan")
        if name not in self.settings.strengths or not abs(strength) < float("inf"):
            self.say(f"Write /strength NUMBER, or /strength NAME NUMBER: {', '.join(self.settings.strengths)}.")
            return
        self.settings = replace(self.settings, strengths={**self.settings.strengths, name: strength})
        self.say(f"strength: {', '.join(f'{n} {s:g}' for n, s in self.settings.strengths.items())}")

    def set_system(self, text: str) -> None:
        self.system = text
        self.start_anew("")

    def start_anew(self, _: str) -> None:
        self.history = []
        self.say("A new conversation.")

    def save(self, text: str) -> None:
        if not text:
            self.say("Write /save FILE.safetensors or /save FILE.yaml.")
            return
        path = Path(text).expanduser()
        path = path if path.suffix else path.with_suffix(".safetensors")
        self.conversation.save(self.settings, path)
        self.say(f"{path} is written.")


def chat_here(conversation: Conversation, settings: Settings, system: str = "") -> None:
    """The chat on this terminal."""
    from rich.console import Console

    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then knows the arrow keys)
    chat = TerminalChat(conversation, settings, Console(highlight=False, markup=False))
    chat.system = system
    chat.run()
