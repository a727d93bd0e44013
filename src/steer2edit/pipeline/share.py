"""A run's edit as a folder for the Hub, and making such an edit again to see whether it is the same."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..edits import Edit, load_any
from ..errors import FileError, Steer2EditError
from ..files.gallery import folder_of, is_of_gallery
from ..files.reading import read_json, sha256
from ..files.writing import replacing_folder
from ..progress import say
from ..recipe import load_recipe, refuse_code
from ..searching.candidates import edit_of
from .run import Run
from .stages import run_stage

EDIT, RECIPE, CHOICE, MANIFEST = "edit.safetensors", "recipe.yaml", "choice.json", "manifest.json"
# What is copied beside an export, so that the edit can be made again and read; the run's manifest has a name of its
# own, since a checkpoint has a manifest too.
RECORD = {EDIT: EDIT, RECIPE: RECIPE, CHOICE: CHOICE, "evaluation/results.json": "results.json", MANIFEST: "run.json"}
# A folder is of steer2edit if it holds one of these.
_OURS = (EDIT, "steer2edit.json", MANIFEST)
_EXPORTS = ("adapter", "checkpoint", "gguf", "steering")


def write_share(source: Path, out: Path, kind: str | None = None) -> Path:
    """Writes the folder that `push` uploads, whole or not at all.

    Args:
        source: a finished run, or a folder with an adapter, an edit or a checkpoint of ours.
        kind: which export of a run, such as "adapter"; the first one that there is by default.

    Raises:
        FileError: there is nothing of ours, or no such export, or the export is of another edit, or `out` holds other
            things.
    """
    record = (source / RECIPE).is_file()
    if not source.is_dir() or not any((source / name).is_file() for name in _OURS):
        raise FileError(
            "there is nothing of steer2edit to push",
            got=source,
            fix="Give a finished run, or the folder of an adapter, an edit or a checkpoint.",
        )
    exported = source
    if (record and (source / "traces.jsonl").is_file()) or kind is not None:
        kinds = [name for name in _EXPORTS if (source / name).is_dir()]
        if (kind is not None and kind not in kinds) or not kinds:
            raise FileError(
                "the run has no such export",
                got=kind or "none",
                fix=f"It has {', '.join(kinds) or 'none'}; name one in the recipe's exports and run the stage export.",
            )
        exported = source / (kind or kinds[0])
    if (source / "traces.jsonl").is_file() and exported is not source:
        _refuse_stale(source)
    if (out / "traces.jsonl").is_file():  # it has an edit, as what is replaced here has, and hours of work
        raise FileError(f"{out} is a run directory", got="traces.jsonl in it", fix="Give a new or an empty folder.")
    with replacing_folder(out, ours=EDIT) as temporary:
        for file in sorted(exported.rglob("*")):
            inside = file.relative_to(exported)
            if file.is_file() and not file.is_symlink() and not any(part.startswith(".") for part in inside.parts):
                (temporary / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, temporary / inside)
        for name, kept in RECORD.items():
            if exported is not source and (source / name).is_file():
                shutil.copyfile(source / name, temporary / kept)
    return out


def _refuse_stale(run: Path) -> None:
    """Raises FileError if the run's exports or results are of another edit than the one that it has now."""
    stages = Run(run, load_recipe(run / RECIPE)).manifest()["stages"]
    now, results = sha256(run / EDIT), "evaluation/results.json"
    stale = [name for name in ("export", "evaluate") if stages.get(name, {}).get("read", {}).get(EDIT, now) != now]
    # Results that came after the entry are of a test in which a task failed.
    written = stages.get("evaluate", {}).get("files", {}).get(results)
    if written and (run / results).is_file() and sha256(run / results) != written:
        stale = [name for name in stale if name != "evaluate"]
    if stale:
        raise FileError(
            "the run's files are of another edit",
            got=f"another edit when it ran {' and '.join(stale)}",
            fix=f"`steer2edit run {run}` makes them again.",
        )


