"""The recipe's section on the behaviour."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..files.schema import Many, Section


class Behaviour(Section):
    """What to change. Positive and negative say where the traces' responses come from."""

    name: Literal["safety"] = "safety"
    system: str | None = None
    positive: Literal["written", "own"] = "written"
    negative: Annotated[list[Literal["benign", "harmful"]], Field(min_length=1)] = ["benign", "harmful"]
    new_tokens: Many = 48
