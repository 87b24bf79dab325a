"""S²-Attn, shifted sparse attention (LongLoRA, arXiv:2309.12307, section 3.2), without leaks from
later tokens.

The row is divided into groups of G tokens and attention stays inside a group, so the cost falls
from T² to T·G. In half of the heads, group borders are shifted by G/2, so that information passes
between groups.

    heads 1..H/2     |-------G-------|-------G-------|-------G-------|
    heads H/2+1..H   |--G/2--|-------G-------|-------G-------|--G/2--|

The paper's code rolls the sequence by G/2, which puts the last and the first half-group of the row
into one causal group, so that early positions see the end. Here nothing is rolled. The first and
last half-groups stay separate (as in the paper's flash path), and document borders divide groups
further.

Heads are split into halves by KV heads, so that no key is copied. With an odd number of KV heads
(SmolLM2: 3) the halves are unequal: ceil(K/2) heads are not shifted, the rest are. In odd layers
the roles are swapped, so that over two layers every head has had both roles. With one KV head, even
layers have plain groups and odd layers have shifted ones.

With `sink_tokens`, every later group also sees the first n tokens of its document. S²-Attn alone
deprives the model of its attention sinks, since no group after the first sees token 0.

    python -c "from longreach.attention import PATTERNS; print(PATTERNS['shifted_sparse'](group_tokens=512))"
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from longreach.attention.pattern import Heads, MaskMod, Pattern, Rectangle, and_, causal, or_, same_document

if TYPE_CHECKING:
    from torch import Tensor


class Grouped(Pattern):
    """Causal attention inside groups without a shift, an ablation of the paper."""

    pattern: Literal["grouped"] = "grouped"
    """Groups that are not shifted."""
    group_tokens: int = Field(ge=2)
    """Group size in tokens; must be even and divide seq_len. The paper uses seq_len / 4."""
    sink_tokens: int = Field(default=0, ge=0)
    """Number of first tokens of a document that every later group also sees."""

    @model_validator(mode="after")
    def _halves(self) -> Self:
        G = self.group_tokens
        if G % 2:
            raise ValueError(f"group_tokens {G} is odd, but groups are shifted by half: use {G - 1} or {G + 1}")
        return self

    def check_row(self, seq_len: int) -> None:
        if seq_len % self.group_tokens:
            divisors = [d for d in range(2, seq_len + 1, 2) if seq_len % d == 0] or [2]  # 2: nothing fits an odd row
            nearest = min(divisors, key=lambda d: abs(d - self.group_tokens))
            raise ValueError(
                f"group_tokens {self.group_tokens} does not divide pack.seq_len {seq_len}: "
                f"use {nearest}, or another seq_len"
            )

    def shifted(self, heads: Heads, kv_head: int) -> bool:
        """Return whether a KV head's groups are shifted by half a group."""
        return False

    def variants(self, heads: Heads) -> list[Hashable]:
        return [self.shifted(heads, k) for k in range(heads.kv)]

    def mask_mod(self, heads: Heads, start_BT: Tensor) -> MaskMod:
        repeat = heads.query // heads.kv
        shift_H = start_BT.new_tensor(
            [self.group_tokens // 2 * self.shifted(heads, h // repeat) for h in range(heads.query)]
        )

        def same_group(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            shift = shift_H[h]
            return (q + shift) // self.group_tokens == (kv + shift) // self.group_tokens

        def sink(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return kv - start_BT[b, q] < self.sink_tokens

        visible = or_(same_group, sink) if self.sink_tokens else same_group
        return and_(causal, same_document(start_BT), visible)

    def rectangles(self, variant: Hashable, begin: int, end: int) -> list[Rectangle]:
        G = self.group_tokens
        first = G // 2 if variant else G
        later = range(first + max(0, (begin - first) // G + 1) * G, end, G)
        edges = [begin, *later, end]
        found = [Rectangle(group, group, causal=True) for group in pairwise(edges)]
        sinks = begin + self.sink_tokens
        far = edges[1]
        for group in pairwise(edges[1:]):
            if group[0] < sinks:  # this group itself contains sinks
                found.append(Rectangle(group, (begin, group[0])))
                far = group[1]
        if self.sink_tokens and far < end:
            found.append(Rectangle((far, end), (begin, sinks)))
        return found

    def mean_keys(self, document_tokens: float) -> float:
        G = self.group_tokens
        if document_tokens <= G:
            return (document_tokens + 1) / 2
        return self._group_keys(document_tokens) + self.sink_tokens * (1 - G / document_tokens)

    def _group_keys(self, document_tokens: float) -> float:
        """Return the mean number of keys in a query's own group, in a document longer than a
        group."""
        return (self.group_tokens + 1) / 2

    @property
    def block_tokens(self) -> int:
        return self.group_tokens

    def about(self) -> str:
        return f"groups of {self.group_tokens} without shift{self._and_sinks()}"

    def _and_sinks(self) -> str:
        return f" and {self.sink_tokens} sinks" if self.sink_tokens else ""


class ShiftedSparse(Grouped):
    """S²-Attn: groups, shifted by half a group in half of the heads."""

    pattern: Literal["shifted_sparse"] = "shifted_sparse"  # type: ignore[assignment]
    """S²-Attn."""

    def shifted(self, heads: Heads, kv_head: int) -> bool:
        stay = (heads.kv + 1) // 2
        roles_change = heads.kv % 2 == 1 and heads.layer % 2 == 1
        return (kv_head >= stay) != roles_change

    def _group_keys(self, document_tokens: float) -> float:
        G, staying = self.group_tokens, (self.group_tokens + 1) / 2
        # half of the heads have document / G - 1 whole groups between two half groups
        shifted = staying * (1 - G / (2 * document_tokens))
        return (staying + shifted) / 2

    def about(self) -> str:
        return f"S²-Attn, groups of {self.group_tokens}{self._and_sinks()}"
