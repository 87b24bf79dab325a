"""Streaming a text with a small cache, four ways (StreamingLLM, arXiv:2309.17453, figure 3): perplexity on the way.

  dense      every token sees all before it: what an unbounded cache would give
  window     the cache keeps the last `cache_tokens` tokens: collapses once the first tokens have left it, because they
             carry the attention that a softmax has to put somewhere (attention sinks)
  recompute  before each token, a fresh pass over the last `cache_tokens` tokens: no collapse, at a price that is
             quadratic in the cache
  n sinks    the first n tokens stay for ever, beside the most recent ones, in the same cache

Each way predicts from `cache_tokens` cached tokens and the current one. All but `recompute` are computed for the whole
text in one pass (attention/streaming.py) that gives what decoding token by token with attention.sink_cache would.
`recompute` needs a pass for each scored token, so it scores every n-th one and its mean is estimated by difference: the
mean of another way over all tokens, plus the mean difference to it over the sample. Neighbouring tokens differ in NLL
far more than two ways do on one token, so the difference is known to a few per cent where the sample's own mean would
be off by tens.

Perplexity counts from the token where the ways begin to differ: after the first `cache_tokens` tokens of the text.
Streaming keeps a model fluent for ever; it does not let it see further back than its cache.

Positions are counted in the cache (the paper's way) or in the text; RoPE is relative, so that only sinks can tell. Is
it the first tokens' place or their meaning? `newlines` replaces them by line breaks (the paper's table 2). Latencies
and cache sizes are measured on the real decode path; `endurance_tokens` streams all documents through one cache.

    longreach evaluate MODEL --eval streaming --set document=2026-Trump-1 --set cache_tokens=256

Legend: T tokens, N sampled tokens, B windows in a batch, W window tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from itertools import pairwise
from statistics import median
from typing import Any

import altair as alt
import numpy as np
import psutil
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from longreach.attention.hf import attending_by
from longreach.attention.rope import Rotary
from longreach.attention.sink_cache import SinkCache
from longreach.attention.streaming import streamed_attention
from longreach.evaluation.documents import Document, first_token_id, matching, with_first
from longreach.evaluation.figures import curves
from longreach.evaluation.likelihood import check_attention, check_head, hidden_nll, is_dynamic, token_nll
from longreach.evaluation.recipe import StreamingRecipe
from longreach.evaluation.scores import EvalScores, bootstrap_mean

BATCH_TOKENS = 4096
"""Tokens of the windows that `recompute` runs at once."""
BINS = 24
"""Points of the curve along the stream."""
FED = 512
"""Tokens that the endurance run reads at once."""


def cells(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, recipe: StreamingRecipe, documents: list[Document]
) -> list[dict[str, Any]]:
    """A way each, then a latency each, then the endurance run. ValueError for a text that is missing or too short."""
    document = matching(documents, (recipe.document,))[0]
    if len(document.ids_T) <= recipe.tokens:
        raise ValueError(
            f"{document.name} has {len(document.ids_T)} tokens; scoring {recipe.tokens} takes one more than that: "
            f"lower tokens or choose a longer document"
        )
    if recipe.endurance_tokens >= (there := sum(len(d.ids_T) for d in documents)):
        raise ValueError(f"endurance_tokens {recipe.endurance_tokens}, but all held-out documents have {there} tokens")
    check_head(model, document.ids_T)
    check_attention(model)
    if {"window", "sinks"} & {*recipe.ways} or recipe.latency_tokens or recipe.endurance_tokens:
        check_rope(model, recipe.tokens + 1, recipe.cache_tokens)
    if (recipe.latency_tokens or recipe.endurance_tokens) and model.config._attn_implementation != "sdpa":
        raise ValueError(
            f"latency_tokens and endurance_tokens need attention 'sdpa' for their cache, {type(model).__name__} has "
            f"{model.config._attn_implementation!r}: set both to 0"
        )
    if recipe.newlines:
        line_break(tokenizer)
    found: list[dict[str, Any]] = []
    about = {"document": document.name}
    for way in recipe.ways:
        if way != "sinks":
            found.append(about | {"way": way, "sinks": 0, "positions": "cache", "newlines": False})
            continue
        for n in recipe.sink_tokens:
            found += [about | {"way": way, "sinks": n, "positions": p, "newlines": False} for p in recipe.positions]
            found += [
                about | {"way": way, "sinks": n, "positions": p, "newlines": True}
                for p in recipe.positions[: recipe.newlines]
            ]
    if recipe.latency_tokens:
        decoded = [(way, recipe.sink_tokens[0] if way == "sinks" else 0) for way in recipe.ways]
        found += [{"latency": way, "sinks": n} for way, n in decoded]
    if recipe.endurance_tokens:
        found.append({"endurance": recipe.endurance_tokens, "sinks": recipe.sink_tokens[0]})
    return found


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    recipe: StreamingRecipe,
    documents: list[Document],
    cell: dict[str, Any],
) -> dict[str, Any]:
    """A way: {"nll": nats of text tokens 1.., of the sampled ones for `recompute`}. FloatingPointError for logits that
    are not finite."""
    first = first_token_id(tokenizer)
    if "endurance" in cell:
        text_T = np.concatenate([d.ids_T for d in documents])[: cell["endurance"] + 1]
        return endurance(model, with_first(text_T, first), cell["sinks"], recipe.cache_tokens - cell["sinks"])
    document = matching(documents, (recipe.document,))[0]
    ids_T = with_first(document.ids_T[: recipe.tokens + 1], first)
    if "latency" in cell:
        return latency(model, ids_T, cell["latency"], cell["sinks"], recipe)
    if cell["way"] == "recompute":
        ends_N = sampled(recipe) + len(ids_T) - 1 - recipe.tokens
        return {"nll": recomputed_nll(model, ids_T, ends_N, recipe.cache_tokens + 1, document.name).tolist()}
    if cell["newlines"]:
        at = int(ids_T[0] == first)  # the model's own first token stays: it is no text
        ids_T = np.concatenate([ids_T[:at], np.full(cell["sinks"] - at, line_break(tokenizer)), ids_T[cell["sinks"] :]])
    window = len(ids_T) if cell["way"] == "dense" else recipe.cache_tokens - cell["sinks"]
    nll_T = streamed_nll(model, ids_T, cell["sinks"], window, cell["positions"], document.name)
    return {"nll": nll_T[-recipe.tokens :].tolist()}


def collect(recipe: StreamingRecipe, results: list[tuple[dict[str, Any], dict[str, Any]]]) -> EvalScores:
    """Rows of kind `way` (perplexity after the first cache_tokens tokens), `stream` (binned along the text), `latency`
    and `endurance`; NLL in nats per token."""
    ways = [(cell, np.array(result["nll"])) for cell, result in results if "way" in cell]
    rows, along = tabulate(recipe, ways, sampled(recipe))
    others = [row for cell, result in results if "way" not in cell for row in result["rows"]]
    summary = {f"streaming_ppl_{row['way'].replace(',', '').replace(' ', '_')}": row["ppl"] for row in rows}
    summary |= {f"decode_ms_{row['way'].replace(' ', '_')}": row["ms"] for row in others if row["kind"] == "latency"}
    if enduring := [row for row in others if row["kind"] == "endurance"]:
        summary |= {"endurance_ppl": math.exp(np.mean([row["nll"] for row in enduring]))}
        summary |= {"endurance_growth_mib": enduring[-1]["resident_mib"] - enduring[len(enduring) // 4]["resident_mib"]}
    return EvalScores(
        eval="streaming",
        protocol=f"tokens {recipe.cache_tokens + 1}..{recipe.tokens} of {ways[0][0]['document']}; "
        f"{recipe.cache_tokens} cached tokens and the current one; positions counted in the "
        f"{' or the '.join(recipe.positions)}"
        + f"; recompute: {len(sampled(recipe))} tokens"
        * ("recompute" in recipe.ways),
        recipe=recipe.model_dump(mode="json"),
        rows=rows + along + others,
        summary=summary,
        note="One text. A low perplexity here means stable generation, not a longer memory.",
    )


def sampled(recipe: StreamingRecipe) -> np.ndarray:
    """Text positions [N] whose next token `recompute` scores."""
    return np.arange(recipe.cache_tokens, recipe.tokens, recipe.recompute_every)


def line_break(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of a line break. ValueError where it has none of its own."""
    before, ids = (tokenizer(text, add_special_tokens=False).input_ids for text in ("a", "a\n"))
    ids = ids[len(before) :]  # alone, some tokenizers put a blank before it
    if len(ids) != 1:
        raise ValueError(f"a line break is {len(ids)} tokens of this tokenizer: leave out streaming.newlines")
    return int(ids[0])


