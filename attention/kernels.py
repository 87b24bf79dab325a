"""Kernels that compute a pattern, and the choice among them.

All kernels agree with the reference (tests/test_attention_kernels.py).

`sdpa`       torch's flash attention on views, without copies: segments.py on CPU, flash.py on CUDA (16 bits)
`flash`      the same through the package flash-attn
`flex`       FlexAttention, for patterns that are only a predicate (CUDA; on CPU without gradients)
`reference`  dense attention: any pattern, quadratic memory

    choose(PATTERNS["shifted_sparse"](group_tokens=512))        # 'sdpa'

Legend: B batch, T tokens, H query heads, K key/value heads, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longreach.attention import flex, reference
from longreach.attention.call import AttentionCall
from longreach.attention.flash import FlashAttnVarlen, TorchVarlen, Varlen, has_flash_attn, refusal, varlen_calls
from longreach.attention.pattern import Pattern
from longreach.attention.segments import Segments, documents_of, features_last, pieces


@dataclass(frozen=True)
class Situation:
    """What, besides the pattern, decides whether a kernel can run."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    gradients: bool = True


CPU = Situation()


def attend(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, pattern: Pattern, position_ids_BT: Tensor | None = None,
    sink_logit_H: Tensor | None = None, scale: float | None = None, kernel: str = "auto", layer: int = 0,
) -> Tensor:  # fmt: skip
    """Return attention [B, H, T, D] of every query over the keys that `pattern` lets it see.

    `kernel` is a name in KERNELS, or "auto" (see `choose`); all other arguments are as in
    AttentionCall. Raises ValueError if shapes do not fit, or if the kernel is unknown or cannot
    compute this pattern here.
    """
    call = AttentionCall(pattern, position_ids_BT, sink_logit_H, scale, layer)
    return attend_call(q_BHTD, k_BKTD, v_BKTD, call, kernel)


def attend_call(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, call: AttentionCall, kernel: str = "auto") -> Tensor:
    """Return the same as `attend`, with the options as one object."""
    check_shapes(q_BHTD, k_BKTD, v_BKTD)
    device = q_BHTD.device.type
    if torch.is_autocast_enabled(device):  # autocast does not cast for our function, and RoPE leaves q, k in float32
        short = torch.get_autocast_dtype(device)
        q_BHTD, k_BKTD, v_BKTD = (x.to(short) for x in (q_BHTD, k_BKTD, v_BKTD))
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHTD, k_BKTD, v_BKTD))
    chosen = choose(call.pattern, kernel, Situation(device, q_BHTD.dtype, q_BHTD.shape[-1], gradients))
    return KERNELS[chosen].run(q_BHTD, k_BKTD, v_BKTD, call)


def choose(pattern: Pattern, kernel: str = "auto", where: Situation = CPU) -> str:
    """Return the kernel that will run: the requested one, or for "auto" the first of AUTO that can.
    Raises ValueError if the requested kernel is unknown or cannot compute this pattern here, or for
    "auto" on a device that is not in AUTO."""
    if kernel == "auto":
        if where.device not in AUTO:
            raise ValueError(f"no kernel is tested on device {where.device!r}: use {' or '.join(AUTO)}")
        return next(name for name in AUTO[where.device] if not KERNELS[name].cannot(pattern, where))
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}: use auto, {', '.join(KERNELS)}")
    if why_not := KERNELS[kernel].cannot(pattern, where):
        raise ValueError(f"kernel {kernel!r} cannot compute {pattern} here: {why_not}; use 'auto'")
    return kernel


def check_shapes(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> None:
    """Raise ValueError unless the shapes of q, k and v fit together."""
    B, H, T, D = q_BHTD.shape
    if k_BKTD.shape != v_BKTD.shape or (k_BKTD.shape[0], *k_BKTD.shape[2:]) != (B, T, D) or H % k_BKTD.shape[1]:
        raise ValueError(
            f"q {tuple(q_BHTD.shape)}, k {tuple(k_BKTD.shape)}, v {tuple(v_BKTD.shape)}: they must share batch, length "
            f"and head size, and the number of key heads must divide that of query heads (with a KV cache, set the "
            f"pattern to 'causal' first)"
        )


def by_segments(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, call: AttentionCall, library: Varlen | None = None
) -> Tensor:
    """Compute a pattern's rectangles by flash attention: with a library's varlen calls, or without
    a library in pieces on the CPU."""
    B, _, T, _ = q_BHTD.shape
    heads, documents = call.heads(q_BHTD, k_BKTD), documents_of(call.position_ids_BT, B, T)
    q_BHTD, k_BKTD, v_BKTD = (features_last(x) for x in (q_BHTD, k_BKTD, v_BKTD))
    calls: list[Any]
    if library is None:
        calls = pieces(call.pattern, heads, documents, T)
    else:
        calls = varlen_calls(call.pattern, heads, documents, T, library, q_BHTD.device)
    return Segments.apply(q_BHTD, k_BKTD, v_BKTD, call.sink_logit_H, calls, call.scale_of(q_BHTD))


def sdpa(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, call: AttentionCall) -> Tensor:
    """Compute attention by torch's own flash attention."""
    library = TorchVarlen() if q_BHTD.device.type == "cuda" else None
    return by_segments(q_BHTD, k_BKTD, v_BKTD, call, library)


def _needs(pattern: Pattern, where: Situation, device: str = "") -> str:
    """Return why flash attention cannot compute the pattern; empty if it can."""
    if pattern.rectangles(None, 0, 1) is None:
        return "the pattern has no rectangles"
    if device and where.device != device:
        return f"it needs {device}, and this is {where.device}"
    return refusal(where.dtype, where.head_dim) if where.device == "cuda" else ""


def _cannot_flash(pattern: Pattern, where: Situation) -> str:
    missing = "" if has_flash_attn() else "the package flash-attn is not installed (pip install longreach[gpu])"
    return _needs(pattern, where, device="cuda") or missing


def _cannot_flex(pattern: Pattern, where: Situation) -> str:
    if where.device == "cpu" and where.gradients:
        return "FlexAttention has no backward on CPU; call it under torch.no_grad()"
    if where.device == "cuda" and where.dtype == torch.float64:
        return "FlexAttention on CUDA does not compute in float64"
    if where.device == "cuda" and where.head_dim < 16:
        return f"FlexAttention on CUDA needs a head size of at least 16, not {where.head_dim}"
    return ""


@dataclass(frozen=True)
class Kernel:
    """One way to compute patterns, and a check that returns why it cannot (empty if it can)."""

    run: Callable[[Tensor, Tensor, Tensor, AttentionCall], Tensor]
    cannot: Callable[[Pattern, Situation], str]


KERNELS: dict[str, Kernel] = {
    "sdpa": Kernel(sdpa, _needs),
    "flash": Kernel(partial(by_segments, library=FlashAttnVarlen()), _cannot_flash),
    "flex": Kernel(flex.attend, _cannot_flex),
    "reference": Kernel(reference.attend, lambda pattern, where: ""),
}
AUTO = {"cuda": ("flash", "sdpa", "flex", "reference"), "cpu": ("sdpa", "reference")}
"""The kernels that "auto" tries, in this order."""
