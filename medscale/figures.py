"""The figures of reports, as PNG: one panel each, small enough to stay readable on a phone.

Needs matplotlib (the extra `report`). Equal data give equal bytes. Names are drawn as they are, never as mathematics.
"""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

__all__ = ["Curve", "by_dim", "choice", "cloud", "over_steps", "plain_name"]

#: colours that colour-blind people tell apart (Okabe and Ito, 2008)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")

_STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "text.parse_math": False, "axes.titlesize": 10.5,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#888888", "axes.labelcolor": "#333333", "xtick.color": "#555555",
    "ytick.color": "#555555", "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#e4e4e4", "axes.axisbelow": True,
    "lines.linewidth": 1.8, "lines.markersize": 5, "legend.frameon": False, "legend.fontsize": 9,
    "figure.constrained_layout.use": True,
}  # fmt: skip
_INCHES = (4.8, 3.6)
_DOTS_PER_INCH = 200
_GREY = "#777777"
#: lines of more points than this show means
_MOST_POINTS = 300
#: of a name in a legend
_MOST_LETTERS = 28


@dataclass(frozen=True)
class Curve:
    """One line: a label, and y over x, of equal length."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def by_dim(title: str, what: str, curves: Sequence[Curve], tiers: Mapping[str, int]) -> bytes:
    """Draw quality by units (logarithmic), the run's own curve first; tiers are named along the top."""
    with mpl.rc_context(_STYLE):
        figure, axes = _panel(title, "units (logarithmic)", what)
        for number, curve in enumerate(curves):
            axes.plot(
                curve.x, curve.y, color=_colour(number), linestyle=DASHES[number % len(DASHES)],
                marker=MARKERS[number % len(MARKERS)], zorder=3 - number / len(curves),
            )  # fmt: skip
        if len(curves) == 1:
            _label_points(axes, curves[0], [units for units in curves[0].x if units in tiers.values()])
        _quality_axis(axes, [y for curve in curves for y in curve.y])
        _units_axis(axes, sorted({x for curve in curves for x in curve.x}), tiers)
        if len(curves) > 1:
            _legend(figure, axes.get_lines()[: len(curves)], [curve.label for curve in curves])
        return _png(figure)


def choice(
    title: str, curve: Curve, sizes: Mapping[int, str], precision: str, mark: tuple[int, float, str] | None,
    tiers: Mapping[str, int],
) -> bytes:  # fmt: skip
    """Draw MRR by units, the size of each tier below its units, and (units, MRR, words) of the chosen one."""
    with mpl.rc_context(_STYLE):
        axis = f"units (logarithmic), and size of the tier at {precision}"
        figure, axes = _panel(title, axis, "MRR", inches=(6.4, 4.2))
        axes.plot(curve.x, curve.y, color=COLOURS[0], marker=MARKERS[0])
        if mark is not None:
            units, mrr, words = mark
            (drawn,) = axes.plot([units], [mrr], color=COLOURS[1], marker="D", markersize=9, linestyle="none")
            _legend(figure, [drawn], [words])
        _label_points(axes, curve, curve.x if len(curve.x) <= 8 else [x for x in curve.x if x in tiers.values()])
        _quality_axis(axes, curve.y)
        _units_axis(axes, curve.x, tiers)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}\n{sizes.get(round(x), '')}"))
        return _png(figure)


