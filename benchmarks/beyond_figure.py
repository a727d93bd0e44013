"""The figure of benchmarks/beyond.py: every method's strengths on test, as means over the draws of the prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steer2edit.behaviours.base import UTILITY_LOSS
from steer2edit.report.drawing import LOOKS, SERIES, Look, canvas, legend_below, save

_EDITS = {
    "preserve": LOOKS["edit"],
    "full": Look("X", SERIES[5], "--", 6.5),
    "full-middle": Look("P", SERIES[3], "-.", 6.5),
}


def draw_curves(results: Mapping[str, Any], titles: Mapping[str, str], costs: Sequence[str], path: Path) -> list[Path]:
    """The attribute against KL, then each of some costs against the attribute.

    Args:
        results: as `results_of` gives them. titles: method → what people read. costs: names of measures, of which those
            that were measured are drawn.

    Returns:
        The files written, path + .png, .svg and .pdf.
    """
    attribute, names = results["attribute"], results["titles"]
    pairs = [(UTILITY_LOSS.name, attribute), *((attribute, cost) for cost in costs if cost in names)]
    figure, axes = canvas(4.3 * len(pairs), 4.0, columns=len(pairs))
    entries: dict[str, Any] = {}
    for axis, (x, y) in zip(axes, pairs, strict=True):
        for method, curve in results["curve"].items():
            # A mean over the draws is missing where no draw has that strength.
            places = [(a, b) for a, b in zip(curve[x], curve[y], strict=True) if a is not None and b is not None]
            if not places:
                continue
            look = _EDITS.get(method) or LOOKS[method]
            style = {"color": look.colour, "marker": look.marker, "ms": look.size, "mec": "white", "mew": 0.5}
            (line,) = axis.plot(*zip(*places, strict=True), lw=1.1, ls=look.dash, **style)
            entries[titles[method]] = line
        axis.set_xlabel(names[x])
        axis.set_ylabel(names[y])
    legend_below(figure, entries)
    draws = len(results["seeds"])
    figure.suptitle(f"Test, from no strength to the strongest: means over {draws} draws of the prompts", fontsize=10)
    return save(figure, path)
