"""Fast ways to compute a pattern; each gives the reference's numbers (tests/test_attention_kernels.py).

`sdpa` cuts the row into segments that are causal inside (group edges united with document edges) and calls the
library's flash attention on views of them: nothing is copied, gathered or rolled. On CPU its autograd function also
writes each piece's gradient into slices of one buffer, since the backward of a slice would fill a whole tensor with
zeros for every piece. Grouped-query attention goes by views too: query heads that share a KV head are called in turn.

`reference` is the dense oracle: any pattern, sink logits, quadratic memory.

Legend: B batch, T tokens, H query heads, K key/value heads, R = H/K, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention import reference
from attention.causal import Causal
from attention.pattern import Heads, Pattern
from attention.shifted_sparse import Grouped

Kernel = Callable[..., Tensor]


def attend(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    pattern: Pattern,
    position_ids_BT: Tensor | None = None,
    sink_logit_H: Tensor | None = None,
    scale: float | None = None,
    kernel: str = "auto",
    layer: int = 0,
) -> Tensor:
    """Attention of every query over the keys that `pattern` lets it see, [B, H, T, D].

    Args:
        position_ids_BT: restart at each packed document (padding is a run of its own); one document a row without it.
        sink_logit_H: a learned logit per head that takes part in the softmax and carries no value (gpt-oss style).
        scale: of the scores; 1/sqrt(D) without it.
        kernel: a name in KERNELS, or "auto": see `choose`.
        layer: which layer this is; patterns on an odd number of KV heads alternate by it.

    Raises:
        ValueError: shapes that do not fit; a kernel that is unknown or cannot compute this pattern.
    """
    check_shapes(q_BHTD, k_BKTD, v_BKTD)
    chosen = choose(pattern, kernel, sink_logit=sink_logit_H is not None)
    return KERNELS[chosen](q_BHTD, k_BKTD, v_BKTD, pattern, position_ids_BT, sink_logit_H, scale, layer=layer)


def choose(pattern: Pattern, kernel: str = "auto", *, sink_logit: bool = False) -> str:
    """The kernel that will run: the asked one, or for "auto" `sdpa` where it can and `reference` elsewhere.

    Raises:
        ValueError: the asked kernel is unknown or cannot compute this pattern.
    """
    why_not = cannot_sdpa(pattern, sink_logit)
    if kernel == "auto":
        return "reference" if why_not else "sdpa"
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r}: there are auto, {', '.join(KERNELS)}")
    if kernel == "sdpa" and why_not:
        raise ValueError(f"kernel 'sdpa' cannot compute {pattern}: {why_not}; use 'reference' or 'auto'")
    return kernel


def cannot_sdpa(pattern: Pattern, sink_logit: bool) -> str:
    """Why the segment kernel cannot compute a pattern; empty if it can."""
    if not isinstance(pattern, Causal | Grouped):
        return "it is not causal attention inside segments"
    if getattr(pattern, "sink_tokens", 0):
        return "sink_tokens are seen across segments"
    return "a sink logit takes part in the softmax" if sink_logit else ""


def check_shapes(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> None:
    """ValueError unless q, k, v belong together."""
    B, H, T, D = q_BHTD.shape
    if k_BKTD.shape != v_BKTD.shape or (k_BKTD.shape[0], *k_BKTD.shape[2:]) != (B, T, D) or H % k_BKTD.shape[1]:
        raise ValueError(
            f"q {tuple(q_BHTD.shape)}, k {tuple(k_BKTD.shape)}, v {tuple(v_BKTD.shape)}: they share batch, length and "
            f"head size, and the key heads divide the query heads (with a KV cache, set the pattern to 'causal' first)"
        )


@dataclass(frozen=True)
class Piece:
    """Consecutive segments of equal length in one batch row, for KV heads that share their edges."""

    row: int
    heads: tuple[int, int]
    begin: int
    segments: int
    length: int

    def of(self, x: Tensor, repeat: int = 1, turn: int = 0) -> Tensor:
        """A view [segments, heads, length, D] of x [B, heads * repeat, T, D]: every repeat-th head from `turn`."""
        first, last = (h * repeat for h in self.heads)
        part = x[self.row, first + turn : last : repeat, self.begin : self.begin + self.segments * self.length]
        return part.unflatten(1, (self.segments, self.length)).transpose(0, 1)


def pieces(pattern: Pattern, heads: Heads, start_BT: Tensor) -> list[Piece]:
    """The pattern as segments: group edges and document edges are one list of edges."""
    T = start_BT.shape[1]
    classes = [(edges, len(list(same))) for edges, same in groupby(pattern.edges(heads, k) for k in range(heads.kv))]
    found, head = [], 0
    for row, start_T in enumerate(start_BT):
        documents = set(start_T.unique().tolist())
        head = 0
        for edges, count in classes:
            cuts = sorted({0, T} | documents | (set(range(edges[0], T, edges[1])) if edges else set()))
            for begin, segments, length in _runs(cuts):
                found.append(Piece(row, (head, head + count), begin, segments, length))
            head += count
    return found


def _runs(cuts: list[int]) -> Iterator[tuple[int, int, int]]:
    """(begin, number, length) of consecutive segments of equal length."""
    lengths = [b - a for a, b in pairwise(cuts)]
    begin = 0
    for length, same in groupby(lengths):
        number = len(list(same))
        yield begin, number, length
        begin += number * length


class _CpuSegments(torch.autograd.Function):
    """Flash attention on each piece; no tensor of q, k, v, their gradients or the output is copied."""

    @staticmethod
    def forward(ctx: Any, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, cut: list[Piece], scale: float) -> Tensor:
        repeat = q_BHTD.shape[1] // k_BKTD.shape[1]
        out_BHTD = _token_major(q_BHTD)
        sums = []
        for piece in cut:
            for turn in range(repeat):
                out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    piece.of(q_BHTD, repeat, turn), piece.of(k_BKTD), piece.of(v_BKTD), 0.0, True, scale=scale
                )
                piece.of(out_BHTD, repeat, turn).copy_(out)
                sums.append(lse)
        ctx.save_for_backward(q_BHTD, k_BKTD, v_BKTD, out_BHTD, *sums)
        ctx.cut, ctx.scale = cut, scale
        return out_BHTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTD, k_BKTD, v_BKTD, out_BHTD, *sums = ctx.saved_tensors
        dout_BHTD = _features_last(grads[0])
        repeat = q_BHTD.shape[1] // k_BKTD.shape[1]
        dq_BHTD, dk_BKTD, dv_BKTD = (_token_major(x) for x in (q_BHTD, k_BKTD, v_BKTD))
        lse = iter(sums)
        for piece in ctx.cut:
            for turn in range(repeat):
                dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    piece.of(dout_BHTD, repeat, turn), piece.of(q_BHTD, repeat, turn), piece.of(k_BKTD),
                    piece.of(v_BKTD), piece.of(out_BHTD, repeat, turn), next(lse), 0.0, True, scale=ctx.scale,
                )  # fmt: skip
                piece.of(dq_BHTD, repeat, turn).copy_(dq)
                for total, part in ((dk_BKTD, dk), (dv_BKTD, dv)):
                    piece.of(total).copy_(part) if turn == 0 else piece.of(total).add_(part)
        return dq_BHTD, dk_BKTD, dv_BKTD, None, None


def _features_last(x_BHTD: Tensor) -> Tensor:
    """A head's features side by side, by a copy if need be: the library's op reads them so, whatever the strides."""
    return x_BHTD if x_BHTD.stride(-1) == 1 else x_BHTD.contiguous()


def _token_major(x_BHTD: Tensor) -> Tensor:
    """Uninitialised, shaped like x, laid out [B, T, H, D]: what follows attention wants it so and gets a view."""
    B, H, T, D = x_BHTD.shape
    return x_BHTD.new_empty(B, T, H, D).transpose(1, 2)


def sdpa(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    pattern: Pattern,
    position_ids_BT: Tensor | None = None,
    sink_logit_H: Tensor | None = None,
    scale: float | None = None,
    *,
    layer: int = 0,
) -> Tensor:
    """The segment kernel; `choose` has made sure that the pattern is one for it."""
    B, H, T, D = q_BHTD.shape
    heads = Heads(H, k_BKTD.shape[1], layer)
    cut = pieces(pattern, heads, reference.starts(position_ids_BT, B, T, q_BHTD.device))
    scale = D**-0.5 if scale is None else scale
    q_BHTD, k_BKTD, v_BKTD = (_features_last(x) for x in (q_BHTD, k_BKTD, v_BKTD))
    if q_BHTD.device.type == "cpu":
        return _CpuSegments.apply(q_BHTD, k_BKTD, v_BKTD, cut, scale)
    out_BHTD, repeat = _token_major(q_BHTD), H // heads.kv
    for piece in cut:
        for turn in range(repeat):
            one = F.scaled_dot_product_attention(
                piece.of(q_BHTD, repeat, turn), piece.of(k_BKTD), piece.of(v_BKTD), is_causal=True, scale=scale
            )
            piece.of(out_BHTD, repeat, turn).copy_(one)
    return out_BHTD


KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "reference": reference.attend}
