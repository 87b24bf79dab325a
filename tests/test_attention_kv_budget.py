"""KV-cache bytes: the published numbers, and what real caches hold."""

import pytest
import torch
from tiny_models import tiny_llama
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    FalconConfig,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    MiMoV2FlashConfig,
    MistralConfig,
)

from longreach.attention.kv_budget import KVBudget, readable

MIB, GIB = 2**20, 2**30
LLAMA2_70B = LlamaConfig(
    hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672
)


def test_llama2_70b_counted_with_64_heads_gives_the_published_numbers():
    """StreamingLLM's introduction and its readers count 64 heads: 2.5 MiB a token; 1.25 GiB; 160 GiB."""
    budget = KVBudget.of(LLAMA2_70B).as_multi_head()
    assert budget.bytes(1, 1, "fp16") == 2.5 * MIB
    assert budget.bytes(1, 512, "fp16") == 1.25 * GIB
    assert budget.bytes(16, 4096, "bf16") == 160 * GIB


def test_its_real_grouped_heads_need_an_eighth():
    assert KVBudget.of(LLAMA2_70B).bytes(16, 4096, "bf16") == 20 * GIB


def test_a_model_without_grouped_heads_costs_the_same_both_ways():
    llama2_7b = KVBudget.of(LlamaConfig())  # transformers' default is Llama-2-7B's shape
    assert llama2_7b.bytes(1, 4096, "fp16") == llama2_7b.as_multi_head().bytes(1, 4096, "fp16") == 2 * GIB


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_it_is_what_a_cache_of_transformers_holds(kv_heads):
    model = tiny_llama(num_key_value_heads=kv_heads)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(3, 11, dtype=torch.long), past_key_values=cache)
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert KVBudget.of(model.config).bytes(3, 11, "fp32") == held


SMALL = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 4}
SHARING = {
    "heads, in Falcon-7B's way": FalconConfig(**SMALL, num_hidden_layers=2, multi_query=True),
    "heads, in Falcon-40B's way": FalconConfig(
        **SMALL, num_hidden_layers=2, multi_query=True, new_decoder_architecture=True, num_kv_heads=2
    ),
    "layers": Gemma3nTextConfig(
        **SMALL, vocab_size_per_layer_input=64, intermediate_size=64, num_hidden_layers=4, num_key_value_heads=2,
        head_dim=16, hidden_size_per_layer_input=8, num_kv_shared_layers=2, laurel_rank=4,
        layer_types=["full_attention"] * 4, activation_sparsity_pattern=[0.0] * 4,
    ),
    "nothing, but full layers have larger heads": Gemma4TextConfig(
        **SMALL, intermediate_size=64, num_hidden_layers=4, num_key_value_heads=2, head_dim=16, global_head_dim=64,
        num_global_key_value_heads=1, attention_k_eq_v=True, sliding_window=32, hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("shared", SHARING)
def test_what_heads_or_layers_share_is_counted_as_a_cache_holds_it(shared):
    model = AutoModelForCausalLM.from_config(SHARING[shared]).eval()
    with torch.no_grad():
        cache = model(torch.zeros(3, 11, dtype=torch.long), use_cache=True).past_key_values
    held = sum(x.nbytes for layer in cache.layers if layer.keys is not None for x in (layer.keys, layer.values))
    assert KVBudget.of(model.config).bytes(3, 11, "fp32") == held


def test_layers_with_a_window_keep_no_more_than_it():
    mistral = MistralConfig(sliding_window=4096)
    assert KVBudget.of(mistral).bytes(1, 100_000) == KVBudget.of(mistral).bytes(1, 4096)
    gemma = Gemma3TextConfig(num_hidden_layers=6, sliding_window=512)  # five layers with a window, one without
    budget = KVBudget.of(gemma)
    assert budget.windows.count(512) == 5
    grown = budget.bytes(1, 2000) - budget.bytes(1, 1000)
    assert grown == 2 * 1000 * gemma.num_key_value_heads * gemma.head_dim * 2


def test_a_sink_cache_costs_the_same_for_any_length():
    budget = KVBudget.of(LLAMA2_70B)
    sizes = {budget.sink_cache_bytes(1, n, sink_tokens=4, window_tokens=1020) for n in (1, 1024, 4_000_000)}
    assert len(sizes) == 1
    assert sizes.pop() == pytest.approx(budget.bytes(1, 1024), rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 5, "bf16"), "batch 0 and length 5"), ((1, 0, "bf16"), "length 0"), ((1, 1, "bfloat"), "'bfloat'.*bf16")],
)
def test_sizes_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        KVBudget.of(LLAMA2_70B).bytes(*arguments)


@pytest.mark.parametrize(("sinks", "window"), [(-1, 1020), (4, 0)])
def test_sizes_that_a_sink_cache_refuses_are_refused(sinks: int, window: int):
    with pytest.raises(ValueError, match=f"sink_tokens {sinks} and window_tokens {window}: at least 0 and at least 1"):
        KVBudget.of(LLAMA2_70B).sink_cache_bytes(1, 1, sink_tokens=sinks, window_tokens=window)


def test_models_that_cache_something_else_are_refused():
    with pytest.raises(ValueError, match="latent of rank 512"):
        KVBudget.of(LlamaConfig(kv_lora_rank=512))
    with pytest.raises(ValueError, match="linear_attention"):
        KVBudget.of(LlamaConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]))
    with pytest.raises(ValueError, match="keys of 192 and values of 128 numbers per head"):
        KVBudget.of(MiMoV2FlashConfig())


def test_bytes_are_printed_with_their_unit():
    assert [readable(n) for n in (12, 2560, 20 * GIB, 4000 * 1024**4)] == ["12 B", "2.5 KiB", "20 GiB", "4000 TiB"]
