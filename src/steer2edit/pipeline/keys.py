"""What each stage's result depends on, as a hash."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from ..files.reading import sha256
from ..method.variants import Variant
from ..recipe import Recipe
from .stages import STAGES


def _keys(recipe: Recipe) -> dict[str, str]:
    """Stage → hash of what its result depends on: its parts of the recipe, and the stage before."""
    r = recipe.model_dump(mode="json")
    prompts = recipe.data.prompts
    text = prompts if prompts.startswith("builtin:") else _digest(prompts)
    search = r["search"]
    asked = recipe.data.questions
    questions = None if asked is None else [r["data"]["questions"], _digest(asked.file)]
    plan = {k: v for k, v in r["evaluation"].items() if k != "resamples"}
    parts: dict[str, Any] = {
        "traces": [
            r["engine"]["name"],
            _local_files(recipe.model.name),
            r["seed"],
            r["model"],
            r["behaviour"],
            r["data"]["probe"],
            text,
            r["evaluation"]["rows"],
        ],
        "probe": {k: v for k, v in r["probe"].items() if k != "expert_tokens"},
        "score": [r["probe"]["expert_tokens"], sorted(_score_files(recipe))],
        "search": [_searched(recipe), r["data"]["validation"], questions, plan],
        "edit": [search, r["evaluation"]["resamples"]],
        "export": r["exports"],
        "evaluate": r["data"]["test"],
        "report": r["name"],
    }
    keys, before = {}, importlib.metadata.version("steer2edit")
    for stage in STAGES:
        before = hashlib.sha256(json.dumps([before, stage, parts[stage]]).encode()).hexdigest()[:16]
        keys[stage] = before
    return keys


def _digest(path: str) -> str:
    return sha256(path) if Path(path).is_file() else "missing"


def _searched(recipe: Recipe) -> dict[str, Any]:
    """What of the search section the trials depend on: of the rule and the limits only where they steer the search."""
    s = recipe.search.model_dump(mode="json")
    steered = recipe.search.method == "tpe" or recipe.search.refine
    keys = set(s) - (set() if steered else {"limits", "rule", "tolerance", "reference"})
    found = {key: s[key] for key in sorted(keys)}
    return found | ({"degenerate": s["limits"]["degenerate"]} if recipe.search.sanity else {})


def _score_files(recipe: Recipe) -> dict[Variant, str]:
    from ..method.variants import FULL, SCORED

    files: dict[Variant, str] = {FULL: "scores.safetensors"}
    return files | {name: f"scores-{name}.safetensors" for name in recipe.search.variants if name in SCORED}


def _local_files(name: str) -> list[Any]:
    """A local model's files, by their sizes and times: other weights under the same name are another model."""
    path = Path(name)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
