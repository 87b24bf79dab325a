"""What a pattern is: a predicate that says which keys a query may see, and the row's documents beside it.

    mask_mod(b, h, q, kv) -> bool         batch row, query head, query position, key position (tensors that broadcast)

Predicates combine with `and_` and `or_`; every kernel and the reference come from the same ones. Documents are read
from position_ids: a position that is not its left neighbour's plus one starts a new one (padding is a run of its own).

Legend: B batch, T tokens, H query heads, K key/value heads (K divides H), D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def and_(*mods: MaskMod) -> MaskMod:
    """All of the predicates hold."""

    def mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        result = mods[0](b, h, q, kv)
        for other in mods[1:]:
            result = result & other(b, h, q, kv)
        return result

    return mod


def or_(*mods: MaskMod) -> MaskMod:
    """Any of the predicates holds."""

    def mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        result = mods[0](b, h, q, kv)
        for other in mods[1:]:
            result = result | other(b, h, q, kv)
        return result

    return mod


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """No key after the query."""
    return kv <= q


def document_starts(position_ids_BT: Tensor) -> Tensor:
    """For each token, where its document begins in the row [B, T], int64."""
    index_T = torch.arange(position_ids_BT.shape[1], device=position_ids_BT.device)
    fresh_BT = torch.ones_like(position_ids_BT, dtype=torch.bool)
    fresh_BT[:, 1:] = position_ids_BT[:, 1:] != position_ids_BT[:, :-1] + 1
    return torch.where(fresh_BT, index_T, 0).cummax(1).values


@dataclass(frozen=True)
class Heads:
    """Where a predicate stands: how many heads there are, and in which layer."""

    query: int
    kv: int
    layer: int = 0

    def __post_init__(self) -> None:
        if self.kv < 1 or self.query % self.kv:
            raise ValueError(f"{self.kv} key/value heads do not divide {self.query} query heads")


class Pattern(ABC):
    """One attention variant. Subclasses are frozen dataclasses whose fields are the variant's choices."""

    name: ClassVar[str]

    @abstractmethod
    def mask_mod(self, heads: Heads, start_BT: Tensor) -> MaskMod:
        """Which keys may be seen, causality and documents included."""

    def edges(self, heads: Heads, kv_head: int) -> tuple[int, int] | None:
        """(first edge, distance between edges) of the causal groups that a KV head's queries are cut into; None: uncut.

        Kernels use it where a pattern is nothing but causal attention inside such groups (`sink_tokens` aside).
        """
        return None

    def __str__(self) -> str:
        fields = ", ".join(f"{k}={v}" for k, v in vars(self).items())
        return f"{self.name}({fields})"


def same_document(start_BT: Tensor) -> MaskMod:
    """Query and key lie in one document."""
    return lambda b, h, q, kv: start_BT[b, q] == start_BT[b, kv]
