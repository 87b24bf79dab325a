"""Parts that the sections of several evaluations share: table cells, curves and retrieval grids.

python -c "from longreach.evaluation.sections import perplexity_text;
print(perplexity_text(12.345))"
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from longreach.evaluation.blocks import Block, Details, Figure, Table
from longreach.evaluation.figures import Style, grid, small_grids
from longreach.evaluation.scores import EvalScores, Row

SAMPLES = 12
"""Number of answers of a model that a page shows, spread evenly over all of them."""
MOST_SHOWN = 300
"""Maximum number of characters of an answer that a page shows."""
ASKED = ("task", "distractors", "way", "cache_tokens", "length", "size", "depth", "place", "distance")
"""Columns of a case that describe its question and the place of the answer."""
DASH = "–"
"""Text of a table cell without a value."""

Shown = TypeVar("Shown")
Item = TypeVar("Item")


def finite(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def with_commas(numbers: Iterable[int]) -> list[str]:
    """Return integers formatted for a table or an axis: 8,192."""
    return [f"{number:,}" for number in numbers]


def cells_of(rows: Mapping[Any, Row], columns: Iterable[Any], shown: Callable[[Row | None], Shown]) -> list[Shown]:
    """Return the cells of a table row: `shown` applied to each column's row, or to None if a column
    has none."""
    return [shown(rows.get(column)) for column in columns]


def spread(items: Sequence[Item], most: int) -> Sequence[Item]:
    """Return all items or, if there are more than `most`, `most` of them, spread evenly."""
    if len(items) <= most:
        return items
    return [items[n * len(items) // most] for n in range(most)]


def perplexity_text(value: float | None) -> str:
    """Return a perplexity with at least three significant digits, or NaN."""
    if value is None or not finite(value):
        return "NaN"
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def perplexity_cell(row: Row | None) -> str:
    """Return a row's perplexity and, in small type, its interval; a dash for None."""
    if row is None:
        return DASH
    return with_interval(perplexity_text, row["ppl"], row.get("ppl_low"), row.get("ppl_high"))


def with_interval(shown: Callable[[float], str], value: float, low: float | None, high: float | None) -> str:
    """Return a number and, in small type, its interval if it has one, all formatted by `shown`."""
    if low is None or high is None:
        return shown(value)
    return f"{shown(value)}\n{shown(low)} to {shown(high)}"


def value_cell(shown: Callable[[float], str], row: Row | None) -> str:
    """Return a row's value and, in small type, its interval and number of documents; a dash for None."""
    if row is None:
        return DASH
    text = with_interval(shown, row["value"], row.get("low"), row.get("high"))
    if row.get("documents"):
        text += f"\nn {row['documents']}"
    return text


def perplexity_curve(rows: Iterable[Row], x: str) -> list[tuple[float, ...]]:
    """Return points (x, perplexity[, low, high]). A perplexity that is not finite becomes NaN."""
    points: list[tuple[float, ...]] = []
    for row in rows:
        if not finite(row["ppl"]):
            points.append((row[x], math.nan))
        elif row.get("ppl_low") is None:
            points.append((row[x], row["ppl"]))
        else:
            points.append((row[x], row["ppl"], row["ppl_low"], row["ppl_high"]))
    return points


def summary_table(title: str, models: Mapping[str, EvalScores]) -> Table:
    """Return a table with a row for each measure of the summaries and a column for each model."""
    measures: dict[str, None] = {}
    for scores in models.values():
        measures |= dict.fromkeys(scores.summary)
    rows = []
    for measure in measures:
        cells = []
        for scores in models.values():
            value = scores.summary.get(measure)
            cells.append(f"{value:.4g}" if finite(value) else DASH)
        rows.append([measure, *cells])
    return Table(title, ["measure", *models], rows)


