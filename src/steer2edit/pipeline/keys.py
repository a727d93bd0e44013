"""What each stage's result depends on, as a hash: its parts of the recipe and the stages that it builds on.

Where a key and the files that a stage read and wrote are still the same, the stage is whole and is not run again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from ..behaviours.base import SPLITS
from ..files.reading import sha256
from ..method.preserve import EPSILON, REPEL
from ..method.rivals import Rival
from ..method.variants import FULL, SCORED, Variant
from ..recipe import Recipe
from ..searching.plan import TASK_SETTINGS
from ..tasks.known import known

ORDER = ("traces", "probe", "score", "search", "edit", "export", "evaluate", "report")


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """The stages of a recipe, in order. If it asks for training, that comes before the test."""
    before = ORDER.index("evaluate")
    return (*ORDER[:before], "train", *ORDER[before:]) if recipe.training.methods else ORDER


def stage_keys(recipe: Recipe) -> dict[str, str]:
    """Stage → key; and under "test answers" what the journal of the test depends on."""
    r = recipe.model_dump(mode="json")
    evaluation = r["evaluation"]
    resamples = evaluation["resamples"]
    answers = {name: value for name, value in evaluation.items() if name not in ("resamples", *TASK_SETTINGS)}
    questions, utility = recipe.data.questions, recipe.utility.prompts
    asked = [
        None if questions is None else [r["data"]["questions"], _file(questions.file)],
        None if utility is None else _neutral(recipe, utility),
        answers,
    ]
    limits = {measure.name: limit for measure, limit in recipe.aim.limits.items()}
    rule = [recipe.search.rule, recipe.search.tolerance, recipe.search.reference, limits]
    chat = recipe.model.chat
    model = [r["engine"]["name"], _local_files(recipe.model.name), r["model"], chat.template, chat.stop]
    named = [_file(path) for path in recipe.behaviour.files]
    data = [r["behaviour"], _prompts(recipe), *named]
    # A behaviour that divides a file by itself makes each split by the counts of all.
    splits = [r["data"][split] for split in SPLITS] if recipe.behaviour.divides else [r["data"]["probe"]]
    keys = {"traces": _key("traces", *model, *data, r["seed"], *splits, evaluation["rows"])}
    probe_pass = {name: value for name, value in r["probe"].items() if name not in ("expert_tokens", "preserve")}
    keys["probe"] = _key("probe", keys["traces"], probe_pass, *recipe.preserved)
    scored = sorted([*score_files(recipe), *rival_files(recipe)])
    # Scores with evidence hold what vectors share with preserved outputs; those of earlier versions did not. All that
    # is made from them, test answers too, depends on the two numbers as well.
    preserving = ["shared", EPSILON, REPEL] if recipe.preserved else []
    keys["score"] = _key("score", keys["probe"], r["probe"]["expert_tokens"], scored, *preserving)
    keys["search"] = _key("search", keys["score"], _searched(recipe), r["data"]["validation"], asked)
    # Without a person's pick the keys are those of versions that did not know one.
    choice = _key("choice", keys["search"], rule, *([] if recipe.search.pick is None else [recipe.search.pick]))
    # Intervals alone depend on the resamples: neither exports nor answers on test are made again for them.
    keys["edit"] = _key("edit", choice, resamples)
    keys["export"] = _key("export", choice, r["exports"])
    keys["test answers"] = _key("test answers", keys["score"], r["data"]["test"], asked)
    # A line of the tasks' journal holds its prompts and its candidates: only what these stand for is in the key.
    keys["task answers"] = _key("task answers", keys["score"], evaluation["rows"])
    keys["train"] = _key("train", choice, r["training"], resamples)
    # What is measured of the edits: training adds to it and changes nothing.
    keys["measured"] = _key("evaluate", choice, keys["test answers"], resamples, *_tasks(recipe, r))
    trained = [keys["train"]] if recipe.training.methods else []
    keys["evaluate"] = _key("evaluate", choice, keys["test answers"], resamples, *_tasks(recipe, r), *trained)
    keys["report"] = _key("report", keys["edit"], keys["export"], keys["evaluate"], r["name"])
    return keys


def _tasks(recipe: Recipe, r: dict[str, Any]) -> list[Any]:
    """What the tasks' numbers depend on; nothing in a recipe without tasks."""
    data = r["data"]
    if not data["utility"] and not data["attacks"]:
        return []
    folder = recipe.data.sets
    sets = (
        [_file(str(Path(folder) / name)) for task in known(recipe.data.utility) for name in task.files]
        if folder
        else []
    )
    attacks = [_file(of_set.file) for of_set in recipe.data.attacks.values()]
    own = [_file(name) for name in recipe.data.utility if name.endswith((".yaml", ".yml"))]
    wanted = [data[name] for name in ("utility", "utility_items", "utility_order", "sets", "attacks")]
    return [wanted, sets, attacks, [r["evaluation"][name] for name in TASK_SETTINGS], *own]


def _key(*parts: Any) -> str:
    version = importlib.metadata.version("steer2edit")
    return hashlib.sha256(json.dumps([version, *parts]).encode()).hexdigest()[:16]


def _prompts(recipe: Recipe) -> str:
    """The source of the prompts; of a file its content."""
    names = [recipe.data.prompts or "", *([recipe.data.test_prompts] if recipe.data.test_prompts else [])]
    return " ".join(map(_content, names))


def _neutral(recipe: Recipe, name: str) -> str:
    """The set of neutral prompts. The behaviour's own has the word that earlier versions had for every set of the
    package, so that their runs are whole.
    """
    return "missing" if name == recipe.behaviour.neutral_prompts else _content(name)


def _content(name: str) -> str:
    """A file's digest; of a set that comes with the package its name."""
    return name if name.startswith("builtin:") else _file(name)


def _file(path: str) -> str:
    return sha256(path) if Path(path).is_file() else "missing"


def _searched(recipe: Recipe) -> dict[str, Any]:
    """What the trials depend on of the search section: the rule and the limits only if they steer the search."""
    s = recipe.search.model_dump(mode="json")
    steered = recipe.search.method == "tpe" or recipe.search.refine or recipe.search.narrow
    left_out = {"pick"} if steered else {"pick", "limits", "rule", "tolerance", "reference"}
    if not recipe.search.narrow:  # earlier versions did not have it, and their runs are whole
        left_out.add("narrow")
    kept = {key: s[key] for key in sorted(s) if key not in left_out}
    by_kl = [kind for kind in recipe.search.baselines if kind != "system"]
    if not recipe.search.automatic and not by_kl:  # nothing is found by KL
        kept = {key: value for key, value in kept.items() if key not in ("span", "points")}
    if recipe.search.sanity:
        kept["degenerate"] = s["limits"].get("degenerate")
    return kept


def score_files(recipe: Recipe) -> dict[Variant, str]:
    """Variant → the file of its scores, for the full method and the variants that score in another way."""
    files: dict[Variant, str] = {FULL: "scores.safetensors"}
    return files | {name: f"scores-{name}.safetensors" for name in recipe.search.variants if name in SCORED}


def rival_files(recipe: Recipe) -> dict[Rival, str]:
    """Rival → the file of what it does at strength 1."""
    return {name: f"rival-{name}.safetensors" for name in recipe.search.rivals}


def _local_files(name: str) -> list[Any]:
    """A local model's files, by their sizes and times: other weights under the same name are another model."""
    path = Path(name)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
