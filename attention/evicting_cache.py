"""KV caches of fixed size that evict tokens by their attention: TOVA and H2O, as baselines for sinks
+ window.

Both read a text token by token. The current token's key is added to the `cache_tokens` that are kept,
its query attends to all of them, and then one is evicted, depending on the attention it got:

  tova   evicts the token with the least attention from the current query, averaged over all heads of
         the layer (Token Omission Via Attention, arXiv:2401.06104, section 4; as in the authors'
         code, this may be the current token). All heads of a layer keep the same tokens.
  h2o    decides for each KV head separately: evicts the token with the least attention, summed over
         all queries since it was added, but none of the most recent half of the cache (heavy-hitter
         oracle, arXiv:2306.14048, algorithm 1: half heavy hitters, half recent). If query heads
         share a KV head, their attention is added.

Neither needs training, and neither fits a flash kernel, since the probabilities themselves are needed.
Positions are counted in the cache (keys have positions 0, 1, 2, ... in the order of the text and are
rotated again for each query) or in the text (as transformers rotated them).

    cache = EvictingCache(model.config, "h2o", cache_tokens=256)
    with reading_sink_cache(model):
        model.generate(**tokenizer(text, return_tensors="pt"), past_key_values=cache)

RESULTS.md compares them with sinks. SnapKV (arXiv:2404.14469) is not comparable: it compresses a
prompt once, after which the cache grows again. NVIDIA's kvpress has all three, but requires
transformers below 5.3 and compresses every n-th step.

Legend: B batch, T new tokens, H query heads, K key/value heads, R query heads of one KV head, N
keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig

from longreach.attention.rope import Rotary, rotate_pairs
from longreach.attention.sink_cache import AttendingLayer, inference_only, own_window, sees_itself


def tova(mass_BKRN: Tensor, sum_BKN: Tensor, recent: int) -> Tensor:
    """Return the key to evict, [B, K]: the one with the least attention from the current query over
    all heads."""
    return mass_BKRN.mean((1, 2)).argmin(-1)[:, None].expand(mass_BKRN.shape[:2])


def h2o(mass_BKRN: Tensor, sum_BKN: Tensor, recent: int) -> Tensor:
    """Return the key to evict, [B, K]: of all except the last `recent`, the one with the least
    attention so far."""
    return sum_BKN[..., : sum_BKN.shape[-1] - recent].argmin(-1)


POLICIES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {"tova": tova, "h2o": h2o}
"""Functions that choose the key to evict from the current query's attention, each key's sum of
attention so far, and the number of recent keys that are protected."""
Policy = Literal["tova", "h2o"]


class EvictingCache(Cache):
    """`cache_tokens` keys and values in every layer, chosen by a policy of POLICIES; no padding.

    Raises ValueError for a cache of fewer than 2 tokens, and for a model whose keys cannot be moved
    (see Rotary.of) or whose own window is no longer than this one.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        policy: Policy,
        cache_tokens: int,
        positions: Literal["cache", "text"] = "cache",
    ) -> None:
        config = config.get_text_config(decoder=True)
        if cache_tokens < 2:
            raise ValueError(f"cache_tokens is {cache_tokens}, but must be at least 2 to have a choice")
        own = own_window(config)
        if own is not None and own <= cache_tokens:
            raise ValueError(
                f"the model's own window of {own} tokens is shorter than cache_tokens {cache_tokens} + 1: lower "
                f"cache_tokens to at most {own - 1}"
            )
        rotary = Rotary.of(config) if positions == "cache" else None
        super().__init__(layers=[EvictingLayer(policy, cache_tokens, rotary) for _ in range(config.num_hidden_layers)])


