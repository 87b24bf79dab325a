"""Helpers for the attention tests: every registered pattern, rows with documents, the float64 oracle."""

from itertools import product

import torch

from longreach.attention import PATTERNS, reference
from longreach.attention.call import AttentionCall

SIZES_TOKENS = (2, 8)
SINKS_TOKENS = (0, 3)


def instances(name):
    """Return small instances of a pattern: all combinations of sink_tokens 0 and 3 and other sizes 2 and 8."""
    names = [field for field in PATTERNS[name].model_fields if field != "pattern"]
    choices = [SINKS_TOKENS if field == "sink_tokens" else SIZES_TOKENS for field in names]
    return [PATTERNS[name](**dict(zip(names, values, strict=True))) for values in product(*choices)]


EVERY_PATTERN = [pattern for name in PATTERNS for pattern in instances(name)]
CPU_KERNELS = ["sdpa", "reference"]  # kernels with gradients on CPU; flex has none there


def positions(*rows):
    """Return position_ids [B, T] of rows given as document lengths: positions((3, 4), (7,))."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


ROWS = {  # document lengths by row; None: no position_ids at all
    "one token": (1, None),
    "one group": (8, None),
    "shorter than half a group": (3, None),
    "a whole number of groups": (32, None),
    "odd": (29, None),
    "not divided by the group": (36, None),
    "batch": (24, [(24,), (24,), (24,)]),
    "ragged documents": (41, [(1, 2, 7, 12, 19), (30, 11)]),
    "documents on group edges": (32, [(8, 16, 8), (4, 28)]),
    "padding left and right": (21, [(5, 16), (16, 5)]),
}
HEADS = [(1, 1), (3, 1), (3, 3), (8, 1), (8, 8), (9, 3), (32, 8), (8, 2)]


def qkv(H, K, T, B=1, D=8, seed=0, dtype=torch.float64):
    """Return q, k, v as a model's projections produce them: [B, H, T, D] views of [B, T, H, D]."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, n, D, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2) for n in (H, K, K)]


def outputs_and_gradients(attend, q, k, v, *args, **kwargs):
    """Return the output and the gradients of q, k, v (and a sink logit), for a fixed random output gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    logit = kwargs.get("sink_logit_H")
    if logit is not None:
        kwargs["sink_logit_H"] = logit = logit.detach().clone().requires_grad_()
        leaves.append(logit)
    out = attend(*leaves[:3], *args, **kwargs)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction.to(out.dtype))]


def dense(q, k, v, pattern, *args, **kwargs):
    """Call the dense reference with the arguments of `attention.attend`."""
    return reference.attend(q, k, v, AttentionCall(pattern, *args, **kwargs))


def oracle(q, k, v, *args, **kwargs):
    """Return outputs_and_gradients of the dense reference in float64."""
    kwargs["sink_logit_H"] = None if kwargs.get("sink_logit_H") is None else kwargs["sink_logit_H"].double()
    kwargs.pop("kernel", None)
    return outputs_and_gradients(dense, q.double(), k.double(), v.double(), *args, **kwargs)
