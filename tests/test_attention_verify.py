"""The verifier must catch a rolling S², tell future from documents and layers apart, and pass what is right."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_llama
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, GPTNeoXConfig, Qwen3Config

from longreach.attention import PATTERNS
from longreach.attention.hf import set_pattern
from longreach.attention.verify import Row, verify_attention

GROUP = 16


def with_attention(attend, **changes):
    """A tiny Llama whose layers compute attend(layer, q, k, v, position_ids) on tensors [B, H, T, D]."""

    def forward(module, q, k, v, attention_mask, *, scaling, position_ids=None, **kwargs):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return attend(module.layer_idx, q, k, v, position_ids).transpose(1, 2), None

    AttentionInterface.register("under_test", forward)
    AttentionMaskInterface.register("under_test", lambda *args, **kwargs: None)
    model = tiny_llama(**changes)
    model.set_attn_implementation("under_test")
    return model


def rolling_s2(layer, q, k, v, position_ids):
    """S²-Attn as most copies have it: half of the heads rolled by half a group, attention in groups, rolled back."""
    B, H, T, D = q.shape

    def rolled(x, by):
        return torch.cat([x[:, : H // 2], x[:, H // 2 :].roll(by, 2)], 1)

    def grouped(x):
        return rolled(x, -GROUP // 2).view(B, H, T // GROUP, GROUP, D).transpose(1, 2).flatten(0, 1)

    out = scaled_dot_product_attention(grouped(q), grouped(k), grouped(v), is_causal=True)
    return rolled(out.view(B, T // GROUP, H, GROUP, D).transpose(1, 2).reshape(B, H, T, D), GROUP // 2)


def causal(layer, q, k, v, position_ids):
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def blind_to_causality_in_layer_1(layer, q, k, v, position_ids):
    return scaled_dot_product_attention(q, k, v, is_causal=layer != 1)


def one_token_ahead(layer, q, k, v, position_ids):
    """Query 20 sees token 21: the smallest leak there is."""
    mask = torch.ones(q.shape[2], q.shape[2]).tril().bool()
    mask[20, 21] = True
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def test_a_rolling_s2_is_caught_by_output_and_by_gradient():
    leaks = verify_attention(with_attention(rolling_s2), tokens=64, packed=False)
    assert {(leak.kind, leak.found_by) for leak in leaks} == {("future", "output"), ("future", "gradient")}
    by_output = next(leak for leak in leaks if leak.found_by == "output")
    assert by_output.layer == 0
    assert by_output.token < GROUP // 2  # the row's first half-group ...
    assert by_output.sees[1] == 63  # ... sees its last one
    assert "in layer 0: token" in str(by_output)


def test_a_rolling_s2_mixes_documents_too():
    leaks = verify_attention(with_attention(rolling_s2), tokens=64)
    assert {leak.kind for leak in leaks if leak.packed and leak.found_by == "output"} == {"document"}
    assert {leak.kind for leak in leaks if leak.packed and leak.found_by == "gradient"} == {"document"}


def test_attention_that_ignores_documents_leaks_only_in_packed_rows():
    leaks = verify_attention(with_attention(causal))
    assert {(leak.kind, leak.packed) for leak in leaks} == {("document", True)}
    assert verify_attention(with_attention(causal), packed=False) == []


def test_the_layer_that_leaks_is_named():
    model = with_attention(blind_to_causality_in_layer_1, num_hidden_layers=3)
    leaks = verify_attention(model, packed=False)
    assert [leak.layer for leak in leaks if leak.found_by == "output"] == [1]


def test_one_token_that_sees_the_next_one_is_found():
    (leak,) = [x for x in verify_attention(with_attention(one_token_ahead), packed=False) if x.found_by == "output"]
    assert (leak.token, leak.sees[0], leak.layer) == (20, 21, 0)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("causal", {}),
        ("grouped", {"group_tokens": 16}),
        ("shifted_sparse", {"group_tokens": 16}),
        ("shifted_sparse", {"group_tokens": 16, "sink_tokens": 2}),
        ("sink_window", {"sink_tokens": 2, "window_tokens": 9}),
    ],
)
def test_no_pattern_of_ours_leaks(name, choices):
    model = tiny_llama()
    set_pattern(model, PATTERNS[name](**choices))
    assert verify_attention(model, tokens=61) == []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_plain_transformers_do_not_leak(attention):
    model = tiny_llama()
    model.set_attn_implementation(attention)
    assert verify_attention(model) == []


SMALL = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    "config",
    [GPTNeoXConfig(**SMALL, num_attention_heads=4), Qwen3Config(**SMALL, num_attention_heads=4, num_key_value_heads=2)],
    ids=lambda c: c.model_type,
)
def test_other_families_do_not_leak(config):
    assert verify_attention(AutoModelForCausalLM.from_config(config), tokens=32) == []


def test_a_peft_model_is_looked_through_and_left_as_it_was():
    model = get_peft_model(with_attention(rolling_s2), LoraConfig(r=2, target_modules=["q_proj"]))
    model.train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    assert verify_attention(model, tokens=32)
    assert model.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_bf16_rounding_is_no_leak():
    assert verify_attention(tiny_llama().bfloat16()) == []


def test_cuts_are_at_every_document_start_and_the_last_token():
    row = Row((0, 5, 9))
    assert {0, 5, 8} <= set(row.cuts(2))
    assert row.document(5) == (5, 9)
    assert row.position_ids_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="7 tokens are too few"):
        verify_attention(tiny_llama(), tokens=7)
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[:] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        verify_attention(model)
