"""How long a suite was at work on each of its parts, over all the times that it was stopped and went on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import FileError
from ..files.reading import read_json
from ..files.writing import write_json

# How many seconds of its count a killed suite may lose.
_EVERY = 5.0

# Under this name stands what belongs to no single run: side effects, tables and figures.
ALL_RUNS = "all runs"


class Clock:
    """Counts the seconds of each run and part. A file keeps them, and is written every few seconds while one is open.

    Args:
        path: the file; what it holds is counted on.

    Raises:
        FileError: the file holds something else.

    >>> with Clock(folder + "/clock.json").counting("a run", "search"):
    ...     pass
    >>> Clock(folder + "/clock.json").taken["a run"]["search"] < 5
    True
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        known = read_json(self.path) if self.path.is_file() else {}
        if not (isinstance(known, dict) and all(isinstance(of_run, dict) for of_run in known.values())):
            raise FileError(f"{path} holds no times", got=type(known).__name__, fix="Delete it.")
        self._taken: dict[str, dict[str, float]] = known
        self._lock = threading.Lock()

    @property
    def taken(self) -> Mapping[str, Mapping[str, float]]:
        """Run → part → seconds."""
        return self._taken

    @contextlib.contextmanager
    def counting(self, run: str, part: str) -> Iterator[None]:
        """Counts the seconds while it lasts, however it ends."""
        before = self._taken.get(run, {}).get(part, 0.0)
        started = time.monotonic()
        ended = threading.Event()

        def write() -> None:
            with self._lock:
                self._taken.setdefault(run, {})[part] = round(before + time.monotonic() - started, 1)
                write_json(self.path, self._taken)

        def keep_writing() -> None:
            while not ended.wait(_EVERY):
                write()

        beat = threading.Thread(target=keep_writing, daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            write()
