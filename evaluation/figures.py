"""The figures of all evaluations and of the report: lines, bars and grids, drawn by Vega-Lite.

A figure is 486 points wide with 13-point text, which is still 10 pixels high on a phone 360 pixels
wide. Colours are Okabe and Ito's (jfly.uni-koeln.de/color), which colour-blind readers can tell
apart. A model keeps its colour, marker and dash in all figures, because they share one Style. On an
interactive page, hovering over a mark shows its numbers.

    style = Style.of(["base", "full", "lora"], dashed=["base"])
    bars("cost.png", "Cost", "Less is better.", {"time (s)": {"full": 8.0, "lora": 6.0}}, style)
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from longreach.evaluation.blocks import Figure

if TYPE_CHECKING:
    import altair as alt

COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#F0E442")
"""Okabe and Ito's colours, which colour-blind readers can tell apart."""
MORE_COLOURS = ("#882255", "#999933")
"""Two of Paul Tol's colours, for figures with more names."""
BLUES = (
    "#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b",
)  # fmt: skip
"""ColorBrewer's blues, from light to dark."""
GREY = "#59636e"
WIDTH = 486
"""Width of a whole figure, in points."""
HEIGHT = 378
"""Height of a whole figure with curves, in points. A long legend adds to it."""
FONT = 13
CHARACTER = 7.2
"""Mean width of a character of FONT's size, in points."""
LABEL = 200
"""Maximum width of a name beside an axis, in points."""
MARK_ROOM = 0.2
"""Fraction of the x axis that the name of a vertical line may take."""
MOST_SERIES = 12
"""Maximum number of curves, or of bars of a panel, that can be told apart. The caption states how
many are left out."""
MOST_ROWS = 64
"""Maximum number of rows of a grid that can be told apart."""


class Look(NamedTuple):
    """How a name is drawn in all figures."""

    colour: str
    marker: str = "stroke"
    """One of Vega's symbols."""
    line: Literal["solid", "dashed", "none"] = "solid"


@dataclass(frozen=True)
class Style:
    """The look of every name (usually of models), shared by several figures."""

    looks: Mapping[str, Look]

    @classmethod
    def of(cls, names: Iterable[str], dashed: Iterable[str] = ()) -> Style:
        """Assign a look to each name. After nine names the colours repeat, with other markers."""
        colours = [COLOURS[n] for n in (0, 2, 1, 4, 5, 6, 3)]  # yellow is too pale for lines
        colours += MORE_COLOURS
        markers = (
            "circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "triangle-right", "triangle-left",
        )  # fmt: skip
        dashed = set(dashed)
        looks = {}
        for n, name in enumerate(names):
            line: Literal["solid", "dashed"] = "dashed" if name in dashed else "solid"
            looks[name] = Look(colours[n % len(colours)], markers[n % len(markers)], line)
        return cls(looks)

    def with_looks(self, looks: Mapping[str, Look]) -> Style:
        """Return a copy of this style with other looks for some names."""
        return Style({**self.looks, **looks})

    def __getitem__(self, name: str) -> Look:
        return self.looks[name]


