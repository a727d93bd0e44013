"""Where a task's questions come from: a local folder of JSON Lines files, or the Hugging Face Hub."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FileError
from ..files.reading import numbered_jsonl, sha256
from .base import Question, Row, Task
from .language import pages


@dataclass(frozen=True)
class Set:
    """The questions of a task that are asked.

    Attributes:
        source: a file's name, or the Hub's data set. revision: its SHA-256 or its commit; None if that is not known.
        total: how many questions the set has. taken: which of them are asked, in words.
    """

    questions: list[Question]
    source: str
    revision: str | None
    total: int
    taken: str


def local_file(task: Task, folder: str | Path | None) -> Path | None:
    """The file of a task's set in a folder; None if the set comes from the Hub.

    Raises:
        FileError: there is no such folder, or no file of the set in it.
    """
    if folder is None or not task.files:
        return None
    if not Path(folder).is_dir():
        raise FileError("the folder of the sets is not there", got=folder, fix="Check data.sets.")
    files = [path for name in task.files if (path := Path(folder) / name).is_file()]
    if not files:
        raise FileError(
            f"the folder of the sets has no file of {task.name}",
            got=folder,
            fix=f"Put {task.files[0]} there, or leave data.sets out to load the set from the Hub.",
        )
    return files[0]


def load_set(task: Task, folder: str | Path | None, items: int | None, order: str, seed: int) -> Set:
    """The questions of a task.

    Args:
        folder: of local sets; None, or a task without local files, loads from the Hub.
        items: at most this many; None is all. order: "first" takes the first ones, "sampled" draws them by the seed.

    Raises:
        FileError: a set that is not there, is gated, or has rows in no known layout.
    """
    path = local_file(task, folder)
    revision: str | None
    if path is not None:
        source, revision = path.name, sha256(path)
        numbered = _paged(numbered_jsonl(path))
    else:
        of_hub, source, revision = _from_hub(task)
        numbered = list(enumerate(of_hub, start=1))
    questions = []
    for number, row in numbered:
        question = task.questions(row, str(seed))
        if question is None:
            if task.form == "document" and not str(row.get("page", "x")).strip():
                continue
            raise FileError(
                f"row {number} of {source} is no question of {task.name}",
                got=sorted(row),
                fix="docs/utility.md has the fields of each set.",
            )
        questions.append(question)
    if not questions:
        raise FileError(f"{source} is empty", got="no question", fix=f"Give the set of {task.name}.")
    chosen = taken(len(questions), items, order, f"{seed} {task.name}")
    return Set([questions[i] for i in chosen], source, revision, len(questions), described(questions, items, order))


def taken(total: int, items: int | None, order: str, seed: str) -> list[int]:
    """The numbers of the questions that are asked, in their order.

    >>> taken(5, 2, "first", ""), taken(2, 9, "sampled", "")
    ([0, 1], [0, 1])
    """
    if items is None or items >= total:
        return list(range(total))
    if order == "first":
        return list(range(items))
    return sorted(random.Random(seed).sample(range(total), items))


def described(questions: Sequence[Any], items: int | None, order: str) -> str:
    """Which questions are asked, in words: `all 5`, `the first 2 of 5`, `2 of 5, sampled`."""
    total = len(questions)
    if items is None or items >= total:
        return f"all {total}"
    return f"the first {items} of {total}" if order == "first" else f"{items} of {total}, sampled"


def _paged(rows: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, Row]]:
    """Rows of WikiText's lines as articles; all other rows as they are."""
    plain: list[Row] = [row for _, row in rows]
    articles = pages(plain)
    return list(rows) if articles is plain else list(enumerate(articles, start=1))


def _from_hub(task: Task) -> tuple[list[Row], str, str | None]:
    assert task.hub is not None
    hub = task.hub
    source = "/".join([hub.path, *([hub.config] if hub.config else []), hub.split])
    try:
        import datasets
    except ImportError:
        raise FileError(
            f"the set of {task.name} needs the package datasets",
            got="it is not installed",
            fix="pip install 'steer2edit[eval]', or give a local folder, data.sets.",
        ) from None
    revision = _commit(hub.path)
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(hub.path, hub.config, split=hub.split, revision=revision)
    except Exception as error:  # the loader raises what its many parts raise
        raise unavailable(task.name, source, error, has_files=bool(task.files)) from None
    return [dict(row) for row in rows], source, revision


def _commit(path: str) -> str | None:
    """The newest commit of a set on the Hub; None where the Hub cannot be asked, so that a cached copy is taken."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(path, timeout=20).sha
    except Exception:  # offline, gated, or not there: loading it says which
        return None


def unavailable(name: str, source: str, error: Exception, has_files: bool = True) -> FileError:
    """The one sentence for a set that cannot be loaded."""
    text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    everything = str(error).lower() + " ".join(cause.__class__.__name__ for cause in _causes(error)).lower()
    if "gated" in everything or "401" in everything or "403" in everything:
        return FileError(
            f"the set of {name} is gated",
            got=f"{source}, no access",
            fix="Accept its terms on the Hub and log in (hf auth login), or leave the task out.",
        )
    local = ", or give a local folder, data.sets" if has_files else ""
    return FileError(
        f"the set of {name} cannot be loaded", got=f"{source}, {text}", fix=f"Check the connection to the Hub{local}."
    )


def _causes(error: BaseException | None) -> list[BaseException]:
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes
