"""Section fast: full attention and S² at 8k to 65k tokens against torch's SDPA, FlexAttention and LongLoRA's roll.

It runs forward and backward of one layer in bfloat16 with B 1, H 32, K 8, D 128 and groups of a quarter of the row.
Each time comes with its floor: the FLOPs of the visible pairs divided by the rate of a large matrix product in the same
run. From 16k tokens on, the goal for S² is at least 85% of its theoretical speedup over full attention. S² must never
be slower than the roll.

Legend: B batch, T tokens, H query heads, K key/value heads, D head dim, G tokens of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from bench import Bench
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longreach.attention import PATTERNS, Pattern, attend
from longreach.attention.flash import TorchVarlen, has_flash_attn, varlen_calls
from longreach.attention.pattern import Heads

BACKWARD = 2.5
"""Ratio of matrix products in flash attention's backward and forward pass: five to two."""
GOAL = 0.85

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(bench: Bench) -> None:
    rate = matmul_rate(bench)
    bench.note("matrix product", tflops=rate / 1e12)
    lengths = (8192, 16384, 32768, 65536) if bench.gpu else (256,)
    H, K, D = (32, 8, 128) if bench.gpu else (4, 2, 16)
    slow = []
    for T in lengths:
        if bench.fits(f"T {T}", 20):
            slow += compare(bench, T, H, K, D, rate)
    if bench.gpu and slow:
        bench.note("goals missed", which="; ".join(slow))


def matmul_rate(bench: Bench) -> float:
    """Return the FLOP/s of a square matrix product in the attention's dtype."""
    n = 8192 if bench.gpu else 256
    a, b = (torch.randn(n, n, device=bench.device, dtype=bench.dtype) for _ in range(2))
    return 2 * n**3 / bench.milliseconds(lambda: a @ b) * 1e3


def pairs(pattern: Pattern, H: int, T: int) -> float:
    """Return the number of visible query-key pairs in all heads of a row with one document."""
    return H * T * pattern.mean_keys(T)


def compare(bench: Bench, T: int, H: int, K: int, D: int, rate: float) -> list[str]:
    """Note the milliseconds of every way at one length; return the missed goals."""
    bench.free()
    causal, sparse = PATTERNS["causal"](), PATTERNS["shifted_sparse"](group_tokens=T // 4)
    with_sinks = PATTERNS["shifted_sparse"](group_tokens=T // 4, sink_tokens=4)
    ways: dict[str, tuple[Way, Pattern]] = {
        "full, ours": (partial(by, causal, "sdpa"), causal),
        "S², ours": (partial(by, sparse, "sdpa"), sparse),
        "S² with 4 sinks, ours": (partial(by, with_sinks, "sdpa"), with_sinks),
        "full, torch's SDPA": (torch_sdpa, causal),
        "S², LongLoRA's roll": (partial(roll, G=T // 4), sparse),
    }
    if bench.gpu and has_flash_attn():
        ways |= {"full, flash-attn": (partial(by, causal, "flash"), causal)}
        ways |= {"S², flash-attn": (partial(by, sparse, "flash"), sparse)}
    if bench.gpu and T <= 32768:
        ways |= {"S², FlexAttention": (partial(by, sparse, "flex"), sparse)}
    qkv = [torch.randn(1, T, n, D, device=bench.device, dtype=bench.dtype, requires_grad=True) for n in (H, K, K)]
    dout = torch.randn(1, T, H * D, device=bench.device, dtype=bench.dtype)
    took: dict[str, float] = {}
    for name, (way, pattern) in ways.items():
        if not bench.fits(f"T {T}, {name}", 15):
            continue
        forward = bench.milliseconds(lambda way=way: output(way, qkv, dout.shape))
        both = bench.milliseconds(lambda way=way: torch.autograd.grad(output(way, qkv, dout.shape), qkv, dout))
        floor = 4 * D * pairs(pattern, H, T) * (1 + BACKWARD) / rate * 1e3
        took[name] = both
        bench.note(f"T {T}, {name}", forward_ms=forward, ms=both, floor_ms=floor, of_floor=floor / both)
    bench.note(f"T {T}, S²'s kernels alone, forward", detail=True, ms=kernels_alone(bench, sparse, qkv))
    return verdict(bench, T, took, pairs(causal, H, T) / pairs(sparse, H, T))


def output(way: Way, qkv: list[Tensor], shape: torch.Size) -> Tensor:
    """Compute a layer's attention from projections [1, T, heads, D] to the output projection's input [1, T, H·D]."""
    return way(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2).reshape(shape)


def verdict(bench: Bench, T: int, took: dict[str, float], limit: float) -> list[str]:
    """Note how S² compares with full attention and the roll; return the missed goals."""
    if not {"full, ours", "S², ours", "S², LongLoRA's roll"} <= took.keys():
        return [f"T {T} was not compared"]
    ratio, roll_ratio = took["full, ours"] / took["S², ours"], took["S², LongLoRA's roll"] / took["S², ours"]
    bench.note(f"T {T}, full / S²", ratio=ratio, limit=limit, of_limit=ratio / limit, roll_over_ours=roll_ratio)
    missed = [f"T {T}: S² at {ratio / limit:.0%} of its limit"] if T >= 16384 and ratio / limit < GOAL else []
    return missed + ([f"T {T}: the roll takes {roll_ratio:.2f}x ours"] if roll_ratio < 1 else [])


def by(pattern: Pattern, kernel: str, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    return attend(q_BHTD, k_BKTD, v_BKTD, pattern, kernel=kernel)


def torch_sdpa(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q_BHTD, k_BKTD, v_BKTD, is_causal=True, enable_gqa=True)


def roll(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, *, G: int) -> Tensor:
    """LongLoRA's method on the same flash kernel: half of the heads rolled by half a group, groups as a batch.

    The first group of the rolled half sees the row's end, so the result differs slightly.
    """
    B, H, T, D = q_BHTD.shape

    def groups(x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        rolled = torch.cat([x[:, :half], x[:, half:].roll(-G // 2, 2)], 1)
        return rolled.transpose(1, 2).reshape(B * T // G, G, x.shape[1], D).transpose(1, 2)

    backends = [SDPBackend.FLASH_ATTENTION] if q_BHTD.is_cuda else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends):
        out = F.scaled_dot_product_attention(
            groups(q_BHTD), groups(k_BKTD), groups(v_BKTD), is_causal=True, enable_gqa=True
        )
    out_BTHD = out.transpose(1, 2).reshape(B, T, H, D)
    return torch.cat([out_BTHD[:, :, : H // 2], out_BTHD[:, :, H // 2 :].roll(G // 2, 1)], 2).transpose(1, 2)


def kernels_alone(bench: Bench, pattern: Pattern, qkv: list[Tensor]) -> float:
    """Return the milliseconds of the library's forward calls alone, which shows the cost of copies and bookkeeping."""
    if not bench.gpu:
        return 0.0
    q, k, v = (x.detach().transpose(1, 2) for x in qkv)
    T, heads = q.shape[2], Heads(q.shape[1], k.shape[1])
    calls = varlen_calls(pattern, heads, ((0,),), T, TorchVarlen(), q.device)
    return bench.milliseconds(
        lambda: [call.forward(call.queries(q), call.keys(k), call.keys(v), q.shape[3] ** -0.5) for call in calls]
    )
