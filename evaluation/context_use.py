"""Overview figure of how far back models use their context, with a row for each model.

Left: the share of answers found by context length, for each retrieval evaluation. A ring marks the
effective length: the longest length up to which the share KEPT_SHARE of the score at the shortest
length is kept (as in NoLiMa, arXiv:2502.05167; RULER's own threshold is a fixed score). Right: the
gain from context on the same tokens (evaluation/gain.py). All rows have the same axes, so that
models can be compared within a column.

    use_figure({"base": {"passkey": passkey_scores, "gain": gain_scores}})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longreach.evaluation.blocks import Figure
from longreach.evaluation.figures import FONT, GREY, WIDTH, Style, concatenated
from longreach.evaluation.ruler import OWN_TASK
from longreach.evaluation.scores import KEPT_SHARE, EvalScores, effective_length

FOUND = {"passkey": "accuracy", "needle": "accuracy", "ruler": "score"}
"""Evaluations with rows of kind `length`, and their column with a share from 0 to 1. OWN_TASK has its
own curve, because a search by words cannot solve it; RULER's tasks are drawn as their mean."""
MOST_MODELS = 8
"""Maximum number of rows of the figure. The caption states how many models are left out."""

Curve = list[tuple[int, float]]


def found_by_length(scores: Mapping[str, EvalScores]) -> dict[str, Curve]:
    """Return the curve (length, share found) of each kind."""
    curves: dict[str, Curve] = {}
    for evaluation, column in FOUND.items():
        if evaluation not in scores:
            continue
        shares: dict[str, dict[int, list[float]]] = {}
        for row in scores[evaluation].rows_with(kind="length"):
            kind = evaluation
            if evaluation == "ruler":
                kind = OWN_TASK if row["task"] == OWN_TASK else "RULER's tasks, mean"
            shares.setdefault(kind, {}).setdefault(row["length"], []).append(row[column])
        for kind, by_length in shares.items():
            curves[kind] = [(length, sum(of) / len(of)) for length, of in sorted(by_length.items())]
    return curves


def gained_by_length(scores: Mapping[str, EvalScores]) -> Curve:
    """Return the curve (length, nats per token gained over the model's shortest context)."""
    if "gain" not in scores:
        return []
    rows = scores["gain"].rows_with(kind="pooled", split="test")
    return sorted((row["length"], row["own_gain"]) for row in rows if "own_gain" in row)


def reached(curve: Curve) -> int:
    """Return the effective length of a curve, or 0 if nothing is found at its shortest length."""
    bar = KEPT_SHARE * curve[0][1]
    if not bar:
        return 0
    return effective_length([{"length": length, "accuracy": share} for length, share in curve], bar)


def use_figure(models: Mapping[str, Mapping[str, EvalScores]]) -> list[Figure]:
    """Draw a row for each model: the shares of answers found and the gain from context, by length.

    Args:
        models: scores by model name and evaluation name.

    There is no figure if everything was measured at one length, or if it would show only the gain,
    which has its own figure: no retrieval was measured, or everything was found.
    """
    found: dict[str, dict[str, Curve]] = {}
    gained: dict[str, Curve] = {}
    lengths: set[int] = set()
    kinds: dict[str, None] = {}  # a set that keeps its order
    shares: list[float] = []
    nats: list[float] = []
    for name, scores in models.items():
        curves, gain = found_by_length(scores), gained_by_length(scores)
        if not curves and not gain:
            continue
        found[name], gained[name] = curves, gain
        kinds |= dict.fromkeys(curves)
        for curve in curves.values():
            for length, share in curve:
                lengths.add(length)
                shares.append(share)
        for length, difference in gain:
            lengths.add(length)
            nats.append(difference)
    if min(shares, default=1.0) == 1 or len(lengths) < 2:
        return []
    names, style = list(found), Style.of(kinds)
    rows = []
    for name in names[:MOST_MODELS]:
        panels = [_panel(found[name], "share found", (0, 1), sorted(lengths), list(kinds), style)]
        if nats:
            room = 0.1 * max(max(nats) - min(nats), 0.01)
            ends = (min(nats) - room, max(nats) + room)
            curves = {"gain": gained[name]} if gained[name] else {}
            panels.append(_panel(curves, "nats gained", ends, sorted(lengths), [], style))
        rows.append((name, panels))
    caption = (
        f"One row for each model. Ring: effective length, the longest length up to which {KEPT_SHARE:g} of the score "
        "at the shortest length is kept. Gain: how much better the same tokens are predicted than with the model's "
        "shortest context; below 0: worse. The answers are in the section of each evaluation."
    )
    if len(names) > MOST_MODELS:
        caption += f" {len(names) - MOST_MODELS} more are left out."
    return [concatenated("context-use.png", "How far back does the model still use what it reads?", caption, rows)]


def _panel(
    curves: Mapping[str, Curve],
    title: str,
    ends: tuple[float, float],
    lengths: list[int],
    kinds: list[str],
    style: Style,
) -> Any:
    """Return one small chart. If there are `kinds`, their colours have a legend."""
    import altair as alt

    points = []
    for kind, curve in curves.items():
        ring = reached(curve) if kinds else 0
        points += [{"kind": kind, "x": x, "y": y, "ring": x == ring} for x, y in curve]
    colour: Any = alt.value(GREY)
    if kinds:
        colours = alt.Scale(domain=kinds, range=[style[kind].colour for kind in kinds])
        legend = alt.Legend(title=None, orient="bottom", columns=2, labelLimit=WIDTH)
        colour = alt.Color("kind", type="nominal", sort=None, scale=colours, legend=legend)
    x_axis = alt.Axis(values=lengths, format=",", labelOverlap=True, labelFontSize=FONT - 2, titleFontSize=FONT - 2)
    x_scale = alt.Scale(type="log", base=2, domain=[lengths[0], lengths[-1]], nice=False, padding=10)
    y_axis = alt.Axis(tickCount=4, labelFontSize=FONT - 2, titleFontSize=FONT - 2)
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("x", type="quantitative", title="context length (tokens)", scale=x_scale, axis=x_axis),
        y=alt.Y("y", type="quantitative", title=title, scale=alt.Scale(domain=list(ends), nice=False), axis=y_axis),
        color=colour,
        tooltip=[
            alt.Tooltip("kind", type="nominal"),
            alt.Tooltip("x", type="quantitative", title="tokens", format=","),
            alt.Tooltip("y", type="quantitative", title=title, format=".3f"),
        ],
    )
    ring = base.transform_filter("datum.ring").mark_point(size=170, strokeWidth=1.8, filled=False)
    return alt.layer(base.mark_line(strokeWidth=2), base.mark_point(size=36, filled=True, opacity=1), ring).properties(
        width=165, height=120
    )
