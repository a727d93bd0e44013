"""The figures of a run: the trade-off, each measure on test, and the edit magnitudes λ. PNG, SVG and PDF."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..behaviours.base import UTILITY_LOSS, Measure
from ..edits import Edit
from ..searching.candidates import TITLES, Trial, of_kind
from ..searching.statistics import interval
from .drawing import INK, LOOKS, MUTED, Label, canvas, darker, diverging, label_points, legend_below, limit_line, save
from .page import table_columns


def trade_off(
    trials: Sequence[Trial],
    choice: Mapping[str, Any],
    measures: Sequence[Measure],
    path: Path,
    *,
    resamples: int = 2000,
    seed: int = 0,
    samples: int = 1,
) -> list[Path]:
    """The attribute against what it costs, on validation: every trial, each method's front, and what was chosen with
    its 95 % intervals.

    Args:
        measures: the attribute first, then the behaviour's costs; drawn are the utility loss and the first cost of
            which less is better.
        resamples, seed, samples: of the intervals.

    Returns:
        The files written, path + .png, .svg and .pdf.
    """
    attribute, *others = measures
    first_cost = next(measure for measure in others if measure.better == "lower" and measure.column)
    costs = [UTILITY_LOSS] if first_cost == UTILITY_LOSS else [UTILITY_LOSS, first_cost]
    figure, axes = canvas(5 * len(costs), 4.6, columns=len(costs))
    ids = [choice[kind]["id"] for kind in TITLES if choice.get(kind)]
    entries: dict[str, Any] = {}
    labels = []
    for axis, cost in zip(axes, costs, strict=True):
        known = [t for t in trials if t.mean(cost.name) is not None and t.mean(attribute.name) is not None]
        place = {t.candidate.id: (t.mean(cost.name) or 0.0, t.mean(attribute.name) or 0.0) for t in known}
        for kind, look in LOOKS.items():
            some = of_kind(known, kind)
            if not some:
                continue
            front = sorted(place[id] for id in choice["front"].get(kind, []) if id in place)
            if cost == UTILITY_LOSS and len(front) > 1:
                axis.step(*zip(*front, strict=True), where="post", color=look.colour, ls=look.dash, lw=1.2, zorder=2)
            style = {"color": look.colour, "marker": look.marker, "ms": look.size, "mec": "white", "mew": 0.5}
            entries[TITLES[kind]] = axis.plot(
                *zip(*(place[t.candidate.id] for t in some), strict=True), ls="none", zorder=3, **style
            )[0]
        chosen = [t for t in known if t.candidate.id in ids]
        for trial in chosen:
            errors = [_reach(trial, measure, resamples, seed, samples) for measure in (cost, attribute)]
            x, y = place[trial.candidate.id]
            colour = LOOKS[trial.candidate.kind].colour
            axis.errorbar(x, y, xerr=errors[0], yerr=errors[1], color=colour, lw=0.9, capsize=2, zorder=2)
            entries["chosen, with 95 % intervals"] = axis.plot(
                x, y, "o", ms=13, mfc="none", mec=INK, mew=0.9, ls="none", zorder=4
            )[0]
        limit = choice["limits"].get(cost.name)
        if limit is not None:
            limit_line(axis, limit, [x for x, _ in place.values()])
        axis.set_xlabel(cost.title)
        if attribute.rate:
            axis.set_ylim(-0.03, 1.03)
        notes = [Label(*place[t.candidate.id], _brief(t), darker(LOOKS[t.candidate.kind].colour)) for t in chosen]
        labels.append((axis, notes, list(place.values())))
    axes[0].set_ylabel(attribute.title)
    legend_below(figure, entries)
    counts = ", ".join(f"{m.title} on {trials[0].count(m.name)}" for m in (attribute, *costs))
    figure.suptitle(f"Validation: {counts} prompts", fontsize=10)
    for axis, wanted, points in labels:
        label_points(axis, wanted, points)
    return save(figure, path)


def _brief(trial: Trial) -> str:
    """What a chosen point is called in the figure: its layer and γ, or else its method."""
    settings = [f"layer {c}" for c in [trial.candidate.config.get("layer")] if c is not None]
    settings += [f"γ {c:.3g}" for c in [trial.candidate.config.get("gamma")] if c is not None]
    return ", ".join(settings) or TITLES[trial.candidate.kind]


def _reach(trial: Trial, measure: Measure, resamples: int, seed: int, samples: int) -> Any:
    """How far the interval reaches below and above the mean [2, 1]; None without one."""
    ends = interval(trial.values.get(measure.name, ()), measure.rate, resamples, seed, samples)
    if ends["mean"] is None:
        return None
    return [[max(0.0, ends["mean"] - ends["low"])], [max(0.0, ends["high"] - ends["mean"])]]


def each_measure(results: Mapping[str, Any], path: Path) -> list[Path]:
    """Every measure on test, a panel each: the systems below each other, with their 95 % intervals.

    So the sets of prompts that a behaviour tells apart (kinds, styles) stand beside each other.

    Returns:
        The files written, path + .png, .svg and .pdf.
    """
    systems = results["systems"]
    first = next(iter(systems.values()))
    shown = {name: title for name, title in table_columns(results).items() if first[name]["n"]}
    kinds = list(systems)
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, axes = canvas(
        1.2 + 2.9 * columns, 0.4 + rows * (0.75 + 0.24 * len(kinds)), columns=columns, rows=rows, sharey=True
    )
    for axis, (name, title) in zip(axes, shown.items(), strict=False):
        for row, kind in enumerate(kinds):
            cell, look = systems[kind][name], LOOKS[kind]
            if cell["mean"] is None:
                axis.annotate("not finite", (0, row), fontsize=7, color=MUTED, va="center")
                continue
            reach = [[max(0.0, cell["mean"] - cell["low"])], [max(0.0, cell["high"] - cell["mean"])]]
            axis.errorbar(
                cell["mean"], row, xerr=reach, fmt=look.marker, color=look.colour, ms=look.size, capsize=2, lw=1.2
            )
        axis.set_title(f"{title}, n = {first[name]['n']}", fontsize=9, loc="left")
        axis.set_yticks(range(len(kinds)), [TITLES[kind] for kind in kinds])
        axis.set_ylim(len(kinds) - 0.5, -0.5)
        axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
        axis.grid(axis="y", visible=False)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    return save(figure, path)


def heat_map(edit: Edit, path: Path) -> list[Path]:
    """λ of every component with its true layer, head and neuron numbers: red reinforced, blue suppressed, white as was.

    What is suppressed carries a minus, so that the signs can be told apart in grey. A block type that the edit leaves
    alone has no panel.

    Returns:
        The files written, path + .png, .svg and .pdf.
    """
    summary = edit.summary()
    blocks = [block for block in ("attn", "mlp") if summary[block]["edited"]]
    tall = max(3.5, 0.16 * (1 + max(s.site.layer for s in edit.sites.values())))
    figure, axes = canvas(5.2 * max(1, len(blocks)), tall, columns=max(1, len(blocks)))
    if not blocks:
        axes[0].set_axis_off()
        axes[0].text(0.5, 0.5, "The edit touches no component.", ha="center", transform=axes[0].transAxes)
    for axis, block in zip(axes, blocks, strict=False):
        lam = _by_layer(edit, block)
        top = float(np.nanmax(np.abs(lam)))
        draw = _draw_heads if block == "attn" else _draw_neurons
        picture = draw(axis, lam, top)
        unit = "head" if block == "attn" else "neuron"
        axis.set_title(f"{block}: {summary[block]['edited']} of {summary[block]['components']} {unit}s")
        axis.set_xlabel(unit)
        axis.set_ylabel("layer")
        axis.set_yticks(range(0, lam.shape[0], 1 if lam.shape[0] <= 20 else 5))
        axis.tick_params(labelsize=7)
        bar = figure.colorbar(picture, ax=axis, label="λ (red reinforced, blue with a minus suppressed)")
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
    return save(figure, path)


def _by_layer(edit: Edit, block: str) -> np.ndarray:
    """λ [layers, components]; the experts of a layer side by side, NaN where a layer has no such component."""
    sites = [s for s in edit.sites.values() if s.site.block == block]
    layers = [s.site.layer for s in sites]
    rows = {layer: [s.lam.numpy() for s in sites if s.site.layer == layer] for layer in layers}
    lam = np.full((max(layers) + 1, max(sum(map(len, row)) for row in rows.values())), np.nan)
    for number, row in rows.items():
        lam[number, : sum(map(len, row))] = np.concatenate(row)
    return lam


def _draw_heads(axis: Any, lam: np.ndarray, top: float) -> Any:
    from matplotlib.ticker import MaxNLocator

    edited = np.where(lam == 0, np.nan, lam)
    picture = axis.imshow(edited, cmap=diverging(), vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
    axis.grid(visible=False)
    few = lam.shape[1] <= 20
    if few:
        axis.set_xticks(range(lam.shape[1]))
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    layer, head = np.nonzero(np.nan_to_num(lam) < 0)
    colours = np.where(np.abs(lam[layer, head]) > 0.55 * top, "white", INK)
    axis.scatter(head, layer, marker="_", s=18 if few else 5, c=colours, linewidths=0.9)
    return picture


def _draw_neurons(axis: Any, lam: np.ndarray, top: float) -> Any:
    """Thousands of neurons would be thinner than a pixel each: only those that are edited are drawn."""
    from matplotlib.colors import Normalize

    picture = None
    for up, marker in ((True, "|"), (False, "_")):
        layer, neuron = np.nonzero(np.nan_to_num(lam) > 0 if up else np.nan_to_num(lam) < 0)
        picture = axis.scatter(
            neuron,
            layer,
            c=lam[layer, neuron],
            cmap=diverging(),
            norm=Normalize(-top, top),
            s=20,
            marker=marker,
            rasterized=len(layer) > 2000,
        )
    axis.set_xlim(-0.5, lam.shape[1] - 0.5)
    axis.set_ylim(lam.shape[0] - 0.5, -0.5)
    return picture
