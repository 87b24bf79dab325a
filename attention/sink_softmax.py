"""Attention sinks in the softmax: an extra column without a value, so that a head may attend to
nothing.

    p_i = exp(s_i) / (exp(sink) + Σ_j exp(s_j))

`sink` = 0 is the zero sink, or softmax-off-by-one (Miller 2023, "Attention is off by one";
StreamingLLM, arXiv:2309.17453, section 3.3). It is equivalent to one more token whose key and value
are zero. gpt-oss has a learned `sink` per head (arXiv:2508.10925). Any kernel that returns its
log-sum-exp allows an exact result, without a mask or an additional key:

    out_with_sink = out · exp(lse) / (exp(sink) + exp(lse)) = out · sigmoid(lse - sink)

    attend(q_BHTD, k_BKTD, v_BKTD, pattern, sink_logit_H=torch.zeros(H))

Legend: B batch, T tokens, H query heads, D head dim.
"""

import torch
from torch import Tensor


def with_sink(out_BHTD: Tensor, lse_BHT: Tensor, sink_logit_H: Tensor) -> Tensor:
    """Return attention with a sink column, computed from attention without one; differentiable."""
    share_BHT = torch.sigmoid(lse_BHT - sink_logit_H.to(lse_BHT.dtype)[:, None])
    return out_BHTD * share_BHT[..., None].to(out_BHTD.dtype)


def merge_(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merge, in place, attention over two disjoint sets of keys from attention over each ([..., D]
    and [...])."""
    total = torch.logaddexp(lse, other_lse)
    out.mul_((lse - total).exp_()[..., None]).add_(other * (other_lse - total).exp_()[..., None].to(other.dtype))
    lse.copy_(total)


def add_sink_(out_BHTD: Tensor, lse_BHT: Tensor, sink_logit_H: Tensor) -> None:
    """Add the sink column in place. `lse` then includes it, so that exp(score - lse) are the new
    probabilities."""
    total_BHT = torch.logaddexp(lse_BHT, sink_logit_H.to(lse_BHT.dtype)[:, None])
    out_BHTD.mul_((lse_BHT - total_BHT).exp_()[..., None])
    lse_BHT.copy_(total_BHT)


def sink_gradient(dout_BHTD: Tensor, out_BHTD: Tensor, lse_BHT: Tensor, sink_logit_H: Tensor) -> Tensor:
    """Return the gradient of the sink logits [H]. The column's value is zero, so that dp = 0 and
    d sink = -p_sink · Σ dout · out."""
    sink_BHT = (sink_logit_H.to(lse_BHT.dtype)[:, None] - lse_BHT).exp()
    return -(sink_BHT * (dout_BHTD * out_BHTD).sum(-1, dtype=lse_BHT.dtype)).sum((0, 2)).to(sink_logit_H.dtype)
