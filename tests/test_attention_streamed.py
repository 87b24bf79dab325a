"""The banded form against the definition, query by query, and against decoding with a SinkCache."""

import pytest
import torch
from attention_cases import dense
from tiny_models import tiny_llama
from transformers import AttentionInterface, AttentionMaskInterface, CohereConfig, LlamaConfig

from longreach.attention import PATTERNS, flash
from longreach.attention.rope import CORRECTED_FROM, Rotary
from longreach.attention.sink_cache import SinkCache
from longreach.attention.streamed import _attend, plain, streamed_attention
from longreach.evaluation.small_cache import StreamedAttention

D = 16
HALVES = Rotary.of(LlamaConfig(hidden_size=D * 2, num_attention_heads=2))
NEIGHBOURS = Rotary.of(CohereConfig(hidden_size=D * 2, num_attention_heads=2))


def tensors(tokens, kv_heads, dtype=torch.float64, batch=2, heads=6):
    torch.manual_seed(tokens)
    shapes = (heads, kv_heads, kv_heads)
    return [torch.randn(batch, n, tokens, D, dtype=dtype) for n in shapes]


def by_definition(q, k, v, sinks, window, rotary, scale):
    """One query after the other: its keys picked out, and the query turned back where it meets a sink."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = []
    for t in range(q.shape[2]):
        seen = [at for at in range(t + 1) if at < sinks or t - at <= window]
        near, back = q[:, :, t : t + 1], torch.tensor([min(0, sinks + window - t)])
        far = rotary.rotate(near, back) if rotary else near
        scores = [(far if at < sinks else near) @ k[:, :, at : at + 1].mT for at in seen]
        out.append((torch.cat(scores, -1) * scale).softmax(-1) @ v[:, :, seen])
    return torch.cat(out, 2)


def ours(q, k, v, sinks, window, rotary, scale, first=0):
    oldest = max(sinks, first - window)
    return streamed_attention(
        q[:, :, first:], (k[:, :, oldest:], v[:, :, oldest:]), (k[:, :, :sinks], v[:, :, :sinks]),
        first=first, sink_tokens=sinks, window_tokens=window, rotary=rotary, scale=scale,
    )  # fmt: skip


@pytest.mark.parametrize("rotary", [HALVES, NEIGHBOURS, None], ids=["halves", "neighbours", "text"])
@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_whole_text_and_its_later_chunks_equal_the_definition(rotary, kv_heads, sinks, window):
    """Lengths around every edge: shorter than the sinks, than the cache, ragged last blocks. 1e-12: float64 sums."""
    for tokens in (1, 3, 6, 7, 17):
        q, k, v = tensors(tokens, kv_heads)
        expected = by_definition(q, k, v, sinks, window, rotary, 0.3)
        for first in sorted({0, 1, tokens // 2, tokens - 1} & set(range(tokens))):
            got = ours(q, k, v, sinks, window, rotary, 0.3, first)
            torch.testing.assert_close(got, expected[:, :, first:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize("sink", [None, torch.linspace(-2, 2, 6, dtype=torch.float64)], ids=["plain", "sink"])
def test_the_last_queries_of_a_text_see_all_keys_before_them(kv_heads, sink):
    tokens = 17
    q, k, v = tensors(tokens, kv_heads)
    expected = dense(q, k, v, PATTERNS["causal"](), sink_logit_H=sink, scale=0.3)
    for first in (0, 1, 8, 16):
        got = streamed_attention(
            q[:, :, first:], (k, v), (k[:, :, :0], v[:, :, :0]),
            sink_tokens=0, window_tokens=tokens, rotary=None, scale=0.3, sink_logit_H=sink,
        )  # fmt: skip
        torch.testing.assert_close(got, expected[:, :, first:], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_short_floats_stay_as_close_as_they_can(dtype, atol):
    """Values are of order 1: a few units in the last place of each type."""
    q, k, v = tensors(40, 3, dtype)
    expected = by_definition(*(x.double() for x in (q, k, v)), 4, 9, HALVES, 0.25)
    got = ours(q, k, v, 4, 9, HALVES, 0.25)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, atol=atol, rtol=0)


def test_with_positions_in_the_text_it_is_the_pattern_sink_window():
    """The pattern's window counts the query's own token, the cache's does not."""
    q, k, v = tensors(50, 3)
    expected = dense(q, k, v, PATTERNS["sink_window"](sink_tokens=4, window_tokens=10 + 1), scale=0.25)
    torch.testing.assert_close(ours(q, k, v, 4, 10, None, 0.25), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("positions", ["cache", "text"])
@pytest.mark.parametrize(("sinks", "window"), [(4, 12), (0, 9), (1, 1)])
def test_one_pass_over_a_text_equals_decoding_it_with_a_sink_cache(positions, sinks, window):
    """Through all layers of a float64 model with grouped heads, at every token."""
    model, ids = tiny_llama().double(), torch.randint(0, 250, (1, 60), generator=torch.Generator().manual_seed(1))
    cache = SinkCache(model.config, sinks, window, positions)
    with torch.no_grad():
        steps = [model.model(ids[:, t : t + 1], past_key_values=cache).last_hidden_state for t in range(60)]
        AttentionInterface.register("in_one_pass", StreamedAttention(model, sinks, window, positions))
        AttentionMaskInterface.register("in_one_pass", lambda *args, **kwargs: None)
        model.set_attn_implementation("in_one_pass")
        whole = model.model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(whole, torch.cat(steps, 1), atol=1e-12, rtol=0)


def test_the_formula_that_stands_in_for_flash_attention_elsewhere_gives_its_numbers():
    q, k, v = tensors(20, 3)
    for causal in (True, False):
        future = torch.ones(20, 20, dtype=torch.bool).triu(1) if causal else None
        for exact, quick in zip(plain(q, k, v, 0.3, future), _attend(q, k, v, 0.3, causal=causal), strict=True):
            torch.testing.assert_close(exact, quick, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("T", "N"), [(20, 20), (20, 13), (20, 1)])
def test_causal_queries_beyond_the_last_key_see_all_keys_by_the_gpu_library_too(monkeypatch, T, N):
    """It aligns causal queries with the last keys, so here more queries than keys must never reach it as causal."""

    def by_formula(q, k, v, cu_q, cu_k, longest_q, longest_k, dropout, causal, debug, *, scale):
        assert (cu_q, cu_k, longest_q, longest_k) == (None, None, q.shape[1], k.shape[1])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
        out, lse = plain(q, k, v, scale, future if causal else None)
        return out.transpose(1, 2), lse, None, None, None

    monkeypatch.setattr(flash, "_forward", by_formula)
    q, k, v = tensors(20, 3)
    q, k, v = q[:, :, :T], k[:, :, :N], v[:, :, :N]
    for causal in (True, False):
        future = torch.ones(T, N, dtype=torch.bool).triu(1) if causal else None
        expected = plain(q, k, v, 0.3, future)
        for a, b in zip(flash.dense(q, k, v, 0.3, causal=causal), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_the_rounding_of_far_positions_is_corrected_in_both_alike():
    """A chunk that reaches across CORRECTED_FROM, in one pass and token by token: the same angles are taken back."""
    model, ids = tiny_llama().double(), torch.randint(0, 250, (1, 40), generator=torch.Generator().manual_seed(1))
    outs = []
    for cuts in ([40], [1] * 40):
        cache = SinkCache(model.config, 2, 8)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            for layer in cache.layers:
                layer.seen = CORRECTED_FROM - 30
            outs.append(torch.cat([model(x, past_key_values=cache).logits for x in ids.split(cuts, 1)], 1))
    got, expected = (out[:, 20:] for out in outs)  # two layers of ten tokens after the jump, ten before CORRECTED_FROM
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
