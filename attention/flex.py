"""FlexAttention (arXiv:2412.05496): any predicate as a compiled block mask. The way for patterns without rectangles.

A block mask says which 128 x 128 blocks of the scores a head needs at all; inside a needed block the predicate decides.
On CUDA forward and backward; on CPU torch has no backward for it (it raises NotImplementedError), so there it runs only
where no gradient is wanted, after 10 to 15 s of compiling.

    attend(q_BHTD, k_BKTD, v_BKTD, pattern, kernel="flex")

Legend: B batch, T tokens, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from longreach.attention import reference
from longreach.attention.pattern import Heads, Pattern
from longreach.attention.sink_softmax import with_sink


def attend(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    pattern: Pattern,
    position_ids_BT: Tensor | None = None,
    sink_logit_H: Tensor | None = None,
    scale: float | None = None,
    *,
    layer: int = 0,
) -> Tensor:
    """Attention [B, H, T, D] by FlexAttention; see `attention.attend`.

    Raises:
        ValueError: a sink logit on CPU.
    """
    B, H, T, _ = q_BHTD.shape
    heads = Heads(H, k_BKTD.shape[1], layer)
    if sink_logit_H is not None and q_BHTD.device.type == "cpu":
        raise ValueError("kernel 'flex' has no sink logits on CPU (no log-sum-exp comes out of it there); use 'auto'")
    mask = block_mask(pattern, heads, reference.starts(position_ids_BT, B, T, q_BHTD.device))
    asked = {"block_mask": mask, "scale": scale, "enable_gqa": heads.query != heads.kv}
    if sink_logit_H is None:
        return _compiled()(q_BHTD, k_BKTD, v_BKTD, **asked)
    out_BHTD, lse_BHT = _compiled()(q_BHTD, k_BKTD, v_BKTD, **asked, return_lse=True)
    return with_sink(out_BHTD, lse_BHT, sink_logit_H)


def block_mask(pattern: Pattern, heads: Heads, start_BT: Tensor) -> BlockMask:
    """The predicate as blocks [B, H, T/128, T/128]."""
    B, T = start_BT.shape
    return create_block_mask(pattern.mask_mod(heads, start_BT), B, heads.query, T, T, device=start_BT.device)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)  # whole, or an error: never quietly uncompiled
