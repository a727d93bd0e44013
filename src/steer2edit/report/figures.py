"""The figures: the trade-off of steering and edits, and the edit magnitudes λ of every component. PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..behaviours.base import UTILITY_LOSS, Measure
from ..edits import Edit
from ..files.writing import replacing
from ..searching.candidates import TITLES, Trial, of_kind

_OTHERS = {
    "layer": {"style": "^", "color": "#dd8452"},
    "direction": {"style": "v", "color": "#8172b3"},
    "system": {"style": "D", "color": "#55a868"},
}
_STEERING, _EDIT, _BASE = "#c44e52", "#1f5fa8", "#555555"


def trade_off(
    trials: Sequence[Trial], choice: Mapping[str, Any], measures: Sequence[Measure], path: Path
) -> list[Path]:
    """The attribute against what it costs, on validation: steering as a curve in the order of γ, edits as points.

    Args:
        measures: the attribute first, then the behaviour's costs; drawn are the utility loss and the first cost of
            which less is better.

    Returns:
        The files written, path + .png and .svg.
    """
    attribute, *others = measures
    first_cost = next(measure for measure in others if measure.better == "lower" and measure.column)
    costs = [UTILITY_LOSS] if first_cost == UTILITY_LOSS else [UTILITY_LOSS, first_cost]
    figure, axes = _canvas(5 * len(costs), 4.2, columns=len(costs))
    for axis, cost in zip(axes, costs, strict=True):
        known = [t for t in trials if t.mean(cost.name) is not None and t.mean(attribute.name) is not None]

        def draw(some: Sequence[Trial], style: str, cost: Measure = cost, axis: Any = axis, **look: Any) -> None:
            axis.plot([t.mean(cost.name) for t in some], [t.mean(attribute.name) for t in some], style, **look)

        steered = sorted(of_kind(known, "steering"), key=lambda t: t.candidate.config["gamma"])
        draw(steered, "-o", color=_STEERING, ms=4, lw=1.2, label="steering, by γ")
        for kind, look in _OTHERS.items():
            if some := of_kind(known, kind):
                draw(some, look["style"], color=look["color"], ms=4, alpha=0.75, label=TITLES[kind])
        draw(of_kind(known, "edit"), "*", color=_EDIT, ms=9, label="edits")
        draw(of_kind(known, "base"), "s", color=_BASE, ms=6, label="original model")
        ids = [choice[kind]["id"] for kind in TITLES if choice.get(kind)]
        chosen = [t for t in known if t.candidate.id in ids]
        draw(chosen, "o", ms=15, mfc="none", mec="black", mew=0.9, label="chosen")
        limit = choice["limits"].get(cost.name)
        if limit is not None:
            axis.axvline(limit, color="#999999", lw=0.8, ls="--")
            axis.annotate("limit", (limit, 0.01), fontsize=7, color="#777777", xytext=(3, 0), **_POINTS)
        axis.set_xlabel(cost.title)
        if attribute.rate:
            axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(attribute.title)
    axes[0].legend(fontsize=7, loc="lower right")
    counts = ", ".join(f"{m.title} on {trials[0].count(m.name)}" for m in (attribute, *costs))
    figure.suptitle(f"Validation: {counts} prompts", fontsize=10)
    return _save(figure, path)


_POINTS: dict[str, Any] = {"textcoords": "offset points"}


def heat_map(edit: Edit, path: Path) -> list[Path]:
    """λ of every component with its true layer, head and neuron numbers: red reinforced, blue suppressed, white as was.

    Returns:
        The files written, path + .png and .svg.
    """
    from matplotlib.ticker import MaxNLocator

    blocks = [b for b in ("attn", "mlp") if any(s.site.block == b for s in edit.sites.values())]
    tall = max(3.5, 0.16 * (1 + max(s.site.layer for s in edit.sites.values())))
    figure, axes = _canvas(5.2 * len(blocks), tall, columns=len(blocks))
    for axis, block in zip(axes, blocks, strict=True):
        sites = [s for s in edit.sites.values() if s.site.block == block]
        layers = [s.site.layer for s in sites]
        rows = {layer: [s.lam.numpy() for s in sites if s.site.layer == layer] for layer in layers}
        lam = np.full((max(layers) + 1, max(sum(map(len, row)) for row in rows.values())), np.nan)
        for number, row in rows.items():  # the experts of a layer side by side
            lam[number, : sum(map(len, row))] = np.concatenate(row)
        top = float(np.nanmax(np.abs(lam)))
        unit = "head" if block == "attn" else "neuron"
        edited = int(np.nansum(lam != 0))
        title = f"{block}: {edited} of {int(np.sum(~np.isnan(lam)))} {unit}s"
        axis.set_title(title if edited else f"{title} (off)", fontsize=9)
        if block == "attn":
            picture = axis.imshow(
                lam, cmap="RdBu_r", vmin=-top or -1, vmax=top or 1, aspect="auto", interpolation="nearest"
            )
            axis.set_xticks(range(lam.shape[1])) if lam.shape[1] <= 40 else axis.xaxis.set_major_locator(
                MaxNLocator(integer=True)
            )
        else:
            # Thousands of neurons would be thinner than a pixel each: only those that are edited are drawn.
            layer, neuron = np.nonzero(np.nan_to_num(lam))
            picture = axis.scatter(
                neuron,
                layer,
                c=lam[layer, neuron],
                cmap="RdBu_r",
                vmin=-top or -1,
                vmax=top or 1,
                s=6,
                marker="|",
                rasterized=True,
            )
            axis.set_xlim(-0.5, lam.shape[1] - 0.5)
            axis.set_ylim(lam.shape[0] - 0.5, -0.5)
        axis.set_xlabel(unit)
        axis.set_ylabel("layer")
        axis.set_yticks(range(0, lam.shape[0], 1 if lam.shape[0] <= 40 else 5))
        axis.tick_params(labelsize=6)
        if edited:
            figure.colorbar(picture, ax=axis, label="λ (red reinforced, blue suppressed)").ax.tick_params(labelsize=6)
    return _save(figure, path)


def _canvas(width: float, height: float, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, np.atleast_1d(figure.subplots(1, columns))


def _save(figure: Any, path: Path) -> list[Path]:
    from matplotlib import rc_context

    files = []
    # A fixed salt and no date: the same numbers give the same bytes.
    with rc_context({"svg.hashsalt": "steer2edit"}):
        for suffix, metadata in ((".png", {}), (".svg", {"Date": None})):
            with replacing(path.with_suffix(suffix)) as temporary:
                figure.savefig(temporary, format=suffix[1:], dpi=150, metadata=metadata)
            files.append(path.with_suffix(suffix))
    return files
