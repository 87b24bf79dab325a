"""Every kernel against the dense float64 oracle, forward and gradients, over every pattern in the registry."""

import math

import pytest
import torch
from attention_cases import (
    CPU_KERNELS,
    EVERY_PATTERN,
    HEADS,
    ROWS,
    dense,
    oracle,
    outputs_and_gradients,
    positions,
    qkv,
)
from torch.nn.attention.flex_attention import create_block_mask

from longreach.attention import PATTERNS, attend, flex, reference
from longreach.attention.call import AttentionCall
from longreach.attention.kernels import Situation, by_segments, choose
from longreach.attention.pattern import Heads
from longreach.attention.segments import documents_of

# Output and gradients are sums of about unit numbers over at most 41 keys. float64: 2^-52 x some tens of additions.
# float32: 2^-24 likewise. bfloat16 keeps 8 bits, float16 11: probabilities and output are rounded once each and a
# gradient sums a few tens of such errors of either sign, so a few times the last bit of numbers up to 4.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 6e-2, torch.float16: 8e-3}

kernels = pytest.mark.parametrize("kernel", CPU_KERNELS)
patterns = pytest.mark.parametrize("pattern", EVERY_PATTERN, ids=str)
rows = pytest.mark.parametrize("row", ROWS)


def assert_equals_oracle(pattern, kernel, q, k, v, position_ids=None, **options):
    got = outputs_and_gradients(attend, q, k, v, pattern, position_ids, kernel=kernel, **options)
    expected = oracle(q, k, v, pattern, position_ids, **options)
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsink"), got, expected, strict=False):
        assert a.dtype == (q.dtype if name != "dsink" else a.dtype)
        assert a.shape == b.shape
        error = float((a.double() - b).abs().max())
        assert error < TOLERANCE[q.dtype] * max(1.0, float(b.abs().max())), f"{name} differs by {error}"


@rows
@kernels
@patterns
def test_kernels_equal_the_oracle_on_every_row(pattern, kernel, row):
    T, documents = ROWS[row]
    q, k, v = qkv(4, 2, T, B=len(documents or [0]))
    assert_equals_oracle(pattern, kernel, q, k, v, None if documents is None else positions(*documents), layer=1)


