"""Full causal attention inside each document: the baseline, and the pattern of every evaluation."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Literal

from longreach.attention.pattern import Heads, MaskMod, Pattern, Rectangle, and_, causal, same_document

if TYPE_CHECKING:
    from torch import Tensor


class Causal(Pattern):
    """Each query sees every earlier key of its document."""

    pattern: Literal["causal"] = "causal"
    """Full causal attention."""

    def mask_mod(self, heads: Heads, start_BT: Tensor) -> MaskMod:
        return and_(causal, same_document(start_BT))

    def rectangles(self, variant: Hashable, begin: int, end: int) -> list[Rectangle]:
        return [Rectangle((begin, end), (begin, end), causal=True)]

    def mean_keys(self, document_tokens: float) -> float:
        return (document_tokens + 1) / 2

    def about(self) -> str:
        return ""
