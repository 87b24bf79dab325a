"""Tables and figures of the streaming evaluation (streaming.py).

blocks = tables(models)                   # {name: scores} -> ways, latencies and endurance runs
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from longreach.evaluation.scores import EvalScores, Row
from longreach.evaluation.streaming import PIECE_TOKENS

if TYPE_CHECKING:
    from longreach.evaluation.blocks import Figure, Table
    from longreach.evaluation.figures import Style


def tables(models: dict[str, EvalScores]) -> list[Table]:
    """Return the tables of these models: perplexity by way, latency by way, and endurance runs."""
    return [*_ways_table(models), *latency_table(models), *_endurance_table(models)]


def _ways_table(models: dict[str, EvalScores]) -> list[Table]:
    """Return the table of each way's perplexity, with a column for each model; one by cache size if there are several
    sizes, and one by text if there are several texts."""
    from longreach.evaluation.blocks import Table
    from longreach.evaluation.sections import cells_of, perplexity_cell, with_commas

    ways: dict[str, dict[str, Row]] = {}
    texts: dict[str, dict[str, Row]] = {}
    beside = set()
    for name, scores in models.items():
        for row in scores.rows_with(kind="way"):
            ways.setdefault(row["way"], {})[name] = row
            if "beside" in row:
                beside.add(row["beside"])
        for row in scores.rows_with(kind="text"):
            texts.setdefault(f"{row['way']}\n{row['document']}", {})[name] = row
    lines = []
    for way, rows in ways.items():
        protocol = next(iter(rows.values()))["protocol"]
        lines.append([f"{way}\n{protocol}", *cells_of(rows, models, _way_cell)])
    recipe = next(iter(models.values())).recipe
    sizes = [recipe["cache_tokens"], *recipe.get("more_cache_tokens", ())]
    cache = " or ".join(with_commas(sorted(sizes)))
    legend = (
        "In small type: which tokens are scored. n sinks: the first n tokens stay in the cache, with the most recent "
        "ones."
    )
    if "TOVA" in ways or "H2O" in ways:
        legend += (
            " TOVA evicts the token that the current token attends to least. H2O evicts the token that all tokens have "
            "attended to least, except for the most recent half."
        )
    if beside:
        over = "over the texts" if texts else f"over pieces of {PIECE_TOKENS} tokens of this one text"
        legend += (
            f" ×: ratio to the perplexity with {' or '.join(sorted(beside))} on the same tokens, with its 95% interval "
            f"{over}."
        )
    tables = [Table(f"Perplexity once the cache of {cache} tokens is full", ["way", *models], lines, legend=legend)]
    if len(sizes) > 1:
        tables += [_sizes_table(name, scores, sorted(sizes)) for name, scores in models.items()]
    if texts:
        lines = [[way, *cells_of(rows, models, perplexity_cell)] for way, rows in texts.items()]
        tables.append(Table("Perplexity by text", ["way", *models], lines))
    return tables


def _sizes_table(name: str, scores: EvalScores, sizes: list[int]) -> Table:
    """Return the table of one model's perplexity by way and cache size, like StreamingLLM's tables 2 and 6."""
    from longreach.evaluation.blocks import Table
    from longreach.evaluation.sections import cells_of, perplexity_cell, with_commas

    ways: dict[str, dict[int, Row]] = {}
    for row in scores.rows_with(kind="way"):
        way = row["way"].removesuffix(f", cache {row['cache_tokens']}")
        if way != "dense":
            ways.setdefault(way, {})[row["cache_tokens"]] = row
    lines = [[way, *cells_of(rows, sizes, perplexity_cell)] for way, rows in ways.items()]
    columns = ["way", *with_commas(sizes)]
    legend = "All sizes are scored on the same tokens: those after the largest cache is full."
    return Table(f"{name}: perplexity by cache size", columns, lines, legend=legend)


def _way_cell(row: Row | None) -> str:
    """Return a way's perplexity and, in small type, its ratio to the way with the most sinks."""
    from longreach.evaluation.sections import perplexity_cell

    text = perplexity_cell(row)
    if row is None or "ratio" not in row:
        return text
    return f"{text}\n{row['ratio']:.4g} × ({row['ratio_low']:.4g} to {row['ratio_high']:.4g})"


