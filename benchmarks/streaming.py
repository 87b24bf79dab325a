"""Compare one-pass streaming with decoding, and a step with SinkCache with a cache that concatenates.

    python benchmarks/streaming.py            # one thread, about four minutes, SmolLM2's shape with random weights

The benchmark measures process CPU time, alternates both sides (A B A B) within one run, and prints medians of ratios.
The same cache can be decoded from repeatedly, because a step only replaces the oldest token and its work does not
depend on what is cached.

Legend: B batch, T tokens, H query heads, K key/value heads, D head dim, S sinks, W window.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from timing import interleaved, medians, ratio
from torch import Tensor
from transformers import Cache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import CacheLayerMixin
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, rotate_half

from longreach.attention.sink_cache import SinkCache
from longreach.evaluation.small_cache import streamed_nll

SINKS = 4
SMOLLM2 = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
)  # fmt: skip


class ConcatenatingLayer(CacheLayerMixin):
    """A streaming cache without a ring buffer: it concatenates, keeps keys unrotated and rotates all at every step."""

    def __init__(self, model: LlamaForCausalLM, window: int) -> None:
        super().__init__()
        self.rotary, self.window = model.model.rotary_emb, window
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values, self.is_initialized = key_states[:, :, :0], value_states[:, :, :0], True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cos, sin = self.rotary(key_states, torch.tensor([[self.seen]]))
        plain = key_states * cos[:, None] - rotate_half(key_states) * sin[:, None]  # undo RoPE
        if self.keys.shape[2] > SINKS + self.window:
            self.keys, self.values = (
                torch.cat([x[:, :, :SINKS], x[:, :, SINKS + 1 :]], 2) for x in (self.keys, self.values)
            )
        self.keys = torch.cat([self.keys, plain], 2)
        self.values = torch.cat([self.values, value_states], 2)
        self.seen += 1
        at_T = torch.arange(self.seen - self.keys.shape[2], self.seen)  # ends at the query's position: RoPE is relative
        _, keys = apply_rotary_pos_emb(self.keys, self.keys, *self.rotary(self.keys, at_T[None]))
        return keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return min(self.seen, SINKS + self.window) + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return SINKS + self.window


def filled(model: LlamaForCausalLM, window: int) -> tuple[SinkCache, Cache]:
    """Return a SinkCache and a concatenating cache, full of random keys, one token past their first eviction."""
    ours = SinkCache(model.config, SINKS, window)
    theirs = Cache(layers=[ConcatenatingLayer(model, window) for _ in range(model.config.num_hidden_layers)])
    token = torch.zeros(1, 1, dtype=torch.long)
    for cache in (ours, theirs):
        model(token, past_key_values=cache)
    for layer in ours.layers:
        for buffer in (layer.keys, layer.values, layer.sink_keys):
            buffer.normal_()
        layer.seen = SINKS + window + 1
    for layer in theirs.layers:
        shape = (1, 3, SINKS + window + 1, 64)
        layer.keys, layer.values, layer.seen = torch.randn(shape), torch.randn(shape), shape[2]
    return ours, theirs


def standing_at(cache: SinkCache, at: int) -> None:
    for layer in cache.layers:
        layer.seen = at


def own_step(model: LlamaForCausalLM, cache: SinkCache, token: Tensor) -> Tensor:
    """Decode a step without transformers' forward, with the model's weights and the cache's own attention."""
    body, at = model.model, cache.get_seq_length()
    x_1E = body.embed_tokens(token)[0]
    cos, sin = (y[0] for y in body.rotary_emb(x_1E, torch.tensor([[at]])))
    for block, layer in zip(body.layers, cache.layers, strict=True):
        normed, attn = block.input_layernorm(x_1E), block.self_attn
        q, k, v = (w(normed).view(1, -1, 1, 64) for w in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k = (y * cos + rotate_half(y) * sin for y in (q, k))
        layer.update(k, v)
        x_1E = x_1E + attn.o_proj(layer.attend(q, None, attn.scaling).view(1, -1))
        x_1E = x_1E + block.mlp(block.post_attention_layernorm(x_1E))
    return model.lm_head(body.norm(x_1E))


def floor(model: LlamaForCausalLM, cache: SinkCache) -> Callable[[], None]:
    """Read every weight and every cached key and value once in matrix products, the lower bound of a step."""
    blocks = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]  # the head included
    inputs = [torch.randn(1, weight.shape[1]) for weight in blocks]
    query, mass = torch.randn(1, 3, 3, 64), torch.rand(1, 3, 3, cache.layers[0].keys.shape[2])

    def read() -> None:
        for weight, x in zip(blocks, inputs, strict=True):
            F.linear(x, weight)
        for layer in cache.layers:
            query @ layer.keys.mT
            mass @ layer.values

    return read


def one_pass(model: LlamaForCausalLM, window: int, tokens: int) -> None:
    """Compare the time per token of a text's perplexity in one pass with a step of a concatenating cache."""
    ids_T = np.random.default_rng(0).integers(0, 49152, tokens)
    _, theirs = filled(model, window)
    token = torch.zeros(1, 1, dtype=torch.long)

    def ten_steps() -> None:
        for _ in range(10):
            model(token, past_key_values=theirs)

    rows = interleaved(lambda: streamed_nll(model, ids_T, SINKS, window, "cache", "text"), ten_steps, rounds=3)
    ours, steps = medians(rows)
    print(
        f"one pass over {tokens} tokens, cache {SINKS} + {window}: {ours / tokens:.2f} ms per token; decoding with a "
        f"concatenating cache {steps / 10:.0f} ms; {ratio(rows, 1, 0) * tokens / 10:.1f}x"
    )


def decoding(model: LlamaForCausalLM, window: int, rounds: int) -> None:
    """Compare a step of SinkCache (near and far), concatenate-and-rotate-all, our own loop and the bandwidth floor."""
    ours, theirs = filled(model, window)
    token, full = torch.zeros(1, 1, dtype=torch.long), SINKS + window + 1

    def at(place: int, step: Callable[[], object]) -> Callable[[], object]:
        def placed() -> None:
            standing_at(ours, place)
            step()

        return placed

    rows = interleaved(
        at(full, lambda: model(token, past_key_values=ours)),
        at(100_000, lambda: model(token, past_key_values=ours)),
        lambda: model(token, past_key_values=theirs),
        at(full, lambda: own_step(model, ours, token)),
        floor(model, ours),
        rounds=rounds,
    )
    near, far, concatenating, own, least = medians(rows)
    print(
        f"W = {window}: SinkCache {near:.1f} ms per step, at text length 100,000 {far:.1f} ({ratio(rows, 1, 0):.3f}x); "
        f"concatenate and rotate all {concatenating:.1f} ({ratio(rows, 2, 0):.2f}x ours); own loop {own:.1f}, "
        f"bandwidth floor {least:.1f} ({ratio(rows, 3, 4):.2f}x of it; through model.forward {ratio(rows, 0, 4):.2f}x)"
    )


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(SMOLLM2).eval()
    for window in (252, 1020, 4092):
        decoding(model, window, rounds=31)
    one_pass(model, window=1020, tokens=8192)


if __name__ == "__main__":
    main()