def lines(
    file: str,
    title: str,
    caption: str,
    axes: tuple[str, str],
    curves: Mapping[str, Sequence[Sequence[float]]],
    style: Style,
    *,
    log: bool = False,
    ticks: Sequence[float] = (),
    marks: Mapping[str, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> Figure:
    """Draw the first MOST_SERIES curves through their points.

    Args:
        axes: names of x and y, with units.
        curves: points (x, y) or, with an error bar, (x, y, low, high), by name. Points whose y is
            not finite are not drawn.
        log: make y logarithmic if it spans more than a factor of two.
        ticks: measured x values; they get markers, and x becomes logarithmic. Empty: x is linear.
        marks: x values of vertical lines, by name.
        y_range: range of a linear y axis; points outside it are not drawn. None: draw all points.
    """
    import altair as alt

    curves, caption = _first(curves, caption, MOST_SERIES)
    names = list(curves)
    joined: list[str] = []
    marked: list[str] = []
    rows: list[dict[str, Any]] = []
    for name, curve in curves.items():
        has_line = style[name].line != "none"
        if has_line:
            joined.append(name)
        if ticks or len(curve) == 1 or not has_line:
            marked.append(name)
        rows += _point_rows(name, curve)
    columns = max(1, min(4, len(names), 76 // (8 + max(map(len, names), default=0))))
    look = _encodings(names, marked, style, columns)
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=_x(axes[0], ticks),
        y=_y(axes[1], rows, log, y_range),
        tooltip=[
            alt.Tooltip("name", type="nominal"),
            alt.Tooltip("x", type="quantitative", title=axes[0]),
            alt.Tooltip("y", type="quantitative", title=axes[1], format=",.5~g"),
        ],
    )
    layers: list[Any] = _marks(marks or {}, [row["x"] for row in rows], log=bool(ticks))
    clip = y_range is not None
    if joined:
        connected = base.transform_filter(alt.FieldOneOfPredicate("name", joined)).mark_line(strokeWidth=2, clip=clip)
        layers.append(connected.encode(stroke=look["stroke"], strokeDash=look["strokeDash"]))
    if marked:
        points = base.transform_filter(alt.FieldOneOfPredicate("name", marked)).mark_point(
            size=45, opacity=1, clip=True
        )
        layers.append(points.encode(stroke=look["stroke"], fill=look["fill"], shape=look["shape"]))
    # Invisible markers, over which the mouse finds the numbers of a curve.
    layers.append(base.mark_point(size=80, opacity=0, clip=clip))
    if any("low" in row for row in rows):
        intervals = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.2, clip=clip)
        layers.append(intervals.encode(y=alt.Y("low", type="quantitative"), y2="high", stroke=look["stroke"]))
    height = HEIGHT + 20 * max(0, math.ceil(len(names) / columns) - 2)
    return Figure(file, title, caption, _finished(alt.layer(*layers).properties(height=height), title))


def bars(file: str, title: str, caption: str, panels: Mapping[str, Mapping[str, float]], style: Style) -> Figure:
    """Draw horizontal bars with their values, the first MOST_SERIES of each panel.

    Args:
        panels: values by name, for each quantity (with its unit).
    """
    import altair as alt

    shown = {quantity: _first(values, caption, MOST_SERIES) for quantity, values in panels.items()}
    names: list[str] = []
    for values, _ in shown.values():
        names += values
    room = _label_room(names)
    parts = []
    for quantity, (values, _) in shown.items():
        rows = []
        for name, value in values.items():
            rows.append({"name": name, "value": value, "text": f"{value:,.4g}", "colour": style[name].colour})
        top = max(filter(math.isfinite, values.values()), default=1.0) or 1.0
        base = alt.Chart(alt.Data(values=rows)).encode(
            x=alt.X("value", type="quantitative", axis=None, scale=alt.Scale(domain=[0, 1.2 * top])),
            y=alt.Y(
                "name", type="nominal", sort=None, title=None,
                axis=alt.Axis(domain=False, ticks=False, labelLimit=LABEL, labelPadding=6),
            ),
            tooltip=[alt.Tooltip("name", type="nominal"), alt.Tooltip("value", type="quantitative", title=quantity)],
        )  # fmt: skip
        bar = base.mark_bar(height={"band": 0.65}).encode(color=alt.Color("colour", type="nominal", scale=None))
        text = base.mark_text(align="left", dx=4, fontSize=12).encode(text="text:N")
        heading = alt.TitleParams(quantity, anchor="start", fontSize=FONT, fontWeight="normal", offset=4)
        parts.append((bar + text).properties(title=heading, width=WIDTH - 24 - room, height=29 * len(rows)))
    _, caption = next(iter(shown.values()))
    return Figure(file, title, caption, _finished(alt.vconcat(*parts, spacing=14), title))


def spans(
    file: str, title: str, caption: str, axis: str, rows: Mapping[str, tuple[float, float, float]], colour: str
) -> Figure:
    """Draw when things ran: a bar from start to end for each name, and before it a thin line since
    it was ready to start.

    Args:
        axis: name of the time axis, which begins with its unit.
        rows: times (ready, start, end) by name; the first MOST_ROWS are drawn.
    """
    import altair as alt

    rows, caption = _first(rows, caption, MOST_ROWS)
    times = []
    for name, (ready, start, end) in rows.items():
        times.append({"name": name, "ready": ready, "start": start, "end": end, "waited": start - ready})
    base = alt.Chart(alt.Data(values=times)).encode(
        y=alt.Y(
            "name", type="nominal", sort=None, title=None,
            axis=alt.Axis(domain=False, ticks=False, labelLimit=LABEL, labelPadding=6),
        ),
        tooltip=[
            alt.Tooltip("name", type="nominal"),
            *(
                alt.Tooltip(time, type="quantitative", title=f"{time} ({axis.partition(' ')[0]})", format=",.3~g")
                for time in ("start", "end", "waited")
            ),
        ],
    )  # fmt: skip
    x = alt.X("start", type="quantitative", title=axis, axis=alt.Axis(tickCount=6))
    ran = base.mark_bar(height={"band": 0.65}, color=colour, stroke=colour).encode(x=x, x2="end")
    waited = base.mark_rule(color=GREY, strokeWidth=1.5).encode(x=alt.X("ready", type="quantitative"), x2="start")
    height = 100 + 21 * len(rows)  # the title and the axis take 100
    return Figure(file, title, caption, _finished(alt.layer(waited, ran).properties(height=height), title))


def grid(
    file: str,
    title: str,
    caption: str,
    axes: tuple[str, str],
    columns: Sequence[str],
    rows: Mapping[str, Sequence[tuple[float, str]]],
    top: float,
    rows_title: str = "",
) -> Figure:
    """Draw a grid of cells (value, text): dark towards `top`, white if the value is NaN. Texts are
    drawn only if they fit.

    Args:
        axes: names of the x axis and of the value.
        rows: a cell for each of `columns`, by the row's name; the first MOST_ROWS are drawn.
    """
    import altair as alt

    rows, caption = _first(rows, caption, MOST_ROWS)
    cells: list[dict[str, Any]] = []
    most_lines, widest = 1, 0
    for name, values in rows.items():
        for column, (value, text) in zip(columns, values, strict=True):
            shown = value if math.isfinite(value) else None
            text_lines = text.split("\n")
            says = "; ".join(text_lines)
            cells.append({"row": name, "column": column, "value": shown, "text": text_lines, "says": says})
            most_lines = max(most_lines, len(text_lines))
            widest = max(widest, *map(len, text_lines))
    few = len(rows) <= 16
    height = max(170, 110 + 35 * len(rows))
    if not few:
        height = 110 + 8 * len(rows)
    column_width = (WIDTH - _label_room(rows) - 90) / max(1, len(columns))
    base = alt.Chart(alt.Data(values=cells)).encode(
        x=alt.X(
            "column", type="ordinal", title=axes[0], scale=alt.Scale(domain=list(columns)),
            axis=alt.Axis(labelAngle=0, labelOverlap=True, domain=False, ticks=False),
        ),
        y=alt.Y(
            "row", type="ordinal", title=rows_title or None, scale=alt.Scale(domain=list(rows)),
            axis=alt.Axis(labelOverlap=not few, domain=False, ticks=False, labelLimit=LABEL),
        ),
        tooltip=[
            alt.Tooltip("row", type="nominal", title=rows_title or " "),
            alt.Tooltip("column", type="nominal", title=axes[0]),
            alt.Tooltip("value", type="quantitative", title=axes[1], format=",.4~g"),
            alt.Tooltip("says", type="nominal", title="cell"),
        ],
    )  # fmt: skip
    shade = alt.Color(
        "value", type="quantitative", title=axes[1],
        legend=alt.Legend(gradientThickness=12, gradientLength=min(200, height - 90)),
        scale=_blues(top),
    )  # fmt: skip
    layers: list[Any] = [base.transform_filter("isValid(datum.value)").mark_rect().encode(color=shade)]
    if few and 6 * widest < column_width:
        ink = alt.condition(f"datum.value > {0.6 * top}", alt.value("white"), alt.value("black"))
        layers.append(
            base.mark_text(fontSize=11, lineHeight=13, baseline="middle", dy=-6.5 * (most_lines - 1)).encode(
                text="text:N", color=ink
            )
        )
    return Figure(file, title, caption, _finished(alt.layer(*layers).properties(height=height), title))


def concatenated(file: str, title: str, caption: str, rows: Sequence[tuple[str, Sequence[Any]]]) -> Figure:
    """Draw rows of small charts side by side, each row under its name."""
    import altair as alt

    parts = []
    for name, panels in rows:
        heading = alt.TitleParams(name, anchor="start", fontSize=FONT, fontWeight="normal", offset=4)
        parts.append(alt.hconcat(*panels, spacing=24).properties(title=heading))
    return Figure(file, title, caption, _finished(alt.vconcat(*parts, spacing=14), title))


def small_grids(
    file: str,
    title: str,
    caption: str,
    axes: tuple[str, str, str],
    columns: Sequence[str],
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, str]]]],
    top: float,
) -> Figure:
    """Draw a small grid of cells (value, text) for each name, two side by side, dark towards `top`.

    Args:
        axes: names of the x axis, the y axis and the value.
        panels: for each name, rows by their own name, with a cell for each of `columns`; the first
            MOST_SERIES panels are drawn.
    """
    import altair as alt

    panels, caption = _first(panels, caption, MOST_SERIES)
    cells: list[dict[str, Any]] = []
    for name, rows in panels.items():
        for row, values in rows.items():
            for column, (value, text) in zip(columns, values, strict=True):
                shown = value if math.isfinite(value) else None
                says = text.replace("\n", "; ")
                cells.append({"name": name, "row": row, "column": column, "value": shown, "says": says})
    order = list(dict.fromkeys(cell["row"] for cell in cells))
    small: dict[str, Any] = {"domain": False, "ticks": False, "labelFontSize": FONT - 2, "titleFontSize": FONT - 2}
    chart = (
        alt.Chart(alt.Data(values=cells))
        .mark_rect()
        .encode(
            x=alt.X("column", type="ordinal", title=axes[0], sort=list(columns), axis=alt.Axis(labelAngle=0, **small)),
            y=alt.Y("row", type="ordinal", title=axes[1], sort=order, axis=alt.Axis(**small)),
            color=alt.Color(
                "value", type="quantitative", title=axes[2], scale=_blues(top),
                legend=alt.Legend(orient="bottom", gradientThickness=12, gradientLength=160),
            ),
            tooltip=[alt.Tooltip("name", type="nominal"), alt.Tooltip("says", type="nominal", title="cell")],
        )
        .properties(width=165, height=20 * max(len(order), 3))
        .facet(facet=alt.Facet("name", type="nominal", title=None, sort=list(panels)), columns=2)
    )  # fmt: skip
    return Figure(file, title, caption, _finished(chart, title))


