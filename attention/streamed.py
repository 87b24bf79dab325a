"""Streaming attention (arXiv:2309.17453) for many queries at once, with the result that a sink
cache gives token by token.

Query t sees the sinks (the text's first S tokens), the W tokens before it, and itself. With
positions counted in the cache, recent keys are at their true distance, since RoPE is relative. Only
the sinks are nearer, as if the query were at min(t, S + W). So for the sinks the query is rotated
back by t - (S + W). The recent keys are a band:

    t - W .. t     = causal inside a block of W queries, and the mirror image of causal in the keys before the block

Blocks of W queries need neither a mask nor a band matrix. They are two causal flash attentions (the
second with queries and keys flipped), a rectangle if a block is short, and a small sink term,
merged by their log-sum-exps. Memory is O(W) in addition to q, k, v. The result equals decoding to
1e-12 in float64 (tests/test_attention_streamed.py); speed is measured in benchmarks/streaming.py.

    out_BHTD = streamed_attention(q_BHTD, recent_kv, sink_kv, sink_tokens=4, window_tokens=1020, rotary=rotary)

Legend: B batch, T queries, H query heads, K key/value heads, D head dim, S sinks, W window, N
recent keys.
"""

import torch
from torch import Tensor

from longreach.attention import flash
from longreach.attention.flash import refusal
from longreach.attention.rope import Rotary
from longreach.attention.sink_softmax import with_sink

Part = tuple[Tensor, Tensor]
"""Attention over some of the keys, and the log-sum-exp of its scores: out [B, H, T, D], lse [B, H,
T]."""


