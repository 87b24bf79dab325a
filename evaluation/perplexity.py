"""Perplexity by context length on held-out documents, in the two ways of LongLoRA
(arXiv:2309.12307).

One causal pass over a document's first L tokens scores every token with all text before it. So the
pass at the longest length that fits a document also serves all shorter lengths. There are two
protocols, and every row names its protocol:

  last_stride    mean over the last `last_tokens` tokens of the context: each has (nearly) the whole length before it
  whole_window   mean over all tokens of the context: easy to compare with published numbers, but includes the first
                 tokens, which have little context

Different lengths score different tokens of the same text. So compare models at one length, where
they score exactly the same tokens. One model's numbers at two lengths also differ because the text
differs. A length counts the tokens of the text. The model's own first token (BOS or sink) comes
before them. Neither this token nor the first token of the text is scored.

Pooled rows average over documents, which are the independent units, so the confidence interval is
over documents, not tokens.

    longreach evaluate MODEL --eval perplexity --set lengths=[2048,8192]

Legend: T tokens, D documents.
"""

from __future__ import annotations

import math
import time
from itertools import chain
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from longreach.evaluation.base import Background, Cell, DocumentNames, EvalChoices, Evaluation, Result
from longreach.evaluation.documents import Document, check_names, first_token_id, matching, named, with_first
from longreach.evaluation.scores import EvalScores, Row, mean_interval, paired
from longreach.infra.lazy import lazy_module

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from longreach.evaluation.blocks import Block, Figure, Section, Table
    from longreach.evaluation.figures import Style
else:
    np = lazy_module("numpy")

PROTOCOLS = ("last_stride", "whole_window")
ALL = "*"
"""The value of `document` and `domain` in rows that are means over all of them."""