def latency_table(models: dict[str, EvalScores]) -> list[Table]:
    """Return the table of decoding latencies by way, with a column for each model that was timed."""
    from longreach.evaluation.blocks import Table
    from longreach.evaluation.sections import DASH

    timed: dict[str, dict[str, Row]] = {}
    for name, scores in models.items():
        for row in scores.rows_with(kind="latency"):
            timed.setdefault(name, {})[row["way"]] = row
    if not timed:
        return []
    lines = []
    for way in dict.fromkeys(chain(*timed.values())):
        cells = []
        for rows in timed.values():
            cell = DASH
            if way in rows:
                cell = f"{rows[way]['ms']:.1f}\n{rows[way]['cache_mib']:.2f} MiB"
            cells.append(cell)
        lines.append([way, *cells])
    heads = []
    for name, rows in timed.items():
        tokens = next(iter(rows.values()))["text_tokens"]  # the same for all ways, but not for all models
        heads.append(f"{name}\n{tokens:,} tokens")
    caption = "Median milliseconds to decode a token at the end of a text; in small type: memory of keys and values"
    return [Table(caption, ["way", *heads], lines)]


def _endurance_table(models: dict[str, EvalScores]) -> list[Table]:
    """Return the table of endurance runs, with a row for each model that has one."""
    from longreach.evaluation.blocks import Table

    lines = []
    for name, scores in models.items():
        rows = scores.rows_with(kind="endurance")
        if rows:
            last = rows[-1]
            lines.append(
                [
                    f"{name}\n{last['way']}",
                    f"{last['end']:,}",
                    f"{scores.summary['endurance_ppl']:.4g}",
                    f"{last['ppl']:.4g}",
                    f"{last['resident_mib']:,.0f}",
                    f"{scores.summary['endurance_growth_mib']:+.1f}",
                ]
            )
    if not lines:
        return []
    columns = ["model", "tokens", "perplexity", "perplexity of the end", "memory at the end (MiB)", "growth (MiB)"]
    legend = "Memory of the process. Growth: over the last three quarters; a leak in the cache would show here."
    return [Table("Endurance run: all held-out documents through one cache", columns, lines, legend=legend)]


def stream_figure(name: str, scores: EvalScores) -> Figure:
    """Draw one model's perplexity along the text, with a curve for each main way. Variants are only in the table."""
    from longreach.evaluation.figures import Style, lines
    from longreach.evaluation.sections import perplexity_curve

    curves: dict[str, list[Row]] = {}
    for row in scores.rows_with(kind="stream"):
        if "," not in row["way"]:  # no text positions, line breaks or further cache size
            curves.setdefault(row["way"], []).append(row)
    caption = (
        "Once its cache is full, a plain window drops the first tokens, which receive much of the attention, and its "
        "perplexity should jump. With a few first tokens kept as sinks, it should stay near that of a window that is "
        "recomputed for each token."
    )
    return lines(
        f"streaming-{name}.png",
        f"Streaming: {name}",
        caption,
        ("token of the text", "perplexity"),
        {way: perplexity_curve(rows, "end") for way, rows in curves.items()},
        Style.of(curves),
        log=True,
        marks={"cache full": scores.recipe["cache_tokens"]},
    )


def endurance_figure(models: dict[str, EvalScores], style: Style) -> list[Figure]:
    """Draw the perplexity along the endurance runs of all models, if there are any."""
    from longreach.evaluation.figures import lines
    from longreach.evaluation.sections import perplexity_curve

    curves = {}
    for name, scores in models.items():
        if rows := scores.rows_with(kind="endurance"):
            curves[name] = perplexity_curve(rows, "end")
    if not curves:
        return []
    caption = (
        "One stream through one cache that never grows. A flat line means that generation stays stable; a lasting rise "
        "means that it degrades."
    )
    axes = ("token of the stream", "perplexity")
    return [lines("endurance.png", "Endurance", caption, axes, curves, style, log=True)]
