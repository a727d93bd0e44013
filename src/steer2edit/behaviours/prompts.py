"""Items from JSON Lines files: prompts by kind and split, and small multiple-choice sets."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import FileError, RecipeError
from ..files.reading import numbered_jsonl
from ..probing.traces import is_prompt
from .base import QUESTION, SPLITS, Item, Prompt, Split

# What stands before the name of a set that comes with the package.
BUILTIN = "builtin:"
# What tells "7 + 2" from "7 - 2".
_SIGNS = "+-*/=<>%^"


def data_path(name: str) -> str:
    """The path of a file, or of a set that comes with the package, `builtin:NAME`.

    Raises:
        FileError: no such file, no such set.
    """
    if not name.startswith(BUILTIN):
        if not Path(name).is_file():
            raise FileError("no such file", got=name, fix="Check the path.")
        return name
    path = Path(str(files("steer2edit") / "data" / f"{name.removeprefix(BUILTIN)}.jsonl"))
    if not path.is_file():
        raise FileError("no such set comes with the package", got=name, fix="Check the name, or give a file.")
    return str(path)


def load_prompts(
    source: str | Path, kinds: Collection[str], split: Split, counts: Mapping[str, int], target: str | None = None
) -> list[Item]:
    """The first `counts[kind]` prompts of each kind in one split.

    Where rows differ in their target, the items of each target are taken in turn.

    Args:
        source: a JSON Lines file with `prompt` (a text, or a list of messages), `kind` and `split`.
        target: the key of a row that becomes the item's target.

    Raises:
        FileError: a row is not a prompt, or the file is empty. RecipeError: the split holds fewer prompts of a kind
            than asked, or a prompt stands in two splits.
    """
    rows: list[tuple[Item, Split]] = []
    for number, row in numbered_jsonl(source):
        if row.get("kind") not in kinds or row.get("split") not in SPLITS or not is_prompt(row.get("prompt")):
            raise FileError(
                f"line {number} of {Path(source).name} is not a prompt",
                got=row,
                fix=f"Write a prompt, its kind ({', '.join(kinds)}) and its split ({', '.join(SPLITS)}).",
            )
        rows.append((Item(row["kind"], row["prompt"], target=_text_of(row, target, number, source)), row["split"]))
    refuse_empty(source, rows, "prompt, kind and split")
    _refuse_leaks(source, rows)
    items = []
    for kind, count in counts.items():
        of_kind = _in_turn([item for item, its_split in rows if (item.kind, its_split) == (kind, split)])
        if len(of_kind) < count:
            raise RecipeError(
                f"the {split} split has too few {kind} prompts",
                got=f"{len(of_kind)}, {count} asked",
                fix="Ask for fewer.",
            )
        items += of_kind[:count]
    return items


def _text_of(row: Mapping[str, Any], key: str | None, number: int, source: str | Path) -> str | None:
    """What a row has under a key, if it has the key. Raises FileError if that is no text."""
    value = None if key is None else row.get(key)
    if value is not None and not isinstance(value, str):
        raise FileError(
            f"line {number} of {Path(source).name} has a {key} that is no text", got=value, fix="Write one."
        )
    return value


def _in_turn(items: Sequence[Item]) -> list[Item]:
    """The items of each target in turn, so that the first ones hold as many of each as there can be."""
    by_target: dict[Any, list[Item]] = {}
    for item in items:
        by_target.setdefault(item.target, []).append(item)
    return [item for some in itertools.zip_longest(*by_target.values()) for item in some if item is not None]


def _refuse_leaks(source: str | Path, rows: Collection[tuple[Item, Split]]) -> None:
    """Raises RecipeError if a prompt stands in two splits: what was tuned on it would be measured on it."""
    split_of: dict[str, Split] = {}
    for item, split in rows:
        text = key_of(item.prompt)
        first = split_of.setdefault(text, split)
        if first != split:
            raise RecipeError(
                f"a prompt of {Path(source).name} stands in two splits",
                got=f"{text[:60]!r} in {first} and in {split}",
                fix="Leave it in one of them: test prompts must be new to everything before.",
            )


def normalised(text: str) -> str:
    """Letters, digits and signs of arithmetic, in lower case: prompts that differ in nothing else are the same.

    >>> normalised("How do I bake... bread?!"), normalised("7 - 2?")
    ('how do i bake bread', '7 - 2')
    """
    return " ".join("".join(c if c.isalnum() or c in _SIGNS else " " for c in text.casefold()).split())


def key_of(prompt: Prompt) -> str:
    """The text that identifies a prompt, normalised: its own, or that of all messages of a conversation."""
    return normalised(prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt))


def refuse_empty(path: str | Path, rows: Collection[Any], wanted: str) -> None:
    """Raises FileError if a file has no row. Args: wanted: the keys of a row, in words."""
    if not rows:
        raise FileError(f"{path} is empty", got="no line", fix=f"Write one JSON object a line, with {wanted}.")


def load_questions(path: str | Path, first: int, count: int) -> list[Item]:
    """`count` questions of a JSON Lines file, from the one numbered `first` on.

    Raises:
        FileError: a row is no question, or the file is empty. RecipeError: there are too few.
    """
    rows = numbered_jsonl(path)
    refuse_empty(path, rows, "question, choices and answer")
    items = [_question(path, number, row) for number, row in rows]
    if len(items) < first + count:
        raise RecipeError(
            f"{path} has too few questions", got=f"{len(items)}, {first + count} asked", fix="Ask for fewer."
        )
    return items[first : first + count]


def _question(path: str | Path, number: int, row: Mapping[str, Any]) -> Item:
    question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
    texts = isinstance(choices, list) and all(isinstance(x, str) and x.strip() for x in (question, *choices))
    if not isinstance(choices, list) or not texts or type(answer) is not int or not 0 <= answer < len(choices):
        raise FileError(
            f"line {number} of {path} is not a question",
            got=row,
            fix="Write a question, its choices (texts) and the number of the right one from 0 on.",
        )
    return Item(QUESTION, str(question), tuple(choices), answer)


def load_neutral(path: str | Path, split: Split, first: int, count: int) -> list[Item]:
    """`count` prompts of any JSON Lines file with `prompt`: of one split if the rows name theirs, else from the one
    numbered `first` on.

    Raises:
        FileError: a row has no prompt, or the file is empty. RecipeError: there are too few.
    """
    rows = numbered_jsonl(data_path(str(path)))
    refuse_empty(path, rows, "prompt")
    for number, row in rows:
        if not is_prompt(row.get("prompt")):
            raise FileError(f"line {number} of {path} is not a prompt", got=row, fix="Write a prompt in each line.")
    splits = any("split" in row for _, row in rows)
    chosen = [row["prompt"] for _, row in rows if not splits or row.get("split") == split]
    chosen = chosen if splits else chosen[first:]
    if len(chosen) < count:
        raise RecipeError(
            f"{path} has too few prompts for {split}",
            got=f"{len(chosen)}, {count} asked",
            fix="Lower evaluation.utility_prompts, or add prompts.",
        )
    return [Item("neutral", prompt) for prompt in chosen[:count]]
