"""Reading text, JSON and JSON Lines, with checks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import FileError
from .seals import unsealed


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError("no such file", got=path, fix="Check the path.") from None
    except (UnicodeDecodeError, OSError) as error:
        raise FileError(f"{path} cannot be read as text", got=error, fix="Give a UTF-8 text file.") from None


def read_json(path: str | Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (RecursionError, ValueError) as error:
        raise FileError(f"{path} is not valid JSON", got=error, fix="Write the file again.") from None


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, as `numbered_jsonl` reads them, without line numbers."""
    return [row for _, row in numbered_jsonl(path)]


def numbered_jsonl(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """The number and the object of each line of a JSON Lines file. Blank lines are skipped.

    Raises:
        FileError: a line is not a JSON object; names the line.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            _refuse_halves(line, row)
        except (RecursionError, ValueError) as error:
            raise FileError(
                f"line {number} of {path} is not JSON",
                got=error,
                fix="Write one JSON object per line. The file may be cut short.",
            ) from None
        if not isinstance(row, dict):
            raise FileError(
                f"line {number} of {path} is not an object",
                got=type(row).__name__,
                fix="Write one JSON object per line.",
            )
        rows.append((number, row))
    return rows


def _refuse_halves(line: str, value: Any) -> None:
    """Raises ValueError if a text holds half a character, which no file and no tokenizer can take."""
    if "\\ud" in line.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half a character, \\u{ord(error.object[error.start]):x}") from None


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """The complete lines of a journal. A last line that a kill cut short is removed from the file.

    Raises:
        FileError: a line is not as it was written.
    """
    path = Path(path)
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    try:
        rows = [json.loads(unsealed(line)) for line in whole.decode("utf-8").split("\n") if line]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line that is not an object")
    except (RecursionError, ValueError) as error:
        raise FileError(f"{path} is damaged", got=error, fix="Delete it; its batches then run again.") from None
    return rows


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
