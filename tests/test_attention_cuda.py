"""The kernels of CUDA against the float64 oracle, forward and gradients; and a model that trains with them."""

import copy

import pytest
import torch
from attention_cases import EVERY_PATTERN, HEADS, ROWS, oracle, outputs_and_gradients, positions, qkv
from transformers import LlamaConfig, LlamaForCausalLM

from longreach.attention import PATTERNS, attend
from longreach.attention.flash import has_flash_attn
from longreach.attention.hf import active_pattern, set_pattern
from longreach.attention.kernels import Situation, choose
from longreach.attention.streamed import streamed_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Probabilities and output are rounded once each to 8 (bfloat16) or 11 bits, sums of a few tens of such errors.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}

flash = pytest.param("flash", marks=pytest.mark.skipif(not has_flash_attn(), reason="flash-attn is not installed"))
kernels = pytest.mark.parametrize("kernel", [flash, "sdpa", "flex"])
patterns = pytest.mark.parametrize("pattern", EVERY_PATTERN, ids=str)


@pytest.fixture(autouse=True)
def _compiled_anew():
    torch._dynamo.reset()  # each pattern is a compilation of its own, and their number is limited


def assert_equals_oracle(pattern, kernel, q, k, v, documents=None, sink_logit=None, layer=0):
    on_gpu = [None if x is None else x.cuda() for x in (q, k, v, documents, sink_logit)]
    got = outputs_and_gradients(
        attend, *on_gpu[:3], pattern, on_gpu[3], sink_logit_H=on_gpu[4], kernel=kernel, layer=layer
    )
    expected = oracle(q, k, v, pattern, documents, sink_logit_H=sink_logit, layer=layer)
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsink"), got, expected, strict=False):
        error = float((a.double().cpu() - b).abs().max())
        assert error < TOLERANCE[q.dtype] * max(1.0, float(b.abs().max())), f"{name} differs by {error}"


@pytest.mark.parametrize("row", ROWS)
@kernels
@patterns
def test_kernels_equal_the_oracle_on_every_row(pattern, kernel, row):
    T, documents = ROWS[row]
    q, k, v = qkv(4, 2, T, B=len(documents or [0]), D=64, dtype=torch.bfloat16)
    assert_equals_oracle(pattern, kernel, q, k, v, None if documents is None else positions(*documents), layer=1)


@pytest.mark.parametrize(("H", "K"), HEADS)
@kernels
def test_kernels_equal_the_oracle_with_any_heads(kernel, H, K):
    pattern = PATTERNS["shifted_sparse"](group_tokens=128, sink_tokens=4)
    q, k, v = qkv(H, K, 700, B=2, D=64, dtype=torch.float16)
    documents = positions((450, 250), (3, 697))
    for layer in (0, 1):
        assert_equals_oracle(pattern, kernel, q, k, v, documents, torch.linspace(-2, 3, H), layer)


@patterns
def test_float32_runs_by_flex_and_by_nothing_less_exact(pattern):
    q, k, v = qkv(4, 2, 300, D=64, dtype=torch.float32)
    assert choose(pattern, "auto", Situation("cuda", torch.float32)) == "flex"
    assert_equals_oracle(pattern, "auto", q, k, v)


def test_flash_attention_is_what_runs_by_itself_in_bfloat16():
    first = "flash" if has_flash_attn() else "sdpa"
    assert all(choose(pattern, "auto", Situation("cuda", torch.bfloat16)) == first for pattern in EVERY_PATTERN)


def test_a_model_trains_with_s2_as_with_the_oracle():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    fast = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    slow = copy.deepcopy(fast)
    pattern = PATTERNS["shifted_sparse"](group_tokens=64)
    ids = torch.randint(64, (2, 256), device="cuda")
    losses = []
    for model, kernel in ((fast, "auto"), (slow, "reference")):
        set_pattern(model, pattern, kernel=kernel)
        assert active_pattern(model).pattern == pattern
        model.gradient_checkpointing_enable()
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    for a, b in zip(fast.parameters(), slow.parameters(), strict=True):
        assert float((a.grad - b.grad).norm()) < 5e-2 * float(b.grad.norm())


@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_streaming_in_one_pass_equals_the_formula(dtype, length):
    q, k, v = qkv(4, 2, length, D=64, dtype=dtype)
    sinks, recent = (k[:, :, :4], v[:, :, :4]), (k[:, :, 4:], v[:, :, 4:])
    options = {"sink_tokens": 4, "window_tokens": 50, "rotary": None, "scale": 0.2}
    expected = streamed_attention(q.double(), *([x.double() for x in pair] for pair in (recent, sinks)), **options)
    got = streamed_attention(q.cuda(), *([x.cuda() for x in pair] for pair in (recent, sinks)), **options)
    assert float((got.cpu().double() - expected).abs().max()) < TOLERANCE[dtype]
