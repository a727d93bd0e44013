"""A recipe as a mapping and as a file, for the tests of what a recipe may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from runs import tiny_recipe


def _raw(**changes: Any) -> dict[str, Any]:
    return yaml.safe_load(tiny_recipe(**changes).to_yaml())


def _with(key: str, value: Any) -> dict[str, Any]:
    raw: dict[str, Any] = _raw()
    place = raw
    *parents, last = key.split(".")
    for parent in parents:
        place = place[parent]
    place[last] = value
    return raw


def _write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path
