"""Streaming a text with a small cache, four ways (StreamingLLM, arXiv:2309.17453, figure 3): perplexity on the way.

  dense      every token sees all before it: what an unbounded cache would give
  window     the cache keeps the last `cache_tokens` tokens: collapses once the first tokens have left it, because they
             carry the attention that a softmax has to put somewhere (attention sinks)
  recompute  before each token, a fresh pass over the last `cache_tokens` tokens: no collapse, at a
             price that is quadratic in the cache
  n sinks    the first n tokens stay for ever, beside the most recent ones, in the same cache

Each way predicts from `cache_tokens` cached tokens and the current one. All but `recompute` are
computed for the whole text in one pass (evaluation/small_cache.py) that gives what decoding token
by token would. So are the field's caches that choose by attention what to forget (`rivals`: TOVA
and H2O, attention/evicting_cache.py), each with as many tokens. `recompute` needs a pass for each
scored token, so it scores every n-th one and its
mean is estimated by difference: the mean of another way over all tokens, plus the mean difference
to it over the sample. Neighbouring tokens differ in NLL far more than two ways do on one token, so
the difference is known to a few per cent where the sample's own mean would be off by tens.

Perplexity counts from the token where the ways begin to differ: after the first `cache_tokens`
tokens of the text. Streaming keeps a model fluent for ever; it does not let it see further back
than its cache.

Positions are counted in the cache (the paper's way) or in the text; RoPE is relative, so that only
sinks can tell. Is it the first tokens' place or their meaning? `newlines` replaces them by line
breaks (the paper's table 2). Latencies and cache sizes are measured on the real decode path;
`endurance_tokens` streams all documents through one cache. So there are three kinds of cells, a
class for each: `Ways`, `Latencies` and `Endurance`.

    longreach evaluate MODEL --eval streaming --set document=2026-Trump-1 --set cache_tokens=256

Legend: T tokens, N sampled tokens.
"""

from __future__ import annotations

import math
from itertools import chain, pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from longreach.evaluation.base import (
    Background,
    Cell,
    Count,
    DocumentName,
    DocumentNames,
    EvalChoices,
    Evaluation,
    Result,
)
from longreach.evaluation.documents import Document, first_token_id, matching, named, with_first
from longreach.evaluation.scores import EvalScores, Row, gathered, mean_interval, mean_of
from longreach.infra.choices import New
from longreach.infra.lazy import lazy_module

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from longreach.evaluation.blocks import Block, Figure, Section, Table
    from longreach.evaluation.figures import Style
else:
    np = lazy_module("numpy")

STRETCH = 256
"""Tokens of a stretch of text, over which ways are compared: long enough that neighbours are nearly independent."""
ABOUT = ("way", "positions", "cache_tokens", "sink_tokens", "protocol")
"""Columns that say what a row of a way is about."""
BINS = 24
"""Points of the curves along the text and along the endurance run."""

Results = list[tuple[Cell, Result]]


