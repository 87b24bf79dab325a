"""Attention patterns, which say which keys each query may see, and one `attend` for all of them.

    from longreach.attention import PATTERNS, attend
    out_BHTD = attend(q_BHTD, k_BKTD, v_BKTD, PATTERNS["shifted_sparse"](group_tokens=512))

PATTERNS does not import torch, since recipes are validated with it.
"""

from typing import TYPE_CHECKING, Any

from longreach.attention.causal import Causal
from longreach.attention.pattern import Pattern
from longreach.attention.shifted_sparse import Grouped, ShiftedSparse
from longreach.attention.sink_window import SinkWindow

if TYPE_CHECKING:
    from longreach.attention.kernels import attend

PATTERNS: dict[str, type[Pattern]] = {
    "causal": Causal,
    "grouped": Grouped,
    "shifted_sparse": ShiftedSparse,
    "sink_window": SinkWindow,
}

__all__ = ["PATTERNS", "Pattern", "attend"]


def __getattr__(name: str) -> Any:
    if name == "attend":  # imported lazily, since its kernels import torch
        from longreach.attention.kernels import attend

        return attend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
