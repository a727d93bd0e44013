"""Messages: silent in a library, shown by the command line, and there for who listens."""

from __future__ import annotations

import subprocess
import sys

import pytest

from steer2edit.progress import be_quiet, is_quiet, say


def test_a_library_says_nothing_by_itself() -> None:
    code = "import steer2edit; from steer2edit.progress import say, showing\nsay('a')\nwith showing('b') as p: p(1, 2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_messages_are_shown_on_stderr_until_they_are_silenced(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    be_quiet(False)
    be_quiet(False)
    say("once")
    be_quiet()
    say("unheard")
    assert is_quiet()
    assert capsys.readouterr() == ("", "once\n")
    assert caplog.messages == ["once", "unheard"]  # who listens to the logger hears both


def test_a_message_acts_on_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    be_quiet(False)
    say("  ρ_attn of a\x1b[2J\x9b31m\u202ename: 27\u202f%\nb")
    assert capsys.readouterr().err == "  ρ_attn of a\\x1b[2J\\x9b31m\\u202ename: 27\\u202f%\nb\n"
