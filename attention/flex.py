"""FlexAttention (arXiv:2412.05496): any predicate as a compiled block mask, for patterns without
rectangles.

A block mask says which 128 x 128 blocks of the scores a head needs. Inside a needed block the
predicate decides, unless all of it is visible. The mask is created once for the documents of a
batch and shared by all layers and the backward pass. The predicate is evaluated for some queries at
a time, so that no [T, T] for every head exists (34 GB at 32,768 tokens and 32 heads, which torch's
own `create_block_mask` needs unless it is recompiled for each batch).

CUDA supports forward and backward. On CPU torch has no backward (it raises NotImplementedError), so
the kernel runs there only without gradients, after 10 to 15 s of compilation.

    attend(q_BHTD, k_BKTD, v_BKTD, pattern, kernel="flex")

Legend: B batch, T tokens, H query heads, K key/value heads, D head dim, N blocks of keys, C queries
of a run.
"""

from functools import cache, lru_cache
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as library
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from longreach.attention.call import AttentionCall
from longreach.attention.pattern import Heads, Pattern
from longreach.attention.segments import Documents, documents_of
from longreach.attention.sink_softmax import with_sink

BLOCK_TOKENS = 128
"""Number of queries, and of keys, in a block, as the compiled kernels expect."""
PAIRS_AT_ONCE = 2**28
"""Pairs of a query and a key for which the predicate is evaluated at once: 256 MiB of booleans."""


def attend(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, call: AttentionCall) -> Tensor:
    """Return attention [B, H, T, D] by FlexAttention. ValueError for a sink logit on CPU."""
    B, _, T, _ = q_BHTD.shape
    heads, sink_H = call.heads(q_BHTD, k_BKTD), call.sink_logit_H
    if sink_H is not None and q_BHTD.device.type == "cpu":
        raise ValueError("kernel 'flex' has no sink logits on CPU (it returns no log-sum-exp there); use 'auto'")
    documents = documents_of(call.position_ids_BT, B, T)
    mask = block_mask(call.pattern, first_alike(call.pattern, heads), documents, T, q_BHTD.device)
    options = {"block_mask": mask, "scale": call.scale, "enable_gqa": heads.query != heads.kv}
    if sink_H is None:
        return _compiled()(q_BHTD, k_BKTD, v_BKTD, **options)
    if hasattr(library, "AuxRequest"):
        out_BHTD, more = _compiled()(q_BHTD, k_BKTD, v_BKTD, **options, return_aux=library.AuxRequest(lse=True))
        return with_sink(out_BHTD, more.lse, sink_H)
    out_BHTD, lse_BHT = _compiled()(q_BHTD, k_BKTD, v_BKTD, **options, return_lse=True)  # torch 2.8
    return with_sink(out_BHTD, lse_BHT, sink_H)


def first_alike(pattern: Pattern, heads: Heads) -> Heads:
    """Return the heads of the first layer with the same visible keys as this one, so that layers
    share a block mask."""
    if pattern.rectangles(None, 0, 1) is None:
        return heads  # it is unknown how the predicate depends on the layer
    variants = pattern.variants(heads)
    candidates = (Heads(heads.query, heads.kv, layer) for layer in count())
    return next(one for one in candidates if pattern.variants(one) == variants)


@lru_cache(maxsize=4)  # for 65,536 tokens and 32 heads, one mask takes 134 MB
@torch.inference_mode(False)  # a mask created during evaluation is cached, and training may use it next
def block_mask(
    pattern: Pattern, heads: Heads, documents: Documents, T: int, device: torch.device, block_tokens: int = BLOCK_TOKENS
) -> BlockMask:
    """Return the predicate as a block mask [B, H, N, N], equal to that of torch's
    `create_block_mask`."""
    start_BT = _starts(documents, T).to(device)
    mod = pattern.mask_mod(heads, start_BT)
    blocks = -(-T // block_tokens)
    run = max(1, PAIRS_AT_ONCE // (len(documents) * heads.query * blocks * block_tokens**2)) * block_tokens
    b_B, h_H, kv_T = (torch.arange(n, device=device) for n in (len(documents), heads.query, T))
    some, whole = [], []
    for first in range(0, T, run):
        q_C = torch.arange(first, min(first + run, T), device=device)
        seen_BHCT = mod(
            b_B[:, None, None, None], h_H[None, :, None, None], q_C[None, None, :, None], kv_T[None, None, None, :]
        ).expand(len(documents), heads.query, len(q_C), T)
        beyond = blocks * block_tokens - T, -len(q_C) % block_tokens
        padded_BHCT = torch.nn.functional.pad(seen_BHCT, (0, beyond[0], 0, beyond[1]))
        counts_BHNN = padded_BHCT.unflatten(3, (-1, block_tokens)).unflatten(2, (-1, block_tokens)).sum((3, 5))
        full_BHNN = counts_BHNN == block_tokens**2
        whole.append(full_BHNN)
        some.append((counts_BHNN > 0) & ~full_BHNN)
    return BlockMask.from_kv_blocks(
        *_ordered(torch.cat(some, 2)), *_ordered(torch.cat(whole, 2)), block_tokens, mod, (T, T)
    )


def _starts(documents: Documents, T: int) -> Tensor:
    """Return where each token's document begins [B, T]."""
    start_BT = torch.zeros(len(documents), T, dtype=torch.long)
    for start_T, starts in zip(start_BT, documents, strict=True):
        start_T[list(starts)] = torch.tensor(starts)
    return start_BT.cummax(1).values


def _ordered(needed_BHNN: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each block of queries, how many blocks of keys it needs, and the indices of all
    blocks of keys with the needed ones first."""
    numbers_BHNN = needed_BHNN.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return needed_BHNN.sum(-1, dtype=torch.int32), numbers_BHNN.to(torch.int32)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)  # an error rather than a graph break
