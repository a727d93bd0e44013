"""The export stage: what a run writes for other tools, each into a folder of its own, or why it does not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

from ..edits import Edit
from ..errors import FileError, Steer2EditError
from ..files.reading import read_json
from ..files.writing import remove, write_json
from ..progress import megabytes, say, showing
from .run import Run

# The model card of an export; a checkpoint comes with the base's, and the report writes its own over it.
CARD = "README.md"
# For each export its folder, or why there is none.
SUMMARY = "exports.json"


# What an export needs beside the core packages.
_NEEDS = {"gguf": "gguf"}


def check_exports(kinds: Sequence[str]) -> None:
    """Raises FileError if an export needs a package that is not installed."""
    for kind in kinds:
        package = _NEEDS.get(kind)
        if package is not None and importlib.util.find_spec(package) is None:
            raise FileError(
                f"the export {kind} needs the package {package}",
                got="not installed",
                fix=f"pip install {package}, or leave {kind} out of exports.",
            )


def export(run: Run) -> list[str]:
    """Writes what the recipe's `exports` name; the files, relative to the run's folder.

    Raises:
        Steer2EditError: an export failed, after the others were tried.
    """
    from ..artefacts.adapter import obstacle

    edit = Edit.load(run.path("edit.safetensors"))
    for old in EXPORTS:
        remove(run.path(old))
    wanted: set[str] = set(run.recipe.exports)
    if "checkpoint" not in wanted:
        remove(run.path(".checkpoint.partial"))  # of an export that was killed, and is not wanted any more
    not_written: dict[str, str] = {}
    if "adapter" in wanted and (reason := obstacle(edit)):
        not_written["adapter"] = (
            f"PEFT cannot hold this edit ({reason}): a checkpoint is written in the adapter's place"
        )
        wanted |= {"checkpoint"}
    if run.recipe.model.name.endswith(".gguf"):
        reason = f"a GGUF file is no safetensors checkpoint (got: {run.recipe.model.name}). Export an adapter instead."
        not_written |= {kind: f"no {kind}: {reason}" for kind in ("checkpoint", "steering") if kind in wanted}
    failures: list[Steer2EditError] = []
    for kind in EXPORTS:
        if kind not in wanted or kind in not_written:
            continue
        try:
            reason = EXPORTS[kind](run, edit)
        except Steer2EditError as error:
            failures.append(error)
            reason = str(error)
        if reason:
            not_written[kind] = f"no {kind}: {reason}"
    for reason in not_written.values():
        say(f"  {reason}")
    summary = {}
    for kind in EXPORTS:
        if kind in not_written:
            summary[kind] = {"not_written": not_written[kind]}
        elif kind in wanted:
            summary[kind] = {"folder": kind}
    write_json(run.path(SUMMARY), summary)
    if failures:
        raise failures[0]
    files = [f for kind in EXPORTS for f in sorted(run.path(kind).rglob("*")) if f.is_file()]
    cards = [run.path(f"{kind}/{CARD}") for kind in EXPORTS]
    return [SUMMARY, *(str(f.relative_to(run.folder)) for f in files if f not in cards)]


def _adapter(run: Run, edit: Edit) -> None:
    from ..models.embedded import HUB_NAMES

    name = run.recipe.model.name
    edit.save_adapter(run.path("adapter"), base=HUB_NAMES.get(name, name))
    if any(site.site.expert is not None for site in edit.edited().values()):
        say("  the experts' edits are LoRAs of fused parameters (target_parameters); PEFT mixes none in a batch")


def _checkpoint(run: Run, edit: Edit) -> None:
    from ..artefacts.checkpoint import export_checkpoint
    from ..models.load import local_folder

    folder = local_folder(run.recipe.model.name, run.recipe.model.revision)
    with showing("checkpoint, MB") as progress:
        export_checkpoint(folder, edit, run.path("checkpoint"), progress=megabytes(progress))


def _gguf(run: Run, edit: Edit) -> str | None:
    from ..artefacts.gguf import obstacle, save_gguf_adapter

    if error := obstacle(edit):
        return str(error)
    save_gguf_adapter(edit, run.path("gguf/adapter.gguf"))
    return None


def _steering(run: Run, edit: Edit) -> str | None:
    from ..artefacts.bias import export_steering
    from ..errors import ModelError
    from ..method.variants import FULL
    from ..models.load import local_folder
    from ..searching.candidates import steering_vectors

    chosen = read_json(run.path("choice.json"))["steering"]
    if chosen is None:
        return "no steering strength was chosen: none was tried, or none stays within the limits on validation."
    folder = local_folder(run.recipe.model.name, run.recipe.model.revision)
    vectors = steering_vectors(run.scores[FULL])
    try:
        export_steering(folder, vectors, chosen["config"]["gamma"], run.path("steering"))
    except ModelError as error:  # few architectures have a place for the biases
        return str(error)
    return None


# What the export stage writes, each into a folder of its own; why it does not, if it does not.
EXPORTS: dict[str, Callable[[Run, Edit], str | None]] = {
    "adapter": _adapter,
    "checkpoint": _checkpoint,
    "gguf": _gguf,
    "steering": _steering,
}
