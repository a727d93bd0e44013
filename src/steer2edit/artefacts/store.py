"""Scores and edits on disk: `safetensors` files, fp32, with the sites and the configuration in the header."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import EditError, FileError
from ..files.tensors import read_tensors, write_tensors
from ..method.change import Part, SiteEdit
from ..method.fingerprint import SKETCHES
from ..method.preserve import Evidence, Shared
from ..method.scores import SiteScores
from ..method.site import Site

T = TypeVar("T")
P = TypeVar("P", bound=Part)
FORMAT = 1

SCORES = ("u", "k", "g", "reach")

EDIT = (*SCORES, "lam")


class ScoreTable(Protocol):
    """The scores of every site as data, such as `steer2edit.Scores`."""

    @property
    def sites(self) -> Mapping[str, SiteScores]: ...
    @property
    def fingerprint(self) -> Mapping[str, Tensor]: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...
    @property
    def evidence(self) -> Evidence | None: ...


def save_scores(scores: ScoreTable, path: str | Path) -> None:
    header: dict[str, Any] = {
        "v_norm": {key: s.v_norm for key, s in scores.sites.items()},
        "provenance": dict(scores.provenance),
    }
    tensors, sites = _packed(scores.sites, SCORES, scores.fingerprint)
    for key, s in scores.sites.items():
        if s.shared is not None:
            tensors |= {f"{key}.shared": s.shared.part.float(), f"{key}.shared_along": s.shared.along.float()}
    if scores.evidence is not None:
        tensors |= scores.evidence.tensors()
        header["evidence"] = scores.evidence.rows_to_json()
    write_tensors(path, tensors, {"kind": "scores", "format": FORMAT, "sites": sites} | header)


def load_scores(path: str | Path, build: Callable[..., T]) -> T:
    """Reads what `save_scores` wrote, as `build(sites, fingerprint, provenance, evidence)`."""
    tensors, header = read_tensors(path, "scores")
    with _whole(path, "scores"):
        sites, fingerprint = _unpacked(tensors, header["sites"], SCORES)
        norms = {key: float(header["v_norm"][key]) for key in sites}
        if not all(0 <= norm < math.inf for norm in norms.values()):
            raise ValueError("a norm that is not finite")
        rows = {
            key: SiteScores(**row, v_norm=norms[key], shared=_shared(tensors, row["site"]))
            for key, row in sites.items()
        }
        evidence = Evidence.read(tensors, header.get("evidence"), [row.site for row in rows.values()])
        return build(rows, fingerprint, dict(header["provenance"]), evidence)


def _shared(tensors: Mapping[str, Tensor], site: Site) -> Shared | None:
    """Raises ValueError if it has another shape, KeyError if a half of it is missing."""
    if not {f"{site.key}.shared", f"{site.key}.shared_along"} & tensors.keys():
        return None
    part, along = tensors[f"{site.key}.shared"], tensors[f"{site.key}.shared_along"]
    if part.shape != (site.d,) or along.shape != (site.n, site.width):
        raise ValueError("a shared part of another shape")
    return Shared(part, along)


def save_edit(edit: Part, path: str | Path) -> None:
    tensors, header = _packed_edit(edit)
    write_tensors(path, tensors, {"kind": "edit", "format": FORMAT} | header)


def load_edit(path: str | Path, build: Callable[..., T]) -> T:
    """Reads what `save_edit` wrote, as `build(sites, config, fingerprint, provenance, strength)`."""
    tensors, header = read_tensors(path, "edit")
    with _whole(path, "edit"):
        return build(*_unpacked_edit(tensors, header))


def save_combination(edits: Sequence[Part], path: str | Path) -> None:
    packed = [_packed_edit(edit) for edit in edits]
    tensors = {f"{i}/{name}": tensor.clone() for i, (own, _) in enumerate(packed) for name, tensor in own.items()}
    write_tensors(path, tensors, {"kind": "combination", "format": FORMAT, "edits": [header for _, header in packed]})


def load_edits(path: str | Path, combine: Callable[[Sequence[P]], T], build: Callable[..., P]) -> T:
    """Reads what `save_combination` wrote, as `combine([build(…), …])`."""
    tensors, header = read_tensors(path, "combination")
    with _whole(path, "combination"):
        edits = []
        for i, own in enumerate(header["edits"]):
            mine = {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{i}/")}
            edits.append(build(*_unpacked_edit(mine, own)))
        return combine(edits)


def _packed_edit(edit: Part) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, sites = _packed(edit.sites, EDIT, edit.fingerprint)
    header = {"config": dict(edit.config), "provenance": dict(edit.provenance), "strength": edit.strength}
    return tensors, {"sites": sites} | header


def _unpacked_edit(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> tuple[Any, ...]:
    sites, fingerprint = _unpacked(tensors, header["sites"], EDIT)
    rows = {key: SiteEdit(**row) for key, row in sites.items()}
    provenance = dict(header["provenance"])
    layers, probe = provenance.get("layers", 0), provenance.get("probe", {})
    if type(layers) is not int or not 0 <= layers < 2**20 or not isinstance(probe, dict):
        raise ValueError("a provenance of another kind")
    strength = float(header["strength"])
    if not math.isfinite(strength):
        raise ValueError("a strength that is not finite")
    return rows, dict(header["config"]), fingerprint, provenance, strength


def _packed(
    sites: Mapping[str, Any], fields: tuple[str, ...], fingerprint: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    tensors = {f"{key}.{name}": getattr(row, name).float() for key, row in sites.items() for name in fields[1:]}
    # v belongs to the block, and so does u: it is stored once for all experts of a block that have the same one.
    for key, row in sites.items():
        u = row.u.float()
        if not torch.equal(tensors.setdefault(f"{row.site.block_key}.u", u), u):
            tensors[f"{key}.u"] = u
    tensors |= {f"{key}.sketch": value for key, value in fingerprint.items()}
    return tensors, [row.site.to_json() for row in sites.values()]


def _unpacked(
    tensors: Mapping[str, Tensor], sites: list[dict[str, Any]], fields: tuple[str, ...]
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    rows: dict[str, dict[str, Any]] = {}
    for site in map(Site.from_json, sites):
        shapes = {"u": (site.d,), "k": (site.n, site.width), "g": (site.n,), "reach": (site.n,), "lam": (site.n,)}
        row = {name: tensors[f"{site.key}.{name}"] for name in fields[1:]}
        row["u"] = tensors.get(f"{site.key}.u", tensors[f"{site.block_key}.u"])
        for name in fields:
            if row[name].shape != shapes[name]:
                raise ValueError(f"tensor {site.key}.{name} should have shape {shapes[name]}")
        rows[site.key] = {"site": site} | row
    sketches = {key: tensors[f"{key}.sketch"] for key in rows if f"{key}.sketch" in tensors}
    if any(sketch.shape != (SKETCHES + 1,) for sketch in sketches.values()):
        raise ValueError("a sketch of another size")
    return rows, sketches


@contextlib.contextmanager
def _whole(path: str | Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (AttributeError, EditError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise FileError(f"{path} is not a whole {kind} file", got=repr(error), fix="Create it again.") from None