def over_steps(
    title: str, what: str, curves: Sequence[Curve], *, logarithmic: bool = False,
    ordered: bool = False, from_zero: bool = False, marked: int | None = None,
) -> bytes:  # fmt: skip
    """Draw values by step.

    `logarithmic` holds where values differ twentyfold, else the axis begins at zero if `from_zero`. `ordered` curves
    take colours from dark to light; `marked` is a step to point out.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _panel(title, "step", what)
        positive = [value for curve in curves for value in curve.y if value > 0]
        logarithmic = logarithmic and max(positive, default=1.0) > 20 * min(positive, default=1.0)
        few = all(len(curve.x) <= 25 for curve in curves)
        for number, curve in enumerate(curves):
            x, y = thinned(curve)
            if logarithmic:
                y = np.where(y > 0, y, np.nan)
            axes.plot(
                x, y, color=_in_order(number, len(curves)) if ordered else _colour(number),
                linestyle="-" if ordered else DASHES[number % len(DASHES)],
                marker=MARKERS[number % len(MARKERS)] if few else None, markersize=4,
            )  # fmt: skip
        lines, labels = list(axes.get_lines()), [curve.label for curve in curves]
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        else:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
            if from_zero:
                axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if marked is not None:
            lines.append(axes.axvline(marked, color=_GREY, linewidth=1, linestyle=(0, (2, 2))))
            labels.append(f"step {marked:,}, exported")
        if len(lines) > 1:
            _legend(figure, lines, labels)
        return _png(figure)


def cloud(title: str, places_N2: NDArray[np.float64], category_N: NDArray[np.int64], names: Sequence[str]) -> bytes:
    """Draw points in the plane, a colour and a shape per category."""
    with mpl.rc_context(_STYLE):
        figure, axes = _panel(title, "", "", inches=(4.8, 4.6))
        size = min(45.0, max(10.0, 8000 / max(len(places_N2), 1)))
        for number in range(len(names)):
            x, y = places_N2[category_N == number].T
            axes.scatter(
                x, y, s=size, color=_colour(number), marker=MARKERS[number % len(MARKERS)], alpha=0.75, linewidths=0
            )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal", "datalim")
        for spine in axes.spines.values():
            spine.set_visible(False)
        _legend(figure, axes.collections, names, marker_scale=(45 / size) ** 0.5)
        return _png(figure)


def thinned(curve: Curve) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return x and y; of long curves the means of consecutive points."""
    x, y = np.asarray(curve.x, np.float64), np.asarray(curve.y, np.float64)
    if len(x) <= _MOST_POINTS:
        return x, y
    starts = np.arange(0, len(x), -(-len(x) // _MOST_POINTS))
    counts = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def plain_name(name: str, most: int = _MOST_LETTERS) -> str:
    """Return a name as one short line without control characters."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _panel(title: str, x: str, y: str, inches: tuple[float, float] = _INCHES) -> tuple[Figure, Axes]:
    figure = Figure(figsize=inches, dpi=_DOTS_PER_INCH)
    axes = figure.add_subplot()
    axes.set_title(plain_name(title, 60))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _in_order(number: int, count: int) -> Any:
    return mpl.colormaps["cividis"](0.82 * number / max(count - 1, 1))


def _quality_axis(axes: Axes, values: Sequence[float]) -> None:
    """Let the axis span at least a quarter of the best value, so that small differences look small."""
    low, high = min(values), max(values)
    low = min(low, 0.75 * high)
    axes.set_ylim(low - 0.12 * (high - low), high + 0.08 * (high - low))


def _units_axis(axes: Axes, dims: Sequence[float], tiers: Mapping[str, int]) -> None:
    """Make the axis of units logarithmic: ticks at sub-models that have room, names of tiers along the top."""
    axes.set_xscale("log", base=2)
    span = math.log2(dims[-1] / dims[0]) or 1.0
    shown: list[float] = []
    for units in [*(u for u in sorted(tiers.values(), reverse=True) if u in dims), *reversed(dims)]:
        if all(abs(math.log2(units / other)) > 0.07 * span for other in shown):
            shown.append(units)
    axes.xaxis.set_major_locator(FixedLocator(sorted(shown)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    named: dict[int, list[str]] = {}
    for name, units in tiers.items():
        named.setdefault(units, []).append(plain_name(name))
    for units, names in named.items():
        if units in dims:
            axes.axvline(units, color="#dddddd", linewidth=1, zorder=0)
            axes.annotate(
                ", ".join(names), (units, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
                ha="center", va="bottom", fontsize=8.5, color=_GREY, annotation_clip=False,
            )  # fmt: skip
    if named:
        axes.set_title(axes.get_title(loc="left"), pad=20)


def _label_points(axes: Axes, curve: Curve, units: Sequence[float]) -> None:
    """Write the value below each of the points of these units."""
    axes.margins(x=0.07)
    for x, y in zip(curve.x, curve.y, strict=True):
        if x in units:
            axes.annotate(
                f"{y:.3f}", (x, y), (0, -7), textcoords="offset points", ha="center", va="top", fontsize=8.5,
                color="#333333", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
            )  # fmt: skip


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str], marker_scale: float = 1.0) -> None:
    """Put the legend below the panel; no label is left out, whatever it begins with."""
    texts = [plain_name(label, 80 if len(labels) == 1 else _MOST_LETTERS) or "(no name)" for label in labels]
    widest = max(map(len, texts))
    rows = -(-len(texts) // max(1, 60 // (widest + 6)))
    columns = -(-len(texts) // rows)
    legend = figure.legend(
        handles, [f" {text}" for text in texts], loc="outside lower center", ncols=columns, markerscale=marker_scale
    )
    assert len(legend.get_texts()) == len(texts)


def _png(figure: Figure) -> bytes:
    """Return the figure's bytes; letters that the font lacks are drawn as boxes, without a warning each."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="png", facecolor="white", metadata={"Software": None})
    return file.getvalue()
