"""The seam to the training baselines: what a suite asks of whatever trains, and the rows that it wants back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import FileError
from .facts import Training
from .rows import Front, Tried

# A finished run's directory, and the methods, steps and learning rates to train with → the rows of each method ("lora",
# "full fine-tuning") on the run's own test items, the original model's first, and what each method tried on validation.
# A row is "chosen" if the run's rule takes it on validation, and "swept" otherwise.
Train = Callable[[Path, Training], tuple[Sequence[Tried], Sequence[Front]]]


def require_trainer(train: Train | None) -> Train:
    """Raises FileError if nothing here trains."""
    if train is None:
        raise FileError(
            "the training baselines are not measured",
            got="nothing that trains comes with this installation",
            fix="Give a trainer to steer2edit.paper.work.run_suite, or run another suite.",
        )
    return train
