"""Perplexity by context length on held-out documents, under LongLoRA's two readings of it (arXiv:2309.12307).

One causal pass over a document's first L tokens scores every token in its full context, so the pass at the greatest
length that fits a document serves all shorter lengths too. Two protocols, named in every row:

  last_stride    mean over the last `last_tokens` tokens of the context: each has (nearly) the whole length behind it
  whole_window   mean over all tokens of the context: easy to compare with published numbers, but burdened by the first
                 tokens, which have little context

In this form different lengths score different tokens of the same text. So compare models at one length, where they
score exactly the same tokens; one model's numbers at two lengths differ by the text as well. A length counts the text's
tokens; a model's own first token (BOS or sink) stands before them and is not scored, nor is the text's first token.

Pooled rows average over documents, which are the independent units: the interval resamples documents, not tokens.

    longreach evaluate MODEL --eval perplexity --set lengths=[2048,8192]

Legend: T tokens, D documents.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from pydantic import Field

from longreach.evaluation.base import Cell, DocumentNames, EvalChoices, Evaluation, Result
from longreach.evaluation.documents import Document, first_token_id, matching, with_first
from longreach.evaluation.scores import EvalScores, Row, bootstrap_mean
from longreach.infra.lazy import lazy_module

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel
else:
    np = lazy_module("numpy")

PROTOCOLS = ("last_stride", "whole_window")
ALL = "*"
"""The document and the domain of rows that are means over all of them."""


class Perplexity(Evaluation):
    """How well are held-out texts predicted, by how much of them the model sees?"""

    name = "perplexity"
    title = "Perplexity"
    gate = ("perplexity_ratio", "base_ratio")

    class Choices(EvalChoices):
        """Perplexity by context length on held-out documents."""

        lengths: tuple[int, ...] = Field(default=(1024, 2048, 4096), min_length=1)
        """Context lengths in tokens, below and above the trained one."""
        documents: DocumentNames = ("*",)
        """Names (shell patterns) of held-out documents; those shorter than a length do not count at that length."""
        last_tokens: int = Field(default=256, ge=1)
        """The `last_stride` protocol scores this many tokens at the end of each context."""

    choices: Choices

    def cells(self) -> list[Cell]:
        """Return a cell for each pass: the document, how far it is read, and the lengths that this pass serves.

        Raises:
            ValueError: a length that no document reaches or into which last_tokens does not fit.
        """
        from longreach.evaluation.likelihood import check_head, is_dynamic

        chosen = matching(self.documents, self.choices.documents)
        _check_names([document.name for document in chosen])
        lengths = sorted(set(self.choices.lengths))
        check_lengths(lengths, self.choices.last_tokens, chosen)
        check_head(self.model, chosen[0].ids_T)
        cells = []
        for document in chosen:
            fitting = [n for n in lengths if n <= len(document.ids_T)]
            for length in passes(self.model, fitting):
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
        """Return {"nll": nats of the text's tokens 1 .. length-1, "seconds": of the pass}."""
        from longreach.evaluation.likelihood import token_nll

        document = next(d for d in self.documents if d.name == cell["document"])
        began = time.perf_counter()
        ids_T = with_first(document.ids_T[: cell["length"]], first_token_id(self.tokenizer))
        nll_T = token_nll(self.model, ids_T, document.name)[1 - cell["length"] :]
        return {"nll": nll_T.tolist(), "seconds": time.perf_counter() - began}

    @classmethod
    def scores(cls, choices: Choices, results: list[tuple[Cell, Result]]) -> EvalScores:
        """Return rows of kind `pooled` (by length and protocol, over all documents and by domain), `document` and
        `position`; NLL in nats per token."""
        rows: list[Row] = []
        for cell, result in results:
            nll_T = np.array(result["nll"])
            place = {"document": cell["document"], "domain": cell["domain"]}
            for length in cell["serves"]:
                rows += document_rows(place, nll_T[: length - 1], choices.last_tokens)
            if cell["longest"]:
                rows += position_rows(place, nll_T, choices.last_tokens)
        pooled = pooled_rows(rows, choices.seed)
        names = {"last_stride": "ppl", "whole_window": "ppl_window"}
        summary = {}
        for row in pooled:
            if row["domain"] == ALL:
                summary[f"{names[row['protocol']]}_{row['length']}"] = row["ppl"]
        tokens = sum(cell["length"] for cell, _ in results)
        seconds = sum(result["seconds"] for _, result in results)
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
    def figure(cls, scores: EvalScores) -> Any:
        """Perplexity by length, a line a document and one for all; below, the NLL along the text."""
        import altair as alt

        from longreach.evaluation.figures import curves

        question = [
            f"{scores.model}: does the text stay predictable as the context grows?",
            "lower is better; a rise past the trained length means that the model breaks there",
        ]
        by_length = [
            row | {"line": "all documents" if row["domain"] == ALL else row["document"]}
            for row in scores.rows
            if row["protocol"] == "last_stride" and (row["kind"] == "document" or row["domain"] == ALL)
        ]
        names = (question, "context length (tokens)", f"perplexity of the last {scores.recipe['last_tokens']} tokens")
        upper = curves(
            by_length, x="length", y="ppl", by="line", titles=names, log="xy", low="ppl_low", high="ppl_high"
        )
        along = [row | {"middle": (row["start"] + row["end"]) / 2} for row in scores.rows if row["kind"] == "position"]
        below = ("Along the text", "position (tokens)", "NLL (nats per token)")
        return alt.vconcat(upper, curves(along, x="middle", y="nll", by="document", titles=below)).resolve_scale(
            color="independent", strokeDash="independent"
        )


def _check_names(names: list[str]) -> None:
    """Raise ValueError where two documents have one name, which rows could not tell apart."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"{len(repeated)} names belong to several held-out documents ({repeated[0]}): rename the files"
        )


def check_lengths(lengths: list[int], last_tokens: int, documents: list[Document]) -> None:
    """Raise ValueError where a length has nothing to score."""
    longest = max(documents, key=lambda document: len(document.ids_T))
    if lengths[-1] > len(longest.ids_T):
        raise ValueError(
            f"length {lengths[-1]} is longer than every chosen document; the longest, {longest.name}, has "
            f"{len(longest.ids_T)} tokens: lower the length or choose longer documents"
        )
    if lengths[0] <= last_tokens:
        raise ValueError(
            f"length {lengths[0]} has no room for last_tokens {last_tokens} and a token before them: "
            f"use a length of at least {last_tokens + 1}, or fewer last_tokens"
        )


def passes(model: PreTrainedModel, lengths: list[int]) -> list[int]:
    """Return the lengths at which a document is read to serve all `lengths`.

    The greatest serves all, except where rotary frequencies change with the length: then each has its own pass.
    """
    from longreach.evaluation.likelihood import is_dynamic

    return lengths if is_dynamic(model) else lengths[-1:]


def document_rows(place: dict[str, str], nll_T: np.ndarray, last_tokens: int) -> list[Row]:
    """Return a row for each protocol, for the context that ends with nll_T's last token.

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
    """Return the NLL along the text, in bins of bin_tokens positions; entry t of nll_T is text token t + 1's."""
    tokens = len(nll_T) + 1
    rows = []
    for start in range(0, tokens, bin_tokens):
        end = min(start + bin_tokens, tokens)
        if end == 1:
            continue  # the text's first token is predicted from nothing, so a bin of it alone has no NLL
        nll = float(nll_T[max(0, start - 1) : end - 1].mean())
        row: Row = {"kind": "position", "protocol": "per_position"}
        rows.append(row | place | {"start": start, "end": end, "nll": nll})
    return rows


def pooled_rows(rows: list[Row], seed: int) -> list[Row]:
    """Return means over documents and, where there are several domains, over each domain's; exp of the mean NLL."""
    documents = [row for row in rows if row["kind"] == "document"]
    domains = sorted({row["domain"] for row in rows})
    shown = [ALL, *domains] if len(domains) > 1 else [ALL]
    pooled = []
    for length, protocol in sorted({(row["length"], row["protocol"]) for row in documents}):
        for domain in shown:
            of_domain = [
                row
                for row in documents
                if (row["length"], row["protocol"]) == (length, protocol) and domain in (ALL, row["domain"])
            ]
            if of_domain:
                place = {"protocol": protocol, "length": length, "domain": domain}
                pooled.append(_pooled(place, of_domain, seed))
    return pooled


def _pooled(place: Row, documents: list[Row], seed: int) -> Row:
    """Return the mean over documents' rows, with an interval if there are two or more."""
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
    interval = bootstrap_mean(nll_D, seed)
    if interval:
        row |= {"ppl_low": math.exp(interval[0]), "ppl_high": math.exp(interval[1])}
    return row
