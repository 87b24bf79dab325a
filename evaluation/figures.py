"""How all figures of evaluations look: one style, colours that colour-blind readers can tell apart, no global state.

Okabe and Ito's palette (jfly.uni-koeln.de/color). matplotlib's pyplot is not used: it keeps figures in a global and may
ask for a display; `Figure` renders with Agg.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#F0E442")


def new_axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """A figure with one pair of labelled axes; labels carry the unit."""
    fig = Figure(figsize=(7, 4.2), layout="constrained")
    axes = fig.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return fig, axes


def save(fig: Figure, path: Path) -> Path:
    """Write a PNG; returns its path."""
    fig.savefig(path, dpi=130)
    return path
