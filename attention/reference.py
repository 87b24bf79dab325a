"""Reference implementation for tests: dense attention for any pattern and floating-point dtype.

It follows the formula directly and is slow.

    out = softmax(q kᵀ · scale + mask) v      with one more column without a value per head, if a sink logit is given

Legend: B batch, T tokens, H query heads, K key/value heads, D head dim.
"""

import torch
from torch import Tensor

from longreach.attention.call import AttentionCall
from longreach.attention.pattern import Heads, Pattern, document_starts


def attend(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, call: AttentionCall) -> Tensor:
    """Return attention [B, H, T, D]. ValueError if K does not divide H."""
    B, H, T, _ = q_BHTD.shape
    heads = call.heads(q_BHTD, k_BKTD)
    mask_BHTT = dense_mask(call.pattern, heads, starts(call.position_ids_BT, B, T, q_BHTD.device))
    k_BHTD, v_BHTD = (x.repeat_interleave(H // heads.kv, 1) for x in (k_BKTD, v_BKTD))
    scores_BHTT = q_BHTD @ k_BHTD.transpose(-1, -2) * call.scale_of(q_BHTD)
    scores_BHTT = scores_BHTT.masked_fill(~mask_BHTT, -torch.inf)
    if call.sink_logit_H is not None:
        column = call.sink_logit_H.to(scores_BHTT.dtype)[None, :, None, None].expand(B, H, T, 1)
        return torch.cat([scores_BHTT, column], -1).softmax(-1)[..., :-1] @ v_BHTD
    return scores_BHTT.softmax(-1) @ v_BHTD


def starts(position_ids_BT: Tensor | None, B: int, T: int, device: torch.device) -> Tensor:
    """Return where each token's document begins, [B, T]; without position_ids a row is one
    document."""
    if position_ids_BT is None:
        return torch.zeros(B, T, dtype=torch.long, device=device)
    return document_starts(position_ids_BT.to(device).expand(B, T))


def dense_mask(pattern: Pattern, heads: Heads, start_BT: Tensor) -> Tensor:
    """Return the pattern as booleans [B, H, T, T]: True where the query (third dimension) sees the
    key (last)."""
    B, T = start_BT.shape
    b, h, q, kv = (torch.arange(n, device=start_BT.device) for n in (B, heads.query, T, T))
    mod = pattern.mask_mod(heads, start_BT)
    mask = mod(b[:, None, None, None], h[None, :, None, None], q[None, None, :, None], kv[None, None, None, :])
    return mask.expand(B, heads.query, T, T)
