"""Full causal attention inside each document: the baseline, and what every model is evaluated with."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from longreach.attention.pattern import Heads, MaskMod, Pattern, Rectangle, and_, causal, same_document


@dataclass(frozen=True)
class Causal(Pattern):
    """Each query sees every earlier key of its document."""

    name: ClassVar[str] = "causal"

    def mask_mod(self, heads: Heads, start_BT: Tensor) -> MaskMod:
        return and_(causal, same_document(start_BT))

    def rectangles(self, variant: Hashable, begin: int, end: int) -> list[Rectangle]:
        return [Rectangle((begin, end), (begin, end), causal=True)]
