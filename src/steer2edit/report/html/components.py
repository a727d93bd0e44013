"""The components on the page: λ of heads and neurons as maps, and the distribution of g.

All numbers are the edit file's own, in fp32, so that a soft threshold in the page counts what `magnitudes` counts.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...edits import Edit
from ...method.change import SiteEdit
from ...method.scores import SiteScores
from ...method.site import BLOCKS, Site, layers_of

UNITS = {"attn": "head", "mlp": "neuron"}
# How many neurons of each layer are shown, the largest |λ| first.
TOP = 24
# How many components are listed as a table.
LISTED = 20
# How many g the page holds exactly, the largest |g| first; the others are in its histogram.
EXACT = 300_000
_BINS = 96


def block_maps(edit: Edit) -> list[dict[str, Any]]:
    """A map for each block type that the edit changes."""
    maps = {"attn": _heads, "mlp": _neurons}
    return [maps[block](edit, sites) for block in BLOCKS if (sites := _sites_of(edit, block)) and _any_edited(sites)]


def _sites_of(edit: Edit, block: str) -> list[SiteEdit]:
    return [s for s in edit.sites.values() if s.site.block == block]


def _any_edited(sites: Sequence[SiteEdit]) -> bool:
    return any(bool((s.lam != 0).any()) for s in sites)


def _summary(edit: Edit, block: str) -> dict[str, Any]:
    return {"block": block, "unit": UNITS[block], "sites": len(_sites_of(edit, block)), **edit.summary()[block]}


def _heads(edit: Edit, sites: Sequence[SiteEdit]) -> dict[str, Any]:
    """λ, g and ‖ΔW‖/‖W‖ of every head, a row for each layer."""
    rows = [
        {
            "layer": s.site.layer,
            "lam": _numbers(s.lam.numpy() * edit.strength),
            "g": _numbers(s.g.numpy()),
            "ratio": _numbers(ratios(edit, s)),
        }
        for s in sites
    ]
    return _summary(edit, "attn") | {"rows": rows}


def _neurons(edit: Edit, sites: Sequence[SiteEdit]) -> dict[str, Any]:
    """The largest neurons of each layer, how many of each sign a layer has, and the distribution of all λ."""
    by_layer: dict[int, list[SiteEdit]] = {}
    for s in sites:
        by_layer.setdefault(s.site.layer, []).append(s)
    rows = []
    for layer, some in by_layer.items():
        lam = np.concatenate([s.lam.numpy() for s in some]) * edit.strength
        g = np.concatenate([s.g.numpy() for s in some])
        ratio = np.concatenate([ratios(edit, s) for s in some])
        names = [(s, i) for s in some for i in range(s.site.n)]
        first = [i for i in np.argsort(-np.abs(lam), kind="stable")[:TOP] if lam[i] != 0]
        rows.append(
            {
                "layer": layer,
                "names": [component_name(names[i][0].site, names[i][1]) for i in first],
                "lam": _numbers(lam[first]),
                "g": _numbers(g[first]),
                "ratio": _numbers(ratio[first]),
                "reinforced": int((lam > 0).sum()),
                "suppressed": int((lam < 0).sum()),
            }
        )
    every = np.concatenate([s.lam.numpy() for s in sites]) * edit.strength
    return _summary(edit, "mlp") | {"rows": rows, "spread": _histogram(every[every != 0])}


def ratios(edit: Edit, s: SiteEdit) -> np.ndarray:
    """‖ΔW_i‖/‖W‖ of each component [n]: u and k_i have length 1, so that ‖ΔW_i‖ is |λ_i| times the strength.

    W is the whole projection, whose norm is the last number of its sketch; NaN where the edit has no sketch of it.
    """
    sketch = edit.fingerprint.get(s.site.key)
    whole = float(sketch[-1]) if sketch is not None else float("nan")
    return np.abs(s.lam.numpy().astype(np.float64) * edit.strength) / whole


def component_name(site: Site, number: int) -> str:
    """`head 3`, `neuron 17`, `expert 5, neuron 17`."""
    own = f"{UNITS[site.block]} {number}"
    if site.shared:
        return f"shared expert, {own}"
    return own if site.expert is None else f"expert {site.expert}, {own}"


def largest(edit: Edit) -> list[dict[str, Any]]:
    """The components with the largest |λ|, for a table."""
    rows: list[dict[str, Any]] = []
    for s in edit.edited().values():
        ratio = ratios(edit, s)
        for i in s.lam.abs().topk(min(LISTED, s.site.n)).indices.tolist():
            lam = float(s.lam[i]) * edit.strength
            if lam != 0:
                row = {"layer": s.site.layer, "block": s.site.block, "name": component_name(s.site, i), "lam": lam}
                rows.append(row | {"g": float(s.g[i]), "ratio": float(ratio[i])})
    rows.sort(key=lambda row: -abs(row["lam"]))
    return rows[:LISTED]


# The distribution of g ------------------------------------------------------------------------------------------------


def spreads(sites: Mapping[str, SiteEdit | SiteScores], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The g of each block type, and the (ρ, α) to begin with.

    Args:
        config: the edit's, or {} if none was chosen. Where it names layers, only their components can be edited.

    Returns:
        values: base64 of fp32, little-endian, of the EXACT largest |g|. floor: the largest |g| that is not among them;
        counts by thresholds from there on are exact. edges, counts: the histogram of all. rho: None where the block
        type is off.
    """
    layers = layers_of(config["layers"]) if config.get("layers") else None
    shown = []
    for block in BLOCKS:
        some = [s for s in sites.values() if s.site.block == block and (layers is None or s.site.layer in layers)]
        if not some:
            continue
        g = np.concatenate([s.g.numpy() for s in some]).astype(np.float32)
        order = np.argsort(-np.abs(g), kind="stable")
        rest = order[EXACT:]
        shown.append(
            {
                "block": block,
                "unit": UNITS[block],
                "total": len(g),
                "values": base64.b64encode(g[order[:EXACT]].astype("<f4").tobytes()).decode(),
                "floor": float(np.abs(g[rest[0]])) if len(rest) else 0.0,
                "largest": float(np.abs(g).max()),
                "rho": config.get(f"rho_{block}"),
            }
            | _histogram(g)
        )
    return shown


def _histogram(values: np.ndarray) -> dict[str, Any]:
    """Counts between edges that lie evenly around 0."""
    top = float(np.abs(values).max()) if len(values) else 0.0
    counts, edges = np.histogram(values, bins=_BINS, range=(-top or -1.0, top or 1.0))
    return {"edges": _numbers(edges), "counts": counts.tolist()}


def _numbers(values: np.ndarray) -> list[float | None]:
    """Six significant digits, as JSON has them; None where a number is not finite."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]
