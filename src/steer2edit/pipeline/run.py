"""A run directory: its recipe, its manifest, what is whole in it, and the model that its stages share."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..edits import Scores
from ..errors import FileError, RecipeError
from ..files.reading import read_json, sha256
from ..files.writing import write_json
from ..recipe import Recipe
from ..report.inspection import MANIFEST
from .keys import _keys, _score_files

if TYPE_CHECKING:
    from ..behaviours.safety import Prompt, Split
    from ..engines import Engine
    from ..search.bench import Bench


class Run:
    """A run directory and its recipe; the model is loaded when a stage first needs it.

    Args:
        folder: made if missing.
        recipe: what to run.
    """

    def __init__(self, folder: str | Path, recipe: Recipe):
        self.folder, self.recipe = Path(folder), recipe
        if self.folder.exists() and not self.folder.is_dir():
            raise RecipeError("the run directory is a file", got=self.folder, fix="Give another --out.")
        self.keys = _keys(recipe)

    def path(self, name: str) -> Path:
        return self.folder / name

    @cached_property
    def host(self) -> Any:
        """Where the model is: a Host here, or a RayEngine, which has the same `engine`, `call` and `close`."""
        model, plan, rows = self.recipe.model, self.recipe.engine, self.recipe.evaluation.rows
        if plan.distributed == "ray":
            from ..engines.ray import RayEngine

            return RayEngine(model, plan, rows=rows)
        from ..engines.host import Host

        return Host(model, plan, rows)

    @property
    def engine(self) -> Engine:
        return self.host.engine

    def close(self) -> None:
        """Lets worker processes and replicas go."""
        if host := self.__dict__.pop("host", None):
            host.close()

    @cached_property
    def scores(self) -> dict[str, Scores]:
        """The full method's, and those of the variants that score in another way."""
        return {name: Scores.load(self.path(file)) for name, file in _score_files(self.recipe).items()}

    def prompts(self, split: Split) -> list[Prompt]:
        """A split's prompts. Those of test cannot be read before the choice is made."""
        from ..behaviours.safety import load_prompts

        if split == "test" and not self.is_whole("edit"):
            raise FileError(
                "the test prompts are not read before an edit is chosen", got=self.folder, fix="Run the stage edit."
            )
        counts = getattr(self.recipe.data, split)
        return load_prompts(self.recipe.data.prompts, split, {str(k): n for k, n in counts.items()})

    def bench(self, stage: str, split: Split, journal: str) -> Bench:
        """Where a stage tries candidates on a split, with its journal."""
        from ..behaviours.questions import load_questions
        from ..search.bench import Bench

        q = self.recipe.data.questions
        first, count = (0, 0) if q is None else (0, q.validation) if split == "validation" else (q.validation, q.test)
        path = self.path(f"{journal}/journal-{self.keys[stage]}.jsonl")
        path.parent.mkdir(exist_ok=True)
        questions = [] if q is None else load_questions(q.file, first, count)
        return Bench(self.engine, self.scores, self.prompts(split), self.recipe, path, questions)

    def manifest(self) -> dict[str, Any]:
        path = self.path(MANIFEST)
        found = read_json(path) if path.is_file() else {"stages": {}}
        if not (isinstance(found, dict) and isinstance(found.get("stages"), dict)):
            raise FileError(f"{path} is not a run's manifest", got=type(found).__name__, fix="Give another --out.")
        return found

    def is_whole(self, stage: str) -> bool:
        entry = self.manifest()["stages"].get(stage)
        if entry is None or entry["key"] != self.keys[stage]:
            return False
        return all(
            self.path(name).is_file() and sha256(self.path(name)) == digest for name, digest in entry["files"].items()
        )

    def record(self, stage: str, seconds: float, files: Sequence[str]) -> None:
        manifest = self.manifest()
        manifest["steer2edit"] = importlib.metadata.version("steer2edit")
        manifest["recipe"] = self.recipe.model_dump(mode="json")
        manifest["machine"] = {"python": platform.python_version(), "platform": platform.machine()}
        manifest["versions"] = {n: importlib.metadata.version(n) for n in ("torch", "transformers", "peft", "numpy")}
        entry = {
            "key": self.keys[stage],
            "seconds": round(seconds, 1),
            "files": {name: sha256(self.path(name)) for name in files},
        }
        if "host" in self.__dict__ and (where := self.host.where()):
            entry["model"] = where
        manifest["stages"][stage] = entry
        write_json(self.path(MANIFEST), manifest)


def load_results(folder: str | Path) -> Mapping[str, Any]:
    return read_json(Path(folder) / "evaluation/results.json")
