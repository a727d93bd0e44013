"""Children of a warm process: importing torch takes seconds, a fork milliseconds. Each ends by itself, by a signal, or
when its time is up.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Seconds of computing, and of the clock, that one command may take; memory that it may add to its parent's.
CPU, WALL, MEMORY = 20, 120.0, 1500 * 2**20


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or the negative number of the signal that ended it."""

    code: int
    out: str
    err: str
    seconds: float
    memory: int  # the most bytes that were resident, those of the parent too

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL

    def complaint(self) -> str:
        """What is wrong with how it ended, if its command may either work or be refused; empty if nothing is."""
        if self.code == -signal.SIGXCPU:
            return f"more than {CPU} s of computing"
        if "Traceback" in self.err:
            return f"a traceback: {self.err.strip().splitlines()[-1][:300]}"
        if self.code not in (0, 2):
            return f"exit code {self.code}: {self.err.strip()[-300:]}"
        if self.code == 2 and not self.sentence:
            return f"no sentence: {self.err.strip()[-300:]!r}"
        if self.memory - parent_memory() > MEMORY:
            return f"{(self.memory - parent_memory()) / 2**20:.0f} MB of memory"
        return ""

    @property
    def sentence(self) -> str:
        """What it was refused with: the last line on stderr, if that is a whole sentence of ours."""
        lines = self.err.strip().split("\n")
        last = lines[-1]
        whole = last.startswith("steer2edit: ") and "(got: " in last and last.endswith((".", "?", "…"))
        return last if whole else ""


class Child:
    """A process that does some work and exits with what the work gives, an exit code."""

    def __init__(self, work: Callable[[], int], folder: Path, name: str = "child", cpu: int = CPU):
        self.started = time.monotonic()
        self.files = [folder / f".{name}.out", folder / f".{name}.err"]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._live(work, cpu)

    def _live(self, work: Callable[[], int], cpu: int) -> None:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (_used() + cpu, _used() + cpu + 1))
            signal.signal(signal.SIGXCPU, signal.SIG_DFL)
            for number, file in zip((1, 2), self.files, strict=True):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, kill_at: float | None = None, wall: float = WALL) -> Ended:
        """Waits for the end, and brings it about `kill_at` or at the latest `wall` seconds after the start."""
        pause = 0.0005
        while True:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                break
            age = time.monotonic() - self.started
            if age > wall or (kill_at is not None and age >= kill_at):
                self.kill()
            time.sleep(pause)
            pause = min(0.01, pause * 1.2) if kill_at is None else 0.001
        seconds = time.monotonic() - self.started
        out, err = (file.read_text(encoding="utf-8", errors="replace") if file.exists() else "" for file in self.files)
        for file in self.files:
            file.unlink(missing_ok=True)
        return Ended(os.waitstatus_to_exitcode(status), out, err, seconds, usage.ru_maxrss * 1024)


def command(*arguments: Any) -> Callable[[], int]:
    """The command line with some arguments, as work for a child."""

    def work() -> int:
        from steer2edit import cli

        sys.argv = ["steer2edit", *map(str, arguments)]
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return work


def say(folder: Path, *arguments: Any, cpu: int = CPU) -> Ended:
    """Runs the command line in a child. `folder` holds what it prints while it runs."""
    return Child(command(*arguments), folder, cpu=cpu).wait()


def parent_memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _used() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return int(usage.ru_utime + usage.ru_stime)