@torch.inference_mode()
def latency(
    model: PreTrainedModel, ids_T: np.ndarray, way: str, sinks: int, recipe: StreamingRecipe
) -> dict[str, list[dict[str, Any]]]:
    """One row: the median milliseconds in which the text's last latency_tokens tokens are decoded one by one, and the
    bytes of keys and values that are kept meanwhile; dense has the whole text before them."""
    x_1T, many, took = torch.from_numpy(ids_T)[None].to(model.device), recipe.latency_tokens, []
    window = recipe.cache_tokens - sinks
    cache = DynamicCache(config=model.config) if way == "dense" else SinkCache(model.config, sinks, window)
    if way != "recompute":
        model(x_1T[:, : -many - 1], past_key_values=cache, logits_to_keep=1)
    for n in range(x_1T.shape[1] - many - 1, x_1T.shape[1]):  # the first one warms up
        began = time.perf_counter()
        if way == "recompute":
            model(x_1T[:, n - recipe.cache_tokens : n + 1], use_cache=False, logits_to_keep=1)
        else:
            model(x_1T[:, n : n + 1], past_key_values=cache, logits_to_keep=1)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    kept = sum(
        getattr(layer, name).nbytes
        for layer in cache.layers
        for name in ("keys", "values", "sink_keys")
        if isinstance(getattr(layer, name, None), torch.Tensor)
    )
    about = {"way": name_of(way, sinks), "cache_tokens": recipe.cache_tokens, "text_tokens": x_1T.shape[1]}
    return {"rows": [{"kind": "latency", **about, "ms": median(took[1:]) * 1e3, "cache_mib": kept / 2**20}]}


