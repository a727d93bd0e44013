"""Side effects: every chosen edit under every behaviour's test items, as differences from the original model.

The runs are of one model. Each behaviour's items are asked once under all edits, its own among them.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..edits import AnyEdit, Edit
from ..engines.host import Host
from ..errors import FileError
from ..files.reading import read_json
from ..files.writing import write_text
from ..pipeline.names import CHOICE, EDIT
from ..pipeline.run import Run
from ..pipeline.stages import chosen_of
from ..progress import say, showing
from ..recipe import load_recipe
from ..report.page import _markdown
from ..searching.candidates import Candidate
from ..searching.statistics import interval, paired_difference
from ..searching.utility import refuse_other_base


@dataclass(frozen=True)
class SideEffect:
    """What one edit does to one measure.

    Attributes:
        model: the runs'. edit: the run that chose it. of: the run whose test items are asked. own: whether it is the
            measure that the edit is to improve.
        original, edited: means. low, high: of their difference's 95 % interval.
    """

    model: str
    edit: str
    of: str
    measure: str
    title: str
    own: bool
    original: float
    edited: float
    difference: float
    low: float
    high: float
    n: int

    @property
    def relative(self) -> float | None:
        """The difference as a share of the original model's mean; None where that is 0."""
        return None if self.original == 0 else self.difference / abs(self.original)

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class SideEffects:
    """A table of side effects.

    Attributes:
        left_out: measures that have no number under an edit: a loss is not finite.
    """

    rows: tuple[SideEffect, ...]
    left_out: tuple[str, ...] = ()

    def joined(self, other: SideEffects) -> SideEffects:
        return replace(self, rows=self.rows + other.rows, left_out=self.left_out + other.left_out)


def measure_side_effects(folders: Sequence[str | Path], out: str | Path) -> SideEffects:
    """Asks the test items of every run under the chosen edit of every run.

    Args:
        folders: runs whose edit is chosen, of one model. out: where the journals lie, so that a stopped one goes on.

    Raises:
        FileError: fewer than two runs, two of one name, one without a choice, or runs of several models.
    """
    runs = _opened(folders)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    edits = {name: Edit.load(run.path(EDIT)) for name, run in runs.items()}
    first = next(iter(runs.values())).recipe
    rows: list[SideEffect] = []
    left_out: list[str] = []
    host = Host(first.model, first.engine, first.evaluation.rows)
    try:
        for edit in edits.values():
            refuse_other_base(host.engine, edit)
        for name, run in runs.items():
            say(f"  side effects on {name}:")
            new_rows, lost = _on_items_of(name, run, edits, host, out)
            rows += new_rows
            left_out += lost
    finally:
        host.close()
    return SideEffects(tuple(rows), tuple(left_out))


def _opened(folders: Sequence[str | Path]) -> dict[str, Run]:
    runs: dict[str, Run] = {}
    for folder in folders:
        path = Path(folder)
        if not (path / "recipe.yaml").is_file():
            raise FileError(f"{folder} is no run directory", got="no recipe.yaml", fix="Give run directories.")
        run = Run(path, load_recipe(path))
        name = path.resolve().name
        if name in runs:
            raise FileError("two runs have the same name", got=name, fix="Rename one of the directories.")
        run.require_choice()
        runs[name] = run
    if len(runs) < 2:
        raise FileError("side effects are those on another behaviour", got=f"{len(runs)} run", fix="Give two or more.")
    models = {run.recipe.model.name for run in runs.values()}
    if len(models) > 1:
        raise FileError(
            "the runs are of several models", got=", ".join(sorted(models)), fix="Give runs of one model at a time."
        )
    return runs


