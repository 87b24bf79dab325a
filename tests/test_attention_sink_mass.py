"""Where attention rests: on hand-made models whose answer is known."""

import pytest
import torch
from tiny_models import tiny_llama

from longreach.attention import PATTERNS
from longreach.attention.hf import active_pattern, set_pattern
from longreach.attention.sink_mass import attention_mass, sink_heads, sink_mass
from longreach.training.model import with_softmax_sinks

IDS = torch.arange(20).repeat(2, 1)


def uniform(model):
    """Every key has the same score."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.zero_()
    return model


def test_a_uniform_head_gives_the_first_token_its_share():
    mass = sink_mass(attention_mass(uniform(tiny_llama()), IDS))
    share = sum(1 / (t + 1) for t in range(10, 20)) / 10
    assert mass["first_token"] == pytest.approx([share] * 2)
    assert mass["softmax_sink"] == [0, 0]


def test_a_sink_logit_takes_its_share_from_all_keys():
    model = with_softmax_sinks(uniform(tiny_llama()))
    with torch.no_grad():
        model.model.layers[1].self_attn.sinks.fill_(torch.tensor(5.0).log())  # weighs as much as five keys
    mass = sink_mass(attention_mass(model, IDS))
    for layer, sink in ((0, 1), (1, 5)):
        assert mass["softmax_sink"][layer] == pytest.approx(sum(sink / (t + 1 + sink) for t in range(10, 20)) / 10)
        assert mass["first_token"][layer] == pytest.approx(sum(1 / (t + 1 + sink) for t in range(10, 20)) / 10)


def test_measuring_changes_neither_the_model_nor_what_it_attends_by():
    model = tiny_llama()
    pattern = PATTERNS["grouped"](group_tokens=4)
    set_pattern(model, pattern)
    before = model(IDS, use_cache=False).logits
    attention_mass(model, IDS)
    assert active_pattern(model).pattern == pattern
    assert torch.equal(model(IDS, use_cache=False).logits, before)


def test_the_model_computes_as_ever_while_it_is_measured(monkeypatch):
    """The pass that measures gives the logits that any other gives: what is measured is the model's own attention."""
    model, seen = tiny_llama(), []
    before = model(IDS, use_cache=False).logits[:, -1:]
    model.register_forward_hook(lambda module, args, out: seen.append(out.logits))
    attention_mass(model, IDS)
    torch.testing.assert_close(seen[0], before, atol=2e-5, rtol=1e-5)


def test_mass_in_blocks_is_that_of_the_whole_matrix_by_head_and_token():
    """300 queries: more than two blocks. Eager attention's own matrices are the yardstick."""
    model = tiny_llama()
    ids = torch.randint(0, 256, (2, 300), generator=torch.Generator().manual_seed(0))
    mass = attention_mass(model, ids, first_tokens=3, map_layers=(1,))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        whole = model(ids, output_attentions=True).attentions
    expected = torch.stack([layer[:, :, 150:, :3].mean((0, 2)) for layer in whole])
    torch.testing.assert_close(mass.first_LHN, expected, rtol=1e-4, atol=1e-6)
    assert mass.maps.keys() == {1}
    torch.testing.assert_close(mass.maps[1], whole[1].mean((0, 1)), rtol=1e-4, atol=1e-6)


def test_heads_are_counted_by_text_over_the_first_64_queries_that_see_the_token():
    """Eager attention's own matrices are the yardstick; of 300 tokens only the first 64 count."""
    model = tiny_llama(initializer_range=0.6)
    ids = torch.randint(0, 256, (3, 300), generator=torch.Generator().manual_seed(0))
    mass = attention_mass(model, ids, first_tokens=3)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        whole = model(ids, output_attentions=True).attentions
    alpha_BLHN = torch.stack([layer[:, :, :64, :3].sum(2) for layer in whole], 1) / torch.tensor([64, 63, 62])
    torch.testing.assert_close(mass.early_BLHN, alpha_BLHN, rtol=1e-4, atol=1e-6)
    epsilon = float(alpha_BLHN[..., 2].quantile(0.7))
    expected = (alpha_BLHN[..., 2] > epsilon).float().mean((0, 2))
    torch.testing.assert_close(mass.heads_L(epsilon, token=2), expected)
    assert 0 < expected.mean() < 1


def test_heads_that_rest_in_the_softmax_are_counted_by_layer():
    model = with_softmax_sinks(uniform(tiny_llama()))
    assert sink_heads(attention_mass(model, IDS))["softmax_sink_0.3"] == 0  # 1 / (t + 2), on average 0.13
    with torch.no_grad():
        model.model.layers[1].self_attn.sinks[:3] = 100.0
    heads = sink_heads(attention_mass(model, IDS))
    assert heads == {"first_token_0.3": 0, "softmax_sink_0.3": 3 / 8, "first_token_0.2": 0, "softmax_sink_0.2": 3 / 8}


def test_norms_are_those_of_the_cache_and_of_the_hidden_states():
    model = tiny_llama(num_hidden_layers=3)
    mass = attention_mass(model, IDS)
    assert not any(layer._forward_hooks for layer in model.model.layers)
    with torch.no_grad():
        out = model(IDS, output_hidden_states=True, use_cache=True)
    for n, layer in enumerate(out.past_key_values.layers):
        norms_BKT = layer.values.norm(dim=-1)
        expected = [float(norms_BKT[..., 0].mean()), float(norms_BKT[..., 1:].mean())]
        assert mass.values_L2[n].tolist() == pytest.approx(expected, rel=1e-4)
    for n in (0, 1):  # the last hidden state has gone through the final norm
        norms_BT = out.hidden_states[n + 1].norm(dim=-1)
        expected = [float(norms_BT[..., 0].mean()), float(norms_BT[..., 1:].mean())]
        assert mass.residual_L2[n].tolist() == pytest.approx(expected, rel=1e-4)
