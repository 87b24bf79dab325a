"""The arguments of one attention call besides queries, keys and values, as one object.

    attend_call(q_BHTD, k_BKTD, v_BKTD, AttentionCall(pattern, position_ids_BT, layer=3))

Legend: B batch, T tokens, H query heads, K key/value heads, D head dim.
"""

from dataclasses import dataclass

from torch import Tensor

from longreach.attention.pattern import Heads, Pattern


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The options of one attention call, the same for all kernels."""

    pattern: Pattern
    """Which keys each query sees."""
    position_ids_BT: Tensor | None = None
    """Positions that restart at each packed document (padding is treated as a document); None: a
    row is one document. Queries and keys may be rotated by other positions."""
    sink_logit_H: Tensor | None = None
    """A logit per head that takes part in the softmax but has no value
    (attention/sink_softmax.py)."""
    scale: float | None = None
    """Factor of the scores; None: 1/sqrt(D)."""
    layer: int = 0
    """Index of the layer. Patterns alternate by it if the number of KV heads is odd."""

    def heads(self, q_BHTD: Tensor, k_BKTD: Tensor) -> Heads:
        """Return the numbers of heads. ValueError unless K divides H."""
        return Heads(q_BHTD.shape[1], k_BKTD.shape[1], self.layer)

    def scale_of(self, q_BHTD: Tensor) -> float:
        """Return the factor of the scores."""
        if self.scale is None:
            return q_BHTD.shape[-1] ** -0.5
        return self.scale
