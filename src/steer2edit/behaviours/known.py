"""The behaviours that a recipe may name."""

from __future__ import annotations

from .base import Behaviour
from .safety import Safety

BEHAVIOURS: dict[str, type[Behaviour]] = {"safety": Safety}
