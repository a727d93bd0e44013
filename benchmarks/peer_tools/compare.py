"""Whether two tools gave the same: cosines of vectors, equal answers, tensors of edited checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file


def agreement(task: str, base: Path, ours: Path, theirs: Path) -> dict[str, Any]:
    """What the results of a task have in common.

    Args:
        base: the checkpoint that was edited. ours, theirs: the folders of the results.
    """
    if task.startswith("vectors"):
        return cosines(load_file(ours / "vectors.safetensors"), load_file(theirs / "vectors.safetensors"))
    if task.startswith("sweep"):
        return equal(*(json.loads((folder / "answers.json").read_text("utf-8")) for folder in (ours, theirs)))
    return differences(base, ours / "edited", theirs / "edited")


def cosines(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The cosine of the layers that both have: the median and the smallest."""
    layers = sorted(set(ours) & set(theirs), key=int)
    found = [float(ours[i] @ theirs[i] / (np.linalg.norm(ours[i]) * np.linalg.norm(theirs[i]))) for i in layers]
    return {"layers": len(layers), "median": float(np.median(found)), "smallest": min(found)}


def equal(ours: list[list[list[int]]], theirs: list[list[list[int]]]) -> dict[str, Any]:
    """Of strength × prompt answers, the share whose tokens are the same."""
    pairs = [pair for rows in zip(ours, theirs, strict=True) for pair in zip(*rows, strict=True)]
    return {"answers": len(pairs), "equal": sum(a == b for a, b in pairs) / len(pairs)}


def differences(base: Path, ours: Path, theirs: Path) -> dict[str, Any]:
    """The largest difference between the tensors of two checkpoints, beside the largest change of ours."""
    mine, other, before = (_places(folder) for folder in (ours, theirs, base))
    change = difference = 0.0
    for name in sorted(set(mine) & set(other)):
        ours_now, theirs_now = _tensor(mine[name], name), _tensor(other[name], name)
        difference = max(difference, float(np.abs(ours_now - theirs_now).max()))
        change = max(change, float(np.abs(ours_now - _tensor(before[name], name)).max()))
    only = sorted(set(mine) ^ set(other))
    return {"tensors": len(set(mine) & set(other)), "difference": difference, "change": change, "only_in_one": only}


def _places(folder: Path) -> dict[str, Path]:
    places = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="np") as file:
            places |= dict.fromkeys(file.keys(), path)
    return places


def _tensor(path: Path, name: str) -> np.ndarray:
    with safe_open(str(path), framework="np") as file:
        return file.get_tensor(name)
