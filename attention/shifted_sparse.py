"""S²-Attn, shifted sparse attention (LongLoRA, arXiv:2309.12307, section 3.2), leak-free by construction.

The row is cut into groups of G tokens and attention stays inside a group: cost falls from T² to T·G. Half of the heads
have their group edges moved by G/2, so that information crosses from group to group between the halves.

    heads 1..H/2     |-------G-------|-------G-------|-------G-------|
    heads H/2+1..H   |--G/2--|-------G-------|-------G-------|--G/2--|

The paper's code rolls the sequence by G/2, which puts the row's last half-group and its first into one causal group:
early positions see the end. Here nothing is rolled; first and last half-groups stay apart (the paper's flash path does
the same), and group edges are united with document edges.

Heads are halved at the granularity of KV heads, so that no key is copied. With an odd number of KV heads (SmolLM2: 3)
the halves are unequal: ceil(K/2) heads stay, the rest is shifted, and in odd layers the roles change, so that over two
layers every head has been both. With one KV head, even layers have plain groups and odd layers shifted ones.

`sink_tokens` lets every later group also see the first n tokens of its document: S² alone starves attention sinks,
since no group after the first sees token 0.

    python -c "from longreach.attention import PATTERNS; print(PATTERNS['shifted_sparse'](group_tokens=512))"
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from longreach.attention.pattern import Heads, MaskMod, Pattern, Rectangle, and_, causal, or_, same_document


@dataclass(frozen=True)
class Grouped(Pattern):
    """Causal attention inside groups, without the shift: the paper's ablation."""

    group_tokens: int
    sink_tokens: int = 0
    name: ClassVar[str] = "grouped"

    def __post_init__(self) -> None:
        if self.group_tokens < 2 or self.group_tokens % 2:
            near = max(2, self.group_tokens + 1)
            raise ValueError(f"group_tokens {self.group_tokens} must be even and at least 2: use {near}")
        if self.sink_tokens < 0:
            raise ValueError(f"sink_tokens {self.sink_tokens} is negative: use 0 for none")

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
        near = [(a, b) for a, b in pairwise(edges[1:]) if a < sinks]  # sinks reach into these groups themselves
        found += [Rectangle(group, (begin, group[0])) for group in near]
        far = near[-1][1] if near else edges[1]
        return [*found, Rectangle((far, end), (begin, sinks))] if self.sink_tokens and far < end else found


@dataclass(frozen=True)
class ShiftedSparse(Grouped):
    """S²-Attn."""

    name: ClassVar[str] = "shifted_sparse"

    def shifted(self, heads: Heads, kv_head: int) -> bool:
        stay = (heads.kv + 1) // 2
        roles_change = heads.kv % 2 == 1 and heads.layer % 2 == 1
        return (kv_head >= stay) != roles_change
