"""Sequence parallelism: the tokens of a row are split over ranks, and attention still covers the
whole row (DeepSpeed-Ulysses, arXiv:2309.14509; ALST, arXiv:2506.13996).

Outside attention, a rank has T / N tokens and all heads. For attention, an all-to-all gives it all
T tokens and H / N heads, any kernel computes any pattern, and another all-to-all restores the
tokens. Which heads S²-Attn shifts depends on their index in the model, not in the rank, so a rank
computes `SomeHeads` of the pattern.

    ranks = sequence_ranks(2)                     # on every rank: groups of two neighbours
    set_pattern(model, pattern, sequence=ranks)

Legend: B batch, T tokens of the row, P tokens of a rank's part, H heads of the model, G heads of a
rank, N ranks.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from longreach.attention.call import AttentionCall
from longreach.attention.kernels import attend_call
from longreach.attention.pattern import Heads, MaskMod, Pattern, Rectangle


@dataclass(frozen=True)
class SequenceRanks:
    """The ranks that share rows, and the index of this rank among them."""

    group: Any
    """Their process group; None for a rank that does not share rows."""
    size: int = 1
    rank: int = 0


ALONE = SequenceRanks(None)


def sequence_ranks(size: int) -> SequenceRanks:
    """Split all ranks into groups of `size` neighbours; every rank calls it. ValueError if `size`
    does not divide the number of ranks."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % size:
        raise ValueError(f"sequence_parallel {size} does not divide {world} ranks: change workers to a multiple of it")
    if size == 1:
        return ALONE
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    return SequenceRanks(groups[rank // size], size, rank % size)


class SomeHeads(Pattern):
    """The part of a pattern for some neighbouring heads of a model."""

    pattern: Literal["some_heads"] = "some_heads"
    """Some heads of another pattern."""
    whole: Pattern
    """The pattern for all heads of the model."""
    query: int
    """Number of query heads in the model."""
    kv: int
    """Number of key/value heads in the model."""
    first_kv: int
    """Index in the model of the first of these key/value heads."""

    def mean_keys(self, document_tokens: float) -> float:
        return self.whole.mean_keys(document_tokens)

    def _model(self, heads: Heads) -> Heads:
        return Heads(self.query, self.kv, heads.layer)

    def variants(self, heads: Heads) -> list[Hashable]:
        return self.whole.variants(self._model(heads))[self.first_kv : self.first_kv + heads.kv]

    def mask_mod(self, heads: Heads, start_BT: Tensor) -> MaskMod:
        first, mod = self.first_kv * self.query // self.kv, self.whole.mask_mod(self._model(heads), start_BT)
        return lambda b, h, q, kv: mod(b, h + first, q, kv)

    def rectangles(self, variant: Hashable, begin: int, end: int) -> list[Rectangle] | None:
        return self.whole.rectangles(variant, begin, end)


class _Exchange(torch.autograd.Function):
    """All-to-all: send the n-th slice [B, G, P, D] to rank n, and return the slices received from
    each rank, [N, B, G, P, D].

    The gradient goes back the same way. torch.distributed.nn.functional has the same, but torch
    deprecates it in favour of a private module.
    """

    @staticmethod
    def forward(ctx: Any, x_NBGPD: Tensor, ranks: SequenceRanks) -> Tensor:
        ctx.ranks = ranks
        received_NBGPD = torch.empty_like(x_NBGPD)
        dist.all_to_all_single(received_NBGPD, x_NBGPD, group=ranks.group)
        return received_NBGPD

    @staticmethod
    def backward(ctx: Any, grad_NBGPD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Exchange.apply(grad_NBGPD.contiguous(), ctx.ranks), None


def to_heads(x_BHPD: Tensor, ranks: SequenceRanks) -> Tensor:
    """Exchange this rank's tokens of all heads for all tokens of this rank's heads, [B, G, T, D];
    differentiable."""
    x_NBGPD = x_BHPD.unflatten(1, (ranks.size, -1)).movedim(1, 0).contiguous()
    return _Exchange.apply(x_NBGPD, ranks).movedim(0, 2).flatten(2, 3)


def to_tokens(x_BGTD: Tensor, ranks: SequenceRanks) -> Tensor:
    """Undo `to_heads`: return this rank's tokens of all heads, [B, H, P, D]; differentiable."""
    x_NBGPD = x_BGTD.unflatten(2, (ranks.size, -1)).movedim(2, 0).contiguous()
    return _Exchange.apply(x_NBGPD, ranks).movedim(0, 1).flatten(1, 2)


def check_heads(heads: int, kv_heads: int, size: int) -> None:
    """Raise ValueError unless that many ranks can share the heads."""
    if kv_heads % size or heads % size:
        raise ValueError(
            f"sequence_parallel {size} does not divide the model's {heads} query and {kv_heads} key/value heads: "
            f"use a divisor of both"
        )


def attend_in_parts(
    q_BHPD: Tensor, k_BKPD: Tensor, v_BKPD: Tensor, call: AttentionCall, kernel: str, ranks: SequenceRanks
) -> Tensor:
    """Return attention [B, H, P, D] of this rank's tokens over the whole row.

    Every rank of the group calls it at the same time, each with its own tokens. Raises ValueError
    like `check_heads`.
    """
    H, K = q_BHPD.shape[1], k_BKPD.shape[1]
    check_heads(H, K, ranks.size)
    assert call.position_ids_BT is not None, "positions are needed to tell documents apart"
    parts = [torch.empty_like(call.position_ids_BT) for _ in range(ranks.size)]
    dist.all_gather(parts, call.position_ids_BT.contiguous(), group=ranks.group)
    sink_logit_G = call.sink_logit_H
    if sink_logit_G is not None:
        sink_logit_G = sink_logit_G.chunk(ranks.size)[ranks.rank]
    pattern = SomeHeads(whole=call.pattern, query=H, kv=K, first_kv=ranks.rank * K // ranks.size)
    of_the_row = replace(call, pattern=pattern, position_ids_BT=torch.cat(parts, 1), sink_logit_H=sink_logit_G)
    q_BGTD, k_BGTD, v_BGTD = (to_heads(x, ranks) for x in (q_BHPD, k_BKPD, v_BKPD))
    return to_tokens(attend_call(q_BGTD, k_BGTD, v_BGTD, of_the_row, kernel), ranks)


def part_of(batch: dict[str, Tensor], ranks: SequenceRanks) -> dict[str, Tensor]:
    """Return this rank's tokens of whole rows [B, T]. Labels, and their weights if there are any,
    also contain the first of the next part, which the last token predicts. ValueError if the number
    of ranks does not divide T."""
    if ranks.size == 1:
        return batch
    tokens = batch["input_ids"].shape[1]
    if tokens % ranks.size:
        raise ValueError(f"sequence_parallel {ranks.size} does not divide rows of {tokens} tokens: change one of them")
    length = tokens // ranks.size
    begin = ranks.rank * length
    ahead = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)
    part = {
        "input_ids": batch["input_ids"][:, begin : begin + length],
        "position_ids": batch["position_ids"][:, begin : begin + length],
        "labels": ahead[:, begin : begin + length + 1],
    }
    if "documents" in batch:
        part["documents"] = batch["documents"][:, begin : begin + length]
    if "weights" in batch:
        weights = torch.nn.functional.pad(batch["weights"], (0, 1))
        part["weights"] = weights[:, begin : begin + length + 1]
    return part
