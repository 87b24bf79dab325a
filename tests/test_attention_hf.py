"""Patterns inside transformers: tiny models of every architecture against the oracle and their own attention."""

import copy

import pytest
import torch
import transformers
from attention_cases import EVERY_PATTERN, positions
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_llama

from longreach.attention import PATTERNS, reference
from longreach.attention.call import AttentionCall
from longreach.attention.hf import active_pattern, check_documents, set_pattern, with_documents
from longreach.attention.pattern import Heads

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": {"attn_logit_softcapping": None, "layer_types": ["full_attention"] * 2},
    "Gemma3Text": {"layer_types": ["full_attention"] * 2},
    "GPTNeoX": {},
    "StableLm": {},  # its layers, as Nemotron's, hand no keyword on that they do not name
    "Nemotron": {},
}
ODD_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 24}
SPARSE = PATTERNS["shifted_sparse"](group_tokens=8)
T = 29
# Two layers of float32 on logits of about unit size; each pattern's own sums are taken in another order.
TOLERANCE = 2e-5

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
patterns = pytest.mark.parametrize("pattern", EVERY_PATTERN, ids=str)


def tiny(architecture, **changes):
    fields = TINY | ARCHITECTURES[architecture] | changes
    name = architecture.removesuffix("Text")
    config = getattr(transformers, f"{architecture}Config")(**fields)
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{name}ForCausalLM")
    return model_class._from_config(config).eval()


def ids(*shape):
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(0))


def causal_mask(tokens):
    """Of transformers' own kind, so that no document is looked for."""
    return torch.full((tokens, tokens), float("-inf")).triu(1)[None, None]


def logits(model, input_ids, **kwargs):
    with torch.no_grad():
        return model(input_ids, use_cache=False, **kwargs).logits


def dense_forward(pattern):
    """transformers' interface for the oracle alone: a mask of ours, the plain formula, nothing of attention/hf.py."""

    def forward(module, q, k, v, mask, scaling=None, position_ids=None, **kwargs):
        call = AttentionCall(pattern, position_ids, scale=scaling, layer=module.layer_idx)
        out = reference.attend(q, k, v, call)
        return out.transpose(1, 2), None

    return forward


def by_oracle(model, pattern):
    transformers.AttentionInterface.register("oracle", dense_forward(pattern))
    model = copy.deepcopy(model)
    model.set_attn_implementation("oracle")
    return model


@architectures
def test_causal_equals_the_models_own_attention(architecture):
    model = tiny(architecture)
    own = logits(model, ids(2, T))
    set_pattern(model, PATTERNS["causal"]())
    assert torch.allclose(logits(model, ids(2, T)), own, atol=TOLERANCE)


@architectures
def test_s2_equals_the_oracle_and_differs_from_dense_attention(architecture):
    model = tiny(architecture)
    packed = positions((20, 9), (29,))
    expected = logits(by_oracle(model, SPARSE), ids(2, T), position_ids=packed)
    dense = logits(model, ids(2, T), position_ids=packed)
    set_pattern(model, SPARSE)
    got = logits(model, ids(2, T), position_ids=packed)
    assert torch.allclose(got, expected, atol=TOLERANCE)
    assert not torch.allclose(got, dense, atol=1e-2)


@patterns
def test_every_pattern_equals_the_oracle_in_a_model(pattern):
    model = tiny("Llama", **ODD_HEADS)
    expected = logits(by_oracle(model, pattern), ids(1, T))
    set_pattern(model, pattern)
    assert torch.allclose(logits(model, ids(1, T)), expected, atol=TOLERANCE)


@architectures
def test_packed_documents_give_what_they_give_alone(architecture):
    model = tiny(architecture)
    set_pattern(model, PATTERNS["causal"]())
    row = ids(1, T)
    packed = logits(model, row, position_ids=positions((11, 18)))
    alone = [logits(model, row[:, :11]), logits(model, row[:, 11:])]
    assert torch.allclose(packed, torch.cat(alone, 1), atol=TOLERANCE)