def _on_items_of(
    name: str, run: Run, edits: Mapping[str, AnyEdit], host: Host, out: Path
) -> tuple[list[SideEffect], list[str]]:
    """Every edit on one run's test items."""
    # The run's own test has asked the original model and the run's edit already: its journal holds the answers.
    of_run = run.bench("test", run.journal("test"), host.engine)
    known = {trial.candidate.kind: trial for trial in of_run.run(chosen_of(read_json(run.path(CHOICE))), "test")}
    base, trials = known["base"], {name: known["edit"]}
    ids = {other: f"{other}-{edit.id[:12]}" for other, edit in edits.items() if other != name}
    given = {ids[other]: edits[other].intervention(ids[other]) for other in ids}
    tried = [Candidate(id, "edit", {"of": other}) for other, id in ids.items()]
    recipe = run.recipe
    asked = hashlib.sha256(f"{run.basis('test answers')} {sorted(ids.values())}".encode()).hexdigest()[:16]
    bench = run.bench("test", out / f"{name}-{asked}.jsonl", host.engine, scores={}, given=given)
    bench.base = of_run.base
    with showing(f"side effects on {name}") as progress:
        new = bench.run(tried, "side effects", progress)
    trials |= {trial.candidate.config["of"]: trial for trial in new}
    rows, left_out = [], []
    plan = recipe.evaluation
    for other in edits:
        trial = trials[other]
        for m in recipe.behaviour.measures:
            values, of_base = trial.values[m.name], base.values[m.name]
            if not values or not m.column:
                continue
            apart = paired_difference(values, of_base, plan.resamples, recipe.seed)
            means = [interval(some, m.rate, plan.resamples, recipe.seed)["mean"] for some in (of_base, values)]
            if apart["mean"] is None or None in means:
                left_out.append(f"{m.title} of {name} under the edit of {other} is not finite")
                continue
            own = other == name and m == recipe.behaviour.attribute
            numbers = (*means, apart["mean"], apart["low"], apart["high"], apart["n"])
            rows.append(SideEffect(recipe.model.name, other, name, m.name, m.title, own, *numbers))
    return rows, left_out


# As files ----------------------------------------------------------------------------------------------------------


def side_effects_csv(effects: SideEffects) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = (
        "model",
        "edit",
        "of",
        "measure",
        "own",
        "original",
        "edited",
        "difference",
        "low",
        "high",
        "relative",
        "n",
    )
    writer.writerow(header)
    for row in effects.rows:
        numbers = [_plain(getattr(row, name)) for name in header[5:11]]
        writer.writerow([row.model, row.edit, row.of, row.measure, int(row.own), *numbers, row.n])
    return out.getvalue()


def _plain(x: float | None) -> str:
    return "" if x is None else f"{x:.6g}"


def side_effects_markdown(effects: SideEffects) -> str:
    """One row for each measure of each behaviour, one column for each edit."""
    lines: list[str] = []
    for model in dict.fromkeys(row.model for row in effects.rows):
        of_model = [row for row in effects.rows if row.model == model]
        edits = list(dict.fromkeys(row.edit for row in of_model))
        cells = {(row.of, row.measure, row.edit): row for row in of_model}
        header = ["test items", "measure", "original", *(f"edit of {edit}" for edit in edits), "n"]
        rows = []
        for of, measure in dict.fromkeys((row.of, row.measure) for row in of_model):
            some = [cells.get((of, measure, edit)) for edit in edits]
            first = next(row for row in some if row is not None)
            rows.append([of, first.title, f"{first.original:.2f}", *map(_cell, some), str(first.n)])
        lines += [f"## {model}", "", _markdown(header, rows), ""]
    lines.append(
        "Differences from the original model on the same items, with 95 % intervals: **bold** where the interval leaves"
        " out 0, *in italics* the measure that the edit is to improve."
    )
    lines += [f"- {text}" for text in effects.left_out]
    return "\n".join(lines) + "\n"


def _cell(row: SideEffect | None) -> str:
    if row is None:
        return "–"
    relative = "" if row.relative is None or abs(row.original) < 1 else f" ({row.relative:+.0%})"
    text = f"{row.difference:+.2f} [{row.low:+.2f}, {row.high:+.2f}]{relative}"
    text = f"**{text}**" if row.told_apart else text
    return f"*{text}*" if row.own else text


def write_side_effects(effects: SideEffects, out: str | Path) -> list[Path]:
    """Writes `side_effects.csv` and `.md` into a folder."""
    files = {"side_effects.csv": side_effects_csv(effects), "side_effects.md": side_effects_markdown(effects)}
    for name, text in files.items():
        write_text(Path(out) / name, text)
    return [Path(out) / name for name in files]


def as_json(effects: SideEffects) -> list[dict[str, Any]]:
    return [vars(row) | {"relative": row.relative} for row in effects.rows]
