"""The sections of the page, in order. A section is drawn if the run directory has what it shows.

A new one is a line in `SECTIONS` and a template: it gets its data as `data`, and the page's script finds them under its
id in the page's JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...behaviours.base import COMMON, UTILITY_LOSS
from ...searching.candidates import TITLES
from ..page import (
    FIRING,
    already_there,
    describe,
    describe_limits,
    nothing_moved,
    picked_by_a_person,
    table_columns,
)
from .components import block_maps, largest, spreads
from .contents import Contents
from .provenance import provenance
from .texts import ANSWERS_BUDGET, TEST_BUDGET, pack_rows
from .trials import chart_of, wanted_first
from .verdict import verdict


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        id: its anchor, its template `ID.html.j2`, and the key of its script data.
        link: its name in the navigation. title: its heading.
        needs: the stage without which it is missing, for the remark on the page; None if a run may lack it.
        data: what its template shows; None if the run directory has nothing for it.
        script: what its script reads, as JSON; None if it has no script.
    """

    id: str
    link: str
    title: str
    needs: str | None
    data: Callable[[Contents], dict[str, Any] | None]
    script: Callable[[Contents], dict[str, Any] | None] = lambda contents: None


def _headline(contents: Contents) -> dict[str, Any] | None:
    results = contents.results
    if results is None:
        return None
    first = next(iter(results["systems"].values()))
    titles = {name: title for name, title in table_columns(results).items() if first[name]["n"]}
    # What it is about and what it costs come first, where a narrow window shows them.
    names = [name for name in (results["attribute"], UTILITY_LOSS.name) if name in titles]
    columns = [(name, titles[name]) for name in dict.fromkeys([*names, *titles])]
    rows = []
    for kind, system in results["systems"].items():
        cells = [{"name": name, "title": title, **system[name]} for name, title in columns]
        rows.append({"kind": kind, "title": TITLES[kind], "config": describe(system["config"]), "cells": cells})
    ends = {name: _ends([system[name] for system in results["systems"].values()]) for name, _ in columns}
    for row in rows:
        for cell in row["cells"]:
            cell["places"] = _places(cell, *ends[cell["name"]])
    better = {m["name"]: m["better"] for m in results.get("measures", [])}
    choice = contents.choice
    remarks = [already_there(results), nothing_moved(choice).strip("* ") if choice else ""]
    return {
        "verdict": verdict(results),
        "columns": [{"name": name, "title": title, "better": better.get(name)} for name, title in columns],
        "rows": rows,
        "sizes": [first[name]["n"] for name, _ in columns],
        "remarks": [remark for remark in remarks if remark],
        "tiles": _tiles(contents, results),
    }


def _tiles(contents: Contents, results: dict[str, Any] | Any) -> list[dict[str, str]]:
    """The few numbers that a reader looks for first."""
    systems, attribute = results["systems"], results["attribute"]
    titles = table_columns(results)
    tiles = []
    if "edit" in systems:
        before, after = systems["base"][attribute]["mean"], systems["edit"][attribute]["mean"]
        if before is not None and after is not None:
            tiles.append({"value": f"{before:.2f} → {after:.2f}", "label": titles[attribute]})
        loss = systems["edit"].get(UTILITY_LOSS.name, {}).get("mean")
        if loss is not None:
            tiles.append({"value": f"{loss:.2f}", "label": f"{UTILITY_LOSS.title}, its cost"})
    if contents.edit is not None:
        for block, unit in (("attn", "heads"), ("mlp", "neurons")):
            summary = contents.edit.summary()[block]
            if summary["edited"]:
                tiles.append(
                    {"value": f"{summary['edited']:,}", "label": f"of {summary['components']:,} {unit} edited"}
                )
    if contents.study is not None:
        tiles.append({"value": str(len(contents.study.trials)), "label": "configurations tried"})
    return tiles


def _ends(cells: list[Any]) -> tuple[float, float]:
    known = [cell[end] for cell in cells for end in ("low", "high") if cell["mean"] is not None]
    return min([0.0, *known]), max([0.0, *known])


def _places(cell: dict[str, Any], low: float, high: float) -> dict[str, float] | None:
    """Where mean and interval stand between the ends of the column, in per cent."""
    if cell["mean"] is None or high == low:
        return None
    return {name: 100 * (cell[name] - low) / (high - low) for name in ("low", "mean", "high")}