def _first(series: Mapping[str, Any], caption: str, most: int) -> tuple[Mapping[str, Any], str]:
    """Return the first `most` series, and the caption, which states how many are left out."""
    others = len(series) - most
    if others <= 0:
        return series, caption
    return dict(list(series.items())[:most]), f"{caption} {others} more are left out."


def _blues(top: float) -> alt.Scale:
    """Return the colour scale of cells from 0 to `top`."""
    import altair as alt

    return alt.Scale(domain=[top * n / 8 for n in range(9)], range=list(BLUES), clamp=True)


def _label_room(names: Iterable[str]) -> float:
    """Return the estimated width of names beside an axis, in points."""
    return min(LABEL, CHARACTER * max(map(len, names), default=0))


def _point_rows(name: str, points: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Return a curve's points as rows for Vega-Lite, without points whose y is not finite."""
    rows: list[dict[str, Any]] = []
    for x, y, *interval in points:
        if math.isfinite(y):
            rows.append({"name": name, "x": x, "y": y})
            if interval:
                rows[-1] |= {"low": interval[0], "high": interval[1]}
    return rows


def _encodings(names: list[str], marked: list[str], style: Style, columns: int) -> dict[str, Any]:
    """Return the encoding channels that distinguish curves. They share a legend below the figure,
    with `columns` names in a line."""
    import altair as alt

    def scale(values: list[Any]) -> alt.Scale:
        return alt.Scale(domain=names, range=values)

    legend = alt.Legend(
        title=None, orient="bottom", columns=columns, labelLimit=WIDTH - 40, symbolSize=110, symbolStrokeWidth=2
    )
    colours: list[str] = []
    shapes: list[str] = []
    patterns: list[list[int]] = []
    dashed: list[str] = []
    for name in names:
        look = style[name]
        colours.append(look.colour)
        shapes.append(look.marker if name in marked else "stroke")
        if look.line == "dashed":
            dashed.append(name)
            patterns.append([5, 4])
        else:
            patterns.append([1, 0])
    # A condition has no legend. With a scale, the legend's markers would have dashed outlines as well.
    dashes: Any = alt.condition(alt.FieldOneOfPredicate("name", dashed), alt.value([5, 4]), alt.value([1, 0]))
    kind: dict[str, Any] = {"type": "nominal", "sort": None}
    if not marked:
        dashes = alt.StrokeDash("name", **kind, scale=scale(patterns), legend=legend)
    return {
        "stroke": alt.Stroke("name", **kind, scale=scale(colours), legend=legend),
        "fill": alt.Fill("name", **kind, scale=scale(colours), legend=legend),
        "shape": alt.Shape("name", **kind, scale=scale(shapes), legend=legend),
        "strokeDash": dashes,
    }


def _x(title: str, ticks: Sequence[float]) -> alt.X:
    """Return a linear axis of integers or, if there are ticks, a logarithmic one with these ticks."""
    import altair as alt

    if ticks:
        scale = alt.Scale(type="log", base=2, nice=False, padding=14)
        axis = alt.Axis(values=list(ticks), format=",", labelOverlap=True)
    else:
        scale = alt.Scale(zero=False, nice=False, padding=8)
        axis = alt.Axis(tickCount=5, tickMinStep=1, format=",.10~g")
    return alt.X("x", type="quantitative", title=title, scale=scale, axis=axis)


def _y(title: str, rows: list[dict[str, Any]], log: bool, y_range: tuple[float, float] | None = None) -> alt.Y:
    """Return the y axis. A logarithmic one has ticks at powers of ten, for smaller ranges also at 2
    and 5 times these, or in finer steps."""
    import altair as alt

    if y_range:
        fixed = alt.Scale(domain=list(y_range), nice=False)
        return alt.Y("y", type="quantitative", title=title, scale=fixed, axis=alt.Axis(tickCount=6))
    heights = [row["y"] for row in rows] or [1.0]
    low, high = min(heights), max(heights)
    if not log or not 0 < 2 * low < high:
        from_zero = 0 <= low < 0.1 * high  # padding below would show shares below 0
        scale = alt.Scale(zero=from_zero, padding=0 if from_zero else 8)
        return alt.Y("y", type="quantitative", title=title, scale=scale, axis=alt.Axis(tickCount=6))
    steps: tuple[float, ...] = (1.0,)
    if high < 300 * low:
        steps = (1.0, 2.0, 5.0)
    if high < 10 * low:
        steps = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = []
    for decade in decades:
        for step in steps:
            ticks.append(step * 10.0**decade)
    return alt.Y(
        "y", type="quantitative", title=f"{title}, log scale",
        scale=alt.Scale(type="log", nice=False, padding=8),
        axis=alt.Axis(values=ticks, format=",.6~r"),
    )  # fmt: skip


def _marks(marks: Mapping[str, float], xs: Sequence[float], *, log: bool) -> list[Any]:
    """Draw dotted vertical lines, each with its name to the left of its upper end, or to the right
    of it if the line is close to the y axis.

    xs: x values of the figure's points; `log` if x is logarithmic.
    """
    import altair as alt

    scale: Callable[[float], float] = math.log if log else float
    places = [scale(x) for x in (*marks.values(), *xs) if x > 0 or not log]  # a logarithmic axis has no zero
    layers = []
    for name, x in marks.items():
        align: Literal["left", "right"] = "right"
        if scale(x) - min(places) < MARK_ROOM * (max(places) - min(places)):
            align = "left"
        base = alt.Chart(alt.Data(values=[{"x": x, "mark": name}])).encode(x=alt.X("x", type="quantitative"))
        text = base.mark_text(color=GREY, fontSize=12, align=align, baseline="top", dx=4 if align == "left" else -4)
        layers.append(base.mark_rule(color=GREY, strokeDash=[2, 3], strokeWidth=1.2))
        layers.append(text.encode(text="mark:N", y=alt.value(3)))
    return layers


def _finished(chart: Any, title: str) -> Any:
    """Return a chart with its title, its width and the look that all figures share."""
    import altair as alt

    if not isinstance(chart, alt.VConcatChart | alt.FacetChart):
        chart = chart.properties(width=WIDTH, autosize=alt.AutoSizeParams(type="fit", contains="padding"))
    heading = alt.TitleParams(textwrap.wrap(title, 60), anchor="start", frame="bounds", fontSize=14, offset=12)
    return _configured(chart.properties(title=heading))


def _configured(chart: Any) -> Any:
    """Return a whole chart with the fonts and colours that all figures share."""
    return (
        chart.properties(padding=8, background="white")
        .configure_view(stroke=None)
        .configure_axis(
            labelFontSize=FONT, titleFontSize=FONT, titleFontWeight="normal", titlePadding=8,
            gridColor="#e3e7eb", domainColor="#8a939c", tickColor="#8a939c",
        )
        .configure_legend(labelFontSize=12.5, titleFontSize=12, titleFontWeight="normal", padding=0)
    )  # fmt: skip


def stacked_png(figures: Sequence[Figure]) -> bytes:
    """Return one PNG with several figures below each other."""
    import altair as alt

    parts = []
    for figure in figures:
        part = figure.chart.copy(deep=False)
        for of_whole_charts_only in ("config", "autosize", "padding", "background"):
            setattr(part, of_whole_charts_only, alt.Undefined)
        parts.append(part)
    whole = alt.vconcat(*parts, spacing=30)
    whole = _configured(
        whole.resolve_scale(
            color="independent", stroke="independent", fill="independent", shape="independent", strokeDash="independent"
        )
    )
    return Figure("", "", "", whole).png
