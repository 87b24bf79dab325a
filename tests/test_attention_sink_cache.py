"""SinkCache in transformers models: against keys that are kept un-rotated and rotated anew at every step."""

import copy
import importlib

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    CohereConfig,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteSWAConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    SmolLM3Config,
)

from longreach.attention import PATTERNS
from longreach.attention.hf import set_pattern
from longreach.attention.kv_budget import KVBudget
from longreach.attention.sink_cache import SinkCache, read_sink_cache, reading_sink_cache

SMALL = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "head_dim": 8, "initializer_range": 0.3,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = [
    MistralConfig(**GROUPED),
    Qwen2Config(**GROUPED),
    Qwen3Config(**GROUPED),
    GemmaConfig(**GROUPED | {"num_key_value_heads": 1}),
    GPTNeoXConfig(**SMALL),  # a quarter of each head is rotated
    CohereConfig(**GROUPED),  # pairs are neighbours
]
FULL = GROUPED | {"layer_types": ["full_attention"] * 2}
WITH_SINK_LOGITS = [
    GraniteSWAConfig(**FULL, sliding_window=8, attention_multiplier=8**-0.5),  # no layer has that window
    GptOssConfig(**FULL, num_local_experts=1, num_experts_per_tok=1),  # its YaRN scales queries and keys
]
ROPES = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
]  # fmt: skip


def text(batch=2, tokens=50, seed=0):
    return torch.randint(3, 250, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def decoded(model, cache, ids, cuts=1):
    """Logits of a text given to the model piece by piece."""
    with torch.no_grad():
        return torch.cat([model(x, past_key_values=cache).logits for x in ids.split(cuts, 1)], 1)


def greedy(model, ids, cache, **more):
    return model.generate(
        ids, past_key_values=cache, max_new_tokens=25, do_sample=False, pad_token_id=0, eos_token_id=-1, **more
    )


class ExactRotary(nn.Module):
    """Llama's rotary embedding with float64 angles."""

    def __init__(self, of):
        super().__init__()
        self.inv_freq, self.attention_scaling = of.inv_freq.double(), of.attention_scaling

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.inv_freq
        angles = torch.cat([angles, angles], -1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def recomputed(model, ids, sinks, window):
    """Logits token by token; keys are kept un-rotated and rotated at every step by their place in the cache."""
    family = importlib.import_module(type(model).__module__)
    rotary, kept = model.base_model.rotary_emb, {}

    def attend(module, q, k, v, attention_mask, *, scaling, **kwargs):
        """q, k arrive at position 0, where the rotation is none (YaRN's scale aside)."""
        cached = kept.setdefault(module.layer_idx, [])
        if len(cached) > sinks + window:
            del cached[sinks]
        cached.append((k / rotary.attention_scaling, v))
        places = torch.arange(len(cached))[None]
        keys, values = torch.cat([k for k, _ in cached], 2), torch.cat([v for _, v in cached], 2)
        _, keys = family.apply_rotary_pos_emb(keys, keys, *rotary(keys, places))
        q = q / rotary.attention_scaling
        q, _ = family.apply_rotary_pos_emb(q, q, *rotary(q, places[:, -1:]))
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (keys, values))
        scores = q @ keys.mT * scaling
        if (sink_logit := kwargs.get("s_aux")) is not None:
            scores = torch.cat([scores, sink_logit.view(1, -1, 1, 1).expand(len(q), -1, 1, 1)], -1)
        return (scores.softmax(-1)[..., : len(cached)] @ values).transpose(1, 2), None

    before = model.config._attn_implementation
    AttentionInterface.register("recomputed", attend)
    AttentionMaskInterface.register("recomputed", lambda *args, **kwargs: None)
    model.set_attn_implementation("recomputed")
    zero = torch.zeros(len(ids), 1, dtype=torch.long)
    with torch.no_grad():
        steps = [model(x, position_ids=zero, use_cache=False).logits for x in ids.split(1, 1)]
    model.set_attn_implementation(before)
    return torch.cat(steps, 1)


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, *ROPES], ids=lambda r: r["rope_type"])
@pytest.mark.parametrize(("sinks", "window"), [(3, 9), (0, 7), (4, 1)])
def test_every_step_equals_rotating_all_keys_anew(rope, sinks, window):
    """float64 with float64 angles: nothing but the order of sums differs."""
    model = tiny_llama(rope_parameters=rope | {"rope_theta": 1e4}).double()
    model.model.rotary_emb = ExactRotary(model.model.rotary_emb)
    ids = text()
    expected = recomputed(model, ids, sinks, window)
    got = decoded(model, SinkCache(model.config, sinks, window), ids)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.model_type)