class Perplexity(Evaluation):
    """How well does the model predict held-out texts at each context length?"""

    name = "perplexity"
    title = "Perplexity"
    revision = 1
    gate = ("perplexity_ratio", "base_ratio")

    class Choices(EvalChoices):
        """Perplexity by context length on held-out documents."""

        lengths: tuple[int, ...] = Field(default=(1024, 2048, 4096), min_length=1)
        """Context lengths in tokens; choose some below and some above the trained length."""
        documents: DocumentNames = Field(default=("*",), min_length=1)
        """Names (shell patterns) of held-out documents; by default all test documents. Validation
        documents, on which choices are made, are read only if they are named. A document shorter than a
        length is not used at that length."""
        last_tokens: int = Field(default=256, ge=1)
        """Number of tokens at the end of each context that the `last_stride` protocol scores."""

        @model_validator(mode="after")
        def _room_for_context(self) -> Perplexity.Choices:
            if min(self.lengths) <= self.last_tokens:
                raise ValueError(
                    f"lengths {list(self.lengths)} must be above last_tokens {self.last_tokens}, because the first "
                    f"token of a text is not scored: use a length of at least {self.last_tokens + 1}, or fewer "
                    f"last_tokens"
                )
            return self

    choices: Choices

    def cells(self) -> list[Cell]:
        """Return a cell for each pass: the document, the number of tokens to read, and the lengths
        that the pass serves.

        Raises:
            ValueError: a length is longer than every document, or too long for the model.
        """
        from longreach.evaluation.likelihood import check_head, is_dynamic

        documents = self.documents
        if self.choices.documents == ("*",):
            documents = [document for document in documents if document.split != "validation"] or documents
        chosen = matching(documents, self.choices.documents)
        check_names([document.name for document in chosen])
        lengths = sorted(set(self.choices.lengths))
        check_lengths(lengths, chosen)
        check_head(self.model)
        cells = []
        for document in chosen:
            fitting = [n for n in lengths if n <= len(document.ids_T)]
            for length in passes(self.model, fitting):
                self.check_reach(len(with_first(document.ids_T[:length], first_token_id(self.tokenizer))))
                cells.append(
                    {
                        "document": document.name,
                        "domain": document.domain,
                        "length": length,
                        "serves": [length] if is_dynamic(self.model) else fitting,
                        "longest": length == fitting[-1],
                    }
                )
        return cells

    def measure(self, cell: Cell) -> Result:
        """Return {"nll": nats for each of the text's tokens 1 .. length-1, "seconds": duration of
        the pass}."""
        from longreach.evaluation.likelihood import token_nll

        document = named(self.documents, cell["document"])
        began = time.perf_counter()
        ids_T = with_first(document.ids_T[: cell["length"]], first_token_id(self.tokenizer))
        nll_T = token_nll(self.model, ids_T, document.name)[1 - cell["length"] :]
        return {"nll": nll_T.tolist(), "seconds": time.perf_counter() - began}

    @classmethod
    def scores(cls, choices: Choices, results: list[tuple[Cell, Result]]) -> EvalScores:
        """Return rows of kind `pooled` (by length and protocol, over all documents and by domain),
        `document` and `position`, and `position_in_pass` for shorter passes of their own. NLL is in
        nats per token."""
        rows: list[Row] = []
        tokens, seconds = 0, 0.0
        for cell, result in results:
            nll_T = np.array(result["nll"])
            place = {"document": cell["document"], "domain": cell["domain"]}
            for length in cell["serves"]:
                rows += document_rows(place, nll_T[: length - 1], choices.last_tokens)
            if cell["longest"]:
                rows += position_rows(place, nll_T, choices.last_tokens)
            else:  # the rotary frequencies depend on the length, so this pass has an NLL of its own at each position
                for row in position_rows(place, nll_T, choices.last_tokens):
                    rows.append(row | {"kind": "position_in_pass", "pass": cell["length"]})
            tokens += cell["length"]
            seconds += result["seconds"]
        pooled = pooled_rows(rows)
        names = {"last_stride": "ppl", "whole_window": "ppl_window"}
        summary = {}
        for row in pooled:
            if row["domain"] == ALL:
                summary[f"{names[row['protocol']]}_{row['length']}"] = row["ppl"]
        return EvalScores(
            eval=cls.name,
            protocol=f"one causal pass a document; last_stride: its last {choices.last_tokens} tokens; "
            "whole_window: all",
            recipe=choices.model_dump(mode="json"),
            rows=pooled + rows,
            summary=summary | {"tokens_per_s": tokens / seconds},
            note="Lengths score different tokens: compare models at one length, not lengths of one model.",
        )

    @classmethod
    def section(cls, models: dict[str, EvalScores], style: Style, background: Background) -> Section:
        """Return a section with both protocols and their intervals, differences on the same tokens,
        and the perplexity along each text."""
        from longreach.evaluation.blocks import Section

        first = next(iter(models.values()))
        table, documents = _protocol_table(models)
        text = f"Protocol: {first.protocol}. {first.note}"
        if max(documents) > 1:
            counts = " or ".join(map(str, sorted(documents)))
            text += f" In small type: 95% intervals over {counts} documents."
        blocks: list[Block] = [text, table]
        compared = background.of_one_base(models)
        blocks += difference_tables(compared)
        if compared:
            blocks.append(cls.figures(compared, style, background))
        return Section(cls.title, blocks)

    @classmethod
    def figures(cls, models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
        """Return one model's figures, with a curve for each document. In a report, return a figure
        for each document, with a curve for each model."""
        if background.related is None and len(models) == 1:
            (scores,) = models.values()
            return _one_model_figures(scores, background)
        return _along_figures(models, style, background)


def check_lengths(lengths: list[int], documents: list[Document]) -> None:
    """Raise ValueError if no document has as many tokens as the longest length."""
    longest = max(documents, key=lambda document: len(document.ids_T))
    if lengths[-1] > len(longest.ids_T):
        raise ValueError(
            f"length {lengths[-1]} is longer than every chosen document; the longest, {longest.name}, has "
            f"{len(longest.ids_T)} tokens: lower the length or choose longer documents"
        )


def passes(model: PreTrainedModel, lengths: list[int]) -> list[int]:
    """Return the lengths at which a document must be read to serve all `lengths`.

    The longest serves all, unless the rotary frequencies change with the length. Then each length
    needs its own pass.
    """
    from longreach.evaluation.likelihood import is_dynamic

    return lengths if is_dynamic(model) else lengths[-1:]


def document_rows(place: dict[str, str], nll_T: np.ndarray, last_tokens: int) -> list[Row]:
    """Return a row for each protocol, for the context that ends with the last token of nll_T.

    place: the document's name and domain.
    """
    scored = {"last_stride": nll_T[-last_tokens:], "whole_window": nll_T}
    rows = []
    for protocol in PROTOCOLS:
        mean = float(scored[protocol].mean())
        row: Row = {"kind": "document", "protocol": protocol, "length": len(nll_T) + 1}
        row |= place
        row |= {"documents": 1, "tokens": len(scored[protocol]), "nll": mean, "ppl": math.exp(mean)}
        rows.append(row)
    return rows


def position_rows(place: dict[str, str], nll_T: np.ndarray, bin_tokens: int) -> list[Row]:
    """Return the NLL along the text, in bins of bin_tokens positions. Entry t of nll_T belongs to
    text token t + 1."""
    tokens = len(nll_T) + 1
    rows = []
    for start in range(0, tokens, bin_tokens):
        end = min(start + bin_tokens, tokens)
        if end == 1:
            continue  # the text's first token is not predicted, so a bin with only this token has no NLL
        nll = float(nll_T[max(0, start - 1) : end - 1].mean())
        row: Row = {"kind": "position", "protocol": "per_position"}
        rows.append(row | place | {"start": start, "end": end, "nll": nll})
    return rows


def pooled_rows(rows: list[Row]) -> list[Row]:
    """Return means over all documents and, if there are several domains, over each domain's
    documents. Perplexity is exp of the mean NLL."""
    groups: dict[tuple[int, str], list[Row]] = {}
    domains = set()
    for row in rows:
        domains.add(row["domain"])
        if row["kind"] == "document":
            groups.setdefault((row["length"], row["protocol"]), []).append(row)
    shown = [ALL]
    if len(domains) > 1:
        shown += sorted(domains)
    pooled = []
    for (length, protocol), documents in sorted(groups.items()):
        for domain in shown:
            of_domain = [row for row in documents if domain in (ALL, row["domain"])]
            if of_domain:
                place = {"protocol": protocol, "length": length, "domain": domain}
                pooled.append(_pooled(place, of_domain))
    return pooled


def _pooled(place: Row, documents: list[Row]) -> Row:
    """Return the mean over the rows of documents, with an interval if there are at least two."""
    nll_D = np.array([row["nll"] for row in documents])
    row = {
        "kind": "pooled",
        "protocol": place["protocol"],
        "length": place["length"],
        "document": ALL,
        "domain": place["domain"],
        "documents": len(nll_D),
        "tokens": sum(row["tokens"] for row in documents),
        "nll": float(nll_D.mean()),
        "ppl": math.exp(nll_D.mean()),
    }
    interval = mean_interval(nll_D)
    if interval:
        row |= {"ppl_low": math.exp(interval[0]), "ppl_high": math.exp(interval[1])}
    return row


def _protocol_table(models: dict[str, EvalScores]) -> tuple[Table, set[int]]:
    """Return the table of perplexity by protocol and length, and the numbers of documents in its
    means."""
    from longreach.evaluation.blocks import Table
    from longreach.evaluation.sections import cells_of, perplexity_cell, with_commas

    heads, groups = ["model"], [("", 1)]
    lines = [[name] for name in models]
    documents = set()
    for protocol in PROTOCOLS:
        rows_of: dict[str, dict[int, Row]] = {name: {} for name in models}
        for name, scores in models.items():
            for row in scores.rows_with(kind="pooled", protocol=protocol, domain=ALL):
                rows_of[name][row["length"]] = row
                documents.add(row["documents"])
        lengths = sorted(set(chain(*rows_of.values())))
        heads += with_commas(lengths)
        groups.append((protocol, len(lengths)))
        for line, by_length in zip(lines, rows_of.values(), strict=True):
            line += cells_of(by_length, lengths, perplexity_cell)
    return Table("By context length", heads, lines, groups), documents


def difference_tables(models: dict[str, EvalScores]) -> list[Table]:
    """Return a table that compares each model with the first one on the same tokens; none for fewer
    than two models.

    A cell has a dash if the two models did not read the same tokens.
    """
    from longreach.evaluation.blocks import Table
    from longreach.evaluation.sections import DASH

    if len(models) < 2:
        return []
    (reference, theirs), *others = models.items()
    lengths = sorted(theirs.distinct("length", kind="pooled"))
    lines = []
    for name, ours in others:
        cells = [_difference_cell(ours.rows, theirs.rows, length) for length in lengths]
        lines.append([name, *cells])
    caption = (
        f"Difference in NLL to {reference} on the same tokens "
        "(nats per token; below 0: better; in small type: 95% interval over documents, or within a single document)"
    )
    legend = ""
    if any(DASH in cells for _, *cells in lines):
        legend = f"{DASH}: up to this length, no bin of tokens was scored by both models."
    return [Table(caption, ["model", *(f"up to {length:,}" for length in lengths)], lines, legend=legend)]


def _difference_cell(ours: list[Row], theirs: list[Row], length: int) -> str:
    """Return the difference of two models up to a length, with its interval in small type."""
    from longreach.evaluation.sections import DASH

    try:
        difference = paired(ours, theirs, length)
    except ValueError:  # the other model read other documents
        return DASH
    text = f"{difference['nll']:+.3f}"
    if not math.isnan(difference["low"]):
        text += f"\n{difference['low']:+.3f} to {difference['high']:+.3f}"
    return text


def _one_model_figures(scores: EvalScores, background: Background) -> list[Figure]:
    """Draw one model's perplexity by length and along the text, with a curve for each document."""
    from longreach.evaluation.figures import lines
    from longreach.evaluation.sections import document_style, perplexity_curve

    whole = "all documents"
    rows_of: dict[str, list[Row]] = {whole: []}
    for row in scores.rows_with(protocol="last_stride"):
        if row["kind"] == "document":
            rows_of.setdefault(row["document"], []).append(row)
        elif row["domain"] == ALL:
            rows_of[whole].append(row)
    by_length = {document: perplexity_curve(rows, "length") for document, rows in rows_of.items()}
    ticks = [point[0] for point in by_length[whole]]
    along = {}
    for document in by_length:
        rows = scores.rows_with(kind="position", document=document)
        if rows:
            along[document] = coarser(rows)
    style, marks = document_style(by_length, whole), background.marks()
    return [
        lines(
            "perplexity-by-document.png",
            f"Perplexity by document: {scores.model}",
            "Lower is better. A rise past the trained length means that the model breaks there.",
            ("context length (tokens)", f"perplexity (last {scores.recipe['last_tokens']} tokens)"),
            by_length,
            style,
            log=True,
            ticks=ticks,
            marks=marks,
        ),
        lines(
            "along.png",
            f"Along the text: {scores.model}",
            "If a curve rises past the trained length, the model breaks there.",
            ("token of the text", "perplexity"),
            along,
            style,
            log=True,
            marks=marks,
        ),
    ]


def _along_figures(models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
    """Draw a figure for each document. All models score the same tokens, so it shows where a model
    breaks."""
    from longreach.evaluation.figures import lines

    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, scores in models.items():
        for document in scores.distinct("document", kind="position"):
            rows = scores.rows_with(kind="position", document=document)
            curves.setdefault(document, {})[name] = coarser(rows)
    caption = (
        "All models score the same tokens. If a curve leaves the others past the trained length, that model breaks "
        "there."
    )
    axes, marks = ("token of the text", "perplexity"), background.marks()
    figures = []
    for number, (document, of_document) in enumerate(curves.items()):
        file, title = f"along-{number}.png", f"Along the text: {document}"
        figures.append(lines(file, title, caption, axes, of_document, style, log=True, marks=marks))
    return figures


def coarser(rows: list[Row], points: int = 16) -> list[tuple[float, float]]:
    """Return a curve of (last token, perplexity) with at most `points` points, each the mean over
    consecutive rows."""
    step = math.ceil(len(rows) / points)
    curve = []
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        tokens = sum(row["end"] - row["start"] for row in part)
        nll = sum(row["nll"] * (row["end"] - row["start"]) for row in part) / tokens
        curve.append((part[-1]["end"], math.exp(nll)))
    return curve
