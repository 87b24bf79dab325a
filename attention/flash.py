"""Variable-length flash attention (arXiv:2307.08691): for S²-Attn one call for each half of the
heads (CUDA, 16 bits).

A varlen call computes all segments of a batch at once. Its inputs are the concatenated tokens of
all rows, and `cu_seqlens`, the borders of segments (groups and documents). So rows with any
documents need two calls, however many groups they have. Two libraries provide it: torch itself
(kernel "sdpa" on CUDA) and the package flash-attn (kernel "flash"). Both support grouped-query
heads directly.

Both require (torch 2.8 to 2.14, flash-attn 2.7 to 2.8) compute capability 8.0, 16 bits, head sizes
up to 256 that are multiples of 8, contiguous features, and `cu_seqlens` in int32 on the device.
Causal is the window (-1, 0), aligned at the bottom right, so causal rectangles must be squares
here.

    attend(q_BHTD, k_BKTD, v_BKTD, pattern, kernel="flash")

Legend: B batch, T tokens, H query heads, K key/value heads, D head dim; a library's own layout is
[B·T, heads, D].
"""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from longreach.attention.pattern import Heads, Pattern
from longreach.attention.segments import Call, Documents, head_spans, row_rectangles


@dataclass(frozen=True, eq=False)
class Edges:
    """Borders of segments, int32 [segments + 1] for queries and for keys, and what each query sees
    in its segment: all keys, or if causal those up to its own, limited to the last `window` (0:
    all)."""

    q: Tensor
    k: Tensor
    longest_q: int
    longest_k: int
    causal: bool
    window: int = 0

    @property
    def sides(self) -> tuple[int, int]:
        """Number of keys to the left and to the right of its own that a query sees; -1: all."""
        return self.window - 1, 0 if self.causal else -1


class Varlen(Protocol):
    """A library for varlen calls. Tensors are [tokens, heads, D], the log-sum-exp is [heads,
    tokens]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, edges: Edges, scale: float) -> tuple[Tensor, Tensor]:
        """Return the output and the log-sum-exp of each query."""

    def backward(self, saved: tuple[Tensor, ...], edges: Edges, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients of q, k, v from (dout, q, k, v, out, lse)."""


@dataclass(frozen=True)
class VarlenCall(Call):
    """A call for tokens q and k (begin, end) of the concatenated rows, for some KV heads and their
    query heads."""

    library: Varlen
    edges: Edges
    heads: tuple[int, int]
    repeat: int
    q: tuple[int, int]
    k: tuple[int, int]

    @property
    def writes_queries(self) -> bool:
        return self.q == self.k  # the call with all segments; other calls read keys outside a query's segment

    def queries(self, x_BHT: Tensor) -> Tensor:
        first, last = (h * self.repeat for h in self.heads)
        return x_BHT.transpose(1, 2).flatten(0, 1)[slice(*self.q), first:last]

    def keys(self, x_BKTD: Tensor) -> Tensor:
        return x_BKTD.transpose(1, 2).flatten(0, 1)[slice(*self.k), slice(*self.heads)]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = self.library.forward(q, k, v, self.edges, scale)
        return out, lse.transpose(0, 1)

    def backward(self, saved: tuple[Tensor, ...], scale: float) -> tuple[Tensor, Tensor, Tensor]:
        *rest, lse = saved
        return self.library.backward((*rest, lse.transpose(0, 1).contiguous()), self.edges, scale)


def varlen_calls(
    pattern: Pattern, heads: Heads, documents: Documents, T: int, library: Varlen, device: torch.device
) -> list[VarlenCall]:
    """Return the pattern as varlen calls: for each range of heads one call for all segments, then
    one for each rectangle outside the segments."""
    return [
        VarlenCall(library, edges, span, heads.query // heads.kv, q, k)
        for span, variant in head_spans(pattern, heads)
        for edges, q, k in _calls(pattern, variant, documents, T, device)
    ]


@lru_cache(maxsize=256)  # shared by the layers of a model, and by forward and backward
def _calls(
    pattern: Pattern, variant: Hashable, documents: Documents, T: int, device: torch.device
) -> tuple[tuple[Edges, tuple[int, int], tuple[int, int]], ...]:
    line = (0, len(documents) * T)
    calls = [(united_edges(pattern, variant, documents, T, device), line, line)]
    for row, starts in enumerate(documents):
        for r in row_rectangles(pattern, variant, starts, T):
            if r.q != r.k:
                q, k = ((row * T + begin, row * T + end) for begin, end in (r.q, r.k))
                lengths = q[1] - q[0], k[1] - k[0]
                cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in lengths)
                calls.append((Edges(cu_q, cu_k, *lengths, r.causal), q, k))
    return tuple(calls)


