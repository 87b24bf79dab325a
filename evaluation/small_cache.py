"""Reading a text with a cache of fixed size: NLL of every token, decoding latency, and long streams.

Streaming keeps the first `sinks` tokens and the last `window` ones. Instead of decoding token by
token, the whole text is computed in one pass with the same result (attention/streamed.py). Only
latencies, endurance runs and questions in a stream use the real cache (attention/sink_cache.py).

Legend: T tokens, N scored tokens, B windows in a batch, W window tokens, V vocabulary, E width, H
heads, K KV heads, D head dim.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from statistics import median
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch.nn.functional import cross_entropy
from transformers import Cache, DynamicCache, PreTrainedModel

from longreach.attention.evicting_cache import POLICIES, EvictingCache, Policy
from longreach.attention.hf import attending_by
from longreach.attention.rope import Rotary
from longreach.attention.sink_cache import SinkCache, reading_sink_cache
from longreach.attention.streamed import streamed_attention
from longreach.evaluation.likelihood import check_ids, hidden_nll, is_dynamic, token_nll

Place = Literal["cache", "text"]
"""Where the positions of keys are counted: in the cache or in the text."""
BATCH_TOKENS = 4096
"""Number of tokens in a batch of windows in `recomputed_nll`."""
READ_AT_ONCE = 512
"""Maximum number of tokens that are read at once through a real cache."""


def streamed_nll(
    model: PreTrainedModel, ids_T: np.ndarray, sinks: int, window: int, positions: str, name: str
) -> np.ndarray:
    """Return the NLL [T-1] of decoding token by token with a cache of sinks + window keys.

    Errors are those of `token_nll`. positions: "cache" or "text", where the positions of keys are counted.
    """
    if sinks + window >= len(ids_T) - 1:
        return token_nll(model, ids_T, name)  # nothing is ever evicted
    check_rope(model, len(ids_T), sinks + window)
    with attending_by(model, "streamed", StreamedAttention(model, sinks, window, positions)):
        return token_nll(model, ids_T, name)


@torch.inference_mode()
def evicted_nll(
    model: PreTrainedModel, ids_T: np.ndarray, policy: Policy, cache_tokens: int, positions: Place, name: str
) -> np.ndarray:
    """Return the NLL [T-1] of decoding token by token with an EvictingCache of this policy.

    Each layer reads the whole text token by token before the next layer runs. The result is that of
    decoding, without a pass through the model for each token. Errors are those of `token_nll`.
    """
    check_rope(model, len(ids_T), cache_tokens)
    cache = EvictingCache(model.config, policy, cache_tokens, positions)
    x_T = torch.from_numpy(ids_T).to(model.device)
    check_ids(model, x_T, name)
    with reading_sink_cache(model):
        out = model.base_model(x_T[None, :-1], past_key_values=cache, use_cache=True)
    return hidden_nll(model, out.last_hidden_state[0], x_T[1:], name).cpu().numpy()


def check_rope(model: PreTrainedModel, tokens: int, cache_tokens: int) -> None:
    """Raise ValueError if the model's RoPE changes with the length of the input."""
    if is_dynamic(model):
        raise ValueError(
            f"rope type {model.config.rope_parameters['rope_type']!r} changes with the length of the input, so one "
            f"pass over {tokens} tokens does not give the result of a cache of {cache_tokens} tokens"
        )


class StreamedAttention:
    """Attention of attention/streamed.py over a whole text, for transformers' AttentionInterface; q, k, v
    [1, ., T, D]."""

    def __init__(self, model: PreTrainedModel, sinks: int, window: int, positions: str) -> None:
        """Keep `sinks` + `window` keys. Positions in the "cache" need the model's rotation, to rotate keys again."""
        self.sinks = sinks
        self.window = window
        self.rotary = Rotary.of(model.config) if positions == "cache" else None

    def __call__(self, module, q_BHTD, k_BKTD, v_BKTD, attention_mask, *, scaling, **kwargs):  # type: ignore[no-untyped-def]
        """Return (output [1, T, H, D], None), as transformers expects."""
        if self.rotary is not None:
            at_T = torch.arange(q_BHTD.shape[2])
            q_BHTD, k_BKTD = self.rotary.correct_rounding(q_BHTD, at_T), self.rotary.correct_rounding(k_BKTD, at_T)
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
def recomputed_nll(model: PreTrainedModel, ids_T: np.ndarray, ends_N: np.ndarray, window: int, name: str) -> np.ndarray:
    """Return the NLL [N] of the tokens after positions ends_N, each predicted only from the last `window` tokens."""
    batches = min(len(ends_N), math.ceil(len(ends_N) * window / BATCH_TOKENS))
    nll_by_batch = []
    for ends_B in np.array_split(ends_N, batches):
        windows_BW = ids_T[ends_B[:, None] + np.arange(1 - window, 1)]
        x_BW = torch.from_numpy(windows_BW).to(model.device)
        logits_BV = model(input_ids=x_BW, use_cache=False, logits_to_keep=1).logits[:, 0].float()
        target_B = torch.from_numpy(ids_T[ends_B + 1]).to(model.device)
        nll_by_batch.append(cross_entropy(logits_BV, target_B, reduction="none").double().cpu().numpy())
    nll_N = np.concatenate(nll_by_batch)
    if not np.isfinite(nll_N).all():
        token = int(ends_N[~np.isfinite(nll_N)][0]) + 1
        raise FloatingPointError(f"{name}: the logits that predict token {token} are not finite; check the weights")
    return nll_N