def test_every_family_of_models_equals_rotating_all_keys_anew(config):
    """transformers' own tables here: their float32 angles up to position 50 err by 2e-6; the logits are of order 10."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    ids = text()
    expected = recomputed(model, ids, 3, 9)
    torch.testing.assert_close(decoded(model, SinkCache(config, 3, 9), ids), expected, atol=2e-4, rtol=0)


def with_sink_logits(config):
    """A model whose softmax has a logit of its own a head, none of them alike."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), experts_implementation="eager").double().eval()
    with torch.no_grad():
        for n, layer in enumerate(model.model.layers):
            layer.self_attn.sinks.copy_(torch.tensor([0.0, 1.0, -2.0, 3.0]) + n)
    return model


@pytest.mark.parametrize("config", WITH_SINK_LOGITS, ids=lambda c: c.model_type)
@pytest.mark.parametrize(("sinks", "window"), [(3, 9), (0, 7)])
def test_a_sink_in_the_softmax_takes_part_in_every_step_and_in_chunks(config, sinks, window):
    """Steps as above, for the same reason; chunks in float64 to the order of sums."""
    model, ids = with_sink_logits(config), text()
    expected = recomputed(model, ids, sinks, window)
    with reading_sink_cache(model):
        steps = decoded(model, SinkCache(config, sinks, window), ids)
        chunks = decoded(model, SinkCache(config, sinks, window), ids, [2, 11, 1, 1, 35])
    torch.testing.assert_close(steps, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(chunks, steps, atol=1e-12, rtol=0)
    assert model.config._attn_implementation == "eager"
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e9)  # what leaving the sink out would give
    assert (recomputed(model, ids, sinks, window) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("config", WITH_SINK_LOGITS, ids=lambda c: c.model_type)
def test_models_with_a_sink_in_the_softmax_generate_with_it_padded_rows_too(config):
    """Until it is full, as with transformers' own cache and attention; then each padded row as alone."""
    model, ids = with_sink_logits(config), text()
    expected = greedy(model, ids, DynamicCache(config=config))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    read_sink_cache(model)
    assert torch.equal(greedy(model, ids, SinkCache(config, 4, 100)), expected)
    together = greedy(model, ids, SinkCache(config, 4, 25), attention_mask=mask)
    assert torch.equal(together[1:, 5:], greedy(model, ids[1:, 5:], SinkCache(config, 4, 25)))
    assert torch.equal(together[:1], greedy(model, ids[:1], SinkCache(config, 4, 25)))


def test_a_model_that_reads_a_sink_cache_reads_no_other():
    model = with_sink_logits(WITH_SINK_LOGITS[0])
    read_sink_cache(model)
    with pytest.raises(TypeError, match="reads a SinkCache only: pass one as past_key_values"):
        model(text())
    with pytest.raises(ValueError, match="FalconForCausalLM computes its attention itself"):
        read_sink_cache(FalconForCausalLM(FalconConfig(vocab_size=9, hidden_size=8, num_attention_heads=2)))


@pytest.mark.parametrize("positions", ["cache", "text"])
@pytest.mark.parametrize("cuts", [50, [20, 30], [1, 1, 48], [2, 11, 1, 1, 35], [3, 10, 37], [12, 1, 37]], ids=str)
def test_chunks_of_any_length_equal_single_tokens(cuts, positions):
    """Longer than the window, ending inside the sinks, one by one in between."""
    model, ids = tiny_llama().double(), text()
    one, many = (SinkCache(model.config, 3, 9, positions) for _ in range(2))
    expected = decoded(model, one, ids)
    torch.testing.assert_close(decoded(model, many, ids, cuts), expected, atol=1e-12, rtol=0)
    after = text(seed=1)
    torch.testing.assert_close(decoded(model, many, after), decoded(model, one, after), atol=1e-12, rtol=0)


def test_a_model_with_a_longer_window_of_its_own_takes_chunks_that_outgrow_it():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**GROUPED, sliding_window=16)).double().eval()
    one, many = (SinkCache(model.config, 3, 9) for _ in range(2))
    ids = text()
    torch.testing.assert_close(decoded(model, many, ids, 40), decoded(model, one, ids), atol=1e-12, rtol=0)


