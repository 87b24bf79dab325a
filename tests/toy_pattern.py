"""An attention pattern that the product does not have, written as a file in attention/ would be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from longreach.attention.pattern import Heads, MaskMod, Pattern, and_, causal, same_document

if TYPE_CHECKING:
    from torch import Tensor


class Dilated(Pattern):
    """Each query attends to every n-th earlier key, counted back from itself."""

    pattern: Literal["dilated"] = "dilated"
    """Every n-th key."""
    stride_tokens: int = Field(ge=1)
    """Distance between two keys, which must divide seq_len."""

    def mask_mod(self, heads: Heads, start_BT: Tensor) -> MaskMod:
        def on_the_grid(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (q - kv) % self.stride_tokens == 0

        return and_(causal, same_document(start_BT), on_the_grid)

    def mean_keys(self, document_tokens: float) -> float:
        return (document_tokens / self.stride_tokens + 1) / 2

    def check_row(self, seq_len: int) -> None:
        if seq_len % self.stride_tokens:
            raise ValueError(f"stride_tokens {self.stride_tokens} does not divide pack.seq_len {seq_len}")

    def about(self) -> str:
        return f"one key in {self.stride_tokens}"
