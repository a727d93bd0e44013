"""A behaviour of one's own, out of instructions or of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sides import write_rows
from steer2edit.behaviours.custom import Custom
from steer2edit.files.schema import parse

LOUD, SOFT = "Be loud.", "Be soft."


def custom(**options: Any) -> Custom:
    """Two instructions, unless the options say otherwise."""
    return parse(Custom, {"more": {"system": LOUD}, "less": {"system": SOFT}, **options}, under="behaviour")


def of_files(more: str, less: str, **options: Any) -> Custom:
    return custom(more={"file": more}, less={"file": less}, **options)


def _files(folder: Path, count: int, first: int = 0, **row: Any) -> tuple[str, str]:
    """Both sides of so many prompts, in another order on the side of `less`."""
    numbers = range(first, first + count)
    more = [{"prompt": f"Prompt {i}", "response": f"LOUD {i}", **row} for i in numbers]
    less = [{"prompt": f"Prompt {i}", "response": f"soft {i}", **row} for i in reversed(numbers)]
    return write_rows(folder / "more.jsonl", more), write_rows(folder / "less.jsonl", less)


def _prompts(folder: Path, count: int, name: str = "prompts.jsonl") -> str:
    return write_rows(folder / name, [{"prompt": f"Prompt {i}"} for i in range(count)])