def test_positions_in_the_text_equal_one_pass_with_a_mask():
    model, ids = tiny_llama().double(), text()
    t = torch.arange(50)
    distance = t[:, None] - t
    seen = (distance >= 0) & ((distance <= 9) | (t < 3))
    with torch.no_grad():
        expected = model(ids, attention_mask=seen[None, None].expand(2, 1, 50, 50)).logits
    got = decoded(model, SinkCache(model.config, 3, 9, "text"), ids)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    assert (decoded(model, SinkCache(model.config, 3, 9), ids) - expected).abs().max() > 1e-2


def test_it_is_a_plain_cache_until_it_is_full():
    model, ids = tiny_llama(), text()
    expected = greedy(model, ids, DynamicCache(config=model.config))
    assert torch.equal(greedy(model, ids, SinkCache(model.config, 4, 100)), expected)
    assert not torch.equal(greedy(model, ids, SinkCache(model.config, 4, 20)), expected)
    beams = greedy(model, ids, DynamicCache(config=model.config), num_beams=3)
    assert torch.equal(greedy(model, ids, SinkCache(model.config, 4, 100), num_beams=3), beams)


def test_generate_equals_choosing_each_token_by_hand():
    model, ids = tiny_llama(), text()
    cache, by_hand = SinkCache(model.config, 4, 12), ids
    logits = decoded(model, cache, ids)
    for _ in range(25):
        by_hand = torch.cat([by_hand, logits[:, -1:].argmax(-1)], 1)
        logits = decoded(model, cache, by_hand[:, -1:])
    assert torch.equal(greedy(model, ids, SinkCache(model.config, 4, 12)), by_hand)
    assert torch.equal(greedy(model, ids, SinkCache(model.config, 4, 12), prefill_chunk_size=17), by_hand)


def test_a_cache_goes_on_over_several_turns_and_begins_anew_after_reset():
    model, ids = tiny_llama(), text()
    cache = SinkCache(model.config, 4, 12)
    first = greedy(model, ids, cache)
    more = torch.cat([first, text(tokens=9, seed=2)], 1)
    whole = greedy(model, more, SinkCache(model.config, 4, 12))
    assert torch.equal(greedy(model, more, cache), whole)
    cache.reset()
    assert torch.equal(greedy(model, ids, cache), first)
    with pytest.raises(ValueError, match=r"the batch has 3: reset\(\) it"):
        decoded(model, cache, text(batch=3))
    cache.reset()
    assert torch.equal(greedy(model, ids.repeat(3, 1), cache), first.repeat(3, 1))


@pytest.mark.parametrize("padding", [1, 5, 30])
def test_a_left_padded_row_generates_what_it_would_alone(padding):
    """Its sinks are its own first tokens, not the padding; while it fills its cache, the other row's is full."""
    model, ids = tiny_llama(), text(batch=3)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    together = greedy(model, ids, SinkCache(model.config, 4, 25), attention_mask=mask)
    alone = greedy(model, ids[1:2, padding:], SinkCache(model.config, 4, 25))
    assert torch.equal(together[1:2, padding:], alone)
    assert torch.equal(together[::2], greedy(model, ids[::2], SinkCache(model.config, 4, 25)))


def test_what_memory_held_before_reaches_no_row(monkeypatch):
    """Uninitialised memory may hold NaN, which no mask of the scores takes out again."""

    def poisoned(*shape, real=torch.empty, **options):
        made = real(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    test_a_left_padded_row_generates_what_it_would_alone(30)


def test_the_millionth_token_decodes_like_the_fiftieth():
    """float32. What lies in the cache is the same; untreated, angles at a million are off by 3e-2 radians."""
    model, ids = tiny_llama(), text()
    near, far = SinkCache(model.config, 3, 9), SinkCache(model.config, 3, 9)
    for cache in (near, far):
        decoded(model, cache, ids)
    for layer in far.layers:
        layer.seen = 1_000_000
    after = text(tokens=40, seed=3)
    got, expected = (
        decoded(model, cache, after)[:, 20:] for cache in (far, near)
    )  # what saw the jump has left by then
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)  # logits of order 10