def united_edges(pattern: Pattern, variant: Hashable, documents: Documents, T: int, device: torch.device) -> Edges:
    """Return the borders of groups, documents and rows as one `cu_seqlens`."""
    edges, lengths, windows = [0], [], set()
    for row, starts in enumerate(documents):
        for r in row_rectangles(pattern, variant, starts, T):
            if r.q == r.k:  # a segment that sees itself; other rectangles are separate calls
                edges.append(row * T + r.q[1])
                lengths.append(r.q[1] - r.q[0])
                windows.add(r.window)
    (window,) = windows  # a call has a single window
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=device)
    return Edges(cu_seqlens, cu_seqlens, max(lengths), max(lengths), causal=True, window=window or 0)


_forward = torch.ops.aten._flash_attention_forward


class TorchVarlen:
    """The flash kernels in torch, called as torch.nn.attention.varlen calls them."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, edges: Edges, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _forward(
            q, k, v, edges.q, edges.k, edges.longest_q, edges.longest_k, 0.0, edges.causal and not edges.window, False,
            scale=scale, window_size_left=edges.sides[0], window_size_right=edges.sides[1],
        )  # fmt: skip
        return out, lse

    def backward(self, saved: tuple[Tensor, ...], edges: Edges, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        no_dropout = saved[0].new_empty(2, dtype=torch.uint64), saved[0].new_empty(0)  # never read
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            *saved, edges.q, edges.k, edges.longest_q, edges.longest_k, 0.0, edges.causal and not edges.window,
            *no_dropout, scale=scale, window_size_left=edges.sides[0], window_size_right=edges.sides[1],
        )  # fmt: skip
        return dq, dk, dv


class FlashAttnVarlen:
    """The package flash-attn, version 2.7 or later."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, edges: Edges, scale: float) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _wrapped_flash_attn_varlen_forward

        out, lse, *_ = _wrapped_flash_attn_varlen_forward(
            q, k, v, edges.q, edges.k, edges.longest_q, edges.longest_k, 0.0, scale, causal=edges.causal,
            window_size_left=edges.sides[0], window_size_right=edges.sides[1],
        )  # fmt: skip
        return out, lse

    def backward(self, saved: tuple[Tensor, ...], edges: Edges, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _wrapped_flash_attn_varlen_backward

        dq, dk, dv = (torch.empty_like(x) for x in saved[1:4])
        _wrapped_flash_attn_varlen_backward(
            *saved, dq, dk, dv, edges.q, edges.k, edges.longest_q, edges.longest_k, 0.0, scale, edges.causal,
            *edges.sides, softcap=0.0, alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),  # as torch's own kernels do
        )  # fmt: skip
        return dq, dk, dv


def dense(q_BHTD: Tensor, k_BKND: Tensor, v_BKND: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Return the output [B, H, T, D] and the log-sum-exp [B, H, T] of one rectangle per row, by
    torch's own kernel.

    causal: the i-th query sees the first i keys, and queries after the last key see all keys. The
    library aligns causal queries with the last keys, so queries beyond the square are a separate
    rectangle.
    """
    T, N = q_BHTD.shape[2], k_BKND.shape[2]
    if causal and N < T:
        square = dense(q_BHTD[:, :, :N], k_BKND, v_BKND, scale, causal=True)
        rest = dense(q_BHTD[:, :, N:], k_BKND, v_BKND, scale, causal=False)
        return torch.cat([square[0], rest[0]], 2), torch.cat([square[1], rest[1]], 2)
    assert not causal or N == T, f"{T} causal queries, and {N} keys"
    q, k, v = (x.transpose(1, 2) for x in (q_BHTD, k_BKND, v_BKND))
    out_BTHD, lse_BHT, *_ = _forward(q, k, v, None, None, T, N, 0.0, causal, False, scale=scale)
    return out_BTHD.transpose(1, 2), lse_BHT


def refusal(dtype: torch.dtype, head_dim: int) -> str:
    """Return why flash attention on CUDA does not support this dtype and head size; empty if it
    does."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention on CUDA computes in bfloat16 and float16, not in {dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"flash attention on CUDA needs a head size that is a multiple of 8 up to 256, not {head_dim}"
    return _too_old() if torch.cuda.is_available() else ""


@cache
def _too_old() -> str:
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= 8 else f"flash attention needs compute capability 8.0, but this GPU has {major}.{minor}"


def has_flash_attn() -> bool:
    """Return whether flash-attn 2 is installed. It looks for the compiled part, since flash-attn 4
    has the same name but differs."""
    return find_spec("flash_attn_2_cuda") is not None
