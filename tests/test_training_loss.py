"""The fused loss against torch.nn.functional.cross_entropy, and against transformers' own loss."""

import pytest
import torch
from families import config_of
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from longreach.training.loss import TokenLoss, count_targets, fused_linear_cross_entropy
from longreach.training.model import fresh_llama
from longreach.training.recipe import LlamaRecipe


def case(dtype=torch.float64, batch=3, tokens=37, hidden=16, vocab=50, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden_BTE = torch.randn(batch, tokens, hidden, generator=g, dtype=dtype, requires_grad=True)
    weight_VE = torch.randn(vocab, hidden, generator=g, dtype=dtype, requires_grad=True)
    labels_BT = torch.randint(0, vocab, (batch, tokens), generator=g)
    labels_BT[torch.rand(batch, tokens, generator=g) < 0.3] = -100
    return hidden_BTE, weight_VE, labels_BT


def dense_loss(hidden_BTE, weight_VE, labels_BT):
    """The oracle: whole logits, torch's own cross entropy, summed."""
    logits = (hidden_BTE @ weight_VE.t())[:, :-1].flatten(0, 1)
    return cross_entropy(logits, labels_BT[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("chunk_tokens", [1, 7, 111, 512])
def test_loss_and_gradients_equal_the_dense_oracle_in_float64(chunk_tokens):
    hidden, weight, labels = case()
    expected = torch.autograd.grad(dense_loss(hidden, weight, labels) * 0.25, (hidden, weight))
    loss = fused_linear_cross_entropy(hidden, weight, labels, scale=0.25, chunk_tokens=chunk_tokens)
    got = torch.autograd.grad(loss, (hidden, weight))
    # 1e-12: float64 rounding (2e-16) of sums over 111 tokens and 50 words
    torch.testing.assert_close(loss, dense_loss(hidden, weight, labels) * 0.25, rtol=1e-12, atol=1e-12)
    for ours, oracle in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)


def test_an_upstream_gradient_scales_both_gradients():
    hidden, weight, labels = case()
    once = torch.autograd.grad(fused_linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    thrice = torch.autograd.grad(3.0 * fused_linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3.0 * a, b, rtol=1e-12, atol=1e-12)


def test_bfloat16_stays_within_its_own_rounding_of_the_oracle():
    hidden, weight, labels = (x.detach().bfloat16() if x.is_floating_point() else x for x in case())
    hidden.requires_grad_()
    weight.requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = torch.autograd.grad(dense_loss(*wide, labels), wide)
    got = torch.autograd.grad(fused_linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    for ours, oracle in zip(got, expected, strict=True):
        error = (ours.double() - oracle).norm() / oracle.norm()
        assert error < 2e-2  # bfloat16 keeps 8 bits: 4e-3 each for the logits, their gradient and the result


def test_rows_split_over_ranks_and_micro_batches_sum_to_the_gradient_of_the_whole_batch():
    hidden, weight, labels = case()
    targets = count_targets(labels)
    whole = torch.autograd.grad(dense_loss(hidden, weight, labels) / targets, weight)[0]
    world = 2  # DeepSpeed divides by it; rank 0 has two rows, rank 1 one row
    parts = [slice(0, 1), slice(1, 2), slice(2, 3)]
    losses = [fused_linear_cross_entropy(hidden[s], weight, labels[s], scale=world / targets) for s in parts]
    summed = sum(torch.autograd.grad(part, weight)[0] for part in losses) / world
    torch.testing.assert_close(summed, whole, rtol=1e-12, atol=1e-12)


def test_rows_without_a_target_give_zero_loss_and_zero_gradients():
    hidden, weight, labels = case()
    labels[:] = -100
    loss = fused_linear_cross_entropy(hidden, weight, labels)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0
    assert all(g.abs().max() == 0 for g in grads)


def test_a_frozen_weight_gets_no_gradient_buffer():
    hidden, weight, labels = case()
    loss = fused_linear_cross_entropy(hidden, weight.detach(), labels)
    _, d_weight = loss.grad_fn.saved_tensors
    assert d_weight is None


def test_a_second_backward_through_one_loss_is_refused():
    hidden, weight, labels = case()
    loss = fused_linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_loss_module_equals_the_models_own_loss_and_gradients():
    model = fresh_llama(LlamaRecipe(hidden=32, layers=2, heads=2, kv_heads=1), vocab_size=61, seed=0).double()
    ids = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(24).expand(2, -1)
    expected = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    got = TokenLoss(model)(ids, positions, ids, scale=1 / count_targets(ids))
    # transformers computes its loss and RMSNorm's variance in float32, so float64 inputs agree to 1e-6 only
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(got, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["granite", "cohere", "hyperclovax"])
def test_a_family_s_own_factor_of_its_logits_is_in_the_loss(family):
    config = config_of(family)
    config.initializer_range = 0.3  # with weights near 0 it would make no difference
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.randint(0, config.vocab_size, (1, 24))
    expected = cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    got = TokenLoss(model)(ids, torch.arange(24)[None], ids, scale=1 / 23)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused():
    model = fresh_llama(LlamaRecipe(hidden=32, layers=1, heads=2, kv_heads=2), vocab_size=61, seed=0)
    model.config.logit_scale = 1.1  # Cohere's, which Llama does not read
    with pytest.raises(ValueError, match=r"LlamaForCausalLM changes its logits .* \(by 0\.1 of the largest\)"):
        TokenLoss(model)


def test_a_model_that_caps_its_logits_is_refused():
    model = fresh_llama(LlamaRecipe(hidden=32, layers=1, heads=2, kv_heads=2), vocab_size=61, seed=0)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="its logits have a soft cap, which the fused loss"):
        TokenLoss(model)