@torch.inference_mode()
def decoding_latency(
    model: PreTrainedModel, ids_T: np.ndarray, tokens: int, way: Any, sinks: int, cache_tokens: int, positions: Place
) -> dict[str, float]:
    """Measure the latency of decoding a text's last `tokens` tokens, one by one, in one way.

    positions: where a cache of fixed size counts the positions of its keys.

    Returns:
        {"ms": median milliseconds per token, "cache_mib": size of the cache in MiB}. The way `dense` keeps the
        keys and values of the whole text.
    """
    x_1T = torch.from_numpy(ids_T)[None].to(model.device)
    first = x_1T.shape[1] - tokens - 1  # one more than is timed: the first step is a warm-up
    cache: Cache = DynamicCache(config=model.config)
    attention: AbstractContextManager[None] = nullcontext()
    if way in ("window", "sinks"):
        cache = SinkCache(model.config, sinks, cache_tokens - sinks, positions)
        attention = reading_sink_cache(model)
    elif way in POLICIES:
        cache = EvictingCache(model.config, way, cache_tokens, positions)
        attention = reading_sink_cache(model)
    seconds = []
    with attention:
        if way != "recompute":
            model(x_1T[:, :first], past_key_values=cache, logits_to_keep=1)
        for at in range(first, x_1T.shape[1]):
            began = time.perf_counter()
            if way == "recompute":
                model(x_1T[:, at - cache_tokens : at + 1], use_cache=False, logits_to_keep=1)
            else:
                model(x_1T[:, at : at + 1], past_key_values=cache, logits_to_keep=1)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    return {"ms": median(seconds[1:]) * 1e3, "cache_mib": _kept_bytes(cache) / 2**20}


def _kept_bytes(cache: Cache) -> int:
    """Return the bytes of a cache's keys and values, sinks included, and of its sums of attention if it has them."""
    total = 0
    for layer in cache.layers:
        for name in ("keys", "values", "sink_keys", "scores"):
            kept = getattr(layer, name, None)
            if isinstance(kept, torch.Tensor):
                total += kept.nbytes
    return total


def endurance(
    model: PreTrainedModel, ids_T: np.ndarray, sinks: int, window: int, parts: int
) -> Iterator[dict[str, Any]]:
    """Stream a long text through one SinkCache; yield {"start", "end", "nll", "resident_mib"} for each part of it.

    resident_mib is the process's resident memory at the end of the part, which should not grow.
    """
    cache = SinkCache(model.config, sinks, window)
    edges = np.linspace(0, len(ids_T) - 1, min(parts, len(ids_T) - 1) + 1).astype(int).tolist()
    for start, end in pairwise(edges):
        nll = []
        with torch.inference_mode(), reading_sink_cache(model):
            for at in range(start, end, READ_AT_ONCE):
                to = min(at + READ_AT_ONCE, end)
                x_T = torch.from_numpy(ids_T[at : to + 1]).to(model.device)
                out = model.base_model(x_T[None, :-1], past_key_values=cache, use_cache=True)
                where = f"endurance, from token {at} on"
                nll.append(hidden_nll(model, out.last_hidden_state[0], x_T[1:], where).cpu().numpy())
        resident = psutil.Process().memory_info().rss / 2**20
        yield {"start": start, "end": end, "nll": float(np.concatenate(nll).mean()), "resident_mib": resident}


@torch.inference_mode()
def answered_in_stream(
    model: PreTrainedModel, cache: Cache, pieces: list[tuple[list[int], list[int]]]
) -> Iterator[tuple[float, list[int]]]:
    """Read a stream piece by piece through one cache; yield for each piece how its answer was predicted.

    Args:
        cache: a SinkCache, or a DynamicCache that keeps everything.
        pieces: token ids of each piece, and those of the answer at its end.

    Yields:
        (mean NLL of the answer's tokens in nats, the argmax at each of their positions).

    Raises:
        FloatingPointError: the logits are not finite.
        ValueError: an id has no embedding.
    """
    streams = isinstance(cache, SinkCache)
    for number, (ids, answer_ids) in enumerate(pieces):
        answer = len(answer_ids)
        x_T = torch.tensor(ids, device=model.device)
        check_ids(model, x_T, f"piece {number} of the stream")
        with reading_sink_cache(model) if streams else nullcontext():
            # the token before the answer predicts its first token, so the last read has answer + 1 tokens
            for part_T in x_T[: -answer - 1].split(READ_AT_ONCE):
                model(part_T[None], past_key_values=cache, logits_to_keep=1)
            logits_AV = model(x_T[None, -answer - 1 :], past_key_values=cache).logits[0, :-1].float()
        nll_A = cross_entropy(logits_AV, x_T[-answer:], reduction="none")
        if not torch.isfinite(nll_A).all():
            raise FloatingPointError(f"piece {number} of the stream: the logits are not finite; check the weights")
        yield float(nll_A.double().mean()), logits_AV.argmax(-1).tolist()
