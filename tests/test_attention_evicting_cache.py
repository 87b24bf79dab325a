"""TOVA and H2O as their papers say them, one token after the other, against the caches that models use."""

import importlib

import pytest
import torch
from test_attention_sink_cache import WITH_SINK_LOGITS, decoded, greedy, text, with_sink_logits
from tiny_models import tiny_llama
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, MistralConfig

from longreach.attention.evicting_cache import EvictingCache
from longreach.attention.sink_cache import read_sink_cache, reading_sink_cache


def kept_one_by_one(model, ids, policy, size, positions):
    """Logits of one text in plain Python: each KV head has a list of [un-rotated key, value, attention, place]."""
    family, rotary, kept = importlib.import_module(type(model).__module__), model.base_model.rotary_emb, {}

    def rotated(x_ND, places):
        x = x_ND[None, None] / rotary.attention_scaling  # of "position 0"
        return family.apply_rotary_pos_emb(x, x, *rotary(x, torch.tensor([places])))[0][0, 0]

    def attend(module, q, k, v, attention_mask, *, scaling, **kwargs):
        heads, repeat = kept.setdefault(module.layer_idx, [[] for _ in range(k.shape[1])]), q.shape[1] // k.shape[1]
        outs, masses = [], []
        for n, entries in enumerate(heads):
            entries.append([k[0, n, 0], v[0, n, 0], 0.0, attend.now])
            places = [*range(len(entries))] if positions == "cache" else [entry[3] for entry in entries]
            keys, values = rotated(torch.stack([entry[0] for entry in entries]), places), [e[1] for e in entries]
            masses.append(torch.zeros(len(entries), dtype=q.dtype))
            for head in range(n * repeat, (n + 1) * repeat):
                scores = keys @ rotated(q[0, head], places[-1:])[0] * scaling
                if (sink_logit := kwargs.get("s_aux")) is not None:
                    scores = torch.cat([scores, sink_logit[head : head + 1]])
                mass = scores.softmax(-1)[: len(entries)]
                outs.append(sum(m * value for m, value in zip(mass, values, strict=True)))
                masses[n] += mass
            for entry, mass in zip(entries, masses[n], strict=True):
                entry[2] += float(mass)
        if len(heads[0]) > size:
            for entries in heads:
                by_query = sum(masses).tolist()
                candidates = range(len(entries) - size // 2) if policy == "h2o" else range(len(entries))
                worth = {i: entries[i][2] if policy == "h2o" else by_query[i] for i in candidates}
                del entries[min(worth, key=worth.get)]
        return torch.stack(outs)[None, None], None

    before = model.config._attn_implementation
    AttentionInterface.register("one_by_one", attend)
    AttentionMaskInterface.register("one_by_one", lambda *args, **kwargs: None)
    model.set_attn_implementation("one_by_one")
    steps = []
    with torch.no_grad():
        for attend.now, x in enumerate(ids.split(1, 1)):
            steps.append(model(x, position_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits)
    model.set_attn_implementation(before)
    return torch.cat(steps, 1)


@pytest.mark.parametrize("positions", ["cache", "text"])
@pytest.mark.parametrize("policy", ["tova", "h2o"])
def test_every_step_keeps_and_gives_what_the_paper_says(policy, positions):
    """float64 with transformers' float32 angles, which err by 2e-6; logits are of order 10."""
    model, ids = tiny_llama().double(), text(batch=1, tokens=25)
    expected = kept_one_by_one(model, ids, policy, 9, positions)
    with reading_sink_cache(model):
        got = decoded(model, EvictingCache(model.config, policy, 9, positions), ids)
        whole = decoded(model, EvictingCache(model.config, policy, 9, positions), ids, [1, 15, 9])
        two = decoded(model, EvictingCache(model.config, policy, 9, positions), torch.cat([text(1, 25, seed=1), ids]))
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(whole, got, atol=1e-10, rtol=0)  # the order of sums
    torch.testing.assert_close(two[1:], got, atol=1e-10, rtol=0)
    other = kept_one_by_one(model, ids, policy, 9, "text" if positions == "cache" else "cache")
    assert (other - expected).abs().max() > 1e-2


@pytest.mark.parametrize("config", WITH_SINK_LOGITS, ids=lambda c: c.model_type)
def test_a_sink_in_the_softmax_takes_part(config):
    model, ids = with_sink_logits(config), text(batch=1, tokens=20)
    expected = kept_one_by_one(model, ids, "h2o", 8, "cache")
    with reading_sink_cache(model):
        got = decoded(model, EvictingCache(config, "h2o", 8), ids)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("policy", ["tova", "h2o"])
def test_it_is_a_plain_cache_until_it_is_full_and_begins_anew_after_reset(policy):
    model, ids = tiny_llama(), text()
    expected = greedy(model, ids, DynamicCache(config=model.config))
    read_sink_cache(model)
    cache = EvictingCache(model.config, policy, 100)
    assert torch.equal(greedy(model, ids, cache), expected)
    cache.reset()
    assert torch.equal(greedy(model, ids, cache), expected)
    small = EvictingCache(model.config, policy, 20)
    assert not torch.equal(greedy(model, ids, small), expected)
    assert {layer.keys.shape[2] for layer in small.layers} == {20}


def test_what_cannot_be_right_is_refused():
    model, ids = tiny_llama(), text()
    read_sink_cache(model)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="does not support padding"):
        model(ids, attention_mask=mask, past_key_values=EvictingCache(model.config, "tova", 9))
    with pytest.raises(ValueError, match="cache_tokens is 1, but must be at least 2"):
        EvictingCache(model.config, "tova", 1)
    with pytest.raises(ValueError, match=r"own window of 9 tokens .* at most 8"):
        EvictingCache(MistralConfig(sliding_window=9), "h2o", 9)
    with pytest.raises(RuntimeError, match="is for inference"):
        model(ids, past_key_values=EvictingCache(model.config, "h2o", 9)).logits.sum().backward()
