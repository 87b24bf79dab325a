"""What the report says of tasks: keys and needles found, streaming with a small cache, and every other evaluation.

longreach report streaming-smollm2 --open
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from longreach.evaluation.blocks import Block, Figure, Section, Table
from longreach.evaluation.figures import Style, grid, lines
from longreach.pipelines.report.findings import Found, by_length, finite
from longreach.pipelines.report.sections import DASH, curve, interval, look

SEES = {
    "sinks": "Above: the share on the first token by layer, then by head. Below: layers; a bright column is a sink.",
}
"""What is to be seen in an evaluation's own figure."""


@dataclass(frozen=True)
class Drawn(Figure):
    """A figure whose PNG an evaluation has drawn; `chart` holds it."""

    def __post_init__(self) -> None:
        vars(self)["png"] = self.chart


AXIS = ("prompt length (tokens)", "nats per token")


def passkey(found: Found) -> Section | None:
    """How sure each model is of the key."""
    pictures = _retrieval(found, "passkey", "Is the hidden key found?")
    said = "A number is hidden in filler sentences and asked for at the end."
    return Section("Passkey", [said, pictures]) if pictures else None


def _retrieval(found: Found, evaluation: str, title: str) -> list[Figure]:
    """Model x length; and for each model that was asked at several depths, depth x length."""
    totals = by_length(found.models, evaluation, kind="length")
    asked = {name: m.rows(evaluation, kind="cell") for name, m in found.models.items() if evaluation in m.scores}
    heads, top = [f"{n:,}" for n in totals], max((r["nll"] for rows in asked.values() for r in rows), default=1.0)

    def cells(rows: Iterable[dict[str, Any] | None]) -> list[tuple[float, str]]:
        return [(r["nll"], f"{r['correct']}/{r['trials']}\n{r['nll']:.2f}") if r else (math.nan, DASH) for r in rows]

    says = "In a cell: found of asked, and nats per token of the answer. Light: the model is sure; dark: it guesses."
    lines_of = {name: cells(rows.get(name) for rows in totals.values()) for name in asked}
    pictures = [grid(f"{evaluation}.png", title, says, AXIS, heads, lines_of, top)] if asked else []
    says = "By depth: 0% is the prompt's beginning. Light: the model is sure; dark: it guesses."
    for name, rows in asked.items():
        at = {(r["length"], r["depth"]): r for r in rows}
        depths = sorted({depth for _, depth in at})
        if len(depths) > 1:
            lines_of = {f"{depth:.0%}": cells(at.get((length, depth)) for length in totals) for depth in depths}
            pictures.append(grid(f"{evaluation}-{name}.png", f"{title} {name}", says, AXIS, heads, lines_of, top))
    return pictures


def _own(found: Found, evaluation: str) -> list[Figure]:
    """The evaluation's own figure of each model."""
    title = evaluation.replace("_", " ")
    return [
        Drawn(f"{evaluation}-{name}.png", f"{title}: {name}", f"{name}. {SEES.get(evaluation, '')}".strip(), drawn)
        for name, model in found.models.items()
        if (drawn := model.figures.get(evaluation))
    ]


def streaming(found: Found) -> Section | None:
    """The ways through a long text with a small cache, what a token costs in each, and the longest stream."""
    asked = {n: m for n, m in found.models.items() if "streaming" in m.scores}
    ways = {n: {r["way"]: r for r in m.rows("streaming", kind="way")} for n, m in asked.items()}
    if not ways:
        return None
    cache = next(r["cache_tokens"] for mine in ways.values() for r in mine.values())
    about = {way: r["protocol"] for mine in ways.values() for way, r in mine.items()}
    rows = [[f"{way}\n{said}", *(interval(m.get(way)) for m in ways.values())] for way, said in about.items()]
    protocol = next(iter(asked.values())).scores["streaming"]["protocol"]
    said = f"Protocol: {protocol}. Streaming keeps a model fluent; it does not let it see further back than its cache."
    legend = "Small: the tokens that are scored. n sinks: the first n tokens stay in the cache, beside the most recent."
    caption = f"Perplexity once the cache of {cache:,} tokens is full"
    blocks: list[Block] = [said, Table(caption, ["way", *ways], rows, legend=legend), *_decoding(found)]
    pictures = []
    for name, mine in ways.items():
        usual = [way for way in mine if "," not in way]  # text positions and newlines: in the table
        curves = {way: curve(asked[name].rows("streaming", kind="stream", way=way), "end") for way in usual}
        says = (
            "Once its cache is full, a plain window drops the first tokens, on which attention rests, and should leap; "
            "with a few of them kept as sinks it should stay near the window that is recomputed for each token."
        )
        title, axes, marks = f"Streaming: {name}", ("token of the text", "perplexity"), {"cache full": cache}
        file, style = f"streaming-{name}.png", Style.of(usual)
        pictures.append(lines(file, title, says, axes, curves, style, log=True, marks=marks))
    return Section("Streaming with a small cache", [*blocks, [*pictures, *_endurance(found)]])


