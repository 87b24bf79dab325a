"""The report's figures: lines, bars and a grid, readable on a phone, in print and by colour-blind readers.

5.4 inches wide with 11-point text: on a phone's 360 pixels that is still 10 pixels high. A model keeps its colour
(Okabe and Ito's palette) and its marker in all figures; what was not trained is dashed.

    bars("cost.png", "Cost", "Less is better.", {"time (s)": {"full": 8.0, "lora": 6.0}}, styles(["full", "lora"]))
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from longreach.evaluation.figures import COLOURS
from longreach.pipelines.report_page import Picture

WIDTH = 5.4
MOST = 12
"""Curves, or bars of a panel, that can still be told apart; what comes later is left out, and the sentence says so."""
SOFT = "#59636e"
LOOK: dict[Any, Any] = {
    "font.size": 11, "legend.fontsize": 10, "legend.frameon": False, "grid.color": "#e3e7eb",
    "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8a939c", "axes.axisbelow": True,
}  # fmt: skip


class Style(NamedTuple):
    """How a name is drawn wherever it appears."""

    colour: str
    marker: str
    line: str


def styles(names: Iterable[str], dashed: Iterable[str] = ()) -> dict[str, Style]:
    """A style for each name; after seven, colours come again with other markers. Yellow is too pale for lines."""
    colours, markers, dashed = [COLOURS[n] for n in (0, 2, 1, 4, 5, 6, 3)], "osD^vPX*", set(dashed)
    return {
        name: Style(colours[n % 7], markers[n % 8], "--" if name in dashed else "-") for n, name in enumerate(names)
    }


@rc_context(LOOK)
def lines(
    file: str,
    title: str,
    says: str,
    axis_names: tuple[str, str],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    look: Mapping[str, Style],
    *,
    log: bool = False,
    ticks: Sequence[float] = (),
    marks: Mapping[str, float] | None = None,
) -> Picture:
    """The first MOST curves of (x, y); a y that is not finite is left out.

    Args:
        axis_names: of x and y, with units.
        log: y is logarithmic if it spans more than a factor of two.
        ticks: the x that were measured, drawn as marked points on a logarithmic axis; none: x is linear.
        marks: vertical lines by name.
    """
    curves, says = _first(curves, says)
    columns = max(1, min(4, len(curves), 76 // (8 + max(map(len, curves), default=0))))
    fig, axes = _figure(4.2 + 0.22 * max(0, math.ceil(len(curves) / columns) - 2), title)
    heights = [y for curve in curves.values() for _, y in curve if math.isfinite(y)] or [1.0]
    for name, curve in curves.items():
        xy = np.array([point for point in curve if math.isfinite(point[1])]).reshape(-1, 2)
        colour, marker, line = look[name]
        marker = marker if ticks or len(xy) == 1 or line == "none" else ""
        axes.plot(*xy.T, linestyle=line, color=colour, marker=marker, lw=1.8, ms=5.5, label=name)
    axes.set_xlabel(axis_names[0])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_ylabel(axis_names[1])
    if log and 0 < 2 * min(heights) < max(heights):
        axes.set_yscale("log")
        axes.set_ylabel(f"{axis_names[1]}, log scale")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(heights) < 300 * min(heights) else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    if ticks:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    for name, x in (marks or {}).items():
        axes.axvline(x, color=SOFT, lw=1.2, ls=":", zorder=0)
        axes.text(x, 0.98, f"{name} ", color=SOFT, size=9.5, ha="right", va="top", transform=axes.get_xaxis_transform())
    axes.grid(True)
    fig.legend(loc="outside lower center", ncols=columns, handlelength=2.4)
    return _picture(fig, file, title, says)


@rc_context(LOOK)
def bars(
    file: str, title: str, says: str, panels: Mapping[str, Mapping[str, float]], look: Mapping[str, Style]
) -> Picture:
    """Horizontal bars with their values, a panel a quantity; its name carries the unit. The first MOST of each."""
    cut = [_first(values, says) for values in panels.values()]
    panels, says = dict(zip(panels, (values for values, _ in cut), strict=True)), cut[0][1]
    fig = Figure(layout="constrained")
    fig.set_size_inches(WIDTH, 0.4 + len(panels) * (0.55 + 0.32 * max(map(len, panels.values()))))
    fig.suptitle(title, x=0.01, ha="left", size=12, weight="bold")
    for axes, (name, values) in zip(fig.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        drawn = axes.barh(list(values), list(values.values()), color=[look[n].colour for n in values], height=0.65)
        axes.bar_label(drawn, [f"{value:,.4g}" for value in values.values()], padding=4, size=10)
        axes.set_title(name, size=10.5, weight="normal")
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.xaxis.set_major_locator(NullLocator())
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(left=False)
    return _picture(fig, file, title, says)


@rc_context(LOOK)
def grid(
    file: str, title: str, says: str, names: tuple[str, str], columns: Sequence[str],
    rows: Mapping[str, Sequence[tuple[float, str]]], top: float,
) -> Picture:  # fmt: skip
    """Cells of (value, text), dark towards `top`, white where NaN; `names` are the x axis' and the value's."""
    rows, says = _first(rows, says)
    values = [[value for value, _ in cells] for cells in rows.values()]
    fig, axes = _figure(1.6 + 0.48 * len(rows), title)
    image = axes.imshow(values, aspect="auto", cmap="Blues", vmin=0, vmax=top)
    for y, cells in enumerate(rows.values()):
        for x, (value, text) in enumerate(cells):
            axes.text(x, y, text, ha="center", va="center", color="white" if value > 0.6 * top else "black", size=9)
    axes.set_xlabel(names[0])
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    fig.colorbar(image, label=names[1])
    return _picture(fig, file, title, says)


def _first(those: Mapping[str, Any], says: str) -> tuple[Mapping[str, Any], str]:
    left = len(those) - MOST
    return dict(list(those.items())[:MOST]), f"{says} {left} more are left out." if left > 0 else says


def _figure(height: float, title: str) -> tuple[Figure, Any]:
    fig = Figure(figsize=(WIDTH, height), layout="constrained")
    return fig, fig.add_subplot(title=title)


def _picture(fig: Figure, file: str, title: str, says: str) -> Picture:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=180)
    return Picture(file, title, says, buffer.getvalue())
