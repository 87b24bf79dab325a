"""The report's section on cost by row length (LongLoRA's main figure), from the stage `costs`."""

from __future__ import annotations

from collections.abc import Callable

from longreach.evaluation.blocks import Block, Figure, Section, Table
from longreach.evaluation.figures import MOST_SERIES, Style, lines
from longreach.evaluation.sections import DASH
from longreach.pipelines.report.findings import Findings
from longreach.training.summary import CostsSummary, Spread

PREDICTED = "predicted"
DISTURBED = 1.5
"""Ratio of an arm's slowest to its fastest step at a length, above which other work is assumed to
have disturbed the measurement."""


def cost_by_length(found: Findings, style: Style) -> Section | None:
    """Return the section on step cost by row length; None if it was not measured.

    Args:
        style: How the other figures draw the arms.
    """
    measured = found.costs
    if measured is None:
        return None
    known = {arm: look for arm, look in style.looks.items() if arm in measured.arms}
    blocks: list[Block] = [" ".join(_texts(measured)), *_tables(measured), *_left_out(measured)]
    blocks.append(_figures(measured, Style.of(measured.arms).with_looks(known)))
    return Section("Cost by row length", blocks)


def costs_in_words(measured: CostsSummary) -> str:
    """Return a sentence that compares the arms' speed with the yardstick's at the greatest length
    at which both were measured."""
    other = measured.yardstick
    for length in reversed(measured.lengths):
        parts = []
        for arm in measured.arms:
            ratio = measured.times_as_fast(length, arm, other)
            if ratio and arm != other:
                parts.append(f"{arm} {_in_words(ratio)}")
        if parts:
            return f"At rows of {length:,} tokens, speed as a multiple of {other}'s: {', '.join(parts)}."
    return ""


def _in_words(ratio: Spread) -> str:
    """Return a ratio with the minimum and maximum of the rounds."""
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _texts(measured: CostsSummary) -> list[str]:
    ranks = "1 new rank"
    if measured.ranks > 1:
        ranks = f"{measured.ranks} new ranks"
    texts = [
        costs_in_words(measured),
        f"At each length the arms took turns for {measured.rounds} rounds, each with {ranks}, one warm-up step and "
        f"{measured.steps} timed. Each row is a single long document: rows of many short documents need less "
        "attention. Groups of S²-Attn have the same share of a row at every length; arms that anneal are measured "
        "with their first pattern.",
    ]
    batches = {cell.length: cell.tokens for cell in measured.cells if not cell.left_out}
    if len({*batches.values()}) > 1:
        sizes = ", ".join(f"{tokens:,} at {length:,}" for length, tokens in batches.items())
        texts.append(f"Steps differ in size, because every rank needs whole rows: {sizes} tokens.")
    disturbed = []
    for length in measured.lengths:
        for arm in measured.arms:
            time = measured.seconds_per_1k(length, arm)
            if time and time.high > DISTURBED * time.low:
                disturbed.append(f"{arm} at {length:,}")
    if disturbed:
        texts.append(
            f"Disturbed by other work (the slowest step took more than {DISTURBED:g} times as long as the fastest): "
            f"{', '.join(disturbed)}; to measure again, run with --force costs."
        )
    return [text for text in texts if text]


def _tables(measured: CostsSummary) -> list[Block]:
    other = measured.yardstick

    def time(length: int, arm: str) -> str:
        return _cell(measured.seconds_per_1k(length, arm), 3)

    def times_as_fast(length: int, arm: str) -> str:
        return _cell(measured.times_as_fast(length, arm, other), 3, " ×")

    def memory(length: int, arm: str) -> str:
        return _cell(measured.peak_gib(length, arm), 3)

    spread = "Medians; small: minimum and maximum"
    return [
        _table(measured, "Seconds per 1,000 tokens", time, f"{spread} of all timed steps."),
        _table(
            measured, f"Times as fast as {other}", times_as_fast,
            f"{spread} of the rounds. Ratios are within a round, because other work slows both arms of a round.",
        ),
        _table(measured, "Peak memory (GiB, all ranks)", memory, f"{spread} of the rounds."),
    ]  # fmt: skip


def _table(measured: CostsSummary, caption: str, cell: Callable[[int, str], str], legend: str) -> Table:
    rows = []
    for arm in measured.arms:
        kernels = set()
        for length in measured.lengths:
            for one in measured.of(length, arm):
                kernels.add(one.kernel)
        head = arm
        if kernels:
            head += f"\nattention by {' and '.join(sorted(kernels))}"
        rows.append([head, *(cell(length, arm) for length in measured.lengths)])
    groups = [("", 1), ("row length (tokens)", len(measured.lengths))]
    return Table(caption, ["arm", *(f"{length:,}" for length in measured.lengths)], rows, groups, legend)


def _cell(spread: Spread | None, digits: int, unit: str = "") -> str:
    if spread is None:
        return DASH
    text = f"{spread.median:.{digits}g}{unit}"
    if spread.low < spread.high:
        text += f"\n{spread.low:.{digits}g} to {spread.high:.{digits}g}"
    return text


def _left_out(measured: CostsSummary) -> list[Block]:
    """Return a table of what was not measured, and why. An arm that does not fit at one length is
    left out at all greater ones too."""
    first = {}
    for cell in reversed(measured.cells):
        if cell.left_out:
            first[cell.arm] = [cell.arm, f"{cell.length:,}", cell.left_out]
    if not first:
        return []
    return [Table("Left out", ["arm", "from row length", "why"], list(first.values())[::-1], prose=True)]


def _figures(measured: CostsSummary, style: Style) -> list[Figure]:
    """Return figures of time and memory by row length, with the planner's predictions dashed."""
    times: dict[str, list[tuple[float, ...]]] = {}
    memories: dict[str, list[tuple[float, ...]]] = {}
    for arm in measured.arms[: MOST_SERIES // 2]:  # each has two curves
        predicted = f"{arm}, {PREDICTED}"
        style = style.with_looks({predicted: style[arm]._replace(line="dashed", marker="stroke")})
        for length in measured.lengths:
            time, memory = measured.seconds_per_1k(length, arm), measured.peak_gib(length, arm)
            if time and memory:
                times.setdefault(arm, []).append((length, *time))
                memories.setdefault(arm, []).append((length, *memory))
            if before := measured.predicted(length, arm):
                times.setdefault(predicted, []).append((length, before[0]))
                memories.setdefault(predicted, []).append((length, before[1]))
    if not times:
        return []
    dashed = "Dashed: the planner's prediction before the first step."
    x = "row length (tokens)"
    return [
        lines(
            "costs-time.png", "Time by row length", f"Lower is better. Bars: fastest to slowest step. {dashed}",
            (x, "seconds per 1,000 tokens"), times, style, log=True, ticks=measured.lengths,
        ),
        lines(
            "costs-memory.png", "Memory by row length", f"Lower is better. {dashed}",
            (x, "peak memory (GiB, all ranks)"), memories, style, log=True, ticks=measured.lengths,
        ),
    ]  # fmt: skip
