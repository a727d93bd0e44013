"""The two sides of a behaviour of one's own: where their responses come from, and how prompts are divided into splits.

A side is a file of responses, or an instruction under which a model writes them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import AfterValidator, BeforeValidator, model_validator

from ..errors import FileError, RecipeError
from ..files.reading import numbered_jsonl
from ..files.schema import Section, Text
from ..probing.traces import is_prompt
from ..progress import say
from .addresses import hide_password, hide_secret, is_base_url, is_variable
from .base import SPLITS, Prompt, Split
from .prompts import data_path, key_of

# The shares of a file that the splits take where the recipe gives no counts, and the most that each takes.
SHARES: Mapping[Split, float] = {"probe": 0.45, "validation": 0.2, "test": 0.35}
MOST: Mapping[Split, int] = {"probe": 60, "validation": 40, "test": 80}


class Side(Section):
    """One side of the contrast: responses from a file, or those that a model writes under an instruction.

    Attributes:
        system: the instruction, as a system prompt.
        file: JSON Lines with `prompt` and `response`, or `builtin:` and the name of a set that comes with the package.
        model: writes the responses in place of the model that is edited: a Hub id or a folder, or a name at `endpoint`.
        endpoint: the base URL of an OpenAI-compatible server that has `model`.
        key: the environment variable that holds the endpoint's API key.
    """

    system: Text | None = None
    file: Text | None = None
    model: Text | None = None
    endpoint: Annotated[str, AfterValidator(is_base_url), BeforeValidator(hide_password)] | None = None
    key: Annotated[str, AfterValidator(is_variable), BeforeValidator(hide_secret)] = "OPENAI_API_KEY"

    @model_validator(mode="after")
    def _one_origin(self) -> Side:
        if (self.system is None) == (self.file is None):
            raise ValueError("Give either a system prompt or a file of responses")
        if self.file is not None and self.model is not None:
            raise ValueError("A file has its responses: leave model out")
        if self.endpoint is not None and self.model is None:
            raise ValueError("Name the endpoint's model")
        return self


@dataclass(frozen=True)
class Pair:
    """A prompt with what each side answers to it; None if a side has no answer."""

    prompt: Prompt
    more: str | None = None
    less: str | None = None
    split: Split | None = None

    @property
    def is_whole(self) -> bool:
        return self.more is not None and self.less is not None


def read_pairs(more: str, less: str) -> list[Pair]:
    """What two files of responses hold, by prompt, in the order of the first file.

    A row has `prompt`, `response` and, if it is to lie in a given split, `split`. In place of `response` a row may name
    its side (`more`, `less`), so that both sides can stand in one file. Of several responses to a prompt the first is
    taken.

    Raises:
        FileError: a row is no response, or a response is empty. RecipeError: the sides are the same.
    """
    by_prompt: dict[str, dict[str, Any]] = {}
    repeated = 0
    for side, file in (("more", more), ("less", less)):
        path = data_path(file)
        for number, row in numbered_jsonl(path):
            response = row.get(side, row.get("response"))
            split = row.get("split")
            if not is_prompt(row.get("prompt")) or not isinstance(response, str) or split not in (None, *SPLITS):
                raise FileError(
                    f"line {number} of {Path(path).name} is no response",
                    got=row,
                    fix='Write {"prompt": …, "response": …} in each line.',
                )
            if not response.strip():
                raise FileError(
                    f"line {number} of {Path(path).name} has an empty response",
                    got=repr(response),
                    fix="Write a response, or take the line out.",
                )
            entry = by_prompt.setdefault(key_of(row["prompt"]), {"prompt": row["prompt"], "split": split})
            if entry["split"] != split:
                raise RecipeError(
                    f"a prompt of line {number} of {Path(path).name} stands in two splits",
                    got=f"{split}, elsewhere {entry['split']}",
                    fix="Give a prompt one split.",
                )
            if side in entry:
                repeated += 1
            else:
                entry[side] = response
    if not by_prompt:
        raise FileError(f"{more} is empty", got="no response", fix="Write one JSON object a line: prompt, response.")
    if repeated:
        say(f"  {repeated} further responses to prompts that have one already are left out")
    pairs = [Pair(**entry) for entry in by_prompt.values()]
    whole = [pair for pair in pairs if pair.is_whole]
    if whole and all(pair.more == pair.less for pair in whole):
        raise RecipeError(
            "more and less are the same", got=f"{more} and {less}", fix="Give responses that differ in the behaviour."
        )
    return pairs


def read_prompts(path: str) -> list[Pair]:
    """The prompts of a JSON Lines file with `prompt` and perhaps `split`, each prompt once.

    Raises:
        FileError: a row has no prompt, or the file is empty.
    """
    path = data_path(path)
    pairs: dict[str, Pair] = {}
    for number, row in numbered_jsonl(path):
        if not is_prompt(row.get("prompt")) or row.get("split") not in (None, *SPLITS):
            raise FileError(
                f"line {number} of {Path(path).name} is not a prompt",
                got=row,
                fix='Write {"prompt": …} in each line; "split" may be probe, validation or test.',
            )
        key = key_of(row["prompt"])
        if key in pairs and pairs[key].split != row.get("split"):
            raise RecipeError(
                f"a prompt of {Path(path).name} stands in two splits",
                got=repr(key[:60]),
                fix="Leave it in one of them: test prompts must be new to everything before.",
            )
        pairs[key] = Pair(row["prompt"], split=row.get("split"))
    if not pairs:
        raise FileError(f"{path} is empty", got="no prompt", fix="Write one JSON object a line, with prompt.")
    return list(pairs.values())


class Divisible(Protocol):
    """What may name the split that it lies in."""

    @property
    def split(self) -> Split | None: ...


D = TypeVar("D", bound=Divisible)


def divided(
    pairs: Sequence[D], wanted: Mapping[Split, int | None], seed: int, name: str, splits: Sequence[Split] = SPLITS
) -> dict[Split, list[D]]:
    """The pairs of each split: as the rows say it, else by the seed.

    Args:
        wanted: how many each split takes; None takes its share, at most MOST.
        name: of the file, for errors.
        splits: those among which the pairs are divided.

    Raises:
        RecipeError: there are too few, or some rows alone name a split.
    """
    if named := sum(pair.split is not None for pair in pairs):
        if named < len(pairs):
            raise RecipeError(
                f"only some rows of {name} name their split", got=f"{named} of {len(pairs)}", fix="Name all or none."
            )
        by_split = {split: [pair for pair in pairs if pair.split == split] for split in splits}
        counts = {split: wanted[split] or len(by_split[split]) for split in splits}
    else:
        shuffled = list(pairs)
        random.Random(seed).shuffle(shuffled)
        counts = _counts(len(pairs), {split: wanted[split] for split in splits})
        start = 0
        by_split = {}
        for split in splits:
            by_split[split] = shuffled[start : start + counts[split]]
            start += counts[split]
    for split in splits:
        if len(by_split[split]) < max(1, counts[split]):
            asked = ", ".join(f"{counts[split]} for {split}" for split in splits)
            raise RecipeError(
                f"{name} has too few lines", got=f"{len(pairs)}; asked are {asked}", fix="Add lines, or ask for fewer."
            )
    return {split: by_split[split][: counts[split]] for split in splits}


def divided_files(
    rows: Sequence[D],
    others: Sequence[D],
    wanted: Mapping[Split, int | None],
    seed: int,
    names: tuple[str, str],
    key: Callable[[D], str],
) -> dict[Split, list[D]]:
    """As `divided`, of two files: the second one is the test split's.

    Args:
        names: of the two files. key: by what a row is known.

    Raises:
        RecipeError: there are too few, or something stands in both files.
    """
    known = {key(row) for row in rows}
    if both := [row for row in others if key(row) in known]:
        raise RecipeError(
            "the same prompt stands in data.prompts and in data.test_prompts",
            got=f"{len(both)}, such as {key(both[0])[:60]!r}",
            fix="Leave it in one of them: test prompts must be new to everything before.",
        )
    first = divided(rows, wanted, seed, names[0], ("probe", "validation"))
    test = others if wanted["test"] is None else others[: wanted["test"]]
    if len(test) < (wanted["test"] or 0):
        raise RecipeError(
            f"{names[1]} has too few lines", got=f"{len(others)}, {wanted['test']} asked", fix="Ask for fewer."
        )
    return {**first, "test": list(test)}


def _counts(size: int, wanted: Mapping[Split, int | None]) -> dict[Split, int]:
    """How many of the pairs each split takes: what is asked for, and shares of the rest."""
    left = size - sum(count or 0 for count in wanted.values())
    share = sum(SHARES[split] for split, count in wanted.items() if count is None)
    return {
        split: min(MOST[split], max(0, int(left * SHARES[split] / share))) if count is None else count
        for split, count in wanted.items()
    }
