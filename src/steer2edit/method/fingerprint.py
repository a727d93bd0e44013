"""Which base an edit belongs to: a small numeric sketch of each edited weight.

A sketch, unlike a hash, still matches when the same model is loaded in another dtype or layout.
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
    # NumPy's policy freezes RandomState's stream, so that files written today stay readable.
    random = np.random.RandomState(20260209)
    left = random.randint(0, 2, size=(SKETCHES, rows)) * 2.0 - 1.0
    right = random.randint(0, 2, size=(SKETCHES, columns)) * 2.0 - 1.0
    return torch.tensor(left, dtype=torch.float32), torch.tensor(right, dtype=torch.float32)


def from_reading(reading: Reading, rows: int, columns: int) -> Tensor:
    """[SKETCHES + 1] fp32: lᵢᵀ W rᵢ for fixed random signs lᵢ and rᵢ, each of variance ‖W‖_F², then ‖W‖_F itself.

    Args:
        reading: one of the weight [rows, columns], with the left signs lᵢ as the last rows of L.
    """
    _, right = signs(rows, columns)
    projections = (reading.along[-SKETCHES:].cpu() * right).sum(dim=1)
    return torch.cat([projections, torch.tensor([reading.power**0.5])])


def differing(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> list[str]:
    """The sites whose sketches differ by more than `tolerance` · ‖W‖_F, or are missing."""
    return [
        key
        for key, sketch in expected.items()
        if key not in actual or not bool((sketch - actual[key]).abs().max() <= tolerance * sketch[-1])  # a NaN differs
    ]
