"""Sinks and a recent window (StreamingLLM, arXiv:2309.17453): what a streaming cache lets a query see.

A model pours attention on its first tokens whatever they mean; a window that drops them collapses, one that keeps a
few of them does not. `sink_tokens=0` is plain window attention.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from longreach.attention.pattern import Heads, MaskMod, Pattern, Rectangle, and_, causal, or_, same_document


@dataclass(frozen=True)
class SinkWindow(Pattern):
    """The first `sink_tokens` of a document and the last `window_tokens`, the query's own included."""

    window_tokens: int
    sink_tokens: int = 4
    name: ClassVar[str] = "sink_window"

    def __post_init__(self) -> None:
        if self.window_tokens < 1 or self.sink_tokens < 0:
            raise ValueError(
                f"window_tokens {self.window_tokens} and sink_tokens {self.sink_tokens}: at least 1 and at least 0"
            )

    def mask_mod(self, heads: Heads, start_BT: Tensor) -> MaskMod:
        def recent(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return q - kv < self.window_tokens

        def sink(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return kv - start_BT[b, q] < self.sink_tokens

        return and_(causal, same_document(start_BT), or_(recent, sink))

    def rectangles(self, variant: Hashable, begin: int, end: int) -> list[Rectangle]:
        n, out = self.sink_tokens, begin + self.window_tokens  # the first query whose window leaves a token out
        found = [Rectangle((begin, end), (begin, end), causal=True, window=self.window_tokens)]
        if n and out < end:  # it misses the first token, the next query the first two, ...
            few = min(n, end - out)
            found.append(Rectangle((out, out + few), (begin, begin + few), causal=True))
        if n and out + n < end:
            found.append(Rectangle((out + n, end), (begin, begin + n)))
        return found