def push(source: Path, repository: str, kind: str | None = None, private: bool = False, api: Any = None) -> str:
    """Uploads what `write_share` writes to a repository of the Hub, which is made if there is none. Gives its address.

    Args:
        api: a HfApi; one with the user's own login by default.

    Raises:
        Steer2EditError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    # HTTPError is that of the HTTP library which this version of the Hub's client uses.
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

    api = api or HfApi()
    with tempfile.TemporaryDirectory() as place:
        folder = write_share(source, Path(place) / "share", kind)
        say(f"  pushing {sum(file.stat().st_size for file in folder.rglob('*')) / 1e6:.1f} MB to {repository}")
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload with steer2edit")
        except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, HTTPError, OSError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Steer2EditError(
                f"the Hub does not take {repository}",
                got=first,
                fix="Log in with `hf auth login`, and write the name as owner/name; --dry-run OUT needs no Hub.",
            ) from None
    return f"{api.endpoint}/{repository}"


def reproduce(source: Path | str, work: Path, trust_code: bool = False) -> dict[str, Any]:
    """Makes an edit again, from its recipe: traces, probe and scores, then the configuration that was chosen.

    Args:
        source: a run, a folder that `write_share` wrote, `gallery:NAME`, or a repository of the Hub.
        work: where it is made; a run directory, so that what was stopped goes on.

    Returns:
        tensors: name → "same", "missing", "extra", or how far it is off, as the largest |difference| / largest |value|.
        adapter: the same for an adapter's tensors. same: whether all are. close: whether all differ by at most 1e-4.

    Raises:
        FileError: the folder does not hold what is needed.
    """
    folder = _folder(source)
    missing = [name for name in (EDIT, RECIPE, CHOICE) if not (folder / name).is_file()]
    if missing:
        raise FileError(
            "the edit cannot be made again", got=f"no {', '.join(missing)} in {folder}", fix="Give a run that is whole."
        )
    stored = load_any(folder / EDIT)
    recipe = load_recipe(folder / RECIPE)
    refuse_code(recipe, trust_code)
    config = ((read_json(folder / CHOICE) or {}).get("edit") or {}).get("config")
    if not isinstance(stored, Edit) or not isinstance(config, dict):
        raise FileError("the edit cannot be made again", got="no chosen configuration", fix="Give a run's own edit.")
    run = Run(work, recipe)
    for stage in ("traces", "probe", "score"):
        if not run.is_whole(stage):
            run_stage(run, stage, str(folder / RECIPE))
    # Another version may preserve by other numbers than this one: the file has its own.
    remade = edit_of(config, run.scores, stored.preserving).with_strength(stored.strength)
    run.close()
    remade.save(work / EDIT)
    result: dict[str, Any] = {"kind": "reproduce", "config": config, "tensors": compared(folder / EDIT, work / EDIT)}
    words = list(result["tensors"].values())
    adapter = next((p for p in (folder, folder / "adapter") if (p / "adapter_model.safetensors").is_file()), None)
    if adapter is not None:
        remade.save_adapter(work / "adapter")
        file = "adapter_model.safetensors"
        result["adapter"] = compared(adapter / file, work / "adapter" / file)
        words += result["adapter"].values()
    result["same"] = all(word == "same" for word in words)
    result["close"] = all(word == "same" or (isinstance(word, float) and word <= 1e-4) for word in words)
    return result


def _folder(source: Path | str) -> Path:
    if is_of_gallery(source):
        return folder_of(source)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(source), ignore_patterns=["*.bin", "*.pt", "*.pth"]))
    except (OSError, ValueError, HFValidationError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileError("no such folder, and no such repository", got=first, fix="Check the name.") from None


def compared(stored: Path, remade: Path) -> dict[str, str | float]:
    """Tensor → "same", byte for byte, "missing" or "extra" in what was made, or the relative difference."""
    one, other = _tensors(stored), _tensors(remade)
    words: dict[str, str | float] = {name: _difference(one[name], other.get(name)) for name in one}
    return words | dict.fromkeys(other.keys() - one.keys(), "extra")


def _tensors(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{path} is not a whole safetensors file", got=error, fix="Copy it again.") from None


def _difference(one: torch.Tensor, other: torch.Tensor | None) -> str | float:
    if other is None:
        return "missing"
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"another shape: {tuple(other.shape)}"
    if torch.equal(one, other):
        return "same"
    size = float(one.abs().max())
    return float((one - other).abs().max()) / size if size else float("inf")