def streamed_attention(
    q_BHTD: Tensor, recent: tuple[Tensor, Tensor], sinks: tuple[Tensor, Tensor], *, first: int = 0, sink_tokens: int,
    window_tokens: int, rotary: Rotary | None, scale: float, sink_logit_H: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return attention [B, H, T, D] of tokens first .. first+T-1 of a text. Queries and keys are
    rotated to their positions in the text.

    Args:
        recent: keys and values [B, K, N, D] of tokens after the sinks, ending with the last query's
            own. Before the first query's own there are up to window_tokens, as many as exist.
        sinks: keys and values of the text's first tokens, min(sink_tokens, first+T) of them.
        rotary: rotates queries back, for positions counted in the cache; None: positions are
            counted in the text.
        sink_logit_H: a logit per head in each softmax (attention/sink_softmax.py), in addition to
            the sink tokens.
    """
    out_BHTD = torch.empty_like(q_BHTD)
    among = max(0, min(sink_tokens - first, q_BHTD.shape[2]))  # number of queries that are sinks
    if sink_tokens:
        to_sinks, sums = _sink_part(q_BHTD, sinks, first, sink_tokens + window_tokens, rotary, scale)
        out_BHTD[:, :, :among] = merged([(to_sinks[:, :, :among], sums[:, :, :among])], sink_logit_H)
    before = recent[0].shape[2] - (q_BHTD.shape[2] - among)  # recent keys older than the first query that has any
    for begin in range(among, q_BHTD.shape[2], window_tokens):
        block = slice(begin, min(begin + window_tokens, q_BHTD.shape[2]))
        own = before + begin - among
        parts = _band_parts(q_BHTD[:, :, block], recent, own, window_tokens, scale)
        if sink_tokens:
            parts.append((to_sinks[:, :, block], sums[:, :, block]))
        out_BHTD[:, :, block] = merged(parts, sink_logit_H)
    return out_BHTD


def _band_parts(q_BHTD: Tensor, recent: tuple[Tensor, Tensor], own: int, window: int, scale: float) -> list[Part]:
    """Return attention of a block of at most W queries over all recent keys in the band, in parts.
    The first query's own key is at `own`."""
    k_BKND, v_BKND = recent
    T = q_BHTD.shape[2]
    parts = [_attend(q_BHTD, k_BKND[:, :, own : own + T], v_BKND[:, :, own : own + T], scale, causal=True)]
    oldest = own - window  # the first query's oldest key; the second's is one later, and so on: causal if mirrored
    low, corner = max(oldest, 0), min(oldest + T, own)
    if low < corner:
        k, v = (x[:, :, low:corner].flip(2) for x in recent)
        out, lse = _attend(q_BHTD[:, :, : corner - oldest].flip(2), k, v, scale, causal=True)
        parts.append((out.flip(2), lse.flip(2)))
    if max(corner, 0) < own:  # keys that every query of a short block sees
        all_see = slice(max(corner, 0), own)
        parts.append(_attend(q_BHTD, k_BKND[:, :, all_see], v_BKND[:, :, all_see], scale, causal=False))
    return parts


def _sink_part(
    q_BHTD: Tensor, sinks: tuple[Tensor, Tensor], first: int, cached: int, rotary: Rotary | None, scale: float
) -> Part:
    """Return attention of all queries over the sinks before them, as if no query were beyond
    position `cached`."""
    k_BKSD, v_BKSD = sinks
    at_T = torch.arange(first, first + q_BHTD.shape[2])
    if rotary is not None and int(at_T[-1]) > cached:
        q_BHTD = rotary.rotate(q_BHTD, (cached - at_T).clamp(max=0))
    future_TS = torch.arange(k_BKSD.shape[2]) > at_T[:, None]
    return plain(q_BHTD, k_BKSD, v_BKSD, scale, future_TS.to(q_BHTD.device) if bool(future_TS.any()) else None)


def _attend(q_BHTD: Tensor, k_BKND: Tensor, v_BKND: Tensor, scale: float, *, causal: bool) -> Part:
    """Compute one part by flash attention. On CPU, the query heads of a KV head are computed one
    after the other, so that no key is repeated."""
    if q_BHTD.device.type == "cuda" and not refusal(q_BHTD.dtype, q_BHTD.shape[3]):
        return flash.dense(q_BHTD, k_BKND, v_BKND, scale, causal=causal)
    if q_BHTD.device.type != "cpu":
        T, N = q_BHTD.shape[2], k_BKND.shape[2]
        future_TN = torch.ones(T, N, dtype=torch.bool, device=q_BHTD.device).triu(1) if causal else None
        return plain(q_BHTD, k_BKND, v_BKND, scale, future_TN)
    repeat = q_BHTD.shape[1] // k_BKND.shape[1]
    parts = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHTD[:, turn::repeat], k_BKND, v_BKND, 0.0, causal, scale=scale
        )
        for turn in range(repeat)
    ]
    if repeat == 1:
        return parts[0]
    out, lse = (torch.stack([part[n] for part in parts], 2).flatten(1, 2) for n in (0, 1))
    return out, lse


def plain(q_BHTD: Tensor, k_BKND: Tensor, v_BKND: Tensor, scale: float, unseen_TN: Tensor | None) -> Part:
    """Compute one part by the formula, with all scores in memory. The mask of unseen keys may
    differ by row, as [B, 1, 1, T, N]."""
    B, H, T, D = q_BHTD.shape
    K = k_BKND.shape[1]
    scores = (q_BHTD.reshape(B, K, -1, D) @ k_BKND.mT).unflatten(2, (H // K, T)) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if unseen_TN is not None:
        scores = scores.masked_fill(unseen_TN, -torch.inf)
    lse = scores.logsumexp(-1)
    mass = (scores - lse[..., None]).exp().to(v_BKND.dtype)
    return (mass.flatten(2, 3) @ v_BKND).view(B, H, T, D), lse.view(B, H, T)


def merged(parts: list[Part], sink_logit_H: Tensor | None = None) -> Tensor:
    """Merge attention over disjoint parts of the keys and, if given, a sink logit."""
    if len(parts) == 1:
        out, total = parts[0]
    else:
        sums = torch.stack([lse for _, lse in parts])
        total = sums.logsumexp(0)
        weights = (sums - total).exp()[..., None]
        out = parts[0][0] * weights[0]
        for (part, _), weight in zip(parts[1:], weights[1:], strict=True):
            out += part * weight
        out = out.to(parts[0][0].dtype)
    return out if sink_logit_H is None else with_sink(out, total, sink_logit_H)