@architectures
def test_documents_with_positions_that_skip_give_what_they_give_alone(architecture):
    """A jump is no new document where that is said, in every architecture that takes patterns."""
    model = tiny(architecture)
    set_pattern(model, PATTERNS["causal"]())
    row, plain = ids(1, T), positions((11, 18))
    skipping = plain + torch.where((plain >= 5) & (torch.arange(T) < 20), 40, 0)  # a jump of 40 in the first document
    skipping[:, 20:] += 70  # and one of 70 in the second
    packed = logits(model, row, position_ids=with_documents(skipping, plain))
    alone = []
    for part in (slice(0, 11), slice(11, T)):
        alone.append(logits(tiny(architecture), row[:, part], position_ids=skipping[:, part],
                            attention_mask=causal_mask(part.stop - part.start)))  # fmt: skip
    assert torch.allclose(packed, torch.cat(alone, 1), atol=TOLERANCE)
    assert not torch.allclose(packed, logits(model, row, position_ids=skipping), atol=1e-2)
    check_documents(model)


def test_layers_that_are_recomputed_know_the_documents_too():
    model = tiny("StableLm")
    set_pattern(model, SPARSE)
    plain = positions((11, 18), (29,))
    skipping = plain + 40 * (plain >= 5)
    expected = gradients(model, with_documents(skipping, plain))
    assert not torch.equal(gradients(model, skipping)["lm_head.weight"], expected["lm_head.weight"])
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = gradients(model, with_documents(skipping, plain))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_model_that_hands_other_positions_to_its_attention_is_refused_where_they_skip():
    model = tiny("Llama")
    check_documents(model)
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, given: (args, given | {"position_ids": given["position_ids"] + 0}), with_kwargs=True
    )
    with pytest.raises(ValueError, match=r"Llama.* does not pass its positions on .* leave arm\.positions out"):
        check_documents(model)
    assert active_pattern(model) is None


@pytest.mark.parametrize("side", ["left", "right"])
@patterns
def test_padded_rows_give_what_they_give_alone(pattern, side):
    """Left padding moves group edges, so that a row is compared with one that has other tokens in its padding."""
    model = tiny("Llama")
    set_pattern(model, pattern)
    real = torch.ones(2, T, dtype=torch.long)
    real[0, slice(0, 6) if side == "left" else slice(T - 6, T)] = 0
    position_ids = (real.cumsum(1) - 1).clamp(min=0)
    row, other = ids(2, T), ids(2, T)
    other[real == 0] = 7
    got = logits(model, row, attention_mask=real, position_ids=position_ids)
    also = logits(model, other, attention_mask=real, position_ids=position_ids)
    assert got.isfinite().all()
    assert torch.equal(got[real == 1], also[real == 1])
    if side == "right" or pattern.pattern in ("causal", "sink_window"):
        alone = logits(model, row[:1, real[0].bool()])
        assert torch.allclose(got[0][real[0].bool()], alone[0], atol=TOLERANCE)


def test_a_mask_and_packed_positions_hold_together():
    """transformers' own masks forget the documents as soon as a 2-D mask is given."""
    model = tiny("Llama")
    set_pattern(model, SPARSE)
    row, packed = ids(1, T), positions((11, 18))
    real = torch.ones(1, T, dtype=torch.long)
    assert torch.equal(
        logits(model, row, position_ids=packed, attention_mask=real), logits(model, row, position_ids=packed)
    )
    real[0, -4:] = 0
    got = logits(model, row, position_ids=packed, attention_mask=real)
    assert torch.allclose(got[:, :-4], logits(model, row, position_ids=packed)[:, :-4], atol=TOLERANCE)


def gradients(model, position_ids=None):
    model.zero_grad()
    if position_ids is None:
        position_ids = positions((20, 9), (29,))
    model(ids(2, T), labels=ids(2, T), position_ids=position_ids, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected):
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        # float32 sums over 58 tokens in another order, relative to the largest entry of a parameter's gradient
        assert torch.allclose(got[name], gradient, atol=2e-5 * max(1.0, float(gradient.abs().max()))), name


