"""The journal of a study or a test: one line a batch of what the engine made, so that a killed one goes on.

A line holds what it is an answer to. Where that differs from what is asked now (another sampler drew other candidates,
a prompt was changed) the batch is made again and the new line counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import FileError
from ..files.reading import read_journal
from ..files.writing import append_jsonl

# Lines of older runs, which do not hold what they are answers to.
_UNKNOWN = "unknown"


class Journal:
    """The lines of one journal file.

    Args:
        path: the file; its folder exists.
        replay: no batch is made: what is not in the journal is an error.
    """

    def __init__(self, path: Path, replay: bool = False):
        self.path, self.replay = path, replay
        self.lines = {(line["round"], line["what"], line["batch"]): line for line in read_journal(path)}

    def keep(self, round: str, what: str, batch: int, asked: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The line of a batch: the one that answers the same, or a new one from `make`.

        Args:
            asked: everything that the batch depends on, as JSON.

        Raises:
            FileError: the journal is only replayed, and has no such line.
        """
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
        line = self.lines.get((round, what, batch))
        if line is not None and line.get("asked", _UNKNOWN) in (digest, _UNKNOWN):
            return line
        if self.replay:
            raise FileError(
                f"{self.path.name} holds no answers for round {round!r}, batch {batch}",
                got="no such line" if line is None else "answers to something else",
                fix="Judge with the recipe that the run was made with, or run the stage again.",
            )
        line = {"round": round, "what": what, "batch": batch, "asked": digest, **make()}
        append_jsonl(self.path, line)
        self.lines[round, what, batch] = line
        return line
