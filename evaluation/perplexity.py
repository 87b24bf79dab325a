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
from typing import Any

import altair as alt
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longreach.evaluation.documents import Document, first_token_id, matching, with_first
from longreach.evaluation.figures import curves
from longreach.evaluation.likelihood import check_head, is_dynamic, token_nll
from longreach.evaluation.recipe import PerplexityRecipe
from longreach.evaluation.scores import EvalScores, bootstrap_mean

PROTOCOLS = ("last_stride", "whole_window")
ALL = "*"


def cells(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, recipe: PerplexityRecipe, documents: list[Document]
) -> list[dict[str, Any]]:
    """A pass each: the document, how far it is read, and which lengths that serves.

    Raises ValueError for a length that no document reaches or that last_tokens does not fit into.
    """
    chosen = matching(documents, recipe.documents)
    names = [document.name for document in chosen]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{len(twice)} names belong to several held-out documents ({twice[0]}): rename the files")
    lengths = sorted(set(recipe.lengths))
    check_lengths(lengths, recipe.last_tokens, chosen)
    check_head(model, chosen[0].ids_T)
    found = []
    for document in chosen:
        fitting = [n for n in lengths if n <= len(document.ids_T)]
        for length in passes(model, fitting):
            serves = [length] if is_dynamic(model) else fitting
            place = {"document": document.name, "domain": document.domain, "length": length}
            found.append(place | {"serves": serves, "longest": length == fitting[-1]})
    return found


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    recipe: PerplexityRecipe,
    documents: list[Document],
    cell: dict[str, Any],
) -> dict[str, Any]:
    """{"nll": nats of text tokens 1 .. length-1, "seconds"}. FloatingPointError for logits that are not finite."""
    document = next(d for d in documents if d.name == cell["document"])
    began = time.perf_counter()
    ids_T = with_first(document.ids_T[: cell["length"]], first_token_id(tokenizer))
    nll_T = token_nll(model, ids_T, document.name)[1 - cell["length"] :]
    return {"nll": nll_T.tolist(), "seconds": time.perf_counter() - began}


def collect(recipe: PerplexityRecipe, results: list[tuple[dict[str, Any], dict[str, Any]]]) -> EvalScores:
    """Rows of kind `document`, `pooled` (per length and protocol, over all documents and by domain) and `position`.

    NLL in nats per token.
    """
    rows: list[dict[str, Any]] = []
    for cell, result in results:
        nll_T, about = np.array(result["nll"]), {"document": cell["document"], "domain": cell["domain"]}
        for served in cell["serves"]:
            rows += document_rows(about, nll_T[: served - 1], recipe.last_tokens)
        if cell["longest"]:
            rows += position_rows(about, nll_T, recipe.last_tokens)
    pooled = pooled_rows(rows, recipe.seed)
    names = {"last_stride": "ppl", "whole_window": "ppl_window"}
    summary = {f"{names[r['protocol']]}_{r['length']}": r["ppl"] for r in pooled if r["domain"] == ALL}
    passed, seconds = sum(c["length"] for c, _ in results), sum(r["seconds"] for _, r in results)
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


def document_rows(about: dict[str, str], nll_T: np.ndarray, last_tokens: int) -> list[dict[str, Any]]:
    """One row a protocol, for the context that ends with nll_T's last token; about: the document's name and domain."""
    scored = {"last_stride": nll_T[-last_tokens:], "whole_window": nll_T}
    return [
        {
            "kind": "document",
            "protocol": protocol,
            "length": len(nll_T) + 1,
        }
        | about
        | {
            "documents": 1,
            "tokens": len(scored[protocol]),
            "nll": float(scored[protocol].mean()),
            "ppl": math.exp(scored[protocol].mean()),
        }
        for protocol in PROTOCOLS
    ]


def position_rows(about: dict[str, str], nll_T: np.ndarray, bin_tokens: int) -> list[dict[str, Any]]:
    """The NLL curve along the text, in bins of bin_tokens positions; entry t of nll_T is text token t + 1's."""
    return [
        {
            "kind": "position",
            "protocol": "per_position",
        }
        | about
        | {
            "start": start,
            "end": min(start + bin_tokens, len(nll_T) + 1),
            "nll": float(nll_T[max(0, start - 1) : start + bin_tokens - 1].mean()),
        }
        for start in range(0, len(nll_T) + 1, bin_tokens)
        if start + bin_tokens > 1  # the first token is predicted from nothing
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


def figure(scores: EvalScores) -> Any:
    """Perplexity by length, a line a document and one for all; below, the NLL along the text."""
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
    upper = curves(by_length, x="length", y="ppl", by="line", titles=names, log="xy", low="ppl_low", high="ppl_high")
    along = [row | {"middle": (row["start"] + row["end"]) / 2} for row in scores.rows if row["kind"] == "position"]
    below = ("Along the text", "position (tokens)", "NLL (nats per token)")
    return alt.vconcat(upper, curves(along, x="middle", y="nll", by="document", titles=below)).resolve_scale(
        color="independent", strokeDash="independent"
    )
