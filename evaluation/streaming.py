"""Perplexity of streaming a text with a small cache, in four ways (StreamingLLM, arXiv:2309.17453, figure 3).

  dense      every token sees all tokens before it, as with an unbounded cache
  window     the cache keeps the last `cache_tokens` tokens; perplexity explodes once the first tokens are evicted,
             because they receive the attention that a softmax has to put somewhere (attention sinks)
  recompute  before each token, a fresh pass over the last `cache_tokens` tokens; perplexity stays low, but the cost
             is quadratic in the cache size
  n sinks    the first n tokens stay in the cache permanently, together with the most recent ones

Each way predicts from `cache_tokens` cached tokens and the current one. All ways but `recompute`
are computed for the whole text in one pass (evaluation/small_cache.py), with the same result as
decoding token by token. So are published caches of the same size that choose by attention what to
evict (`rivals`: TOVA and H2O, attention/evicting_cache.py). `recompute` needs a pass for each
scored token, so it scores only every n-th token. Its mean is estimated by difference: the mean of
another way over all tokens, plus the mean difference to that way over the sample. NLL varies far
more between neighbouring tokens than between two ways on one token. So the difference is known to a
few per cent, while the error of the sample's own mean would be tens of per cent.

Perplexity is measured from the token where the ways begin to differ: once the cache (the largest, if
there are several) is full. Streaming keeps a model fluent without end, but does not let it see
further back than its cache.

Positions are counted in the cache (as in the paper) or in the text. RoPE is relative, so this makes
a difference only for sinks and rivals. `newlines` replaces the first tokens by line breaks (the paper's table
2), which shows whether their place or their meaning matters. Latencies and cache sizes are measured
on the real decode path. `endurance_tokens` streams all documents through one cache. So there are
three kinds of cells, with a class for each: `Ways`, `Latencies` and `Endurance`.

    longreach evaluate MODEL --eval streaming --set document=2026-Trump-1 --set cache_tokens=256

Legend: T tokens, N sampled tokens.
"""

from __future__ import annotations

import math
from itertools import pairwise
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

    from longreach.evaluation.blocks import Figure, Section
    from longreach.evaluation.figures import Style
else:
    np = lazy_module("numpy")

PIECE_TOKENS = 256
"""Tokens of a piece of text for comparing ways where there is one text."""
ABOUT = ("way", "positions", "cache_tokens", "sink_tokens", "protocol")
"""Columns that identify the way of a row."""
BINS = 24
"""Points of the curves along the text and along the endurance run."""

Results = list[tuple[Cell, Result]]


