"""Flash attention on views: each rectangle of a pattern is one call of the library's op, without
copies in between.

A call reads views of q, k, v (a range of heads, a range of tokens). If a query has keys in several
rectangles (sinks, windows), the results are merged by log-sum-exp. The backward of flash attention
needs only the output and the log-sum-exp over all keys of a query. Given the merged ones, the
backward of each call returns exactly its share of the whole gradient, including sink logits. The
autograd function writes these into slices of one buffer, because the backward of a slice would fill
a whole tensor with zeros for every call.

A rectangle is divided into pieces of three kinds. Rows are queries, columns are keys, and `x` is a
visible pair:

    causal   x . . .     full   x x x x     later   . . . .     in a window of 5 tokens, in blocks of 4: a query
             x x . .            x x x x             . x x x     sees its own block causally, and the later part of
             x x x .            x x x x             . . x x     the block before it; reversed, this is causal, too
             x x x x            x x x x             . . . x     (queries and keys flipped), so the op supports it

Query heads that share a KV head are called one after another, so that no key is repeated.

Legend: B batch, T tokens, H query heads, K key/value heads, R = H/K, D head dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from longreach.attention.pattern import Heads, Pattern, Rectangle, document_starts
from longreach.attention.sink_softmax import add_sink_, merge_, sink_gradient

Documents = tuple[tuple[int, ...], ...]
"""For each batch row, the tokens at which its documents begin."""

_known_documents = WeakIdKeyDictionary()
"""Cache of position_ids -> (version of the tensor, documents). All layers get the same tensor, and
reading it synchronizes with the GPU."""


def documents_of(position_ids_BT: Tensor | None, B: int, T: int) -> Documents:
    """Return for each row where its documents begin."""
    if position_ids_BT is None:
        return ((0,),) * B
    version = -1 if position_ids_BT.is_inference() else position_ids_BT._version
    known = _known_documents.get(position_ids_BT)
    if known is None or known[0] != version or version < 0:
        start_BT = document_starts(position_ids_BT)
        fresh = (start_BT == torch.arange(T, device=start_BT.device)).cpu()
        known = version, tuple(tuple(row.nonzero()[:, 0].tolist()) for row in fresh)
        _known_documents[position_ids_BT] = known
    return known[1] if len(known[1]) == B else known[1] * B


class Call(ABC):
    """One call of a library's flash attention, and the parts of the tensors that it reads."""

    @property
    @abstractmethod
    def writes_queries(self) -> bool:
        """Whether this is the first call for its queries. It writes their output; later calls are
        merged into it."""

    @property
    def writes_keys(self) -> bool:
        """Whether this is the first call for its keys. It writes their gradients; later calls add
        to them."""
        return self.writes_queries

    @abstractmethod
    def queries(self, x_BHT: Tensor) -> Tensor:
        """Return the call's view of a tensor [B, H, T, D] or [B, H, T]."""

    @abstractmethod
    def keys(self, x_BKTD: Tensor) -> Tensor:
        """Return the call's view of a tensor [B, K, T, D]."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp."""

    @abstractmethod
    def backward(self, saved: tuple[Tensor, ...], scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients of q, k, v from (dout, q, k, v, out, lse)."""


@dataclass(frozen=True)
class Piece(Call):
    """Consecutive rectangles of one size, as one batch of the CPU op."""

    kind: str
    """causal, full or later, as drawn in the module's docstring."""
    q_begin: int
    k_begin: int
    q_length: int
    k_length: int
    segments: int = 1
    row: int = 0
    heads: tuple[int, int] = (0, 1)
    repeat: int = 1
    member: int = 0
    """Index among the `repeat` query heads that share a KV head."""

    @property
    def writes_queries(self) -> bool:
        return self.kind == "causal" and self.q_begin == self.k_begin

    @property
    def writes_keys(self) -> bool:
        return self.writes_queries and self.member == 0

    def queries(self, x_BHT: Tensor) -> Tensor:
        first, last = (h * self.repeat for h in self.heads)
        heads = slice(first + self.member, last, self.repeat)
        part = x_BHT[self.row, heads, self.q_begin : self.q_begin + self.segments * self.q_length]
        return part.unflatten(1, (self.segments, self.q_length)).transpose(0, 1)

    def keys(self, x_BKTD: Tensor) -> Tensor:
        part = x_BKTD[self.row, slice(*self.heads), self.k_begin : self.k_begin + self.segments * self.k_length]
        return part.unflatten(1, (self.segments, self.k_length)).transpose(0, 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = self._mirrored(q, k, v)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, self.kind != "full", scale=scale
        )
        out, lse = self._mirrored(out, lse)
        return out, lse

    def backward(self, saved: tuple[Tensor, ...], scale: float) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *self._mirrored(*saved), 0.0, self.kind != "full", scale=scale
        )
        dq, dk, dv = self._mirrored(dq, dk, dv)
        return dq, dk, dv

    def _mirrored(self, *xs: Tensor) -> tuple[Tensor, ...]:
        """Reverse the tokens (third dimension) of a "later" piece, which makes it causal."""
        if self.kind != "later":
            return xs
        return tuple(x.flip(2) for x in xs)