@architectures
def test_gradients_equal_the_oracles(architecture):
    model = tiny(architecture)
    expected = gradients(by_oracle(model, SPARSE))
    set_pattern(model, SPARSE)
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = tiny("Llama")
    set_pattern(model, SPARSE)
    expected = gradients(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = gradients(model)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_peft_keeps_the_pattern_in_either_order():
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    before, after = tiny("Llama"), tiny("Llama")
    set_pattern(before, SPARSE)
    torch.manual_seed(1)
    before = get_peft_model(before, lora)
    torch.manual_seed(1)
    after = get_peft_model(after, lora)
    set_pattern(after, SPARSE)
    assert active_pattern(before) == active_pattern(after)
    assert active_pattern(before).pattern == SPARSE
    assert_same_gradients(gradients(before), gradients(after))
    assert torch.allclose(
        logits(before.merge_and_unload(), ids(1, T)),
        logits(by_oracle(after.merge_and_unload(), SPARSE), ids(1, T)),
        atol=TOLERANCE,
    )


def test_one_call_switches_from_sparse_to_dense():
    model = tiny("Qwen3")
    own = logits(model, ids(1, T))
    assert set_pattern(model, SPARSE) == active_pattern(model)
    assert str(active_pattern(model)) == f"{SPARSE} by kernel sdpa"
    assert not torch.allclose(logits(model, ids(1, T)), own, atol=1e-2)
    set_pattern(model, PATTERNS["causal"]())
    assert active_pattern(model).pattern == PATTERNS["causal"]()
    assert torch.allclose(logits(model, ids(1, T)), own, atol=TOLERANCE)


def test_two_models_keep_their_own_patterns():
    one, two = tiny("Llama"), tiny("Llama")
    set_pattern(one, SPARSE)
    set_pattern(two, PATTERNS["shifted_sparse"](group_tokens=4))
    assert active_pattern(one).pattern.group_tokens == 8
    assert active_pattern(two).pattern.group_tokens == 4
    assert not torch.allclose(logits(one, ids(1, T)), logits(two, ids(1, T)), atol=1e-2)


def test_a_model_left_alone_has_no_pattern():
    assert active_pattern(tiny("Llama")) is None


def test_active_pattern_notices_that_another_attention_was_set():
    model = tiny("Llama")
    set_pattern(model, SPARSE)
    model.set_attn_implementation("sdpa")
    assert active_pattern(model) is None


def test_active_pattern_notices_layers_that_disagree():
    model = tiny("Llama")
    set_pattern(model, SPARSE)
    attention = model.model.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="use different attention"):
        active_pattern(model)


def test_odd_layers_change_the_roles_of_an_odd_number_of_kv_heads():
    heads = [Heads(3, 3, layer) for layer in (0, 1)]
    assert [SPARSE.shifted(h, 0) for h in heads] == [False, True]
    model = tiny("Llama", **ODD_HEADS)
    expected = logits(by_oracle(model, SPARSE), ids(1, T))
    set_pattern(model, SPARSE)
    assert torch.allclose(logits(model, ids(1, T)), expected, atol=TOLERANCE)
    for layer in model.model.layers:
        layer.self_attn.layer_idx = 0
    assert not torch.allclose(logits(model, ids(1, T)), expected, atol=1e-2)


def test_with_a_cache_of_earlier_tokens_it_says_what_to_do():
    model = tiny_llama()
    set_pattern(model, SPARSE)
    past = model(ids(1, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="with a KV cache, set the pattern"):
        model(ids(1, 1), past_key_values=past)


def test_a_mask_of_four_dimensions_is_refused():
    model = tiny("Llama")
    set_pattern(model, SPARSE)
    with pytest.raises(ValueError, match="leave 4-D masks to the pattern"):
        logits(model, ids(1, 4), attention_mask=torch.zeros(1, 1, 4, 4))


def test_dropout_is_refused():
    model = tiny("Llama", attention_dropout=0.1).train()
    set_pattern(model, SPARSE)
    with pytest.raises(ValueError, match=r"attention dropout 0\.1"):
        model(ids(1, 4), use_cache=False)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("Mistral", {"sliding_window": 16}, r"layers\.0\.self_attn has a sliding window of 16"),
        ("Gemma3Text", {"layer_types": ["full_attention", "sliding_attention"]}, r"layers\.1\.self_attn has a sliding"),
        ("Gemma2", {"attn_logit_softcapping": 50.0}, r"caps its scores at 50\.0"),
    ],
)
def test_a_model_whose_own_attention_is_more_than_the_pattern_is_refused(architecture, changes, message):
    model = tiny(architecture, **changes)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        set_pattern(model, SPARSE)
    assert model.config._attn_implementation == before


def test_a_softcap_that_comes_with_the_call_is_refused():
    model = tiny("Gemma2")
    set_pattern(model, SPARSE)
    model.model.layers[1].self_attn.attn_logit_softcapping = 50.0
    with pytest.raises(ValueError, match=r"softcap=50\.0"):
        logits(model, ids(1, 4))


def test_something_that_is_no_transformers_model_is_refused():
    with pytest.raises(ValueError, match="Linear contains no transformers model"):
        set_pattern(torch.nn.Linear(2, 2), SPARSE)


def test_a_kernel_that_cannot_run_is_refused_before_the_model_changes():
    model = tiny("Llama")
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="kernel"):
        set_pattern(model, SPARSE, kernel="fast")
    assert model.config._attn_implementation == before
