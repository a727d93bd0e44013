"""Checks of a recipe's sections and numbers, with errors in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..errors import RecipeError


def _number(value: Any) -> Any:
    # Pydantic takes true for 1, and YAML reads an unquoted `on` as true.
    if isinstance(value, bool):
        raise ValueError("Input should be a number")
    return value


def at_most(most: int) -> AfterValidator:
    """A bound that no recipe comes near, so that the reference of the recipe need not name it."""

    def check(value: int) -> int:
        if value > most:
            raise ValueError(f"Input should be at most {most}")
        return value

    return AfterValidator(check)


# The bounds stand before the validator, so that the JSON schema has them. The validator runs first all the same.
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number)]

Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)]

Count = Annotated[int, Field(ge=0), BeforeValidator(_number), at_most(10**9)]

Many = Annotated[int, Field(ge=1), BeforeValidator(_number), at_most(10**9)]

Text = Annotated[str, Field(pattern=r"\S")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Section)

# Names that pydantic gives to a union's branch or to a validator in an error's path. They are no keys of the recipe.
_KINDS = ("function-", "constrained-", "list[", "dict[", "literal[")


def parse(section: type[S], raw: dict[str, Any], under: str = "") -> S:
    """Checks a recipe or one of its sections.

    Args:
        under: the section's key; empty for a whole recipe.

    Raises:
        RecipeError: for the first key or value that is wrong.
    """
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        # For a union, the branch that matched deepest is the one that was meant. A key that is missing may be the one
        # that is misspelt.
        problem = max(error.errors(), key=lambda e: (len(e["loc"]), e["type"] == "extra_forbidden"))
        parts = [str(part) for part in problem["loc"]]
        path = [part for part in parts if not part.startswith(_KINDS)]
        key = ".".join([under, *path] if under else path)
        if problem["type"] == "extra_forbidden":
            raise RecipeError(f"the recipe has an unknown key {key}", got=path[-1], fix=_hint(section, path)) from None
        if problem["type"] == "missing":
            raise RecipeError(f"the recipe has no {key}", got="nothing", fix=f"Add the key {key}.") from None
        message = problem["msg"].removeprefix("Value error, ")
        raise RecipeError(f"the recipe's {key} cannot be used", got=repr(problem["input"]), fix=f"{message}.") from None


def nearest(name: str, known: Sequence[str], what: str) -> str:
    """A hint for an unknown name: the closest known one, or else all of them."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"Did you mean {near[0]!r}?" if near else f"{what}: {', '.join(known)}."


def _hint(section: type[BaseModel], path: Sequence[str]) -> str:
    """A hint for an unknown key: where that key belongs, or the closest key of the same section."""
    elsewhere = [".".join(place) for place in _places(section) if place[-1] == path[-1]]
    if elsewhere:
        return f"Did you mean {elsewhere[0]!r}?"
    return nearest(path[-1], _known_keys(section, path[:-1]), "Known keys there")


def _places(section: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """Every key of a section and of the sections in it, as its path."""
    for name, field in section.model_fields.items():
        yield (name,)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from ((name, *place) for place in _places(kind))


def _known_keys(section: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        kind = section.model_fields[part].annotation if part in section.model_fields else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return []
        section = kind
    return list(section.model_fields)
