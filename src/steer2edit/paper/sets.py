"""What a folder of evaluation sets gives a suite: prompts, question files and utility tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..behaviours.prompts import BUILTIN, data_path, key_of
from ..errors import FileError
from ..files.reading import numbered_jsonl, read_jsonl
from ..files.writing import write_jsonl
from ..probing.traces import is_prompt
from ..tasks.known import TASKS
from ..tasks.sets import local_file
from .facts import Composed, layouts


def composed(behaviour: str, folder: Path | None, out: Path) -> dict[str, str]:
    """The recipe's keys of `data` that name prompts; composed ones are written to `out/data`.

    Args:
        folder: None if all of the prompts come with the package.

    Raises:
        FileError: a file is not there, or a line of it has no prompt.
    """
    layout = layouts()[behaviour]
    if not layout.compose:
        names = {"prompts": layout.prompts, "test_prompts": layout.test_prompts}
        return {key: str(_file_in(folder, name)) for key, name in names.items() if name is not None}
    rows = list(_rows(layout.compose, folder))
    path = out / "data" / f"{behaviour}_prompts.jsonl"
    if not (path.is_file() and read_jsonl(path) == rows):
        write_jsonl(path, rows)
    return {"prompts": str(path)}


def _rows(parts: Sequence[Composed], folder: Path | None) -> Iterator[dict[str, Any]]:
    """Prompts with kind and split. A prompt that stands in two places stays in the first: no split has another's."""
    known: set[str] = set()
    for part in parts:
        builtin = part.file.startswith(BUILTIN)
        path = data_path(part.file) if builtin else _file_in(folder, part.file)
        lines = [(n, row) for n, row in numbered_jsonl(path) if _holds(row, part.where)]
        last = None if part.count is None else part.first + part.count
        for number, row in lines[part.first : last]:
            if not is_prompt(row.get("prompt")):
                raise FileError(
                    f"line {number} of {part.file} is not a prompt", got=sorted(row), fix="Write a prompt in each line."
                )
            key = key_of(row["prompt"])
            if key not in known:
                known.add(key)
                yield {"prompt": row["prompt"], "kind": part.kind, "split": part.split}


def _holds(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    return all(row.get(key) == value for key, value in where.items())


def _file_in(folder: Path | None, name: str) -> Path:
    path = Path(name) if folder is None else folder / name
    if not path.is_file():
        raise FileError(
            "the folder of the sets lacks prompts",
            got=f"no {name} in {folder}",
            fix="Put it there (docs/paper.md has the fields), or leave --data out.",
        )
    return path


def sets_of(tasks: Sequence[str], folder: Path) -> tuple[list[str], list[str]]:
    """The tasks whose set is in the folder, or comes from the Hub alone; and a sentence for each other."""
    kept, missing = [], []
    for name in tasks:
        try:
            local_file(TASKS[name], folder)
            kept.append(name)
        except FileError as error:
            missing.append(f"{name} is not measured: {error}")
    return kept, missing
