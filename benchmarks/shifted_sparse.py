"""Compare S²-Attn in time and memory with full attention, the paper's two implementations, and a dense mask.

    python benchmarks/shifted_sparse.py       # one thread, about five minutes

The benchmark runs forward and backward of one layer's attention in float32, with B = 1, H = 8, D = 64 and groups of T /
4. q, k and v are views of projections, [B, T, H, D] seen as [B, H, T, D], and the output is [B, T, H·D]. First, the
results of all implementations are compared. The dense mask is measured on packed rows.

Legend: B batch, T tokens, H heads, D head dim, G tokens of a group.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from timing import extra_mib, interleaved, medians, ratio
from torch import Tensor

from longreach.attention import PATTERNS, attend
from longreach.attention.pattern import Heads
from longreach.attention.reference import dense_mask, starts

B, H, D = 1, 8, 64
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def full(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
    """Causal attention over the whole row."""
    return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)


def ours(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, position_ids_BT: Tensor | None = None) -> Tensor:
    pattern = PATTERNS["shifted_sparse"](group_tokens=q_BHTD.shape[2] // 4)
    return attend(q_BHTD, k_BHTD, v_BHTD, pattern, position_ids_BT)


def roll(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
    """LongLoRA without flash attention, on SDPA: half of the heads rolled by half a group, groups as a batch.

    Its wrapped group leaks (queries at the row's start see its end), so the result differs slightly.
    """
    T = q_BHTD.shape[2]
    G = T // 4

    def groups(x_BHTD: Tensor) -> Tensor:
        rolled = torch.cat([x_BHTD[:, : H // 2], x_BHTD[:, H // 2 :].roll(-G // 2, 2)], 1)
        return rolled.transpose(1, 2).reshape(B * T // G, G, H, D).transpose(1, 2)

    out = F.scaled_dot_product_attention(groups(q_BHTD), groups(k_BHTD), groups(v_BHTD), is_causal=True)
    out_BTHD = out.transpose(1, 2).reshape(B, T, H, D)
    return torch.cat([out_BTHD[:, :, : H // 2], out_BTHD[:, :, H // 2 :].roll(G // 2, 1)], 2).transpose(1, 2)


def stacked(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
    """LongLoRA with flash attention: the halves of the heads are stacked as twice the batch, for one varlen call with
    shifted edges for the second half. No varlen attention runs on CPUs, so the call is emulated segment by segment."""
    T = q_BHTD.shape[2]
    G = T // 4
    plain, shifted = range(0, T + 1, G), [0, *range(G // 2, T, G), T]
    lengths = [b - a for edges in (plain, shifted) for a, b in pairwise(edges)]

    def line(x_BHTD: Tensor) -> tuple[Tensor, ...]:
        half_2BTHD = torch.cat([x_BHTD[:, : H // 2], x_BHTD[:, H // 2 :]]).transpose(1, 2)
        return half_2BTHD.reshape(2 * B * T, H // 2, D).split(lengths)

    parts = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in qkv), is_causal=True)[0].transpose(0, 1)
        for qkv in zip(line(q_BHTD), line(k_BHTD), line(v_BHTD), strict=True)
    ]
    out_2BTHD = torch.cat(parts).view(2 * B, T, H // 2, D)
    return torch.cat([out_2BTHD[:B], out_2BTHD[B:]], 2).transpose(1, 2)


def eager(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
    """Full attention that materialises its scores, for the memory table."""
    T = q_BHTD.shape[2]
    scores = q_BHTD @ k_BHTD.mT * D**-0.5
    return scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v_BHTD


WAYS: dict[str, Way] = {"full": full, "ours": ours, "roll": roll, "stacked": stacked, "eager": eager}


def inputs(T: int) -> tuple[list[Tensor], Tensor]:
    """Return q, k, v [B, T, H, D] that require gradients, and the gradient of the output [B, T, H·D]."""
    torch.manual_seed(0)
    return [torch.randn(B, T, H, D, requires_grad=True) for _ in range(3)], torch.randn(B, T, H * D)


def step(way: Callable[..., Tensor], qkv: list[Tensor], dout: Tensor, *more: object) -> Callable[[], None]:
    def forward_and_backward() -> None:
        out_BHTD = way(*(x.transpose(1, 2) for x in qkv), *more)
        torch.autograd.grad(out_BHTD.transpose(1, 2).reshape(dout.shape), qkv, dout)

    return forward_and_backward


def agree() -> None:
    """Check that stacked halves equal ours, and the roll too, except in the shifted half's leaking first half-group."""
    q, k, v = (x.detach().transpose(1, 2) for x in inputs(512)[0])
    expected = ours(q, k, v)
    torch.testing.assert_close(stacked(q, k, v), expected)
    rolled = roll(q, k, v)
    torch.testing.assert_close(rolled[:, : H // 2], expected[:, : H // 2])
    torch.testing.assert_close(rolled[:, H // 2 :, 64:], expected[:, H // 2 :, 64:])


def against_full(T: int, rounds: int) -> None:
    qkv, dout = inputs(T)
    rows = interleaved(step(full, qkv, dout), step(ours, qkv, dout), rounds=rounds)
    slow, fast = medians(rows)
    print(f"T = {T}: full causal {slow:.0f} ms, S² {fast:.0f} ms: {ratio(rows, 0, 1):.2f}x", flush=True)


def against_the_papers(T: int, rounds: int) -> None:
    qkv, dout = inputs(T)
    rows = interleaved(*(step(way, qkv, dout) for way in (roll, stacked, ours)), rounds=rounds)
    print(f"T = {T}: roll / ours {ratio(rows, 0, 2):.2f}x, stacked / ours {ratio(rows, 1, 2):.2f}x", flush=True)


def packed(T: int, rounds: int) -> None:
    """Compare S² within each document of a row with full attention within each by a dense mask."""
    torch.manual_seed(0)
    lengths = torch.randint(T // 16, T // 4, (20,)).tolist()
    position_ids_BT = torch.cat([torch.arange(n) for n in lengths])[None, :T]
    (b_documents,) = (position_ids_BT == 0).sum(1).tolist()
    mask = dense_mask(PATTERNS["causal"](), Heads(1, 1), starts(position_ids_BT, B, T, torch.device("cpu")))

    def dense(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, attn_mask=mask)

    qkv, dout = inputs(T)
    rows = interleaved(step(dense, qkv, dout), step(ours, qkv, dout, position_ids_BT), rounds=rounds)
    print(f"T = {T}, {b_documents} documents: dense block-diagonal mask / S² {ratio(rows, 0, 1):.2f}x", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:]:  # each peak is measured in its own process
        step(WAYS[sys.argv[1]], *inputs(64))()
        print(f"{extra_mib(step(WAYS[sys.argv[1]], *inputs(8192))):.0f}")
        return
    agree()
    for T, rounds in ((4096, 15), (8192, 9), (16384, 5)):
        against_full(T, rounds)
    against_the_papers(8192, rounds=9)
    packed(8192, rounds=5)
    for name in WAYS:
        got = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True)
        print(f"extra peak memory at T = 8192, {name}: {got.stdout.strip()} MiB", flush=True)


if __name__ == "__main__":
    main()