class EvictingLayer(AttendingLayer):
    """One layer's kept keys and values in the order of the text, and the attention that each got."""

    keys: Tensor  # [B, K, N, D], rotated back to position 0 if there is a `rotary`
    values: Tensor
    scores: Tensor  # [B, K, N], at least float32

    def __init__(self, policy: Policy, cache_tokens: int, rotary: Rotary | None) -> None:
        super().__init__()
        self.policy, self.cache_tokens, self.rotary = POLICIES[policy], cache_tokens, rotary

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states[:, :, :0].detach(), value_states[:, :, :0].detach()
        wide = torch.promote_types(self.dtype, torch.float32)
        self.scores = torch.zeros(self.keys.shape[:3], dtype=wide, device=self.device)
        if self.rotary is not None:
            angles_NR = self.rotary.angles(torch.arange(self.cache_tokens + 1))
            self.cos_NR, self.sin_NR = self.rotary.cos_sin(angles_NR, key_states)

    def attend(
        self, q_BHTD: Tensor, mask: Tensor | None, scale: float | None, sink_logit_H: Tensor | None = None
    ) -> Tensor:
        """Return the attention of the new tokens' queries, computed one after the other, and evict
        tokens by the policy."""
        k_BKTD, v_BKTD = self.take_new()
        B, _, T, D = q_BHTD.shape
        if mask is not None and not bool(sees_itself(mask, B, T).all()):
            raise ValueError("an EvictingCache does not support padding: read texts of equal length together")
        if scale is None:
            scale = D**-0.5
        with torch.no_grad():
            q, k = q_BHTD.detach(), k_BKTD
            if self.rotary is not None:
                at_T = torch.arange(self.seen - T, self.seen)
                q, k = (self.rotary.rotate(self.rotary.correct_rounding(x, at_T), -at_T) for x in (q, k))
            outs = []
            for q_BH1D, k_BK1D, v_BK1D in zip(q.split(1, 2), k.split(1, 2), v_BKTD.split(1, 2), strict=True):
                outs.append(self._step(q_BH1D, k_BK1D, v_BK1D, scale, sink_logit_H))
            out_BHTD = torch.cat(outs, 2)
        return inference_only(q_BHTD, out_BHTD)

    def _step(
        self, q_BH1D: Tensor, k_BK1D: Tensor, v_BK1D: Tensor, scale: float, sink_logit_H: Tensor | None
    ) -> Tensor:
        """Attend with one token to all kept tokens and itself; then evict one token if there are too
        many."""
        self.keys, self.values = torch.cat([self.keys, k_BK1D], 2), torch.cat([self.values, v_BK1D], 2)
        B, K, N, _ = self.keys.shape
        keys_BKND, q_BKRD = self.keys, q_BH1D.reshape(B, K, -1, q_BH1D.shape[3])
        if self.rotary is not None:
            keys_BKND = rotate_pairs(keys_BKND, (self.cos_NR[:N], self.sin_NR[:N]), self.rotary.interleaved)
            q_BKRD = rotate_pairs(q_BKRD, (self.cos_NR[N - 1], self.sin_NR[N - 1]), self.rotary.interleaved)
        logits_BKRN = (q_BKRD @ keys_BKND.mT).to(self.scores) * scale
        total_BKR1 = logits_BKRN.logsumexp(-1, keepdim=True)
        if sink_logit_H is not None:
            total_BKR1 = torch.logaddexp(total_BKR1, sink_logit_H.to(self.scores).view(K, -1, 1))
        mass_BKRN = (logits_BKRN - total_BKR1).exp()
        out_BKRD = mass_BKRN.to(self.values.dtype) @ self.values
        self.scores = torch.cat([self.scores, torch.zeros_like(mass_BKRN[:, :, 0, :1])], 2) + mass_BKRN.sum(2)
        if self.cache_tokens < N:
            leaves_BK = self.policy(mass_BKRN, self.scores, self.cache_tokens // 2)
            stays_BKN = torch.ones_like(self.scores, dtype=torch.bool).scatter(2, leaves_BK[..., None], value=False)
            self.keys, self.values = (x[stays_BKN].view(B, K, N - 1, -1) for x in (self.keys, self.values))
            self.scores = self.scores[stays_BKN].view(B, K, N - 1)
        return out_BKRD.reshape(q_BH1D.shape)

    def get_max_length(self) -> int:
        return self.cache_tokens

    def reset(self) -> None:
        self.seen, self.new, self.is_initialized = 0, None, False