@torch.inference_mode()
def endurance(model: PreTrainedModel, ids_T: np.ndarray, sinks: int, window: int) -> dict[str, list[dict[str, Any]]]:
    """Rows along one long stream through one SinkCache: NLL, and the process's resident memory at the end of each."""
    cache = SinkCache(model.config, sinks, window)
    edges, rows = np.linspace(0, len(ids_T) - 1, min(BINS, len(ids_T) - 1) + 1).astype(int).tolist(), []
    for start, end in pairwise(edges):
        nll: list[np.ndarray] = []
        for at in range(start, end, FED):
            to = min(at + FED, end)
            x_T = torch.from_numpy(ids_T[at : to + 1]).to(model.device)
            hidden_TE = model.base_model(x_T[None, :-1], past_key_values=cache, use_cache=True).last_hidden_state[0]
            nll.append(hidden_nll(model, hidden_TE, x_T[1:], f"endurance, from token {at} on").cpu().numpy())
        mean = float(np.concatenate(nll).mean())
        resident = psutil.Process().memory_info().rss / 2**20
        place = {"kind": "endurance", "way": name_of("sinks", sinks), "start": start, "end": end}
        rows.append(place | {"nll": mean, "ppl": math.exp(mean), "resident_mib": resident})
    return {"rows": rows}


