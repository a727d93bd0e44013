"""The behaviours that a recipe may name."""

from __future__ import annotations

from .base import Behaviour
from .brevity import Brevity
from .custom import Custom
from .safety import Safety
from .truthfulness import Truthfulness

BEHAVIOURS: dict[str, type[Behaviour]] = {
    "safety": Safety,
    "custom": Custom,
    "truthfulness": Truthfulness,
    "brevity": Brevity,
}