def test_memory_is_allocated_once_and_is_what_the_calculator_says():
    model, cache = tiny_llama(), SinkCache(tiny_llama().config, 3, 9)
    decoded(model, cache, text(tokens=1))
    buffers = [x for layer in cache.layers for x in (layer.keys, layer.values, layer.sink_keys)]
    places = [x.data_ptr() for x in buffers]
    decoded(model, cache, text(tokens=100), 30)
    assert places == [x.data_ptr() for layer in cache.layers for x in (layer.keys, layer.values, layer.sink_keys)]
    budget = KVBudget.of(model.config)
    held = sum(x.nbytes for x in buffers)
    assert held == budget.sink_cache_bytes(2, 101, "fp32", sink_tokens=3, window_tokens=9)


def test_a_cache_begun_in_inference_mode_goes_on_outside_of_it():
    model, ids = tiny_llama(), text()
    cache = SinkCache(model.config, 3, 9)
    with torch.inference_mode():
        begun = decoded(model, cache, ids, 20)
        cache.reorder_cache(torch.tensor([0, 1]))
    after = decoded(model, cache, text(seed=1), 20)
    other = SinkCache(model.config, 3, 9)
    assert torch.equal(
        torch.cat([begun, after], 1), torch.cat([decoded(model, other, x, 20) for x in (ids, text(seed=1))], 1)
    )


@pytest.mark.parametrize("attention", ["eager", "a pattern of ours"])
def test_other_attention_than_sdpa_is_an_error_that_says_what_to_do(attention):
    model = tiny_llama()
    if attention == "a pattern of ours":
        set_pattern(model, PATTERNS["causal"]())
    else:
        model.set_attn_implementation(attention)
    cache = SinkCache(model.config)
    with pytest.raises(ValueError, match=r"set_attn_implementation\('sdpa'\)"):
        decoded(model, cache, text(), 20)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="failed half-way"):
        decoded(model, cache, text(), 20)
    cache.reset()
    decoded(model, cache, text(), 20)


def test_a_gradient_through_the_cache_is_an_error():
    model = tiny_llama()
    with pytest.raises(RuntimeError, match="inference"):
        model(text(), past_key_values=SinkCache(model.config)).logits.sum().backward()


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (tiny_llama().config, {"window_tokens": 0}, "window_tokens 0"),
        (tiny_llama().config, {"sink_tokens": -1}, "sink_tokens -1"),
        (tiny_llama().config, {"positions": "world"}, "'world'"),
        (MistralConfig(sliding_window=1024), {}, "own window of 1024 .* at most 1019"),
        (GPT2Config(), {}, "gpt2"),
        (GptOssConfig(), {}, "own window of 128 .* at most 123"),
        (GraniteSWAConfig(**FULL, layer_rope_theta=[1e4, 0]), {}, "differently or not at all in some of its layers"),
        (SmolLM3Config(**GROUPED, no_rope_layers=[1, 0]), {}, "count positions in the text"),
        (Qwen3NextConfig(), {}, "layers .'linear_attention'., whose state a SinkCache cannot keep"),
        (tiny_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}).config, {}, "dynamic"),
    ],
)
def test_what_cannot_be_exact_is_refused(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        SinkCache(config, **arguments)


def test_padding_that_it_cannot_place_is_refused():
    model, ids = tiny_llama(), text()
    right, late = torch.ones_like(ids), torch.ones(2, 100, dtype=torch.long)
    right[0, -3:], late[0, 60:63] = 0, 0
    with torch.no_grad(), pytest.raises(ValueError, match="on its right"):
        model(ids, attention_mask=right, past_key_values=SinkCache(model.config))
    cache = SinkCache(model.config)
    decoded(model, cache, ids)
    with torch.no_grad(), pytest.raises(ValueError, match="left padding only"):
        model(ids, attention_mask=late, past_key_values=cache)
    with torch.no_grad(), pytest.raises(ValueError, match="2 rows, the batch has 3"):
        model(text(batch=3), past_key_values=cache)
    with pytest.raises(ValueError, match="cannot remove tokens"):
        cache.crop(-1)