@pytest.mark.parametrize(("H", "K"), HEADS)
@kernels
@patterns
def test_kernels_equal_the_oracle_with_any_heads(pattern, kernel, H, K):
    q, k, v = qkv(H, K, 21, B=2)
    for layer in (0, 1):
        assert_equals_oracle(pattern, kernel, q, k, v, positions((13, 8), (2, 19)), layer=layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@kernels
@patterns
def test_kernels_equal_the_oracle_in_short_floats(pattern, kernel, dtype):
    q, k, v = qkv(9, 3, 29, dtype=dtype, D=16)
    assert_equals_oracle(pattern, kernel, q, k, v)
    assert_equals_oracle(pattern, kernel, q, k, v, positions((10, 19)))


@kernels
@patterns
def test_a_scale_of_the_scores_is_kept(pattern, kernel):
    q, k, v = qkv(4, 2, 21)
    assert_equals_oracle(pattern, kernel, q, k, v, scale=0.7)


@kernels
@patterns
def test_sink_logits_equal_the_oracle_and_have_gradients(pattern, kernel):
    q, k, v = qkv(4, 2, 29, B=2)
    logit = torch.tensor([-40.0, 0.0, 1.5, 9.0], dtype=torch.float64)
    assert_equals_oracle(pattern, kernel, q, k, v, positions((13, 16), (4, 25)), sink_logit_H=logit)


LAYOUTS = {
    "head-major": lambda x: x.contiguous(),
    "features outermost": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "a slice of fused projections": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "one head repeated by expand": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@kernels
@patterns
def test_any_memory_layout_gives_the_same(pattern, kernel, layout):
    q, k, v = (LAYOUTS[layout](x) for x in qkv(4, 4, 21))
    out = attend(q, k, v, pattern, kernel=kernel)
    assert torch.allclose(out, dense(q, k, v, pattern), atol=1e-13)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(attend(*leaves, pattern, kernel=kernel), leaves, LAYOUTS[layout](torch.randn_like(q)))
    assert all(g.isfinite().all() for g in grads)


@kernels
@patterns
def test_the_gradient_of_a_plain_sum_is_right(pattern, kernel):
    """autograd hands such a gradient over as one number with strides of zero."""
    leaves = [x.requires_grad_() for x in qkv(2, 2, 13)]
    got = torch.autograd.grad(attend(*leaves, pattern, kernel=kernel).sum(), leaves)
    expected = torch.autograd.grad(dense(*leaves, pattern).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-13)


@kernels
@patterns
def test_only_the_asked_gradients_are_given(pattern, kernel):
    q, k, v = qkv(4, 2, 13)
    v.requires_grad_()
    got = torch.autograd.grad(attend(q, k, v, pattern, kernel=kernel).square().sum(), v)[0]
    expected = torch.autograd.grad(dense(q, k, v, pattern).square().sum(), v)[0]
    assert torch.allclose(got, expected, atol=1e-13)


@kernels
@patterns
def test_changing_a_token_moves_nothing_before_it_and_in_no_other_document(pattern, kernel):
    """Bitwise, on the computed numbers: no kernel lets a token through with a small weight."""
    q, k, v = qkv(4, 2, 24)
    documents = positions((14, 10))
    before = attend(q, k, v, pattern, documents, kernel=kernel)
    for token in (5, 13, 17):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, token] += 1
        after = attend(*changed, pattern, documents, kernel=kernel)
        begin, end = (0, 14) if token < 14 else (14, 24)
        still = torch.ones(24, dtype=torch.bool)
        still[token:end] = False
        assert torch.equal(after[:, :, still], before[:, :, still])
        assert not torch.equal(after[:, :, token], before[:, :, token]), begin


@patterns
def test_the_kernel_chosen_by_itself_equals_the_oracle(pattern):
    q, k, v = qkv(9, 3, 21)
    assert_equals_oracle(pattern, "auto", q, k, v)
    assert_equals_oracle(pattern, "auto", q, k, v, sink_logit_H=torch.zeros(9, dtype=torch.float64))


def test_the_oracle_is_softmax_written_out_for_one_query():
    q, k, v = qkv(2, 1, 7)
    pattern, logit = PATTERNS["sink_window"](window_tokens=3, sink_tokens=1), torch.tensor([0.3, -1.0]).double()
    out = dense(q, k, v, pattern, positions((1, 6)), sink_logit_H=logit, scale=0.5)
    seen = [1, 4, 5, 6]  # the second document's first token and the last three
    weights = [math.exp(0.5 * float(q[0, 1, 6] @ k[0, 0, i])) for i in seen]
    total = sum(weights) + math.exp(float(logit[1]))
    expected = sum(w / total * v[0, 0, i] for w, i in zip(weights, seen, strict=True))
    assert torch.allclose(out[0, 1, 6], expected, atol=1e-14)


@kernels
def test_a_zero_sink_is_one_more_token_whose_key_and_value_are_zero(kernel):
    q, k, v = qkv(4, 2, 9)
    got = attend(q, k, v, PATTERNS["causal"](), sink_logit_H=torch.zeros(4), kernel=kernel)
    q, k, v = (torch.cat([torch.zeros_like(x[:, :, :1]), x], 2) for x in (q, k, v))
    assert torch.allclose(got, dense(q, k, v, PATTERNS["causal"]())[:, :, 1:], atol=1e-13)


class VarlenByTheFormula:
    """A varlen library for attention/flash.py on a CPU: each segment dense; tensors [tokens, heads, D]."""

    def segments(self, edges, *of):
        for n in range(len(edges.q) - 1):
            (q0, q1), (k0, k1) = edges.q[n : n + 2].tolist(), edges.k[n : n + 2].tolist()
            assert q1 - q0 <= edges.longest_q
            assert k1 - k0 <= edges.longest_k
            # aligned at the last token, as flash-attn does it
            distance = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
            left, right = edges.sides
            seen = (distance >= -right if right >= 0 else True) & (distance <= left if left >= 0 else True)
            yield slice(q0, q1), slice(k0, k1), torch.as_tensor(seen).expand_as(distance)

    def scores(self, q, k, seen, scale):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~seen, -torch.inf)

    def forward(self, q, k, v, edges, scale):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
        for qs, ks, seen in self.segments(edges):
            scores = self.scores(q[qs], k[ks], seen, scale)
            lse[:, qs] = scores.logsumexp(-1)
            values = v[ks].repeat_interleave(q.shape[1] // v.shape[1], 1)
            out[qs] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        return out, lse

    def backward(self, saved, edges, scale):
        """What flash attention computes: probabilities from the log-sum-exp that it is handed."""
        dout, q, k, v, out, lse = saved
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        repeat = q.shape[1] // k.shape[1]
        for qs, ks, seen in self.segments(edges):
            p = (self.scores(q[qs], k[ks], seen, scale) - lse[:, qs, None]).exp()
            keys, values = (x[ks].repeat_interleave(repeat, 1) for x in (k, v))
            dp = torch.einsum("qhd,khd->hqk", dout[qs], values)
            ds = p * (dp - (dout[qs] * out[qs]).sum(-1).T[..., None]) * scale
            dq[qs] = torch.einsum("hqk,khd->qhd", ds, keys)
            for total, weights, with_ in ((dk, ds, q), (dv, p, dout)):
                whole = torch.einsum("hqk,qhd->khd", weights, with_[qs])
                total[ks] = whole.unflatten(1, (-1, repeat)).sum(2)
        return dq, dk, dv


def by_varlen(q, k, v, pattern, *args, **kwargs):
    return by_segments(q, k, v, AttentionCall(pattern, *args, **kwargs), VarlenByTheFormula())


@rows
@patterns
def test_varlen_calls_equal_the_oracle_on_every_row(pattern, row):
    T, documents = ROWS[row]
    q, k, v = qkv(4, 2, T, B=len(documents or [0]))
    given = None if documents is None else positions(*documents)
    logit = torch.tensor([-1.0, 0.0, 1.5, 4.0], dtype=torch.float64)
    for layer, sink in ((0, None), (1, logit)):
        options = {"sink_logit_H": sink, "layer": layer}
        got = outputs_and_gradients(by_varlen, q, k, v, pattern, given, **options)
        for name, a, b in zip(
            ("out", "dq", "dk", "dv", "dsink"), got, oracle(q, k, v, pattern, given, **options), strict=False
        ):
            assert torch.allclose(a, b, atol=1e-12), name


@patterns
def test_varlen_edges_fit_rows_of_every_length(pattern):
    """All lengths to 24 in one document, and all pairs of documents to 12, with heads of which each is a variant."""
    cases = [(n,) for n in range(1, 25)] + [(a, b) for a in range(1, 12) for b in range(1, 12)]
    for documents in cases:
        q, k, v = qkv(3, 3, sum(documents), D=2)
        for layer in (0, 1):
            got = by_varlen(q, k, v, pattern, positions(documents), layer=layer)
            expected = dense(q, k, v, pattern, positions(documents), layer=layer)
            assert torch.allclose(got, expected, atol=1e-12), documents


def test_sdpa_computes_causal_and_grouped_patterns():
    for name in ("causal", "grouped", "shifted_sparse"):
        pattern = PATTERNS[name](**({} if name == "causal" else {"group_tokens": 8}))
        assert choose(pattern) == "sdpa"


@pytest.mark.parametrize("row", ["not divided by the group", "ragged documents", "one token"])
@patterns
def test_flex_gets_the_block_mask_that_torch_would_make(monkeypatch, pattern, row):
    """Made a run of queries at a time here, from all pairs at once there; the backward's blocks are in it too."""
    T, documents = ROWS[row]
    given = None if documents is None else positions(*documents)
    heads, B = Heads(3, 3, layer=1), len(documents or [0])
    start_BT = reference.starts(given, B, T, torch.device("cpu"))
    expected = create_block_mask(pattern.mask_mod(heads, start_BT), B, 3, T, T, device="cpu", BLOCK_SIZE=8)
    for at_once in (1, 2**28):
        monkeypatch.setattr(flex, "PAIRS_AT_ONCE", at_once)
        flex.block_mask.cache_clear()
        got = flex.block_mask(pattern, heads, documents_of(given, B, T), T, torch.device("cpu"), block_tokens=8)
        assert got.seq_lengths == expected.seq_lengths
        for name in ("kv", "full_kv", "q", "full_q"):
            for field in (f"{name}_num_blocks", f"{name}_indices"):
                assert torch.equal(getattr(got, field), getattr(expected, field)), field


def test_layers_that_see_the_same_share_a_block_mask_which_is_made_once():
    flex.block_mask.cache_clear()
    pattern, documents, device = PATTERNS["shifted_sparse"](group_tokens=8), ((0, 5), (0,)), torch.device("cpu")
    for K, kinds in ((2, 1), (3, 2)):  # with an odd number of KV heads odd layers have the other halves
        masks = {
            id(flex.block_mask(pattern, flex.first_alike(pattern, Heads(6, K, layer)), documents, 20, device))
            for layer in range(6)
        }
        assert len(masks) == kinds
    assert flex.block_mask.cache_info().misses == 3


def test_flex_equals_the_oracle_where_no_gradient_is_wanted():
    """One compilation on a CPU takes 10 to 15 s; the other patterns are compared on a GPU (test_attention_cuda.py)."""
    pattern = PATTERNS["shifted_sparse"](group_tokens=8, sink_tokens=3)
    q, k, v = qkv(4, 2, 41, B=2, D=16, dtype=torch.float32)
    documents = positions((1, 2, 7, 12, 19), (30, 11))
    with torch.no_grad():
        got = attend(q, k, v, pattern, documents, kernel="flex", layer=1)
    assert torch.allclose(got, dense(q, k, v, pattern, documents, layer=1), atol=5e-6)
    with pytest.raises(ValueError, match="no sink logits on CPU"):
        attend(q, k, v, pattern, sink_logit_H=torch.zeros(4), kernel="flex")
    with pytest.raises(ValueError, match=r"kernel 'flex' cannot compute .* no backward on CPU"):
        attend(q.requires_grad_(), k, v, pattern, kernel="flex")


def test_an_unknown_kernel_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"unknown kernel 'fast': use auto, .*sdpa.*reference"):
        choose(PATTERNS["causal"](), "fast")
    with pytest.raises(ValueError, match="device 'mps': use cuda or cpu"):
        choose(PATTERNS["causal"](), where=Situation(device="mps"))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 4, 5, 8), (1, 3, 5, 8), (1, 3, 5, 8)), "the number of key heads must divide that of query heads"),
        (((1, 4, 1, 8), (1, 4, 5, 8), (1, 4, 5, 8)), "with a KV cache"),
        (((1, 4, 5, 8), (1, 4, 5, 8), (1, 4, 5, 4)), "share batch, length and head size"),
    ],
)
@kernels
def test_shapes_that_do_not_belong_together_are_refused(shapes, message, kernel):
    with pytest.raises(ValueError, match=message):
        attend(*(torch.zeros(s) for s in shapes), PATTERNS["causal"](), kernel=kernel)