def streamed_nll(
    model: PreTrainedModel, ids_T: np.ndarray, sink_tokens: int, window_tokens: int, positions: str, name: str
) -> np.ndarray:
    """NLL [T-1] of decoding token by token with a cache of sink_tokens + window_tokens keys; errors as `token_nll`."""
    if sink_tokens + window_tokens >= len(ids_T) - 1:
        return token_nll(model, ids_T, name)  # nothing is ever evicted
    check_rope(model, len(ids_T), sink_tokens + window_tokens)
    with attending_by(model, "streamed", StreamedAttention(model, sink_tokens, window_tokens, positions)):
        return token_nll(model, ids_T, name)


def check_rope(model: PreTrainedModel, tokens: int, cache_tokens: int) -> None:
    """ValueError for a RoPE that changes with the length of what it reads."""
    if is_dynamic(model):
        raise ValueError(
            f"rope type {model.config.rope_parameters['rope_type']!r} changes with the length of the input: "
            f"one pass over {tokens} tokens is not what a cache of {cache_tokens} would give"
        )


class StreamedAttention:
    """For transformers' AttentionInterface: attention/streaming.py over a whole text; q, k, v [1, ., T, D]."""

    def __init__(self, model: PreTrainedModel, sink_tokens: int, window_tokens: int, positions: str) -> None:
        self.rotary = Rotary.of(model.config) if positions == "cache" else None
        self.sinks, self.window = sink_tokens, window_tokens

    def __call__(self, module, q_BHTD, k_BKTD, v_BKTD, attention_mask, *, scaling, **kwargs):  # type: ignore[no-untyped-def]
        if self.rotary is not None:
            at_T = torch.arange(q_BHTD.shape[2])
            q_BHTD, k_BKTD = self.rotary.put_right(q_BHTD, at_T), self.rotary.put_right(k_BKTD, at_T)
        out_BHTD = streamed_attention(
            q_BHTD,
            (k_BKTD[:, :, self.sinks :], v_BKTD[:, :, self.sinks :]),
            (k_BKTD[:, :, : self.sinks], v_BKTD[:, :, : self.sinks]),
            sink_tokens=self.sinks,
            window_tokens=self.window,
            rotary=self.rotary,
            scale=scaling,
            sink_logit_H=kwargs.get("s_aux"),
        )
        return out_BHTD.transpose(1, 2).contiguous(), None


@torch.inference_mode()
def recomputed_nll(
    model: PreTrainedModel, ids_T: np.ndarray, ends_N: np.ndarray, window_tokens: int, name: str
) -> np.ndarray:
    """NLL [N] of the tokens after positions ends_N, each predicted from its last window_tokens tokens alone."""
    nll_N = []
    for ends_B in np.array_split(ends_N, min(len(ends_N), math.ceil(len(ends_N) * window_tokens / BATCH_TOKENS))):
        windows_BW = ids_T[ends_B[:, None] + np.arange(1 - window_tokens, 1)]
        x_BW = torch.from_numpy(windows_BW).to(model.device)
        logits_BV = model(input_ids=x_BW, use_cache=False, logits_to_keep=1).logits[:, 0].float()
        target_B = torch.from_numpy(ids_T[ends_B + 1]).to(model.device)
        nll_N.append(cross_entropy(logits_BV, target_B, reduction="none").double().cpu().numpy())
    nll = np.concatenate(nll_N)
    if not np.isfinite(nll).all():
        token = int(ends_N[~np.isfinite(nll)][0]) + 1
        raise FloatingPointError(f"{name}: the logits that predict token {token} are not finite; check the weights")
    return nll


