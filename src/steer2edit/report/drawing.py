"""One style for all figures: colours and shapes that stay apart in grey and for colour-blind readers, and labels that
never lie over each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..files.writing import replacing

# Written for every figure, in this order.
SUFFIXES = (".png", ".svg", ".pdf")
# No dates: the same numbers give the same bytes.
_METADATA: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}

INK, MUTED, GRID = "#1b2430", "#66707c", "#dfe3e8"


@dataclass(frozen=True)
class Look:
    """How one method is drawn everywhere. The colours are Okabe and Ito's, and a grey."""

    marker: str
    colour: str
    dash: str = "-"
    size: float = 5.5


LOOKS = {
    "base": Look("s", "#000000"),
    "system": Look("D", "#009e73", ":"),
    "steering": Look("o", "#d55e00", "-"),
    "layer": Look("^", "#e69f00", "--"),
    "direction": Look("v", "#cc79a7", "-."),
    "rosi": Look("p", "#5b3fa0", "--", 6.0),
    "llm_va": Look("h", "#8a1c4a", ":", 6.0),
    "null_space": Look("d", "#6b6b00", "-.", 6.5),
    "lora": Look("P", "#56b4e9", "--", 6.5),
    "fine_tuning": Look("X", "#7a7a7a", ":", 6.5),
    "edit": Look("*", "#0072b2", "-", 10.0),
}
# Runs beside each other: as far apart in lightness as in hue.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

_RC: Any = {
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.hashsalt": "steer2edit",
    "pdf.fonttype": 42,
}


def canvas(width: float, height: float, columns: int = 1, rows: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    """A figure in the style, and its axes in one list."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = np.atleast_1d(figure.subplots(rows, columns, **options)).flatten().tolist()
    return figure, axes


def save(figure: Any, path: Path) -> list[Path]:
    """Writes path + .png, .svg and .pdf."""
    from matplotlib import rc_context

    files = []
    with rc_context(_RC):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once for all formats: it takes as long as to draw
        for suffix in SUFFIXES:
            drawn = BytesIO()  # into memory: on a full disk matplotlib's PDF ends in an error of zlib's
            figure.savefig(drawn, format=suffix[1:], dpi=150, metadata=_METADATA[suffix])
            with replacing(path.with_suffix(suffix)) as temporary:
                temporary.write_bytes(drawn.getvalue())
            files.append(path.with_suffix(suffix))
    return files


def legend_below(figure: Any, entries: Mapping[str, Any]) -> None:
    """One legend under all axes, where it covers nothing.

    Args:
        entries: label → what is drawn.
    """
    columns = min(len(entries), max(2, int(figure.get_figwidth() / 1.35)))
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )


def darker(colour: str) -> tuple[float, float, float]:
    """A colour that is readable as text on white."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return 0.62 * red, 0.62 * green, 0.62 * blue


def diverging() -> Any:
    """Blue to red for λ around 0, without the palest colours, so that the smallest λ is told from white."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    halves = np.concatenate([np.linspace(0.02, 0.4, 128), np.linspace(0.6, 0.98, 128)])
    return ListedColormap(colormaps["RdBu_r"](halves))


def limit_line(axis: Any, limit: float, values: Sequence[float]) -> None:
    """A limit's line with its name beside it, inside the axes; none if it is far from everything drawn."""
    most = max([*values, 0.0])
    if limit > 2 * most:
        return
    axis.set_xlim(right=max(axis.get_xlim()[1], 1.08 * limit))
    axis.axvline(limit, color=MUTED, lw=0.9, ls=(0, (4, 3)), zorder=1)
    left = limit > 0.2 * axis.get_xlim()[1]
    axis.annotate(
        f"limit {limit:g}",
        (limit, 0.99),
        xycoords=axis.get_xaxis_transform(),
        xytext=(-2 if left else 2, 0),
        textcoords="offset points",
        rotation=90,
        ha="right" if left else "left",
        va="top",
        fontsize=7.5,
        color=MUTED,
    )


# Where a label may stand around its point, in points: the nearest place first.
_PLACES = [
    (reach * x, reach * y)
    for reach in (9, 18, 30, 44)
    for x, y in ((1, 0.6), (1, -0.6), (-1, 0.6), (-1, -0.6), (0, 1), (0, -1), (1, 0), (-1, 0))
]


@dataclass(frozen=True)
class Label:
    """A text beside a point, in its colour."""

    x: float
    y: float
    text: str
    colour: Any = INK


def label_points(axis: Any, labels: Sequence[Label], points: Sequence[tuple[float, float]]) -> None:
    """Writes a label beside each point, at the nearest place that covers no other label, no point and no edge.

    A label for which there is no such place is left out: the legend and the tables have it.

    Args:
        points: all that is drawn, and must stay in sight.
    """
    figure = axis.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is placed now stays where it is
    renderer = figure.canvas.get_renderer()
    frame = axis.get_window_extent(renderer)
    dots = axis.transData.transform(list(points)) if points else np.zeros((0, 2))
    taken: list[Any] = [text.get_window_extent(renderer) for text in axis.texts]
    for label in labels:
        for dx, dy in _PLACES:
            note = axis.annotate(
                label.text,
                (label.x, label.y),
                xytext=(dx, dy),
                textcoords="offset points",
                fontsize=7.5,
                color=label.colour,
                bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6},
                ha=_aligned(dx, "right", "left"),
                va=_aligned(dy, "top", "bottom"),
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": label.colour} if math.hypot(dx, dy) > 15 else None,
            )
            box = note.get_window_extent(renderer).padded(2)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken) and not _covers(box, dots):
                taken.append(box)
                break
            note.remove()


def _aligned(offset: float, before: str, after: str) -> str:
    """Which side of a text faces its point, when the text stands before it (a negative offset), at it or after it."""
    if offset == 0:
        return "center"
    return before if offset < 0 else after


def _covers(box: Any, dots: np.ndarray) -> bool:
    wide = box.padded(5)
    return any(wide.contains(x, y) for x, y in dots)
