"""A recipe from two instructions or two files: what `steer2edit make` writes and runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..behaviours.prompts import BUILTIN
from ..errors import RecipeError
from ..files.plain_yaml import read_yaml
from ..recipe import Recipe, parse_recipe
from ..report.page import shortened

# How long answers may be whose tokens are counted.
LENGTH_TOKENS = 128


def made_recipe(
    model: str,
    more: str,
    less: str,
    *,
    name: str,
    title: str | None = None,
    prompts: str | None = None,
    score: str | None = None,
) -> Recipe:
    """The recipe of a behaviour that two sides describe; every choice that is made here stands in it.

    Args:
        more, less: a JSON Lines file of responses if they end in .jsonl, else instructions.
        name: of the run. title: of the behaviour; by default what `more` says.
        prompts: a JSON Lines file; by default the prompts that come with the package, or those of the files.
        score: YAML, like `{pattern: '(?i)ahoy'}`; by default "preference".

    Raises:
        RecipeError: the sides are the same, or the score is none.
    """
    sides = {side: _side(text) for side, text in (("more", more), ("less", less))}
    behaviour: dict[str, Any] = {"name": "custom", "title": title or _title(more), **sides}
    if score is not None:
        try:
            behaviour["score"] = read_yaml(score, "--score")
        except RecipeError as error:
            raise RecipeError(error.what, got=score, fix="Write it like --score '{pattern: \"(?i)ahoy\"}'.") from None
    raw: dict[str, Any] = {
        "name": re.sub(r"[/\\]|^\.+", "-", name) or "made",
        "model": {"name": model},
        "behaviour": behaviour,
        "data": {} if prompts is None else {"prompts": prompts},
    }
    if isinstance(behaviour.get("score"), dict) and "length" in behaviour["score"]:
        # Answers that are cut all have one length, so that a score of tokens sees nothing of them.
        behaviour["new_tokens"] = LENGTH_TOKENS
        raw["evaluation"] = {"new_tokens": LENGTH_TOKENS}
    return parse_recipe(raw)


def _side(text: str) -> dict[str, str]:
    if text.endswith(".jsonl") or text.startswith(BUILTIN):
        return {"file": text}
    return {"system": text}


def _title(more: str) -> str:
    return Path(more).stem if more.endswith(".jsonl") else shortened(more.rstrip("."))
