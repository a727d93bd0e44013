"""What is in a probe, scores, an edit or a run directory, as data and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..edits import Combination, Edit, Scores
from ..errors import FileError
from ..files.reading import read_json, sha256
from ..files.tensors import read_header
from ..method.variants import PRESERVE
from ..probing.probe import Probe
from .visible import in_markup

MANIFEST = "manifest.json"
# Larger files are a checkpoint's.
_HASHED = 100 * 2**20
# How many characters of a value are shown; `--json` has all.
_SHOWN = 5000


def describe(path: Path, top: int = 10) -> dict[str, Any]:
    """Raises FileError if it is none of them."""
    if path.is_dir():
        return _run(path)
    kind = read_header(path).get("kind")
    if kind == "probe":
        return _probe(Probe.load(path))
    if kind == "scores":
        return _scores(Scores.load(path), top)
    if kind == "edit":
        return _edit(Edit.load(path), top)
    if kind == "combination":
        return _combination(Combination.load(path))
    raise FileError(f"{path} is nothing that can be inspected", got=kind, fix="Give a probe, scores, an edit or a run.")


def _probe(probe: Probe) -> dict[str, Any]:
    rows = []
    for site in probe.sites:
        v = probe.vector(site)
        mean = probe.outputs[site.block_key]
        size = (mean["positive"].norm() + mean["negative"].norm()) / 2
        rows.append(
            {
                "site": site.key,
                "shape": f"{site.d} × {site.n} × {site.width}",
                "|v|": float(v.norm()),
                "|v|/|mean|": float(v.norm() / size),
            }
        )
    return {"kind": "probe", "counts": dict(probe.counts), "provenance": dict(probe.provenance), "sites": rows}


def _largest(sites: dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]], top: int) -> list[dict[str, Any]]:
    rows = []
    for key, (by, columns) in sites.items():
        for i in by.abs().topk(min(top, len(by))).indices.tolist():
            rows.append(
                {
                    "site": key,
                    "component": i,
                    **{name: float(x[i]) for name, x in columns.items()},
                    "_": float(by[i].abs()),
                }
            )
    rows.sort(key=lambda row: -row["_"])
    return [{k: v for k, v in row.items() if k != "_"} for row in rows[:top]]


def _scores(scores: Scores, top: int) -> dict[str, Any]:
    largest = _largest({key: (s.g, {"g": s.g, "reach": s.reach}) for key, s in scores.sites.items()}, top)
    return {"kind": "scores", "provenance": dict(scores.provenance), "largest |g|": largest}


def _edit(edit: Edit, top: int) -> dict[str, Any]:
    sites = {}
    for key, s in edit.edited().items():
        columns = {"λ": s.lam, "g": s.g}
        if PRESERVE not in edit.config:  # there k̂ is not what drives the component, whose reach is no measure of λ
            columns["λ/reach"] = s.lam / s.reach
        sites[key] = (s.lam, columns)
    return {
        "kind": "edit",
        "id": edit.id,
        "config": dict(edit.config),
        "strength": edit.strength,
        "summary": edit.summary(),
        "provenance": dict(edit.provenance),
        "largest |λ|": _largest(sites, top),
    }


def _combination(both: Combination) -> dict[str, Any]:
    from ..edits import meetings

    rows = []
    for edit in both.parts:
        edited = {block: f"{counts['edited']} of {counts['components']}" for block, counts in edit.summary().items()}
        rows.append({"edit": edit.id, "strength": edit.strength, "config": dict(edit.config), **edited})
    return {"kind": "combination", "id": both.id, "edits": rows, "interference": meetings(both)}


def changed_files(folder: Path) -> list[str]:
    """The files of a run that are not as the run wrote them, by its manifest. Files of gigabytes are not looked at.

    Raises:
        FileError: the manifest is not a run's.
    """
    manifest = read_json(folder / MANIFEST)
    try:
        digests = {name: digest for entry in manifest["stages"].values() for name, digest in entry["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{folder / MANIFEST} is not a run's", got=repr(error), fix="Give a run directory.") from None
    small = [name for name in digests if (folder / name).is_file() and (folder / name).stat().st_size < _HASHED]
    return [name for name in small if sha256(folder / name) != digests[name]]


def _state(entry: Mapping[str, Any], changed: Sequence[str]) -> str:
    if entry.get("stale"):
        return "stale: another recipe's"
    own = [name for name in entry["files"] if name in changed]
    return f"changed: {', '.join(own)}" if own else "whole"


def _run(path: Path) -> dict[str, Any]:
    manifest = read_json(path / MANIFEST)
    changed = changed_files(path)
    try:
        contents = {
            "kind": "run",
            "name": manifest["recipe"]["name"],
            "model": manifest["recipe"]["model"]["name"],
            "stages": [
                {
                    "stage": name,
                    "seconds": e["seconds"],
                    "files": ", ".join(e["files"]),
                    "state": _state(e, changed),
                }
                for name, e in manifest["stages"].items()
            ],
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path / MANIFEST} is not a run's", got=repr(error), fix="Give a run directory.") from None
    if (path / "choice.json").is_file():
        contents["choice"] = read_json(path / "choice.json")
        if rows := contents["choice"].pop("firing", None):
            contents["where it fires"] = rows
    if (path / "evaluation/results.json").is_file():
        contents["results"] = read_json(path / "evaluation/results.json")
    return contents


def _shown(text: str) -> str:
    """As much of a text as people read."""
    return text[:_SHOWN] + ("…" if len(text) > _SHOWN else "")


def show(console: Any, contents: dict[str, Any]) -> None:
    from rich.table import Table

    results = contents.pop("results", None)
    for name, value in contents.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            table = Table(title=name)
            for column in value[0]:
                table.add_column(in_markup(column))
            for row in value:
                table.add_row(
                    *(f"{x:.4g}" if isinstance(x, float) else in_markup(_shown(str(x))) for x in row.values())
                )
            console.print(table)
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) and value else str(value)
            console.print(f"[bold]{name}[/bold]: {in_markup(_shown(text))}", highlight=False)
    if results:
        from .page import print_results

        print_results(console, results)
