"""Attention sinks and a recent window (StreamingLLM, arXiv:2309.17453): the keys that a streaming
cache keeps.

A model puts much attention on its first tokens, whatever they mean. Window attention that drops
them collapses; window attention that keeps a few of them does not. `sink_tokens=0` is plain window
attention.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from longreach.attention.pattern import Heads, MaskMod, Pattern, Rectangle, and_, causal, or_, same_document

if TYPE_CHECKING:
    from torch import Tensor


class SinkWindow(Pattern):
    """A query sees the first `sink_tokens` of its document and the last `window_tokens`, including
    its own."""

    pattern: Literal["sink_window"] = "sink_window"
    """A window of the last tokens, and the first tokens of the document."""
    window_tokens: int = Field(ge=1)
    """Number of last tokens that a query sees, including its own."""
    sink_tokens: int = Field(default=4, ge=0)
    """Number of first tokens of a document that every later query also sees; 0 is plain window
    attention."""

    def mask_mod(self, heads: Heads, start_BT: Tensor) -> MaskMod:
        def recent(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return q - kv < self.window_tokens

        def sink(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return kv - start_BT[b, q] < self.sink_tokens

        return and_(causal, same_document(start_BT), or_(recent, sink))

    def rectangles(self, variant: Hashable, begin: int, end: int) -> list[Rectangle]:
        n, out = self.sink_tokens, begin + self.window_tokens  # out: the first query whose window drops a token
        found = [Rectangle((begin, end), (begin, end), causal=True, window=self.window_tokens)]
        if n and out < end:  # it misses the first token, the next query the first two, ...
            few = min(n, end - out)
            found.append(Rectangle((out, out + few), (begin, begin + few), causal=True))
        if n and out + n < end:
            found.append(Rectangle((out + n, end), (begin, begin + n)))
        return found

    def mean_keys(self, document_tokens: float) -> float:
        most = min(document_tokens, self.sink_tokens + self.window_tokens)  # the i-th query sees min(i, most) keys
        return most - most * (most - 1) / (2 * document_tokens)

    @property
    def block_tokens(self) -> int:
        return self.window_tokens

    def about(self) -> str:
        return f"a window of {self.window_tokens}" + (f" and {self.sink_tokens} sinks" if self.sink_tokens else "")
