"""Which base an edit belongs to: a small numeric sketch of each edited weight.

A sketch, not a hash: the same model loaded in another dtype or layout must be known again, another model must not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .scores import Reading

SKETCHES = 4

# Rounding fp32 to bf16 moves a sketch by about 0.001 ‖W‖_F; another model's weight moves it by about ‖W‖_F.
TOLERANCE = 0.02

# Rounding to 4 bits moves a weight by about 0.1 ‖W‖_F.
QUANTISED_TOLERANCE = 0.4


@lru_cache(maxsize=16)
def signs(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    # RandomState's stream is frozen by NumPy's own policy, so that a file made today is understood in ten years.
    random = np.random.RandomState(20260209)
    left = random.randint(0, 2, size=(SKETCHES, rows)) * 2.0 - 1.0
    right = random.randint(0, 2, size=(SKETCHES, columns)) * 2.0 - 1.0
    return torch.tensor(left, dtype=torch.float32), torch.tensor(right, dtype=torch.float32)


def from_reading(reading: Reading, rows: int, columns: int) -> Tensor:
    """[SKETCHES + 1] fp32: lᵢᵀ W rᵢ for fixed random signs lᵢ and rᵢ, each of variance ‖W‖_F², then ‖W‖_F itself.

    Args:
        reading: of the weight [rows, columns], with the left signs lᵢ as the last rows of L.
    """
    _, right = signs(rows, columns)
    projections = (reading.along[-SKETCHES:].cpu() * right).sum(dim=1)
    return torch.cat([projections, torch.tensor([reading.power**0.5])])


def differing(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> list[str]:
    """The sites whose sketches differ by more than `tolerance` · ‖W‖_F, or are not there."""
    return [
        key
        for key, there in expected.items()
        if key not in found or not bool((there - found[key]).abs().max() <= tolerance * there[-1])  # a NaN differs
    ]
