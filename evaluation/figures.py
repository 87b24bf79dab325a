"""How all figures of evaluations look: Vega-Lite charts, saved as a PNG and as an interactive page that opens offline.

Okabe and Ito's palette (jfly.uni-koeln.de/color), which colour-blind readers can tell apart. Hovering over a point in
the page shows every column of its row.

    save(curves(rows, x="length", y="ppl", by="document", titles=("Perplexity", "tokens", "perplexity")), out, "ppl")
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import altair as alt

from longreach.evaluation.scores import EvalScores

COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#F0E442")
Rows = Iterable[dict[str, Any]]
Titles = tuple[list[str] | str, str, str]
"""A figure's title (lines: what is asked, and how to read it) and the names of its axes, units included."""


def curves(rows: Rows, *, x: str, y: str, by: str, titles: Titles, log: str = "", low: str = "", high: str = "") -> Any:
    """A line for each value of `by`, with points; columns `low` and `high` are drawn as error bars.

    log: the axes ("x", "y", "xy") whose scale is logarithmic.
    """
    rows = list(rows)
    title, x_title, y_title = titles
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X(x, type="quantitative", title=x_title, scale=_scale("x" in log), axis=_ticks(rows, x)),
        color=alt.Color(by, type="nominal", sort=None, scale=alt.Scale(range=list(COLOURS)), title=None),
    )
    height = alt.Y(y, type="quantitative", title=y_title, scale=_scale("y" in log))
    shown = _tooltips(rows)
    layers = [
        base.mark_line(strokeWidth=2).encode(
            y=height, strokeDash=alt.StrokeDash(by, type="nominal", sort=None, legend=None)
        ),
        base.mark_point(filled=True, size=25).encode(y=height, tooltip=shown),
    ]
    if low and any(row.get(low) is not None for row in rows):
        bars = base.transform_filter(f"isValid(datum.{low})").mark_rule(strokeWidth=1)
        layers.append(bars.encode(y=alt.Y(low, type="quantitative"), y2=alt.Y2(high)))
    return alt.layer(*layers).properties(title=_title(title), width=520, height=300)


def heatmap(
    rows: Rows, *, x: str, y: str, value: str, text: str, titles: Titles, value_title: str, top: float, bright_low: bool
) -> Any:
    """A cell for each (x, y), coloured by `value` from 0 to `top`, with the column `text` in it.

    bright_low: small values are the bright ones.
    """
    rows = list(rows)
    title, x_title, y_title = titles
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X(x, type="ordinal", title=x_title, axis=alt.Axis(labelAngle=0)),
        y=alt.Y(y, type="ordinal", title=y_title),
    )
    shade = alt.Scale(scheme="cividis", domain=[0, top], reverse=bright_low)
    dark = f"datum['{value}'] {'>' if bright_low else '<'} {top / 2}"
    shown = _tooltips(rows)
    cells = base.mark_rect().encode(
        color=alt.Color(value, type="quantitative", title=value_title, scale=shade), tooltip=shown
    )
    words = base.mark_text(fontSize=10).encode(
        text=alt.Text(text, type="nominal"),
        color=alt.condition(dark, alt.value("white"), alt.value("black")),
        tooltip=shown,
    )
    columns, lines = len({row[x] for row in rows}), len({row[y] for row in rows})
    return (cells + words).properties(
        title=_title(title), width=max(240, min(900, 90 * columns)), height=max(90, min(900, 30 * lines))
    )


def retrieval_figure(scores: EvalScores, question: list[str], x_title: str, y_title: str, x: str, y: str) -> Any:
    """A heatmap of `cell` rows, shared by the evaluations that look for something in a text."""
    grid = [row for row in scores.rows if row["kind"] == "cell"]
    text = [row | {"found": f"{row['nll']:.2f} · {row['correct']}/{row['trials']}"} for row in grid]
    return heatmap(
        text, x=x, y=y, value="nll", text="found", titles=(question, x_title, y_title),
        value_title="nats per token", top=max(4.0, *(row["nll"] for row in grid)), bright_low=True,
    )  # fmt: skip


def save(chart: alt.TopLevelMixin, folder: Path, name: str) -> Path:
    """Writes NAME.png and NAME.html (self-contained); returns the PNG's path."""
    chart = chart.configure_axis(labelFontSize=11, titleFontSize=12, gridOpacity=0.4).configure_legend(labelLimit=260)
    chart.save(folder / f"{name}.png", ppi=110)
    chart.save(folder / f"{name}.html", inline=True)
    return folder / f"{name}.png"


def _title(lines: list[str] | str) -> alt.TitleParams:
    first, *rest = [lines] if isinstance(lines, str) else lines
    return alt.TitleParams(first, subtitle=rest, anchor="start", fontSize=13, subtitleFontSize=11)


def _ticks(rows: list[dict[str, Any]], x: str) -> alt.Axis:
    """Where something was measured, if that is at few places."""
    places = sorted({row[x] for row in rows})
    return alt.Axis(values=places) if len(places) <= 10 else alt.Axis()


def _scale(log: bool) -> alt.Scale:
    return alt.Scale(type="log", nice=False) if log else alt.Scale()


def _tooltips(rows: list[dict[str, Any]]) -> list[alt.Tooltip]:
    """Every column."""
    return [alt.Tooltip(key, type=_kind(rows, key)) for key in dict.fromkeys(k for row in rows for k in row)]


def _kind(rows: list[dict[str, Any]], key: str) -> Literal["quantitative", "nominal"]:
    value = next((row[key] for row in rows if row.get(key) is not None), None)
    return "quantitative" if isinstance(value, int | float) and not isinstance(value, bool) else "nominal"