def _decoding(found: Found) -> list[Block]:
    """Latency and memory of each way; the endurance run in numbers."""
    asked = {name: m.rows("streaming", kind="latency") for name, m in found.models.items()}
    took = {name: {row["way"]: row for row in rows} for name, rows in asked.items() if rows}
    blocks: list[Block] = []
    if took:

        def cell(row: dict[str, Any] | None) -> str:
            return f"{row['ms']:.1f}\n{row['cache_mib']:.2f} MiB" if row else DASH

        ways = dict.fromkeys(way for mine in took.values() for way in mine)
        tokens = next(r["text_tokens"] for mine in took.values() for r in mine.values())
        caption = f"Milliseconds to decode a token, the median at the end of {tokens:,} tokens; small: keys and values"
        cells = [[way, *(cell(mine.get(way)) for mine in took.values())] for way in ways]
        blocks.append(Table(caption, ["way", *took], cells))
    lasting = {name: rows for name, m in found.models.items() if (rows := m.rows("streaming", kind="endurance"))}
    if lasting:
        cells = [
            [f"{name}\n{rows[0]['way']}", f"{end['end']:,}", f"{of['endurance_ppl']:.4g}", f"{end['ppl']:.4g}",
             f"{end['resident_mib']:,.0f}", f"{of['endurance_growth_mib']:+.1f}"]
            for name, rows in lasting.items()
            for end, of in [(rows[-1], found.models[name].scores["streaming"]["summary"])]
        ]  # fmt: skip
        columns = ["model", "tokens", "perplexity", "of its last part", "memory at the end (MiB)", "grown (MiB)"]
        legend = "Memory: the process's. Grown: in the last three quarters; a cache that leaks would show here."
        blocks.append(Table("All held-out documents through one cache", columns, cells, legend=legend))
    return blocks


def _endurance(found: Found) -> list[Figure]:
    curves = {n: curve(rows, "end") for n, m in found.models.items() if (rows := m.rows("streaming", kind="endurance"))}
    says = "One stream through one cache that never grows. Flat: generation stays stable; a rise that stays is decay."
    names = ("token of the stream", "perplexity")
    return [lines("endurance.png", "Endurance", says, names, curves, look(found), log=True)] if curves else []


def others(found: Found) -> Section | None:
    """Evaluations without a section of their own: measures, the models compared, and the evaluation's figures."""
    blocks: list[Block] = []
    for evaluation in dict.fromkeys(name for model in found.models.values() for name in model.scores):
        if evaluation in ("perplexity", "passkey", "streaming"):
            continue
        asked = {name: m.scores[evaluation] for name, m in found.models.items() if evaluation in m.scores}
        keys = dict.fromkeys(key for scores in asked.values() for key in scores["summary"])
        values = {key: [scores["summary"].get(key) for scores in asked.values()] for key in keys}
        rows = [[key, *(f"{v:.4g}" if finite(v) else DASH for v in some)] for key, some in values.items()]
        title, compare = evaluation.replace("_", " "), COMPARED.get(evaluation)
        pictures = [*(compare(found) if compare else []), *([] if evaluation in ENOUGH else _own(found, evaluation))]
        said = f"{title}: {next(iter(asked.values()))['protocol']}."
        blocks += [said, Table(title, ["measure", *asked], rows), pictures]
    return Section("Other evaluations", blocks) if blocks else None


def _needle(found: Found) -> list[Figure]:
    return _retrieval(found, "needle", "Is the needle found?")


def _by_place(found: Found) -> list[Figure]:
    """Lost in the middle: a figure for each task and size, a curve for each model."""
    rows = {n: m.rows("lost_in_the_middle", kind="cell") for n, m in found.models.items()}
    pictures, words = [], {"kv": "JSON pairs", "qa": "documents"}
    for task, size in dict.fromkeys((row["task"], row["size"]) for some in rows.values() for row in some):
        curves = {
            name: [(100 * row["depth"], row["nll"]) for row in some if (row["task"], row["size"]) == (task, size)]
            for name, some in rows.items()
            if some
        }
        says = "A hump in the middle: answers at both ends are found more easily. Lower is better."
        title = f"Where the answer stands: {size} {words.get(task, task)}"
        axes = ("place of the answer (%, 0: first)", "answer (nats per token)")
        pictures.append(lines(f"lost-in-the-middle-{task}-{size}.png", title, says, axes, curves, look(found)))
    return pictures


def _by_layer(found: Found) -> list[Figure]:
    """Attention on the first token, a figure for each length of texts, a curve for each model."""
    rows = {n: some for n, m in found.models.items() if (some := m.rows("sinks", kind="layer"))}
    pictures = []
    for length in sorted({row["length"] for some in rows.values() for row in some}):
        curves = {
            n: [(r["layer"], r["first_token"]) for r in some if r["length"] == length] for n, some in rows.items()
        }
        even = next(row["uniform"] for some in rows.values() for row in some if row["length"] == length)
        says = f"Even attention would give the first token {even:.3f}; a layer far above that uses it as a sink."
        title, axes = f"Attention on the first token, texts of {length:,} tokens", ("layer", "share of attention")
        pictures.append(lines(f"sinks-{length}.png", title, says, axes, curves, look(found)))
    return pictures


ENOUGH = ("needle", "lost_in_the_middle")
"""Evaluations whose own figures show no more than the comparison."""
COMPARED: dict[str, Callable[[Found], list[Figure]]] = {
    "needle": _needle,
    "lost_in_the_middle": _by_place,
    "sinks": _by_layer,
}