class Streaming(Evaluation):
    """Does generation stay stable when the text outgrows the cache?"""

    name = "streaming"
    title = "Streaming with a small cache"

    class Choices(EvalChoices):
        """StreamingLLM's four ways through one text (2309.17453, figure 3)."""

        document: DocumentName = "*"
        """Held-out document (name, or a shell pattern whose first match is taken)."""
        more_documents: New[DocumentNames] = ()
        """Further ones that go through the same ways, chosen alike; latencies and the endurance run leave them out."""
        tokens: int = Field(default=1024, ge=2)
        """Tokens of each that are scored."""
        cache_tokens: int = Field(default=256, ge=2)
        """Keys that each way keeps, sinks included (dense keeps all)."""
        more_cache_tokens: New[tuple[Count, ...]] = ()
        """Further sizes of the cache; all ways but dense are measured in each, on the tokens after the greatest, so
        that sizes compare. The endurance run keeps to cache_tokens."""
        sink_tokens: tuple[int, ...] = Field(default=(4,), min_length=1)
        """Number of first tokens that the sink cache keeps; each number is a way of its own."""
        ways: tuple[Literal["dense", "window", "recompute", "sinks"], ...] = Field(
            default=("dense", "window", "recompute", "sinks"), min_length=1
        )
        """Which of the four ways are measured."""
        rivals: New[tuple[Literal["tova", "h2o"], ...]] = ()
        """Caches of the same size that choose by attention what to forget, each a way of its own: tova
        (2401.06104), h2o (heavy hitters, 2306.14048); nothing is trained."""
        recompute_every: int = Field(default=16, ge=1)
        """The `recompute` way scores every n-th token, as each needs a pass over its own window; 1 scores all."""
        positions: tuple[Literal["cache", "text"], ...] = Field(default=("cache",), min_length=1)
        """Where sinks' positions are counted: inside the cache (the paper's way) or in the text; a way each."""
        newlines: bool = False
        """Also with the sinks' own tokens replaced by line breaks: is it their place or their meaning?"""
        latency_tokens: int = Field(default=0, ge=0)
        """Decode n tokens one by one in each way, and time them; 0: no latencies."""
        endurance_tokens: int = Field(default=0, ge=0)
        """Stream n tokens of all documents through one sink cache; 0: not measured."""

        @model_validator(mode="after")
        def _fits(self) -> Streaming.Choices:
            sizes = self.cache_sizes()
            if len({*sizes}) < len(sizes):
                raise ValueError(f"cache_tokens and more_cache_tokens {list(sizes)}: each size once")
            smallest, largest = min(sizes), max(sizes)
            if self.latency_tokens and self.latency_tokens + largest + 1 >= self.tokens:
                raise ValueError(
                    f"latency_tokens {self.latency_tokens} and cache_tokens {largest} before them do not fit "
                    f"into tokens {self.tokens}: lower latency_tokens or score more tokens"
                )
            if min(self.sink_tokens) < 1:
                raise ValueError(f"sink_tokens {list(self.sink_tokens)}: from 1 (none: way 'window')")
            most = max(self.sink_tokens)
            if most >= smallest:
                raise ValueError(
                    f"sink_tokens {most} leave no room for recent tokens in cache_tokens {smallest}: "
                    f"use fewer sinks or a larger cache"
                )
            if largest >= self.tokens:
                raise ValueError(
                    f"tokens {self.tokens} do not outgrow cache_tokens {largest}, so all ways would be the "
                    f"same: score more tokens or use a smaller cache"
                )
            return self

        def cache_sizes(self) -> tuple[int, ...]:
            """Return all sizes of the cache, that of `cache_tokens` first."""
            return (self.cache_tokens, *self.more_cache_tokens)

        def longest_input(self) -> int:
            """Return how many tokens the model reads at once at most."""
            return self.tokens

    choices: Choices

    def cells(self) -> list[Cell]:
        """Return a cell for each way, then one for each latency, then the endurance run.

        Raises:
            ValueError: the text is missing or too short, or the model's attention cannot be streamed.
        """
        self._check_texts()
        self._check_model()
        if self.choices.newlines:
            line_break(self.tokenizer)
        cells: list[Cell] = []
        for kind in KINDS:
            cells += kind.cells(self)
        return cells

    def measure(self, cell: Cell) -> Result:
        """Return what the cell's kind measures; FloatingPointError for logits that are not finite."""
        kind = next(kind for kind in KINDS if kind.kind == cell["kind"])
        return kind.measure(self, cell)

    @classmethod
    def scores(cls, choices: Choices, results: Results) -> EvalScores:
        """Return rows of kind `way` (perplexity after the first cache_tokens tokens), `stream`
        (binned along the text), `latency` and `endurance`; NLL in nats per token."""
        rows: list[Row] = []
        summary: dict[str, float] = {}
        for kind in KINDS:
            of_kind = [(cell, result) for cell, result in results if cell["kind"] == kind.kind]
            if of_kind:
                kind_rows = kind.rows(choices, of_kind)
                rows += kind_rows
                summary |= kind.summary(kind_rows)
        sizes = " or ".join(map(str, choices.cache_sizes()))
        protocol = (
            f"tokens {max(choices.cache_sizes()) + 1}..{choices.tokens} of {', '.join(_texts_of(results))}; "
            f"{sizes} cached tokens and the current one; positions counted in the "
            f"{' or the '.join(choices.positions)}"
        )
        if "recompute" in choices.ways:
            protocol += f"; recompute: {len(sampled(choices))} tokens"
        note = "A low perplexity here means stable generation, not a longer memory."
        if not choices.more_documents:
            note = f"One text. {note}"
        return EvalScores(
            eval=cls.name,
            protocol=protocol,
            recipe=choices.model_dump(mode="json"),
            rows=rows,
            summary=summary,
            note=note,
        )

    @property
    def document(self) -> Document:
        """The text that the ways go through, the first one if there are several."""
        return matching(self.documents, (self.choices.document,))[0]

    @property
    def texts(self) -> list[Document]:
        """All texts that the ways go through."""
        further = [matching(self.documents, (pattern,))[0] for pattern in self.choices.more_documents]
        return [self.document, *further]

    def text_ids(self, name: str) -> np.ndarray:
        """Return a text's scored tokens and the one before them, after the model's own first token if it has one."""
        return with_first(named(self.texts, name).ids_T[: self.choices.tokens + 1], first_token_id(self.tokenizer))

    def _check_texts(self) -> None:
        """Raise ValueError where the documents are too short."""
        choices, names = self.choices, [document.name for document in self.texts]
        if len({*names}) < len(names):
            raise ValueError(f"document and more_documents choose {', '.join(names)}: each text once")
        for document in self.texts:
            if len(document.ids_T) <= choices.tokens:
                raise ValueError(
                    f"{document.name} has {len(document.ids_T)} tokens; scoring {choices.tokens} takes one more than "
                    f"that: lower tokens or choose a longer document"
                )
        total = sum(len(document.ids_T) for document in self.documents)
        if choices.endurance_tokens >= total:
            raise ValueError(
                f"endurance_tokens {choices.endurance_tokens}, but all held-out documents have {total} tokens"
            )

    def _check_model(self) -> None:
        """Raise ValueError where the model's attention or its head does something that streaming cannot follow."""
        from longreach.evaluation.likelihood import check_attention, check_head
        from longreach.evaluation.small_cache import check_rope

        choices, model = self.choices, self.model
        check_head(model)
        check_attention(model)
        windowed = {*choices.ways} == {"recompute"} and not choices.rivals  # no pass over the whole text
        self.check_reach(max(choices.cache_sizes()) + 1 if windowed else len(self.text_ids(self.document.name)))
        decodes = bool(choices.latency_tokens or choices.endurance_tokens)
        if decodes or choices.rivals or {"window", "sinks"} & {*choices.ways}:
            check_rope(model, choices.tokens + 1, min(choices.cache_sizes()))

    @classmethod
    def section(cls, models: dict[str, EvalScores], style: Style, background: Background) -> Section:
        """Return the ways through the text, what a token costs in each, and the longest stream."""
        from longreach.evaluation.blocks import Section

        protocol = next(iter(models.values())).protocol
        warning = "Streaming keeps a model fluent; it does not let it see further back than its cache."
        text = f"Protocol: {protocol}. {warning}"
        blocks: list[Block] = [text]
        blocks += [*_ways_table(models), *_latency_table(models), *_endurance_table(models)]
        blocks.append(cls.figures(models, style, background))
        return Section(cls.title, blocks)

    @classmethod
    def figures(cls, models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
        """Return perplexity along the text, a figure for each model, and along the endurance runs of all models."""
        from longreach.evaluation.figures import lines
        from longreach.evaluation.sections import perplexity_curve

        figures = [_stream_figure(name, scores) for name, scores in models.items()]
        curves = {}
        for name, scores in models.items():
            if rows := scores.rows_with(kind="endurance"):
                curves[name] = perplexity_curve(rows, "end")
        if curves:
            caption = (
                "One stream through one cache that never grows. Flat: generation stays stable; a rise that stays is "
                "decay."
            )
            axes = ("token of the stream", "perplexity")
            figures.append(lines("endurance.png", "Endurance", caption, axes, curves, style, log=True))
        return figures


class Ways:
    """Perplexity of each way through the text."""

    kind: ClassVar[str] = "way"

    @staticmethod
    def cells(streaming: Streaming) -> list[Cell]:
        """Return a cell for each text and way; sinks have one for each number of them, place of positions, and line
        breaks."""
        choices = streaming.choices
        cells = []
        for text in streaming.texts:
            of_text = Ways._of_text(choices, text.name)
            cells += of_text
            for size in choices.more_cache_tokens:
                cells += [cell | {"cache_tokens": size} for cell in of_text if cell["way"] != "dense"]
        return cells

    @staticmethod
    def _of_text(choices: Streaming.Choices, name: str) -> list[Cell]:
        cells: list[Cell] = []

        def add(way: str, sinks: int = 0, positions: str = "cache", newlines: bool = False) -> None:
            cells.append(
                {
                    "kind": "way",
                    "document": name,
                    "way": way,
                    "sinks": sinks,
                    "positions": positions,
                    "newlines": newlines,
                }
            )

        for way in choices.ways:
            if way != "sinks":
                add(way)
                continue
            for sinks in choices.sink_tokens:
                for positions in choices.positions:
                    add(way, sinks, positions)
                if choices.newlines:
                    add(way, sinks, choices.positions[0], newlines=True)
        for rival in choices.rivals:
            for positions in choices.positions:
                add(rival, positions=positions)
        return cells

    @staticmethod
    def measure(streaming: Streaming, cell: Cell) -> Result:
        """Return {"nll": nats of text tokens 1.., of the sampled ones for `recompute`}."""
        from longreach.evaluation.small_cache import evicted_nll, recomputed_nll, streamed_nll

        choices, model, name = streaming.choices, streaming.model, cell["document"]
        ids_T, size = streaming.text_ids(name), size_of(choices, cell)
        if cell["way"] in choices.rivals:
            nll_T = evicted_nll(model, ids_T, cell["way"], size, cell["positions"], name)
            return {"nll": nll_T[-choices.tokens :].tolist()}
        if cell["way"] == "recompute":
            ends_N = sampled(choices) + len(ids_T) - 1 - choices.tokens
            return {"nll": recomputed_nll(model, ids_T, ends_N, size + 1, name).tolist()}
        sinks = cell["sinks"]
        if cell["newlines"]:
            # the model's own first token is no text, so it stays
            own = int(ids_T[0] == first_token_id(streaming.tokenizer))
            breaks = np.full(sinks - own, line_break(streaming.tokenizer))
            ids_T = np.concatenate([ids_T[:own], breaks, ids_T[sinks:]])
        window = size - sinks
        if cell["way"] == "dense":
            window = len(ids_T)
        nll_T = streamed_nll(model, ids_T, sinks, window, cell["positions"], name)
        return {"nll": nll_T[-choices.tokens :].tolist()}

    @staticmethod
    def rows(choices: Streaming.Choices, results: Results) -> list[Row]:
        """Return a row for each way, rows along the stream, and with several texts one for each way and text."""
        return tabulate(choices, [(cell, np.array(result["nll"])) for cell, result in results])

    @staticmethod
    def summary(rows: list[Row]) -> dict[str, float]:
        """Return the perplexity of each way."""
        summary = {}
        for row in rows:
            if row["kind"] == "way":
                summary[f"streaming_ppl_{_measure_name(row['way'])}"] = row["ppl"]
        return summary


class Latencies:
    """What decoding one token costs in each way."""

    kind: ClassVar[str] = "latency"

    @staticmethod
    def cells(streaming: Streaming) -> list[Cell]:
        """Return a cell for each way; sinks have the first number of them."""
        choices = streaming.choices
        if not choices.latency_tokens:
            return []
        common: Cell = {"kind": "latency", "document": streaming.document.name}
        cells = []
        for way in choices.ways:
            sinks = choices.sink_tokens[0] if way == "sinks" else 0
            cells.append(common | {"way": way, "sinks": sinks})
        for rival in choices.rivals:
            cells.append(common | {"way": rival, "sinks": 0, "positions": choices.positions[0]})
        smaller = [cell for cell in cells if cell["way"] != "dense"]
        for size in choices.more_cache_tokens:
            cells += [cell | {"cache_tokens": size} for cell in smaller]
        return cells

    @staticmethod
    def measure(streaming: Streaming, cell: Cell) -> Result:
        """Return {"rows": one}: milliseconds a token, and MiB of keys and values."""
        from longreach.evaluation.small_cache import decoding_latency

        choices = streaming.choices
        ids_T = streaming.text_ids(cell["document"])
        way, sinks, cache_tokens = cell["way"], cell["sinks"], size_of(choices, cell)
        positions = cell.get("positions", "text" if way == "dense" else "cache")
        costs = decoding_latency(streaming.model, ids_T, choices.latency_tokens, way, sinks, cache_tokens, positions)
        row = {
            "kind": "latency",
            "way": name_of(way, sinks) + _about_size(cell),
            "positions": positions,
            "cache_tokens": cache_tokens,
            "text_tokens": len(ids_T),
        }
        return {"rows": [row | costs]}

    @staticmethod
    def rows(choices: Streaming.Choices, results: Results) -> list[Row]:
        """Return the row of each way."""
        return gathered(results, "rows")

    @staticmethod
    def summary(rows: list[Row]) -> dict[str, float]:
        """Return the milliseconds of each way."""
        return {f"decode_ms_{_measure_name(row['way'])}": row["ms"] for row in rows}


class Endurance:
    """All held-out documents through one cache: does generation stay stable, does memory stay flat?"""

    kind: ClassVar[str] = "endurance"

    @staticmethod
    def cells(streaming: Streaming) -> list[Cell]:
        """Return one cell if an endurance run is asked for."""
        choices = streaming.choices
        if not choices.endurance_tokens:
            return []
        document = streaming.document.name
        return [
            {
                "kind": "endurance",
                "document": document,
                "tokens": choices.endurance_tokens,
                "sinks": choices.sink_tokens[0],
            }
        ]

    @staticmethod
    def measure(streaming: Streaming, cell: Cell) -> Result:
        """Return {"rows": along the run, the NLL and the process's resident memory}."""
        from longreach.evaluation.small_cache import endurance

        text_T = np.concatenate([document.ids_T for document in streaming.documents])[: cell["tokens"] + 1]
        ids_T = with_first(text_T, first_token_id(streaming.tokenizer))
        sinks = cell["sinks"]
        rows = []
        for part in endurance(streaming.model, ids_T, sinks, streaming.choices.cache_tokens - sinks, BINS):
            rows.append(
                {
                    "kind": "endurance",
                    "way": name_of("sinks", sinks),
                    "start": part["start"],
                    "end": part["end"],
                    "nll": part["nll"],
                    "ppl": math.exp(part["nll"]),
                    "resident_mib": part["resident_mib"],
                }
            )
        return {"rows": rows}

    @staticmethod
    def rows(choices: Streaming.Choices, results: Results) -> list[Row]:
        """Return the rows along the run."""
        return gathered(results, "rows")

    @staticmethod
    def summary(rows: list[Row]) -> dict[str, float]:
        """Return the perplexity of the whole run, and by how much the process grew in its last three quarters."""
        grown = rows[-1]["resident_mib"] - rows[len(rows) // 4]["resident_mib"]
        return {"endurance_ppl": math.exp(mean_of(rows, "nll")), "endurance_growth_mib": grown}


KINDS = (Ways, Latencies, Endurance)
"""What a cell can measure, in the order of the cells."""


def sampled(choices: Streaming.Choices) -> np.ndarray:
    """Return the text positions [N] whose next token `recompute` scores."""
    return np.arange(max(choices.cache_sizes()), choices.tokens, choices.recompute_every)


def size_of(choices: Streaming.Choices, cell: Cell) -> int:
    """Return the cache's size in a cell; only those of the further sizes say it."""
    return int(cell.get("cache_tokens", choices.cache_tokens))


def _measure_name(way: str) -> str:
    """Return a way's name as the summary writes it: `4_sinks_text_positions`."""
    return way.replace(",", "").replace(" ", "_")


def _about_size(cell: Cell) -> str:
    """Return the end of a way's name in one of the further sizes of the cache."""
    return f", cache {cell['cache_tokens']}" if "cache_tokens" in cell else ""


def line_break(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of a line break; ValueError where it is no token of its own."""
    before = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer("a\n", add_special_tokens=False).input_ids[len(before) :]  # alone, some put a blank before it
    if len(ids) != 1:
        raise ValueError(f"a line break is {len(ids)} tokens of this tokenizer: leave out streaming.newlines")
    return int(ids[0])


Measured = list[tuple[Cell, "np.ndarray"]]
"""Cells of ways with their NLL: entry t is text token t + 1's, for `recompute` that of the sampled tokens."""


def _texts_of(results: Results) -> list[str]:
    """Return the names of the texts that cells are about, in their order."""
    return list(dict.fromkeys(cell["document"] for cell, _ in results))


def tabulate(choices: Streaming.Choices, ways: Measured) -> list[Row]:
    """Return a row for each way over all texts, the rows along the first text, and of several texts a row each."""
    texts: dict[str, Measured] = {}
    for cell, nll_N in ways:
        texts.setdefault(cell["document"], []).append((cell, nll_N))
    totals: dict[str, list[Row]] = {}
    streams, by_text = [], []
    for name, of_text in texts.items():
        rows, along = tabulate_text(choices, of_text)
        streams.append(along)
        for row in rows:
            totals.setdefault(row["way"], []).append(row)
            by_text.append({**row, "kind": "text", "document": name})
    ratios = ratios_over_stretches(choices, texts)
    pooled = []
    for way, rows in totals.items():
        row = rows[0]
        if len(rows) > 1:
            about = {name: row[name] for name in ("kind", *ABOUT, "start", "end")}
            nll = mean_of(rows, "nll")
            row = about | {"scored": sum(one["scored"] for one in rows), "nll": nll, "ppl": math.exp(nll)}
        pooled.append(row | ratios.get(way, {}))
    return pooled + streams[0] + (by_text if len(texts) > 1 else [])


def ratios_over_stretches(choices: Streaming.Choices, texts: dict[str, Measured]) -> dict[str, Row]:
    """Return for each way its perplexity over that with the most sinks, and an interval over stretches of the texts.

    Both ways read the same stretches, once the cache is full, so that how hard a stretch is cancels
    out. Each size of the cache has its own yardstick. Nothing for `recompute`, which scores other
    tokens, nor where no sinks were measured.
    """
    most = {"way": "sinks", "sinks": max(choices.sink_tokens), "positions": choices.positions[0], "newlines": False}
    first = max(choices.cache_sizes())
    yardsticks: dict[str, str] = {}
    differences: dict[str, list[np.ndarray]] = {}
    for of_text in texts.values():
        nll_of: dict[str, np.ndarray] = {}
        for cell, nll_T in of_text:
            yardsticks[way_of(cell)] = way_of(most) + _about_size(cell)
            if cell["way"] != "recompute":
                nll_of[way_of(cell)] = nll_T[first:]
        for way, nll_N in nll_of.items():
            yardstick = yardsticks[way]
            if yardstick in nll_of and way != yardstick:
                differences.setdefault(way, []).append(nll_N - nll_of[yardstick])
    ratios = {}
    for way, of_texts in differences.items():
        stretches = []
        for difference_N in of_texts:
            pieces = np.array_split(difference_N, max(1, round(len(difference_N) / STRETCH)))
            stretches += [float(piece.mean()) for piece in pieces]
        interval = mean_interval(np.array(stretches))
        if interval:
            low, high = np.exp(interval).tolist()
            ratio = math.exp(np.concatenate(of_texts).mean())
            ratios[way] = {"beside": yardsticks[way], "ratio": ratio, "ratio_low": low, "ratio_high": high}
    return ratios


def tabulate_text(choices: Streaming.Choices, ways: Measured) -> tuple[list[Row], list[Row]]:
    """Return a row for each way through one text, and the rows along it."""
    sampled_N, first = sampled(choices), max(choices.cache_sizes())
    edges = np.linspace(0, choices.tokens, min(BINS, choices.tokens) + 1).astype(int).tolist()
    totals, along = [], []
    for cell, nll_N in ways:
        size = size_of(choices, cell)
        beside = _beside(choices, ways, size)
        about: Row = {
            "way": way_of(cell),
            "positions": cell["positions"],
            "cache_tokens": size,
            "sink_tokens": cell["sinks"],
            "protocol": "every token",
        }
        scored_N = np.arange(choices.tokens)
        beside_T = np.zeros(choices.tokens)
        if cell["way"] == "recompute":
            scored_N = sampled_N
            if choices.recompute_every > 1:
                about["protocol"] = f"1 token in {choices.recompute_every}"
                if beside:
                    about["protocol"] += f", beside {way_of(beside[0])}"
                    beside_T = beside[1]
        total = mean_over(nll_N, scored_N, beside_T, first, choices.tokens)
        totals.append({"kind": "way"} | about | total)
        for start, end in pairwise(edges):
            if start >= scored_N[0]:
                part = mean_over(nll_N, scored_N, beside_T, start, end)
                if part["scored"]:
                    along.append({"kind": "stream"} | about | part)
    return totals, along


def _beside(choices: Streaming.Choices, ways: Measured, size: int) -> tuple[Cell, np.ndarray] | None:
    """Return the way beside which a sample of `recompute` in a cache of this size is judged: it scores all tokens and
    is the most alike."""
    for wanted in ("sinks", "dense", "window"):
        for cell, nll_T in ways:
            if cell["way"] == wanted and size_of(choices, cell) == size:
                return cell, nll_T
    return None


def way_of(cell: Cell) -> str:
    """Return a way's name, with what is unusual about it."""
    name = name_of(cell["way"], cell["sinks"])
    if cell["positions"] == "text":
        name += ", text positions"
    if cell["newlines"]:
        name += ", newlines"
    return name + _about_size(cell)


def name_of(way: str, sinks: int) -> str:
    """Return what a way is called in rows and figures: `dense`, `window`, `recompute`, `4 sinks`, `TOVA`."""
    if way in ("tova", "h2o"):
        return way.upper()
    if way != "sinks":
        return way
    return "1 sink" if sinks == 1 else f"{sinks} sinks"


def mean_over(nll_N: np.ndarray, scored_N: np.ndarray, beside_T: np.ndarray, start: int, end: int) -> Row:
    """Return the mean NLL of tokens start..end-1: that of beside_T over all of them, plus the mean
    difference to it over scored_N.

    With beside_T zero and every token scored this is the plain mean. Only sampled means have an
    interval, over differences.
    """
    inside = (start <= scored_N) & (scored_N < end)
    if not inside.any():
        return {"scored": 0}
    difference_N = nll_N[inside] - beside_T[scored_N[inside]]
    nll = float(beside_T[start:end].mean() + difference_N.mean())
    row = {"start": start, "end": end, "scored": int(inside.sum()), "nll": nll, "ppl": math.exp(nll)}
    interval = None
    if row["scored"] < end - start:
        interval = mean_interval(difference_N)
    if interval:
        low, high = interval
        row["ppl_low"] = math.exp(nll + low - difference_N.mean())
        row["ppl_high"] = math.exp(nll + high - difference_N.mean())
    return row


def _ways_table(models: dict[str, EvalScores]) -> list[Table]:
    """Return the perplexity of each way, a column for each model; of several texts once more by text."""
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
    legend = "Small: the tokens that are scored. n sinks: the first n tokens stay in the cache, beside the most recent."
    if "TOVA" in ways or "H2O" in ways:
        legend += (
            " TOVA forgets what the current token attends to least, H2O what all have attended to least, but for the "
            "most recent half."
        )
    if beside:
        legend += (
            f" ×: over that with {' or '.join(sorted(beside))} on the same tokens, and its 95% interval over stretches "
            f"of {STRETCH} tokens."
        )
    tables = [Table(f"Perplexity once the cache of {cache} tokens is full", ["way", *models], lines, legend=legend)]
    if len(sizes) > 1:
        tables += [_sizes_table(name, scores, sorted(sizes)) for name, scores in models.items()]
    if texts:
        lines = [[way, *cells_of(rows, models, perplexity_cell)] for way, rows in texts.items()]
        tables.append(Table("The same by text", ["way", *models], lines))
    return tables


def _sizes_table(name: str, scores: EvalScores, sizes: list[int]) -> Table:
    """Return one model's perplexity by way and size of the cache, as StreamingLLM's tables 2 and 6."""
    from longreach.evaluation.blocks import Table
    from longreach.evaluation.sections import cells_of, perplexity_cell, with_commas

    ways: dict[str, dict[int, Row]] = {}
    for row in scores.rows_with(kind="way"):
        way = row["way"].removesuffix(f", cache {row['cache_tokens']}")
        if way != "dense":
            ways.setdefault(way, {})[row["cache_tokens"]] = row
    lines = [[way, *cells_of(rows, sizes, perplexity_cell)] for way, rows in ways.items()]
    columns = ["way", *with_commas(sizes)]
    legend = "All sizes are scored on the same tokens, those after the greatest cache."
    return Table(f"{name}: perplexity by size of the cache", columns, lines, legend=legend)


def _way_cell(row: Row | None) -> str:
    """Return a way's perplexity and, small, what it is beside the most sinks."""
    from longreach.evaluation.sections import perplexity_cell

    text = perplexity_cell(row)
    if row is None or "ratio" not in row:
        return text
    return f"{text}\n{row['ratio']:.4g} × ({row['ratio_low']:.4g} to {row['ratio_high']:.4g})"


def _latency_table(models: dict[str, EvalScores]) -> list[Table]:
    """Return what decoding a token costs in each way, a column for each model that was timed."""
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
        tokens = next(iter(rows.values()))["text_tokens"]  # one text for all ways, but not for all models
        heads.append(f"{name}\n{tokens:,} tokens")
    caption = "Milliseconds to decode a token, the median at the end of so many tokens; small: keys and values"
    return [Table(caption, ["way", *heads], lines)]


def _endurance_table(models: dict[str, EvalScores]) -> list[Table]:
    """Return the endurance runs in numbers, a row for each model that has one."""
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
    columns = ["model", "tokens", "perplexity", "of its last part", "memory at the end (MiB)", "grown (MiB)"]
    legend = "Memory: the process's. Grown: in the last three quarters; a cache that leaks would show here."
    return [Table("All held-out documents through one cache", columns, lines, legend=legend)]


def _stream_figure(name: str, scores: EvalScores) -> Figure:
    """Draw one model's perplexity along the text, a curve for each usual way; the others are in the table."""
    from longreach.evaluation.figures import Style, lines
    from longreach.evaluation.sections import perplexity_curve

    curves: dict[str, list[Row]] = {}
    for row in scores.rows_with(kind="stream"):
        if "," not in row["way"]:  # neither text positions nor line breaks
            curves.setdefault(row["way"], []).append(row)
    caption = (
        "Once its cache is full, a plain window drops the first tokens, on which attention rests, and should leap; "
        "with a few of them kept as sinks it should stay near the window that is recomputed for each token."
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
