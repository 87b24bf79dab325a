"""S²-Attn, shifted sparse attention (LongLoRA, arXiv:2309.12307, section 3.2), leak-free by
construction.

The row is cut into groups of G tokens and attention stays inside a group: cost falls from T² to
T·G. Half of the heads have their group edges moved by G/2, so that information crosses from group
to group between the halves.

    heads 1..H/2     |-------G-------|-------G-------|-------G-------|
    heads H/2+1..H   |--G/2--|-------G-------|-------G-------|--G/2--|

The paper's code rolls the sequence by G/2, which puts the row's last half-group and its first into
one causal group: early positions see the end. Here nothing is rolled; first and last half-groups
stay apart (the paper's flash path does the same), and group edges are united with document edges.

Heads are halved at the granularity of KV heads, so that no key is copied. With an odd number of KV
heads (SmolLM2: 3) the halves are unequal: ceil(K/2) heads stay, the rest is shifted, and in odd
layers the roles change, so that over two layers every head has been both. With one KV head, even
layers have plain groups and odd layers shifted ones.

`sink_tokens` lets every later group also see the first n tokens of its document: S² alone starves
attention sinks, since no group after the first sees token 0.

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
    """Causal attention inside groups, without the shift: the paper's ablation."""

    pattern: Literal["grouped"] = "grouped"
    """Groups that are not shifted."""
    group_tokens: int = Field(ge=2)
    """Group size, which is even and divides seq_len; the paper's choice is seq_len / 4."""
    sink_tokens: int = Field(default=0, ge=0)
    """First tokens of a document that every later group also sees."""

    @model_validator(mode="after")
    def _halves(self) -> Self:
        G = self.group_tokens
        if G % 2:
            raise ValueError(f"group_tokens {G} is odd: half a group is shifted; use {G - 1} or {G + 1}")
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
        """Whether a KV head's groups begin half a group later."""
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
            if group[0] < sinks:  # sinks reach into this group itself
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
        # half of the heads have document / G - 1 whole groups between two half ones
        shifted = staying * (1 - G / (2 * document_tokens))
        return (staying + shifted) / 2

    def about(self) -> str:
        return f"S²-Attn, groups of {self.group_tokens}{self._and_sinks()}"
