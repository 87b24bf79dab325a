"""Section decode: milliseconds per token of SinkCache, of a growing cache, and of recomputing the window each time.

StreamingLLM (arXiv:2309.17453, figure 10) reports up to 22.2 times the speed of a recomputed window, on an A6000 with
Llama-2-7B and windows of 256 to 4,096 tokens. This benchmark includes the same shape. It uses random weights, bfloat16
and one text. Caches are filled with random keys to set their text length, since a step's work does not depend on the
keys.

Legend: T tokens, L length of the text, W tokens of the window.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from bench import Bench
from steps import SMOLLM2, TINY
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from longreach.attention.sink_cache import SinkCache
from longreach.evaluation.small_cache import streamed_nll

SINKS = 4
LLAMA2_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
    vocab_size=32000, max_position_embeddings=4096,
)  # fmt: skip


def run(bench: Bench) -> None:
    if not bench.gpu:
        model = model_of(bench, TINY)
        caches(bench, "tiny", model, lengths=(64, 200), windows=(28,))
        recomputed(bench, "tiny", model, windows=(32,))
        in_one_pass(bench, "tiny", model, tokens=200, window=28)
        return
    model = model_of(bench, SMOLLM2)
    caches(bench, "SmolLM2", model, lengths=(1000, 10_000, 100_000), windows=(1020, 4092))
    recomputed(bench, "SmolLM2", model, windows=(1024, 4096))
    in_one_pass(bench, "SmolLM2", model, tokens=100_000, window=1020)
    del model
    bench.free()
    if bench.fits("Llama-2-7B", 30):
        model = model_of(bench, LLAMA2_7B)
        caches(bench, "7B", model, lengths=(4096,), windows=(252, 1020, 4092))
        recomputed(bench, "7B", model, windows=(256, 1024, 4096))


def model_of(bench: Bench, config: LlamaConfig) -> LlamaForCausalLM:
    """Return a model with random weights in evaluation mode."""
    with torch.device(bench.device):
        return bench.placed(LlamaForCausalLM(config)).eval()


@torch.inference_mode()
def caches(
    bench: Bench, name: str, model: LlamaForCausalLM, *, lengths: tuple[int, ...], windows: tuple[int, ...]
) -> None:
    """Time a token after texts of several lengths, with SinkCache and with a growing cache."""
    token = torch.zeros(1, 1, dtype=torch.long, device=bench.device)
    took: dict[str, float] = {}
    for window in windows:
        cache = SinkCache(model.config, SINKS, window)
        model(token, past_key_values=cache)
        for layer in cache.layers:
            for buffer in (layer.keys, layer.values, layer.sink_keys):
                buffer.normal_()
        for length in lengths:
            for layer in cache.layers:
                layer.seen = max(length, SINKS + window + 1)
            milliseconds = bench.milliseconds(lambda cache=cache: model(token, past_key_values=cache), rounds=20)
            took[f"SinkCache {SINKS} + {window}, text {length}"] = milliseconds
    for length in lengths:
        took[f"DynamicCache, text {length}"] = bench.milliseconds(
            partial(model, token, past_key_values=grown(bench, model, length)), rounds=20
        )
    for what, milliseconds in took.items():
        bench.note(f"{name}, {what}", ms_a_token=milliseconds)


def grown(bench: Bench, model: LlamaForCausalLM, length: int) -> DynamicCache:
    """Return a cache with random keys and values for a text of this length."""
    config = model.config
    shape = 1, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, device=bench.device, dtype=bench.dtype) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


@torch.inference_mode()
def recomputed(bench: Bench, name: str, model: LlamaForCausalLM, *, windows: tuple[int, ...]) -> None:
    """Time a token with the whole window recomputed, relative to a step with SinkCache."""
    token = torch.zeros(1, 1, dtype=torch.long, device=bench.device)
    for window in windows:
        ids_1T = torch.randint(model.config.vocab_size, (1, window), device=bench.device)
        fresh = bench.milliseconds(lambda ids_1T=ids_1T: model(ids_1T, use_cache=False, logits_to_keep=1))
        cache = SinkCache(model.config, SINKS, window - SINKS)
        model(ids_1T, past_key_values=cache, logits_to_keep=1)
        step = bench.milliseconds(lambda cache=cache: model(token, past_key_values=cache), rounds=20)
        bench.note(f"{name}, window of {window} computed anew", ms_a_token=fresh, over_sink_cache=fresh / step)


def in_one_pass(bench: Bench, name: str, model: LlamaForCausalLM, *, tokens: int, window: int) -> None:
    """Note the tokens per second of a long text in one pass, which gives the results of decoding with SinkCache."""
    ids_T = np.random.default_rng(0).integers(0, model.config.vocab_size, tokens)
    work = partial(streamed_nll, model, ids_T, SINKS, window, "cache", "text")
    milliseconds = bench.milliseconds(work, rounds=1)
    bench.note(f"{name}, {tokens} tokens in one pass", tokens_per_s=tokens / milliseconds * 1e3)