def retrieval_figures(evaluation: str, title: str, models: Mapping[str, EvalScores]) -> list[Figure]:
    """Return a grid of model x length and, if there are several depths, one of depth x length. For
    several models, these are small grids side by side with the same colour scale.

    Args:
        evaluation: name of an evaluation with rows of kind `length` and `cell`; the files are named
            after it.
    """
    totals: dict[str, dict[int, Row]] = {}
    panels: dict[str, dict[str, dict[int, Row]]] = {}
    lengths: set[int] = set()
    nlls = []
    for name, scores in models.items():
        totals[name] = {row["length"]: row for row in scores.rows_with(kind="length")}
        lengths |= totals[name].keys()
        by_depth: dict[str, dict[int, Row]] = {}
        for row in sorted(scores.rows_with(kind="cell"), key=lambda row: row["depth"]):
            by_depth.setdefault(f"{100 * row['depth']:.4g}%", {})[row["length"]] = row  # depths have four decimals
            nlls.append(row["nll"])
        if len(by_depth) > 1:
            panels[name] = by_depth
    axes = ("prompt length (tokens)", "nats per token")
    columns, top = sorted(lengths), max(nlls, default=1.0)

    def texts(lines: Mapping[str, dict[int, Row]]) -> dict[str, list[tuple[float, str]]]:
        return {name: cells_of(rows, columns, _retrieval_cell) for name, rows in lines.items()}

    def draw(file: str, heading: str, caption: str, lines: Mapping[str, dict[int, Row]]) -> Figure:
        caption = f"{caption} Light: the model is certain; dark: it guesses."
        return grid(file, heading, caption, axes, with_commas(columns), texts(lines), top)

    caption = "In a cell: answers found out of questions asked, and nats per token of the answer."
    figures = [draw(f"{evaluation}.png", title, caption, totals)]
    caption = "By depth: 0% is the beginning of the prompt."
    if len(panels) == 1:
        ((name, by_depth),) = panels.items()
        figures.append(draw(f"{evaluation}-{name}.png", f"{title} {name}", caption, by_depth))
    elif panels:
        grids = {name: texts(by_depth) for name, by_depth in panels.items()}
        file, caption = f"{evaluation}-depths.png", f"{caption} Light: the model is certain; dark: it guesses."
        heads = with_commas(columns)
        figures.append(small_grids(file, f"{title} By depth", caption, (axes[0], "depth", axes[1]), heads, grids, top))
    return figures


def raw_answers(models: Mapping[str, EvalScores]) -> list[Block]:
    """Return a collapsed sample of each model's questions and answers; nothing if there are no
    cases."""
    tables: list[Block] = []
    for name, scores in models.items():
        cases = [case for case in scores.cases if "got" in case]
        if not cases:
            continue
        lines = []
        for case in spread(cases, SAMPLES):
            asked = []
            for key in ASKED:
                if case.get(key) is not None:
                    asked.append(f"{key} {case[key]}")
            right = "yes" if case.get("correct") else "no"
            if "score" in case:
                right = f"{case['score']:.2f}"
            lines.append([", ".join(asked), str(case.get("expected", DASH)), case["got"][:MOST_SHOWN], right])
        caption = f"{name}: {len(lines)} of {len(cases)} answers"
        legend = (
            "If no text was generated, the answer shown is the most likely token at each position of the expected "
            "answer, given its tokens before that position. All answers, with their prompts, are in cases.jsonl."
        )
        tables.append(Table(caption, ["asked", "expected", "answer", "right"], lines, legend=legend, prose=True))
    if not tables:
        return []
    return [Details("Raw answers", tables)]


def _retrieval_cell(row: Row | None) -> tuple[float, str]:
    """Return the value and text of a grid cell."""
    if row is None:
        return math.nan, DASH
    return row["nll"], f"{row['correct']}/{row['trials']}\n{row['nll']:.2f}"


def document_style(names: Iterable[str], whole: str) -> Style:
    """Return the style of figures with dashed curves of single documents and a solid one of `whole`."""
    names = list(names)
    return Style.of(names, dashed={*names} - {whole})
