"""attention: which keys each query may see. Patterns by name, one `attend` for all of them.

from longreach.attention import PATTERNS, attend
out_BHTD = attend(q_BHTD, k_BKTD, v_BKTD, PATTERNS["shifted_sparse"](group_tokens=512))
"""

from collections.abc import Callable

from longreach.attention.causal import Causal
from longreach.attention.kernels import attend
from longreach.attention.pattern import Pattern
from longreach.attention.shifted_sparse import Grouped, ShiftedSparse
from longreach.attention.sink_window import SinkWindow

PATTERNS: dict[str, Callable[..., Pattern]] = {
    "causal": Causal,
    "grouped": Grouped,
    "shifted_sparse": ShiftedSparse,
    "sink_window": SinkWindow,
}

__all__ = ["PATTERNS", "Pattern", "attend"]
