"""The base class of attention patterns.

A pattern is a predicate that says which keys a query may see, and optionally the same as rectangles
for fast kernels.

    mask_mod(b, h, q, kv) -> bool         batch row, query head, query position, key position (tensors that broadcast)

Predicates combine with `and_` and `or_`. The reference and FlexAttention need only the predicate.
Flash attention supports only causal squares and full rectangles: a pattern that can be divided into
those does so in `rectangles`, and a test compares both forms. A position_id that is not one more
than its left neighbour starts a new document (padding is treated as a document).

Legend: B batch, T tokens, H query heads, K key/value heads (K divides H), D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:  # recipes import the patterns, and `longreach plan` must not wait for torch
    from torch import Tensor

MaskMod: TypeAlias = "Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]"


def and_(first: MaskMod, *others: MaskMod) -> MaskMod:
    """Return the conjunction of predicates."""
    if not others:
        return first
    rest = and_(*others)
    return lambda b, h, q, kv: first(b, h, q, kv) & rest(b, h, q, kv)


def or_(one: MaskMod, other: MaskMod) -> MaskMod:
    """Return the disjunction of two predicates."""
    return lambda b, h, q, kv: one(b, h, q, kv) | other(b, h, q, kv)


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """Allow no key after the query."""
    return kv <= q


def same_document(start_BT: Tensor) -> MaskMod:
    """Return the predicate that query and key are in the same document."""
    return lambda b, h, q, kv: start_BT[b, q] == start_BT[b, kv]


def document_starts(position_ids_BT: Tensor) -> Tensor:
    """Return, for each token, where its document begins in the row, [B, T] int64."""
    import torch

    index_T = torch.arange(position_ids_BT.shape[1], device=position_ids_BT.device)
    fresh_BT = torch.ones_like(position_ids_BT, dtype=torch.bool)
    fresh_BT[:, 1:] = position_ids_BT[:, 1:] != position_ids_BT[:, :-1] + 1
    return torch.where(fresh_BT, index_T, 0).cummax(1).values


@dataclass(frozen=True)
class Heads:
    """What a predicate may depend on: the numbers of heads, and the layer."""

    query: int
    kv: int
    layer: int = 0

    def __post_init__(self) -> None:
        if self.kv < 1 or self.query % self.kv:
            raise ValueError(f"{self.kv} key/value heads do not divide {self.query} query heads")


@dataclass(frozen=True)
class Rectangle:
    """Queries q (begin, end) of a row see keys k (begin, end).

    If not causal, each query sees all keys. If causal, q and k have the same length and the i-th
    query sees the first i keys, or only the last `window` of these.
    """

    q: tuple[int, int]
    k: tuple[int, int]
    causal: bool = False
    window: int | None = None


class Pattern(BaseModel, ABC):
    """One attention variant: the fields of a recipe's `attention` section, and what follows from
    them.

    A subclass sets its name by `pattern: Literal["its name"]`, and gives each of its fields a
    docstring.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    pattern: str
    """Name of the pattern in PATTERNS and in recipes."""

    @abstractmethod
    def mask_mod(self, heads: Heads, start_BT: Tensor) -> MaskMod:
        """Return the predicate of the visible keys, including causality and documents."""

    @abstractmethod
    def mean_keys(self, document_tokens: float) -> float:
        """Return the mean number of keys that a query sees in a document of that length. The cost
        of training grows with it."""

    def variants(self, heads: Heads) -> list[Hashable]:
        """Return, for each KV head, what its rectangles depend on (S²-Attn: its shift)."""
        return [None] * heads.kv

    def rectangles(self, variant: Hashable, begin: int, end: int) -> list[Rectangle] | None:
        """Return the predicate inside the document begin..end of a row as rectangles, or None if it
        cannot be expressed so.

        Every visible pair is in exactly one rectangle, and every token is in one causal rectangle
        whose q and k are the same tokens.
        """
        return None

    def check_row(self, seq_len: int) -> None:
        """Raise ValueError if the pattern does not support rows of that length; the message begins
        with the field's name."""

    @property
    def block_tokens(self) -> int:
        """Tokens in the blocks that the pattern divides a document into (groups, windows); 0 if it
        does not divide documents."""
        return 0

    def span(self, document_tokens: int) -> int:
        """Return the side of the largest causal square that a kernel computes in a document of that
        length."""
        return min(document_tokens, self.block_tokens or document_tokens)

    def about(self) -> str:
        """Return a short description for the report's tables; empty for full attention."""
        return str(self)

    def __str__(self) -> str:
        fields = ", ".join(f"{name}={value}" for name, value in self if name != "pattern")
        return f"{self.pattern}({fields})"
