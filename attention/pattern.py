"""What a pattern is: a predicate that says which keys a query may see, and the same as rectangles
for fast kernels.

    mask_mod(b, h, q, kv) -> bool         batch row, query head, query position, key position (tensors that broadcast)

Predicates combine with `and_` and `or_`; the reference and FlexAttention come from them alone.
Flash attention knows only causal squares and full rectangles: a pattern that can be cut into those
says how in `rectangles`, and a test holds both forms together. A position_id that is not its left
neighbour's plus one starts a new document (padding is a run of its own).

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
    """All of the predicates hold."""
    if not others:
        return first
    rest = and_(*others)
    return lambda b, h, q, kv: first(b, h, q, kv) & rest(b, h, q, kv)


def or_(one: MaskMod, other: MaskMod) -> MaskMod:
    """One of the predicates holds, or both."""
    return lambda b, h, q, kv: one(b, h, q, kv) | other(b, h, q, kv)


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """No key after the query."""
    return kv <= q


def same_document(start_BT: Tensor) -> MaskMod:
    """Query and key lie in one document."""
    return lambda b, h, q, kv: start_BT[b, q] == start_BT[b, kv]


def document_starts(position_ids_BT: Tensor) -> Tensor:
    """For each token, where its document begins in the row [B, T], int64."""
    import torch

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


@dataclass(frozen=True)
class Rectangle:
    """Tokens q (begin, end) of a row see tokens k: all of them, or, if causal (then both are as
    long), the i-th query the first i keys, and of those no more than the last `window`."""

    q: tuple[int, int]
    k: tuple[int, int]
    causal: bool = False
    window: int | None = None


class Pattern(BaseModel, ABC):
    """One attention variant: its choices, which a recipe's `attention` section gives, and what
    follows from them.

    A subclass names itself by `pattern: Literal["its name"]`, and each of its fields has a
    docstring.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    pattern: str
    """Name of the pattern in PATTERNS and in recipes."""

    @abstractmethod
    def mask_mod(self, heads: Heads, start_BT: Tensor) -> MaskMod:
        """Return the predicate of the visible keys, causality and documents included."""

    @abstractmethod
    def mean_keys(self, document_tokens: float) -> float:
        """Return how many keys a query sees on average in a document of that length: training's
        cost grows with it."""

    def variants(self, heads: Heads) -> list[Hashable]:
        """Return for each KV head what tells its rectangles from another's (S²-Attn: its shift)."""
        return [None] * heads.kv

    def rectangles(self, variant: Hashable, begin: int, end: int) -> list[Rectangle] | None:
        """Return the predicate inside the document begin..end of a row, or None if it is not made
        of rectangles.

        Every visible pair is in one rectangle, and each token in one causal rectangle of its own (q
        and k the same tokens).
        """
        return None

    def check_row(self, seq_len: int) -> None:
        """Raise ValueError, which opens with the field's name, if rows of that length do not suit
        the pattern."""

    @property
    def block_tokens(self) -> int:
        """Tokens of the blocks that it cuts a document into (a group, a window); 0 if it takes a
        document whole."""
        return 0

    def span(self, document_tokens: int) -> int:
        """Return the side of the largest causal square that a kernel computes in a document of that
        length."""
        return min(document_tokens, self.block_tokens or document_tokens)

    def about(self) -> str:
        """Return a few words for the report's tables; nothing for full attention."""
        return str(self)

    def __str__(self) -> str:
        fields = ", ".join(f"{name}={value}" for name, value in self if name != "pattern")
        return f"{self.pattern}({fields})"