def pieces(pattern: Pattern, heads: Heads, documents: Documents, T: int) -> list[Piece]:
    """Return the pattern as calls on a CPU, each with just enough heads to keep all threads busy.

    A call returns copies, which are smaller with fewer heads (93 MiB instead of 106 for one layer's
    forward and backward at T = 8,192).
    """
    repeat = heads.query // heads.kv
    calls = []
    for row, starts in enumerate(documents):
        for (begin, last), variant in head_spans(pattern, heads):
            for part in _row_pieces(pattern, variant, starts, T):
                at_once = -(-torch.get_num_threads() // part.segments)  # a thread for each head and segment
                for first in range(begin, last, at_once):
                    span = (first, min(first + at_once, last))
                    for member in range(repeat):
                        calls.append(replace(part, row=row, heads=span, repeat=repeat, member=member))
    return calls


def head_spans(pattern: Pattern, heads: Heads) -> Iterator[tuple[tuple[int, int], Hashable]]:
    """Yield ((first KV head, last + 1), variant) of neighbouring KV heads with the same
    rectangles."""
    first = 0
    for variant, same in groupby(pattern.variants(heads)):
        number = len(list(same))
        yield (first, first + number), variant
        first += number


@lru_cache(maxsize=1024)
def row_rectangles(pattern: Pattern, variant: Hashable, starts: tuple[int, ...], T: int) -> tuple[Rectangle, ...]:
    """Return a row's rectangles, beginning with those whose queries and keys are the same
    tokens."""
    found = []
    for begin, end in zip(starts, (*starts[1:], T), strict=True):
        rectangles = pattern.rectangles(variant, begin, end)
        assert rectangles is not None, f"{pattern} has no rectangles"
        found += rectangles
    return tuple(sorted(found, key=lambda r: r.q != r.k))


@lru_cache(maxsize=1024)
def _row_pieces(pattern: Pattern, variant: Hashable, starts: tuple[int, ...], T: int) -> tuple[Piece, ...]:
    """Return a row's rectangles as pieces: windows are divided into blocks, and equal neighbours are
    joined."""
    found: list[Piece] = []
    for one in sorted(
        (piece for rectangle in row_rectangles(pattern, variant, starts, T) for piece in _blocks(rectangle)),
        key=lambda piece: not piece.writes_queries,
    ):
        if found:
            last = found[-1]
            q_end, k_end = last.q_begin + last.segments * last.q_length, last.k_begin + last.segments * last.k_length
            if one == replace(last, q_begin=q_end, k_begin=k_end, segments=1):
                found[-1] = replace(last, segments=last.segments + 1)
                continue
        found.append(one)
    return tuple(found)


def _blocks(r: Rectangle) -> Iterator[Piece]:
    """Yield the pieces of a rectangle. A window of W tokens is divided into blocks of W - 1 tokens:
    a query sees its own block causally, and the later part of the block before it."""
    (begin, end), (k_begin, k_end) = r.q, r.k
    if r.window is None or r.window >= end - begin:
        yield Piece("causal" if r.causal else "full", begin, k_begin, end - begin, k_end - k_begin)
        return
    size = max(1, r.window - 1)
    for at in range(begin, end, size):
        here = min(size, end - at)
        yield Piece("causal", at, at, here, here)
        if at > begin and r.window > 1:
            yield Piece("later", at, at - size, here, here)
            if here < size:  # the last block is short: it also sees the rest of the block before it
                yield Piece("full", at, at - size + here, here, size - here)


class Segments(torch.autograd.Function):
    """Attention by a list of calls: apply(q, k, v, sink_logit_H or None, calls, scale) -> out [B,
    H, T, D]."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, sink: Tensor | None, calls: list[Call], scale: float
    ) -> Tensor:
        out_BHTD = _token_major(q_BHTD)
        wide = torch.float64 if q_BHTD.dtype == torch.float64 else torch.float32
        lse_BHT = _token_major(q_BHTD[..., :1], wide)[..., 0]
        for call in calls:
            out, lse = call.forward(call.queries(q_BHTD), call.keys(k_BKTD), call.keys(v_BKTD), scale)
            if call.writes_queries:
                call.queries(out_BHTD).copy_(out)
                call.queries(lse_BHT).copy_(lse)
            else:
                merge_(call.queries(out_BHTD), call.queries(lse_BHT), out, lse)
        if sink is not None:
            add_sink_(out_BHTD, lse_BHT, sink)
        ctx.save_for_backward(q_BHTD, k_BKTD, v_BKTD, out_BHTD, lse_BHT, sink)
        ctx.calls, ctx.scale = calls, scale
        return out_BHTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BHTD: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTD, k_BKTD, v_BKTD, out_BHTD, lse_BHT, sink = ctx.saved_tensors
        dout_BHTD = features_last(dout_BHTD)
        dq_BHTD, dk_BKTD, dv_BKTD = (_token_major(x) for x in (q_BHTD, k_BKTD, v_BKTD))
        for call in ctx.calls:
            dout, q, out, lse = (call.queries(x) for x in (dout_BHTD, q_BHTD, out_BHTD, lse_BHT))
            k, v = call.keys(k_BKTD), call.keys(v_BKTD)
            dq, dk, dv = call.backward((dout, q, k, v, out, lse), ctx.scale)
            _put(call.queries(dq_BHTD), dq, call.writes_queries)
            _put(call.keys(dk_BKTD), dk, call.writes_keys)
            _put(call.keys(dv_BKTD), dv, call.writes_keys)
        dsink = None if sink is None else sink_gradient(dout_BHTD, out_BHTD, lse_BHT, sink)
        return dq_BHTD, dk_BKTD, dv_BKTD, dsink, None, None


def _put(place: Tensor, part: Tensor, first: bool) -> None:
    if first:
        place.copy_(part)
    else:
        place.add_(part)


def features_last(x_BHTD: Tensor) -> Tensor:
    """Make a head's features contiguous, with a copy if needed. The library's op requires it and
    ignores the stride."""
    return x_BHTD if x_BHTD.stride(-1) == 1 else x_BHTD.contiguous()


def _token_major(x_BHTD: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialized tensor shaped like x with memory layout [B, T, H, D], so that the
    layer after attention gets a view."""
    B, H, T, D = x_BHTD.shape
    return x_BHTD.new_empty(B, T, H, D, dtype=dtype or x_BHTD.dtype).transpose(1, 2)
