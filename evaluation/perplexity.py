"""Perplexity by context length on held-out documents, under LongLoRA's two readings of it (arXiv:2309.12307).

One causal pass over a document's first L tokens scores every token in its full context, so the pass at the greatest
length that fits a document serves all shorter lengths too. Two protocols, named in every row:

  last_stride    mean over the last `last_tokens` tokens of the context: each has (nearly) the whole length behind it
  whole_window   mean over all tokens of the context: easy to compare with published numbers, flattered by nothing but
                 burdened by its first tokens, which have little context

In this form different lengths score different tokens of the same text. So compare models at one length, where they
score exactly the same tokens; one model's numbers at two lengths differ by the text as well. A length counts the text's
tokens; a model's own first token (BOS or sink) stands before them and is not scored, nor is the text's first token.

Pooled rows average over documents, which are the independent units: the interval resamples documents, not tokens.

    longreach evaluate MODEL --eval perplexity --set lengths=[2048,8192]

Legend: T tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.documents import Document, Progress, first_token_id, matching, silent, with_first
from evaluation.figures import COLOURS, new_axes
from evaluation.likelihood import check_head, is_dynamic, token_nll
from evaluation.recipe import PerplexityRecipe
from evaluation.scores import EvalScores, bootstrap_mean

PROTOCOLS = ("last_stride", "whole_window")
ALL = "*"


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    recipe: PerplexityRecipe,
    documents: Iterable[Document] = (),
    progress: Progress = silent,
) -> EvalScores:
    """Rows of kind `document`, `pooled` (per length and protocol, over all documents and by domain) and `position`.

    NLL in nats per token. Raises ValueError for a length that no document reaches or that last_tokens does not fit
    into, FloatingPointError for logits that are not finite.
    """
    chosen = matching(documents, recipe.documents)
    lengths = sorted(set(recipe.lengths))
    check_lengths(lengths, recipe.last_tokens, chosen)
    first = first_token_id(tokenizer)
    check_head(model, chosen[0].ids_T)
    rows: list[dict[str, Any]] = []
    seconds, passed = 0.0, 0
    todo = [(d, n) for d in chosen for n in passes(model, [n for n in lengths if n <= len(d.ids_T)])]
    for done, (document, length) in enumerate(todo):
        progress(done, len(todo))
        began = time.perf_counter()
        nll_T = token_nll(model, with_first(document.ids_T[:length], first), document.name)[1 - length :]
        seconds, passed = seconds + time.perf_counter() - began, passed + length
        for served in [length] if is_dynamic(model) else [n for n in lengths if n <= length]:
            rows += document_rows(document, nll_T[: served - 1], recipe.last_tokens)
        if length == max(n for d, n in todo if d is document):
            rows += position_rows(document, nll_T, recipe.last_tokens)
    progress(len(todo), len(todo))
    pooled = pooled_rows(rows, recipe.seed)
    names = {"last_stride": "ppl", "whole_window": "ppl_window"}
    summary = {f"{names[r['protocol']]}_{r['length']}": r["ppl"] for r in pooled if r["domain"] == ALL}
    return EvalScores(
        eval="perplexity",
        protocol=f"one causal pass a document; last_stride: its last {recipe.last_tokens} tokens; whole_window: all",
        recipe=recipe.model_dump(mode="json"),
        rows=pooled + rows,
        summary=summary | {"tokens_per_s": passed / seconds},
        note="Lengths score different tokens: compare models at one length, not lengths of one model.",
    )


def check_lengths(lengths: list[int], last_tokens: int, documents: list[Document]) -> None:
    """ValueError where a length has nothing to score."""
    longest = max(documents, key=lambda d: len(d.ids_T))
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
    """The lengths at which a document is run to serve all `lengths`: the greatest, or each one (is_dynamic)."""
    return lengths if is_dynamic(model) else lengths[-1:]


def document_rows(document: Document, nll_T: np.ndarray, last_tokens: int) -> list[dict[str, Any]]:
    """One row a protocol, for the context that ends with nll_T's last token."""
    scored = {"last_stride": nll_T[-last_tokens:], "whole_window": nll_T}
    return [
        {
            "kind": "document",
            "protocol": protocol,
            "length": len(nll_T) + 1,
            "document": document.name,
            "domain": document.domain,
            "documents": 1,
            "tokens": len(scored[protocol]),
            "nll": float(scored[protocol].mean()),
            "ppl": math.exp(scored[protocol].mean()),
        }
        for protocol in PROTOCOLS
    ]


def position_rows(document: Document, nll_T: np.ndarray, bin_tokens: int) -> list[dict[str, Any]]:
    """The NLL curve along the text, in bins of bin_tokens positions; entry t of nll_T is text token t + 1's."""
    return [
        {
            "kind": "position",
            "protocol": "per_position",
            "document": document.name,
            "domain": document.domain,
            "start": start,
            "end": min(start + bin_tokens, len(nll_T) + 1),
            "nll": float(nll_T[max(0, start - 1) : start + bin_tokens - 1].mean()),
        }
        for start in range(0, len(nll_T), bin_tokens)
    ]


def pooled_rows(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Over documents and, where there are several domains, over each domain's; exp of the mean NLL."""
    domains = sorted({row["domain"] for row in rows})
    cells = sorted({(row["length"], row["protocol"]) for row in rows if row["kind"] == "document"})
    pooled = []
    for length, protocol in cells:
        here = [row for row in rows if row.get("length") == length and row["protocol"] == protocol]
        for domain in [ALL, *(domains if len(domains) > 1 else [])]:
            nll_D = np.array([row["nll"] for row in here if domain in (ALL, row["domain"])])
            if len(nll_D):
                tokens = sum(row["tokens"] for row in here if domain in (ALL, row["domain"]))
                pooled.append(
                    {"kind": "pooled", "protocol": protocol, "length": length, "document": ALL, "domain": domain}
                    | {"documents": len(nll_D), "tokens": tokens, "nll": float(nll_D.mean())}
                    | {"ppl": math.exp(nll_D.mean())}
                )
                if interval := bootstrap_mean(nll_D, seed):
                    pooled[-1] |= {"ppl_low": math.exp(interval[0]), "ppl_high": math.exp(interval[1])}
    return pooled


def figure(scores: EvalScores) -> Figure:
    """Perplexity by length, a thin line a document and a thick one for all."""
    fig, axes = new_axes(
        f"{scores.model}: does the text stay predictable as the context grows?\n(lower is better; a rise past the "
        f"trained length means the model breaks there)",
        "context length (tokens)",
        f"perplexity of the last {scores.recipe['last_tokens']} tokens",
    )
    rows = [row for row in scores.rows if row["protocol"] == "last_stride" and row["domain"] != ALL]
    for n, name in enumerate(dict.fromkeys(r["document"] for r in rows if r["kind"] == "document")):
        mine = sorted((r["length"], r["ppl"]) for r in rows if r["document"] == name)
        axes.plot(*zip(*mine, strict=True), "o-", lw=1, ms=3, color=COLOURS[1 + n % (len(COLOURS) - 1)], label=name)
    every = [r for r in scores.rows if r["protocol"] == "last_stride" and r["domain"] == ALL]
    axes.plot([r["length"] for r in every], [r["ppl"] for r in every], "ks-", lw=2.5, label="all documents")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([r["length"] for r in every], [f"{r['length']:,}" for r in every])
    axes.legend(fontsize=7)
    return fig
