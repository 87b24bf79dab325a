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

    longreach evaluate MODEL --eval streaming --set document=2026-Trump-1 --set cache_tokens=256

Legend: T tokens, N sampled tokens, B windows in a batch, W window tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attention.hf import attending_by
from attention.rope import Rotary
from attention.streaming import streamed_attention
from evaluation.documents import Document, Progress, first_token_id, matching, silent, with_first
from evaluation.figures import COLOURS, new_axes
from evaluation.likelihood import check_head, is_dynamic, token_nll
from evaluation.recipe import StreamingRecipe
from evaluation.scores import EvalScores, bootstrap_mean

BATCH_TOKENS = 4096
"""Tokens of the windows that `recompute` runs at once."""
BINS = 24
"""Points of the curve along the stream."""


def streaming(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    recipe: StreamingRecipe,
    documents: Iterable[Document] = (),
    progress: Progress = silent,
) -> EvalScores:
    """Rows of kind `way` (perplexity after the first cache_tokens tokens) and `stream` (binned along the text).

    NLL in nats per token. Raises ValueError for a document that is missing or too short, FloatingPointError for logits
    that are not finite.
    """
    document = matching(documents, (recipe.document,))[0]
    if len(document.ids_T) <= recipe.tokens:
        raise ValueError(
            f"{document.name} has {len(document.ids_T)} tokens; scoring {recipe.tokens} takes one more than that: "
            f"lower tokens or choose a longer document"
        )
    check_head(model, document.ids_T)
    ids_T = with_first(document.ids_T[: recipe.tokens + 1], first_token_id(tokenizer))
    sampled_N = np.arange(recipe.cache_tokens, recipe.tokens, recipe.recompute_every)
    ways = [(way, n) for way in recipe.ways for n in (recipe.sink_tokens if way == "sinks" else (0,))]
    nll: dict[tuple[str, int], np.ndarray] = {}
    for done, (way, sinks) in enumerate(ways):
        progress(done, len(ways))
        if way == "recompute":
            ends_N = sampled_N + len(ids_T) - 1 - recipe.tokens
            nll[way, 0] = recomputed_nll(model, ids_T, ends_N, recipe.cache_tokens + 1, document.name)
        else:
            window = len(ids_T) if way == "dense" else recipe.cache_tokens - sinks
            streamed = streamed_nll(model, ids_T, sinks, window, recipe.positions, document.name)
            nll[way, sinks] = streamed[-recipe.tokens :]
    progress(len(ways), len(ways))
    rows, curves = tabulate(recipe, nll, sampled_N)
    return EvalScores(
        eval="streaming",
        protocol=f"tokens {recipe.cache_tokens + 1}..{recipe.tokens} of {document.name}; {recipe.cache_tokens} cached "
        f"tokens and the current one; positions counted in the {recipe.positions}"
        + f"; recompute: {len(sampled_N)} tokens"
        * ("recompute" in recipe.ways),
        recipe=recipe.model_dump(mode="json"),
        rows=rows + curves,
        summary={f"streaming_ppl_{row['way'].replace(' ', '_')}": row["ppl"] for row in rows},
        note="One text, no latencies. A low perplexity here means stable generation, not a longer memory.",
    )


def streamed_nll(
    model: PreTrainedModel, ids_T: np.ndarray, sink_tokens: int, window_tokens: int, positions: str, name: str
) -> np.ndarray:
    """NLL [T-1] of decoding token by token with a cache of sink_tokens + window_tokens keys; errors as `token_nll`."""
    if sink_tokens + window_tokens >= len(ids_T) - 1:
        return token_nll(model, ids_T, name)  # nothing is ever evicted
    if is_dynamic(model):
        raise ValueError(
            f"rope type {model.config.rope_parameters['rope_type']!r} changes with the length of the input: "
            f"one pass over {len(ids_T)} tokens is not what a cache of {sink_tokens + window_tokens} would give"
        )
    with attending_by(model, "streamed", StreamedAttention(model, sink_tokens, window_tokens, positions)):
        return token_nll(model, ids_T, name)


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
    for ends_B in np.array_split(ends_N, math.ceil(len(ends_N) * window_tokens / BATCH_TOKENS)):
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
    recipe: StreamingRecipe, nll: dict[tuple[str, int], np.ndarray], sampled_N: np.ndarray
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a row a way, rows along the stream). nll[way, sinks][t] is text token t + 1's; recompute's are those of
    sampled_N."""
    beside = next((key for way in ("sinks", "dense", "window") for key in nll if key[0] == way), None)
    against = f", beside {name_of(*beside)}" if beside else ""
    edges = np.linspace(0, recipe.tokens, min(BINS, recipe.tokens) + 1).astype(int).tolist()
    nothing_T, rows, curves = np.zeros(recipe.tokens), [], []
    for (way, sinks), nll_N in nll.items():
        sampled = way == "recompute" and recipe.recompute_every > 1
        about = {
            "way": name_of(way, sinks),
            "positions": recipe.positions,
            "cache_tokens": recipe.cache_tokens,
            "sink_tokens": sinks,
            "protocol": f"1 token in {recipe.recompute_every}{against}" if sampled else "every token",
        }
        scored_N = sampled_N if way == "recompute" else np.arange(recipe.tokens)
        beside_T = nll[beside] if sampled and beside else nothing_T
        spans = [(a, b) for a, b in pairwise(edges) if a >= scored_N[0]]
        rows.append({"kind": "way"} | about | measure(nll_N, scored_N, beside_T, recipe.cache_tokens, recipe.tokens))
        curves += [{"kind": "stream"} | about | measure(nll_N, scored_N, beside_T, *span) for span in spans]
    return rows, [row for row in curves if row["scored"]]


def name_of(way: str, sinks: int) -> str:
    """What a way is called in rows and figures: `dense`, `window`, `recompute`, `4 sinks`."""
    return f"{sinks} sink{'s' * (sinks > 1)}" if way == "sinks" else way


def measure(nll_N: np.ndarray, scored_N: np.ndarray, beside_T: np.ndarray, start: int, end: int) -> dict[str, Any]:
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


def figure(scores: EvalScores) -> Figure:
    """Perplexity along the stream, a line a way."""
    cache = scores.recipe["cache_tokens"]
    fig, axes = new_axes(
        f"{scores.model}: does generation stay stable when the text outgrows a cache of {cache} tokens?\n"
        f"(window rises once the first tokens are evicted; sinks should follow dense)",
        "position in the text (tokens)",
        "perplexity",
    )
    ways = dict.fromkeys(row["way"] for row in scores.rows if row["kind"] == "stream")
    for way, colour, dash in zip(ways, cycle(COLOURS), cycle(("-", "--", ":", "-.")), strict=False):
        curve = [row for row in scores.rows if row["kind"] == "stream" and row["way"] == way]
        middle = [(row["start"] + row["end"]) / 2 for row in curve]
        label = {"recompute": "window, recomputed"}.get(way, f"{way} + window" if "sink" in way else way)
        axes.plot(middle, [row["ppl"] for row in curve], dash, color=colour, lw=1.8, label=label)
    axes.axvline(cache, color="grey", lw=1)
    axes.text(cache, axes.get_ylim()[1], " cache full", color="grey", fontsize=8, va="top")
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    return fig
