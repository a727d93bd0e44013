"""Checked data from outside: sections of a recipe, the numbers that they hold, and errors in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..errors import RecipeError


def _number(value: Any) -> Any:
    # Pydantic takes true for 1, and YAML reads an unquoted `on` as true.
    if isinstance(value, bool):
        raise ValueError("Input should be a number")
    return value


Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]

Share = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)]

Count = Annotated[int, BeforeValidator(_number), Field(ge=0)]

Many = Annotated[int, BeforeValidator(_number), Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Section)


def parse(section: type[S], raw: dict[str, Any]) -> S:
    """A recipe, or one of its sections. Raises RecipeError for the first key or value that is wrong."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        # Of a value that may be of several kinds the kind that it fits farthest.
        problem = max(error.errors(), key=lambda e: len(e["loc"]))
        path = [
            str(part) for part in problem["loc"] if not str(part).startswith(("function-", "constrained-", "list["))
        ]
        key = ".".join(path)
        if problem["type"] == "extra_forbidden":
            known = _known_keys(section, path[:-1])
            near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.4)
            fix = f"Did you mean {near[0]!r}?" if near else f"Known keys there: {', '.join(known)}."
            raise RecipeError(f"the recipe has an unknown key {key}", got=path[-1], fix=fix) from None
        if problem["type"] == "missing":
            raise RecipeError(f"the recipe has no {key}", got="nothing", fix=f"Add the key {key}.") from None
        message = problem["msg"].removeprefix("Value error, ")
        raise RecipeError(f"the recipe's {key} cannot be used", got=repr(problem["input"]), fix=f"{message}.") from None


def _known_keys(section: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        kind = section.model_fields[part].annotation if part in section.model_fields else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return []
        section = kind
    return list(section.model_fields)