class Streaming(Evaluation):
    """Does generation stay stable when the text outgrows the cache?"""

    name = "streaming"
    title = "Streaming with a small cache"
    revision = 1

    class Choices(EvalChoices):
        """StreamingLLM's four ways through one text (2309.17453, figure 3)."""

        document: DocumentName = "*"
        """Held-out document (name, or a shell pattern whose first match is used)."""
        more_documents: New[DocumentNames] = ()
        """More held-out documents for the same ways (names, or shell patterns whose first match is used). Not used
        for latencies; the endurance run always streams all held-out documents."""
        tokens: int = Field(default=1024, ge=2)
        """Number of tokens of each document that are scored."""
        cache_tokens: int = Field(default=256, ge=2)
        """Cache size in tokens, sinks included (`dense` keeps all tokens)."""
        more_cache_tokens: New[tuple[Count, ...]] = ()
        """More cache sizes in tokens. All ways but `dense` are measured with each size, on the tokens after the
        largest one, so that sizes can be compared. The endurance run uses only cache_tokens."""
        sink_tokens: tuple[int, ...] = Field(default=(4,), min_length=1)
        """Numbers of first tokens that the sink cache keeps; each number is a separate way."""
        ways: tuple[Literal["dense", "window", "recompute", "sinks"], ...] = Field(
            default=("dense", "window", "recompute", "sinks"), min_length=1
        )
        """Which of the four ways to measure."""
        rivals: New[tuple[Literal["tova", "h2o"], ...]] = ()
        """Caches of the same size that choose by attention what to evict, each a separate way: tova (2401.06104), h2o
        (heavy hitters, 2306.14048). They need no training."""
        recompute_every: int = Field(default=16, ge=1)
        """The `recompute` way scores every n-th token, because each needs a pass over its own window; 1 scores all."""
        positions: tuple[Literal["cache", "text"], ...] = Field(default=("cache",), min_length=1)
        """Where positions of the ways with sinks and of rivals are counted: in the cache (as in the paper) or in the
        text; each is a separate way."""
        newlines: bool = False
        """Also measure ways whose sinks are replaced by line breaks, to see if the sinks' place or meaning matters."""
        latency_tokens: int = Field(default=0, ge=0)
        """Number of tokens to decode one by one in each way to time them; 0: do not measure latencies."""
        endurance_tokens: int = Field(default=0, ge=0)
        """Number of tokens, from all held-out documents, to stream through one sink cache; 0: no endurance run."""

        @model_validator(mode="after")
        def _fits(self) -> Streaming.Choices:
            sizes = self.cache_sizes()
            if len({*sizes}) < len(sizes):
                raise ValueError(
                    f"cache_tokens and more_cache_tokens {list(sizes)} list a size twice: list each size once"
                )
            smallest, largest = min(sizes), max(sizes)
            if self.latency_tokens and self.latency_tokens + largest + 1 >= self.tokens:
                raise ValueError(
                    f"latency_tokens {self.latency_tokens} and cache_tokens {largest} before them do not fit "
                    f"into tokens {self.tokens}: lower latency_tokens or raise tokens"
                )
            if min(self.sink_tokens) < 1:
                raise ValueError(
                    f"sink_tokens {list(self.sink_tokens)} must be at least 1 each; for no sinks, use the way 'window'"
                )
            most = max(self.sink_tokens)
            if most >= smallest:
                raise ValueError(
                    f"sink_tokens {most} leave no room for recent tokens in cache_tokens {smallest}: "
                    f"use fewer sinks or a larger cache"
                )
            if largest >= self.tokens:
                raise ValueError(
                    f"tokens {self.tokens} must be more than cache_tokens {largest}, because all ways are the "
                    f"same until the cache is full: raise tokens or lower cache_tokens"
                )
            return self

        def cache_sizes(self) -> tuple[int, ...]:
            """Return all cache sizes, `cache_tokens` first."""
            return (self.cache_tokens, *self.more_cache_tokens)

        def longest_input(self) -> int:
            """Return the largest number of tokens that the model reads at once."""
            return self.tokens

    choices: Choices

    def cells(self) -> list[Cell]:
        """Return a cell for each way, then one for each latency, then the endurance run.

        Raises:
            ValueError: a text is missing or too short, or the model's attention cannot be streamed.
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
        """Return the result of the cell's kind; raise FloatingPointError for logits that are not finite."""
        kind = next(kind for kind in KINDS if kind.kind == cell["kind"])
        return kind.measure(self, cell)

    @classmethod
    def scores(cls, choices: Choices, results: Results) -> EvalScores:
        """Return rows of kind `way` (perplexity after the largest cache is full), `text` (the same by text, if there
        are several), `stream` (binned along the text), `latency` and `endurance`. NLL is in nats per token."""
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
        """The text to stream; the first one if there are several."""
        return matching(self.documents, (self.choices.document,))[0]

    @property
    def texts(self) -> list[Document]:
        """All texts to stream."""
        further = [matching(self.documents, (pattern,))[0] for pattern in self.choices.more_documents]
        return [self.document, *further]

    def text_ids(self, name: str) -> np.ndarray:
        """Return the token ids of a text: the model's own first token if it has one, the text's first token, and the
        scored tokens."""
        return with_first(named(self.texts, name).ids_T[: self.choices.tokens + 1], first_token_id(self.tokenizer))

    def _check_texts(self) -> None:
        """Raise ValueError if a document is too short, or chosen twice."""
        choices, names = self.choices, [document.name for document in self.texts]
        if len({*names}) < len(names):
            raise ValueError(
                f"document and more_documents choose {', '.join(names)}, which has a text twice: choose each text once"
            )
        for document in self.texts:
            if len(document.ids_T) <= choices.tokens:
                raise ValueError(
                    f"{document.name} has {len(document.ids_T)} tokens, but scoring {choices.tokens} tokens needs at "
                    f"least one more than that: lower tokens or choose a longer document"
                )
        total = sum(len(document.ids_T) for document in self.documents)
        if choices.endurance_tokens >= total:
            raise ValueError(
                f"endurance_tokens is {choices.endurance_tokens}, but must be less than the {total} tokens of all "
                f"held-out documents: lower it or add documents"
            )

    def _check_model(self) -> None:
        """Raise ValueError if the model's attention, head or position encoding does not allow streaming."""
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
        """Return a section with the perplexity of each way, the latency of a token in each, and the endurance run
        (streaming_page.py)."""
        from longreach.evaluation.blocks import Section
        from longreach.evaluation.streaming_page import tables

        protocol = next(iter(models.values())).protocol
        warning = "Streaming keeps a model fluent; it does not let it see further back than its cache."
        text = f"Protocol: {protocol}. {warning}"
        return Section(cls.title, [text, *tables(models), cls.figures(models, style, background)])

    @classmethod
    def figures(cls, models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
        """Return a figure of perplexity along the text for each model, and one of the endurance runs of all models."""
        from longreach.evaluation.streaming_page import endurance_figure, stream_figure

        return [*(stream_figure(name, scores) for name, scores in models.items()), *endurance_figure(models, style)]


class Ways:
    """Cells that measure the perplexity of each way."""

    kind: ClassVar[str] = "way"

    @staticmethod
    def cells(streaming: Streaming) -> list[Cell]:
        """Return a cell for each text and way. The way `sinks` has a cell for each number of sinks, each choice of
        positions, and line breaks."""
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
        """Return {"nll": nats of each text token from token 1 on; for `recompute`, of the sampled tokens}."""
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
            # the model's own first token is not part of the text, so it stays
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
        """Return a row for each way, rows along the stream and, with several texts, a row for each way and text."""
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
    """Cells that measure the time and memory of decoding a token in each way."""

    kind: ClassVar[str] = "latency"

    @staticmethod
    def cells(streaming: Streaming) -> list[Cell]:
        """Return a cell for each way and cache size. The way `sinks` uses the first number in sink_tokens."""
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
        """Return {"rows": [a row]} with milliseconds per token, and MiB of keys and values."""
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
    """The cell that streams all held-out documents through one cache, to see if perplexity and memory stay stable."""

    kind: ClassVar[str] = "endurance"

    @staticmethod
    def cells(streaming: Streaming) -> list[Cell]:
        """Return one cell if endurance_tokens is set."""
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
        """Return {"rows": NLL and the process's resident memory along the run}."""
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
        """Return the perplexity of the whole run, and the growth of the process in its last three quarters, in MiB."""
        grown = rows[-1]["resident_mib"] - rows[len(rows) // 4]["resident_mib"]
        return {"endurance_ppl": math.exp(mean_of(rows, "nll")), "endurance_growth_mib": grown}


KINDS = (Ways, Latencies, Endurance)
"""The kinds of cells, in the order of the cells."""


def sampled(choices: Streaming.Choices) -> np.ndarray:
    """Return the text positions [N] whose next token `recompute` scores."""
    return np.arange(max(choices.cache_sizes()), choices.tokens, choices.recompute_every)


def size_of(choices: Streaming.Choices, cell: Cell) -> int:
    """Return the cache size of a cell. Only cells for more_cache_tokens state it."""
    return int(cell.get("cache_tokens", choices.cache_tokens))


def _measure_name(way: str) -> str:
    """Return a way's name as written in the summary, such as `4_sinks_text_positions`."""
    return way.replace(",", "").replace(" ", "_")


def _about_size(cell: Cell) -> str:
    """Return the suffix of a way's name that states a cache size from more_cache_tokens; empty for cache_tokens."""
    return f", cache {cell['cache_tokens']}" if "cache_tokens" in cell else ""


def line_break(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token id of a line break; raise ValueError if it is not a single token."""
    before = tokenizer("a", add_special_tokens=False).input_ids
    # some tokenizers put a space before a line break that stands alone
    ids = tokenizer("a\n", add_special_tokens=False).input_ids[len(before) :]
    if len(ids) != 1:
        raise ValueError(f"this tokenizer makes {len(ids)} tokens of a line break, not 1: leave out streaming.newlines")
    return int(ids[0])


Measured = list[tuple[Cell, "np.ndarray"]]
"""Cells of ways with their NLL: entry t belongs to text token t + 1; for `recompute`, entry n to sampled token n."""


def _texts_of(results: Results) -> list[str]:
    """Return the names of the texts in the results, in their order."""
    return list(dict.fromkeys(cell["document"] for cell, _ in results))


def tabulate(choices: Streaming.Choices, ways: Measured) -> list[Row]:
    """Return a row for each way over all texts, the rows along the first text and, if there are several texts, a row
    for each way and text."""
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
    ratios = ratios_to_most_sinks(choices, texts)
    pooled = []
    for way, rows in totals.items():
        row = rows[0]
        if len(rows) > 1:
            about = {name: row[name] for name in ("kind", *ABOUT, "start", "end")}
            nll = mean_of(rows, "nll")
            row = about | {"scored": sum(one["scored"] for one in rows), "nll": nll, "ppl": math.exp(nll)}
        pooled.append(row | ratios.get(way, {}))
    return pooled + streams[0] + (by_text if len(texts) > 1 else [])


def ratios_to_most_sinks(choices: Streaming.Choices, texts: dict[str, Measured]) -> dict[str, Row]:
    """Return the ratio of each way's perplexity to that of the way with the most sinks, with a 95% interval.

    Both ways read the same tokens once the cache is full, so the difficulty of a text cancels out.
    The interval is over the texts. A single text is cut into pieces of PIECE_TOKENS, and the
    interval is over these, as if they were independent: it says nothing about other texts. Each
    cache size has its own baseline. There is no ratio for `recompute`, which scores other tokens,
    and none at all if no sinks were measured.
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
        parts = of_texts
        if len(of_texts) == 1:
            parts = np.array_split(of_texts[0], max(1, round(len(of_texts[0]) / PIECE_TOKENS)))
        interval = mean_interval(np.array([part.mean() for part in parts]))
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
    """Return the way to which a sample of `recompute` with this cache size is compared: the most similar way that
    scores all tokens; None if there is none."""
    for wanted in ("sinks", "dense", "window"):
        for cell, nll_T in ways:
            if cell["way"] == wanted and size_of(choices, cell) == size:
                return cell, nll_T
    return None


def way_of(cell: Cell) -> str:
    """Return a way's name, with text positions, line breaks and another cache size if it has them."""
    name = name_of(cell["way"], cell["sinks"])
    if cell["positions"] == "text":
        name += ", text positions"
    if cell["newlines"]:
        name += ", newlines"
    return name + _about_size(cell)


def name_of(way: str, sinks: int) -> str:
    """Return a way's name in rows and figures: `dense`, `window`, `recompute`, `4 sinks`, `TOVA`."""
    if way in ("tova", "h2o"):
        return way.upper()
    if way != "sinks":
        return way
    return "1 sink" if sinks == 1 else f"{sinks} sinks"


def mean_over(nll_N: np.ndarray, scored_N: np.ndarray, beside_T: np.ndarray, start: int, end: int) -> Row:
    """Return the mean NLL of tokens start..end-1: the mean of beside_T over all of them, plus the mean
    difference to it over scored_N.

    If beside_T is zero and every token is scored, this is the plain mean. Only means over a sample
    have an interval, which is over the differences.
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
