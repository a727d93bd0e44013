"""Scores and edits on disk: `safetensors` files, fp32, with the sites and the configuration in the header."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .edit import Edit, Scores, SiteEdit, SiteScores
from .errors import EditError, FileError
from .files import read_tensors, write_tensors
from .sites import Site

FORMAT = 1
SCORES = ("u", "k", "g", "reach")
EDIT = (*SCORES, "lam")


def save_scores(scores: Scores, path: str | Path) -> None:
    header = {"v_norm": {key: s.v_norm for key, s in scores.sites.items()}, "provenance": dict(scores.provenance)}
    _write(path, "scores", scores.sites, SCORES, scores.fingerprint, header)


def load_scores(path: str | Path) -> Scores:
    sites, fingerprint, header = _read(path, "scores", SCORES)
    try:
        norms = {key: float(header["v_norm"][key]) for key in sites}
        if not all(0 <= norm < math.inf for norm in norms.values()):
            raise ValueError("a norm that is not finite")
        rows = {key: SiteScores(**row, v_norm=norms[key]) for key, row in sites.items()}
        return Scores(rows, fingerprint, dict(header["provenance"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, "scores", error) from None


def save_edit(edit: Edit, path: str | Path) -> None:
    header = {"config": dict(edit.config), "provenance": dict(edit.provenance), "strength": edit.strength}
    _write(path, "edit", edit.sites, EDIT, edit.fingerprint, header)


def load_edit(path: str | Path) -> Edit:
    sites, fingerprint, header = _read(path, "edit", EDIT)
    try:
        rows = {key: SiteEdit(**row) for key, row in sites.items()}
        edit = Edit(rows, dict(header["config"]), fingerprint, dict(header["provenance"]))
        return edit.with_strength(float(header["strength"]))
    except (EditError, KeyError, TypeError, ValueError) as error:
        raise _broken(path, "edit", error) from None


def _write(
    path: str | Path,
    kind: str,
    sites: Mapping[str, Any],
    fields: tuple[str, ...],
    fingerprint: Mapping[str, Tensor],
    header: Mapping[str, Any],
) -> None:
    tensors = {f"{key}.{name}": getattr(row, name).float() for key, row in sites.items() for name in fields[1:]}
    # v is the block's, and so is u: kept once for all the experts of a block, where they have the same one.
    for key, row in sites.items():
        block = f"{row.site.block_key}.u"
        if torch.equal(tensors.setdefault(block, row.u.float()), row.u.float()):
            continue
        tensors[f"{key}.u"] = row.u.float()
    tensors |= {f"{key}.sketch": value for key, value in fingerprint.items()}
    common = {"kind": kind, "format": FORMAT, "sites": [row.site.to_json() for row in sites.values()]}
    write_tensors(path, tensors, common | dict(header))


def _read(path: str | Path, kind: str, fields: tuple[str, ...]) -> tuple[dict, dict[str, Tensor], dict[str, Any]]:
    tensors, header = read_tensors(path, kind)
    try:
        rows: dict[str, Any] = {}
        for site in map(Site.from_json, header["sites"]):
            shapes = {"u": (site.d,), "k": (site.n, site.width), "g": (site.n,), "reach": (site.n,), "lam": (site.n,)}
            own = {name: tensors[f"{site.key}.{name}"] for name in fields[1:]}
            u = tensors.get(f"{site.key}.u", tensors[f"{site.block_key}.u"])
            rows[site.key] = {"site": site, "u": u} | own
            for name in fields:
                if rows[site.key][name].shape != shapes[name]:
                    raise ValueError(f"tensor {site.key}.{name} should have shape {shapes[name]}")
        sketches = {key: tensors[f"{key}.sketch"] for key in rows if f"{key}.sketch" in tensors}
        return rows, sketches, header
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, kind, error) from None


def _broken(path: str | Path, kind: str, error: Exception) -> FileError:
    return FileError(f"{path} is not a whole {kind} file", got=repr(error), fix="Make it anew.")
