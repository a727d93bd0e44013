"""A run directory: its recipe, its manifest, what is whole in it, and the model that its stages share."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..behaviours.base import Item, Split
from ..behaviours.prompts import load_neutral, load_questions
from ..edits import Edit, Scores
from ..engines.base import Engine
from ..engines.host import Host
from ..errors import FileError, RecipeError
from ..files.reading import read_json, read_jsonl, sha256
from ..files.writing import clear_temporaries, make_folder, write_json, write_jsonl, write_text
from ..method.intervention import Intervention
from ..models.load import resolved_revision
from ..probing.probe import Probe
from ..progress import showing
from ..recipe import Recipe
from ..report.inspection import MANIFEST
from ..searching.bench import Bench
from ..searching.own_answers import Journalled
from .keys import rival_files, score_files, stage_keys, stages_of
from .names import PROBE

# Where a kill may leave temporary files; the report writes cards into the folders of the exports.
_FOLDERS = (
    *(".", "traces", "search", "training", "evaluation", "figures"),
    *("adapter", "checkpoint", "gguf", "steering"),
)


def _are(digests: Mapping[str, str], folder: Path) -> bool:
    """Whether files of a folder have these digests."""
    return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in digests.items())


def _is_entry(entry: Any) -> bool:
    """Whether a value of the manifest is what `record` writes of a stage."""
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
        return False
    digests = [entry.get("files"), entry.get("read", {})]
    return all(isinstance(d, dict) and all(isinstance(x, str) for x in d.values()) for d in digests)


class Run:
    """A run directory and its recipe; the model is loaded when a stage first needs it.

    Args:
        folder: made if missing.
        recipe: what to run.
        host: where the model is, for runs one after the other that share it; who gives it closes it.
    """

    def __init__(self, folder: str | Path, recipe: Recipe, host: Any = None):
        self._lent = host is not None
        if host is not None:
            self.__dict__["host"] = host
        self.folder, self.recipe = Path(folder), recipe
        if self.folder.exists() and not self.folder.is_dir():
            raise RecipeError("the run directory is a file", got=self.folder, fix="Give another --out.")
        self.keys = stage_keys(recipe)
        self.notes: dict[str, Any] = {}  # what a stage adds to its entry in the manifest
        # What is open while a stage works, like a clock.
        self.during: Callable[[str], AbstractContextManager[object]] = lambda stage: contextlib.nullcontext()

    def path(self, name: str) -> Path:
        return self.folder / name

    @property
    def commit(self) -> str | None:
        """The commit of the recipe's model, if it is the Hub's and in the cache."""
        return resolved_revision(self.recipe.model.name, self.recipe.model.revision)

    @cached_property
    def host(self) -> Any:
        """Where the model is: a Host here, or a RayEngine, which has the same `engine`, `call` and `close`."""
        model, plan, rows = self.recipe.model, self.recipe.engine, self.recipe.evaluation.rows
        if plan.distributed == "ray":
            from ..engines.ray import RayEngine

            return RayEngine(model, plan, rows=rows)
        return Host(model, plan, rows)

    @property
    def engine(self) -> Engine:
        return self.host.engine

    def close(self) -> None:
        """Lets worker processes and replicas go, unless the host is another's."""
        if not self._lent and (host := self.__dict__.pop("host", None)):
            host.close()

    @cached_property
    def scores(self) -> dict[str, Scores]:
        """The full method's, and those of the variants that score in another way."""
        return {name: Scores.load(self.path(file)) for name, file in score_files(self.recipe).items()}

    @cached_property
    def rivals(self) -> dict[str, Edit]:
        """Kind → what each rival that the recipe names does at strength 1."""
        return {name: Edit.load(self.path(file)) for name, file in rival_files(self.recipe).items()}

    @cached_property
    def probe(self) -> Probe:
        return Probe.load(self.path(PROBE))

    # What is asked -------------------------------------------------------------------------------------------------

    def items(self, split: Split, locked: bool = True) -> list[Item]:
        """A split's prompts. Those of test cannot be read before the choice is made.

        Args:
            locked: False only where nothing can be asked any more, since a journal is judged again.
        """
        if split == "test" and locked:
            self.require_choice()
        return self.recipe.behaviour.items(self.recipe.source, split)

    def require_choice(self) -> None:
        """Raises FileError if no edit is chosen: before that nothing of test is read."""
        if not self.is_whole("edit"):
            raise FileError(
                "the test prompts are not read before an edit is chosen", got=self.folder, fix="Run the stage edit."
            )

    def completed(self, split: Split, items: Sequence[Item], engine: Engine | None) -> list[Item]:
        """The items with what the model wrote for them, which a file beside the split's journal keeps.

        Raises:
            FileError: without an engine, if there is no such file.
        """
        if not self.recipe.behaviour.completes:
            return list(items)
        journal = self.journal(split)
        path = journal.with_name(journal.name.replace("journal", "items"))
        if path.is_file():
            return [Item(row["kind"], row["prompt"], tuple(row["choices"]), row["target"]) for row in read_jsonl(path)]
        if engine is None:
            raise FileError("the run has no items to judge", got=f"no {path.name}", fix="Run the stage again.")
        answers = journal.with_name(journal.name.replace("journal", "own"))
        with showing("what is compared") as progress:
            completed = self.recipe.behaviour.completed(Journalled(engine, answers), items, progress)
        write_jsonl(path, (vars(item) for item in completed))
        return completed

    def bench(
        self,
        split: Split,
        journal: Path,
        engine: Engine | None,
        *,
        scores: Mapping[str, Scores] | None = None,
        given: Mapping[str, Intervention] | None = None,
        most: int | None = None,
    ) -> Bench:
        """Where candidates are tried on a split.

        Args:
            engine: None if the journal is only judged again.
            scores: in place of the run's own. given: a candidate's id → what it does, where no scores say it.
            most: at most this many items of each kind are asked; None is all.
        """
        recipe = self.recipe
        journal.parent.mkdir(exist_ok=True)
        if scores is None:
            scores = {} if engine is None else self.scores
        items = self.completed(split, self.items(split, locked=engine is not None), engine)
        items = items if most is None else first_of_each_kind(items, most)
        return Bench(
            engine,
            scores,
            [*items, *self._questions(split)],
            recipe.behaviour,
            recipe.evaluation,
            journal,
            neutral=self._neutral(split, items),
            probe=None if engine is None else self.probe,
            rivals=None if engine is None else self.rivals,
            given=given,
            seed=recipe.seed,
        )

    def journal(self, split: Split) -> Path:
        """The journal of a split's answers under the scores that are here now: other scores have another journal."""
        if split == "test":
            return self.on_basis("evaluation/journal-{}.jsonl", "test answers", "evaluate")
        return self.on_basis("search/journal-{}.jsonl", "search", "search")

    def on_basis(self, name: str, key: str, stage: str) -> Path:
        """A file that is named after its basis. Earlier versions named it after the key alone: that one, if what the
        stage read is as it was, so that its answers are of the scores that are here now.
        """
        path, older = (self.path(name.format(of)) for of in (self.basis(key), self.keys[key]))
        return older if older.is_file() and not path.is_file() and self._read_as_now(stage) else path

    def _read_as_now(self, stage: str) -> bool:
        read: Mapping[str, str] = (self.entry(stage) or {}).get("read", {})
        return bool(read) and _are(read, self.folder)

    def basis(self, key: str) -> str:
        """Of all that an answer depends on: a key of the recipe, and what is in the probe, the scores and the rivals.

        Those may be others under the same recipe: of traces put here by hand, or of a model that moved on at the Hub.
        """
        files = [PROBE, *score_files(self.recipe).values(), *rival_files(self.recipe).values()]
        contents = [sha256(self.path(file)) for file in files if self.path(file).is_file()]
        return hashlib.sha256(json.dumps([self.keys[key], contents]).encode()).hexdigest()[:16]

    def _questions(self, split: Split) -> list[Item]:
        questions = self.recipe.data.questions
        if questions is None:
            return []
        if split == "validation":
            return load_questions(questions.file, 0, questions.validation)
        return load_questions(questions.file, questions.validation, questions.test)

    def _neutral(self, split: Split, items: Sequence[Item]) -> list[Item]:
        count = self.recipe.evaluation.utility_prompts
        if self.recipe.utility.prompts is not None:
            first = 0 if split == "validation" else count
            return load_neutral(self.recipe.utility.prompts, split, first, count)
        return [item for item in items if item.kind == self.recipe.behaviour.neutral and not item.choices][:count]

    # The manifest --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While it lasts, no other process works in this directory. Writes down the recipe, and marks as stale what
        another recipe left.

        Raises:
            FileError: another process is at work here, or nothing can be written here.
        """
        make_folder(self.folder)
        lock = FileLock(self.path(".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise FileError(
                "another steer2edit process is working in this run directory",
                got=self.folder,
                fix="Wait until it has finished, or give another --out.",
            ) from None
        try:
            for place in _FOLDERS:
                clear_temporaries(self.path(place))
            self._mark_stale()
            write_text(self.path("recipe.yaml"), self.recipe.to_yaml())
            with contextlib.closing(self):
                yield
        finally:
            lock.release()

    def _mark_stale(self) -> None:
        manifest = self.manifest()
        changed = False
        for name, entry in manifest["stages"].items():
            stale = entry["key"] != self.keys.get(name)
            if stale != entry.get("stale", False):
                entry["stale"] = stale
                changed = True
        if changed:
            write_json(self.path(MANIFEST), manifest)

    def manifest(self) -> dict[str, Any]:
        path = self.path(MANIFEST)
        manifest = read_json(path) if path.is_file() else {"stages": {}}
        stages = manifest.get("stages") if isinstance(manifest, dict) else None
        if not isinstance(stages, dict) or not all(_is_entry(entry) for entry in stages.values()):
            raise FileError(
                f"{path} is not a run's manifest",
                got="damaged, or another file",
                fix="Delete it, so that the stages run again (what the journals hold is not made again), or give"
                " another --out.",
            )
        return manifest

    def entry(self, stage: str) -> Mapping[str, Any] | None:
        return self.manifest()["stages"].get(stage)

    def is_whole(self, stage: str) -> bool:
        """Whether a stage was run with this recipe, and what it read and wrote is as it was."""
        entry = self.entry(stage)
        if entry is None or entry["key"] != self.keys[stage]:
            return False
        if entry.get("commit") not in (None, self.commit):  # the Hub's model has moved on
            return False
        return _are(entry["files"] | entry.get("read", {}), self.folder)

    def record(self, stage: str, seconds: float, files: Sequence[str], read: Sequence[str]) -> None:
        """Writes into the manifest that a stage is whole.

        Args:
            files: what it wrote. read: what it read of the stages before.
        """
        manifest = self.manifest()
        manifest["steer2edit"] = importlib.metadata.version("steer2edit")
        manifest["recipe"] = self.recipe.model_dump(mode="json")
        manifest["machine"] = {"python": platform.python_version(), "platform": platform.machine()}
        manifest["versions"] = {n: importlib.metadata.version(n) for n in ("torch", "transformers", "peft", "numpy")}
        entry = {
            "key": self.keys[stage],
            "seconds": round(seconds, 1),
            "files": {name: sha256(self.path(name)) for name in files},
            "read": {name: sha256(self.path(name)) for name in read if self.path(name).is_file()},
        }
        if "host" in self.__dict__ and (where := self.host.where()):
            entry["model"] = where
        if self.commit is not None:
            entry["commit"] = self.commit
        entry |= self.notes
        self.notes = {}
        manifest["stages"] = {name: e for name, e in manifest["stages"].items() if name != stage} | {stage: entry}
        entries = manifest["stages"]
        manifest["stages"] = {name: entries[name] for name in stages_of(self.recipe) if name in entries}
        write_json(self.path(MANIFEST), manifest)


def first_of_each_kind(items: Sequence[Item], most: int) -> list[Item]:
    """The first items of each kind, in their order.

    >>> [item.text for item in first_of_each_kind([Item("a", "1"), Item("b", "2"), Item("a", "3")], 1)]
    ['1', '2']
    """
    counts: dict[str, int] = {}
    kept = []
    for item in items:
        counts[item.kind] = counts.get(item.kind, 0) + 1
        if counts[item.kind] <= most:
            kept.append(item)
    return kept
