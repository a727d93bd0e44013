"""`steer2edit` in a terminal of its own, for the tests of what a person sees and types."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pexpect

# Colours, movements of the cursor, titles of windows.
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[=>78]")
_SECONDS = 600


class Terminal:
    """A pseudo-terminal in which `steer2edit` runs.

    Args:
        place: the folder that it runs in.
    """

    def __init__(self, place: Path, *arguments: str | Path, columns: int = 100, lines: int = 40, **variables: str):
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        environment |= {"TERM": "xterm-256color", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"} | variables
        self.child: Any = pexpect.spawn(
            sys.executable,
            ["-m", "steer2edit.cli", *map(str, arguments)],
            cwd=str(place),
            env=environment,
            dimensions=(lines, columns),
            encoding="utf-8",
            timeout=_SECONDS,
            preexec_fn=_hear_ctrl_c,
        )
        self.raw = ""

    def wait_for(self, text: str) -> str:
        """Until a text stands there; gives what came before it, without control sequences."""
        self.child.expect(re.escape(text))
        self.raw += self.child.before + self.child.after
        return plain(self.child.before)

    def answer(self, question: str, line: str) -> str:
        """Waits for a question and answers it; gives what came before the question."""
        before = self.wait_for(question)
        self.child.sendline(line)
        return before

    def interrupt(self) -> None:
        self.child.sendintr()

    def end(self) -> tuple[int, str]:
        """The exit code, and what was written until the end."""
        self.child.expect(pexpect.EOF)
        self.raw += self.child.before
        rest = plain(self.child.before)
        self.child.close()
        return int(self.child.exitstatus if self.child.exitstatus is not None else -self.child.signalstatus), rest


def _hear_ctrl_c() -> None:
    """Tests that run in the background of a shell ignore Ctrl-C, and what they start would ignore it too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def plain(text: str) -> str:
    """What was written, without control sequences."""
    return _CONTROL.sub("", text).replace("\r\n", "\n")