def _trade_off(contents: Contents) -> dict[str, Any] | None:
    if contents.study is None or not contents.study.trials:
        return None
    choice = contents.choice
    shown: dict[str, Any] = {"discarded": len(contents.study.discarded), "methods": []}
    if choice is not None:
        limits = describe_limits(contents.recipe.aim)
        shown |= {
            "picked": picked_by_a_person(choice),
            "rule": choice["rule"],
            "limits": limits,
            "reference": choice["reference"],
        }
        for kind in TITLES:
            if kind in choice["tried"]:
                row = {"title": TITLES[kind], "tried": choice["tried"][kind], "asked": choice["evaluations"][kind]}
                chosen = describe(choice[kind]["config"]) if choice.get(kind) else "none within the limits"
                shown["methods"].append(row | {"volume": choice["hypervolume"][kind], "chosen": chosen})
    return shown


def _trade_off_script(contents: Contents) -> dict[str, Any] | None:
    if contents.study is None or not contents.study.trials:
        return None
    return chart_of(contents.study, contents.recipe, contents.choice)


def _map(contents: Contents) -> dict[str, Any] | None:
    edit = contents.edit
    if edit is None:
        return None
    return {"summary": edit.summary(), "config": describe(edit.config), "largest": largest(edit), "id": edit.id}


def _map_script(contents: Contents) -> dict[str, Any] | None:
    return None if contents.edit is None else {"maps": block_maps(contents.edit)}


def _scores(contents: Contents) -> dict[str, Any] | None:
    return None if contents.edit is None and contents.scores is None else {}


def _scores_script(contents: Contents) -> dict[str, Any] | None:
    source = contents.edit or contents.scores
    if source is None:
        return None
    config = {} if contents.edit is None else {**contents.edit.config, **_layers(contents)}
    variant = config.get("variant")
    alpha = 0.0 if variant == "l2" else config.get("alpha", 0.4)
    return {"alpha": alpha, "variant": variant, "blocks": spreads(source.sites, config)}


def _firing(contents: Contents) -> dict[str, Any] | None:
    rows = (contents.choice or {}).get("firing")
    return {"rows": rows, "about": FIRING} if rows else None


def _layers(contents: Contents) -> dict[str, Any]:
    """The layers to which the chosen configuration is restricted, if it is."""
    brief = (contents.choice or {}).get("edit") or {}
    layers = brief.get("config", {}).get("layers")
    return {} if layers is None else {"layers": layers}


def _answers(contents: Contents) -> dict[str, Any] | None:
    return {} if contents.answers or contents.tried_answers else None


def _answers_script(contents: Contents) -> dict[str, Any] | None:
    measures = [m for m in contents.recipe.behaviour.measures if m.column]
    names = [m.name for m in measures]
    shown: dict[str, Any] = {"measures": [m.to_json() | {"rate": m.rate, "common": m in COMMON} for m in measures]}
    left = ANSWERS_BUDGET
    if contents.answers:
        systems = [kind for kind in TITLES if kind in contents.answers[0]]
        rows = [
            {"prompt": row["prompt"], "kind": row["kind"], "answers": row, "labels": row.get("labels", {})}
            for row in contents.answers
        ]
        packed = pack_rows(rows, systems, names, TEST_BUDGET)
        if packed is not None:
            left -= len(packed.data)
            shown["test"] = packed.to_json() | {"ids": [kind for kind in systems if kind not in packed.left_out]}
    if contents.tried_answers and contents.study is not None:
        ids = wanted_first(contents.study, contents.recipe, contents.choice)
        packed = pack_rows(contents.tried_answers, ids, names, left)
        if packed is not None:
            shown["validation"] = packed.to_json() | {"ids": [id for id in ids if id not in set(packed.left_out)]}
    shown["titles"] = TITLES
    return shown


SECTIONS = (
    Section("headline", "Result", "What it bought and what it cost", "evaluate", _headline),
    Section("trade_off", "Trade-off", "Trade-off", "search", _trade_off, _trade_off_script),
    Section("map", "Edit", "Where the edit is", "edit", _map, _map_script),
    Section("scores", "Threshold", "Scores and threshold", "score", _scores, _scores_script),
    Section("firing", "Firing", "Where it fires", None, _firing),
    Section("answers", "Answers", "Answers", "evaluate", _answers, _answers_script),
    Section("provenance", "Reproduce", "How to make it again", None, provenance),
)