def tabulate(
    recipe: StreamingRecipe, ways: list[tuple[dict[str, Any], np.ndarray]], sampled_N: np.ndarray
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a row a way, rows along the stream). Entry t of a way's NLL is text token t + 1's; recompute's are those of
    sampled_N."""
    beside = next(
        ((cell, nll) for way in ("sinks", "dense", "window") for cell, nll in ways if cell["way"] == way), None
    )
    against = f", beside {way_of(beside[0])}" if beside else ""
    edges = np.linspace(0, recipe.tokens, min(BINS, recipe.tokens) + 1).astype(int).tolist()
    nothing_T, rows, along = np.zeros(recipe.tokens), [], []
    for cell, nll_N in ways:
        few = cell["way"] == "recompute" and recipe.recompute_every > 1
        about = {
            "way": way_of(cell),
            "positions": cell["positions"],
            "cache_tokens": recipe.cache_tokens,
            "sink_tokens": cell["sinks"],
            "protocol": f"1 token in {recipe.recompute_every}{against}" if few else "every token",
        }
        scored_N = sampled_N if cell["way"] == "recompute" else np.arange(recipe.tokens)
        beside_T = beside[1] if few and beside else nothing_T
        spans = [(a, b) for a, b in pairwise(edges) if a >= scored_N[0]]
        rows.append({"kind": "way"} | about | over(nll_N, scored_N, beside_T, recipe.cache_tokens, recipe.tokens))
        along += [{"kind": "stream"} | about | over(nll_N, scored_N, beside_T, *span) for span in spans]
    return rows, [row for row in along if row["scored"]]


def way_of(cell: dict[str, Any]) -> str:
    """A way's name: as `name_of`, with what is unusual about it."""
    unusual = ", text positions" * (cell["positions"] == "text") + ", newlines" * cell["newlines"]
    return name_of(cell["way"], cell["sinks"]) + unusual


def name_of(way: str, sinks: int) -> str:
    """What a way is called in rows and figures: `dense`, `window`, `recompute`, `4 sinks`."""
    return f"{sinks} sink{'s' * (sinks > 1)}" if way == "sinks" else way


def over(nll_N: np.ndarray, scored_N: np.ndarray, beside_T: np.ndarray, start: int, end: int) -> dict[str, Any]:
    """Mean NLL of tokens start..end-1: beside_T's mean over all of them plus the mean difference to it over scored_N.

    beside_T zero and every token scored: the plain mean. The interval, of sampled means only, resamples differences.
    """
    inside = (start <= scored_N) & (scored_N < end)
    if not inside.any():
        return {"scored": 0}
    difference_N = nll_N[inside] - beside_T[scored_N[inside]]
    nll = float(beside_T[start:end].mean() + difference_N.mean())
    found = {"start": start, "end": end, "scored": int(inside.sum()), "nll": nll, "ppl": math.exp(nll)}
    if found["scored"] < end - start and (interval := bootstrap_mean(difference_N, seed=0)):
        low, high = (math.exp(nll + bound - difference_N.mean()) for bound in interval)
        found |= {"ppl_low": low, "ppl_high": high}
    return found


def figure(scores: EvalScores) -> Any:
    """Perplexity along the stream, a line a way, the usual ones; below, along the endurance run."""
    cache = scores.recipe["cache_tokens"]
    question = [
        f"{scores.model}: does generation stay stable when the text outgrows a cache of {cache} tokens?",
        "window rises once the first tokens are evicted; sinks should stay close to recompute, whatever dense does",
    ]
    along = [row | {"middle": (row["start"] + row["end"]) / 2} for row in scores.rows if "start" in row]
    usual = [row for row in along if row["kind"] == "stream" and "," not in row["way"]]
    titles = (question, "position in the text (tokens)", "perplexity")
    upper = curves(usual, x="middle", y="ppl", by="way", titles=titles, log="y", low="ppl_low", high="ppl_high")
    if not (enduring := [row for row in along if row["kind"] == "endurance"]):
        return upper
    tokens, grown = enduring[-1]["end"], scores.summary["endurance_growth_mib"]
    titles = (
        [f"{tokens:,} tokens through one cache", f"the process grew by {grown:.1f} MiB in the last three quarters"],
        *titles[1:],
    )
    return alt.vconcat(upper, curves(enduring, x="middle", y="ppl", by="way", titles=titles))
