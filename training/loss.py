"""Cross entropy over a large vocabulary without materializing all logits.

For 8,192 tokens and 49,152 words the logits alone take 1.6 GB in float32, and their gradient as
much again. But the gradient of a token's loss is known as soon as its logits are: softmax(logits) -
onehot. So the forward pass immediately turns each chunk of logits into d(loss)/d(hidden) and
d(loss)/d(weight), and the backward pass only returns them. This is the idea of Liger's fused linear
cross entropy (arXiv:2410.10989).

torch has the same as `torch.nn.functional.linear_cross_entropy` since 2.13. We keep ours for two
reasons. torch's returns the loss of bfloat16 weights in bfloat16, which is off by 0.3 to 0.5%
(measured), too coarse for curves, spikes and the best checkpoint. And it would raise our minimum
version above torch 2.8. It is not faster. Median CPU seconds of forward and backward, and memory,
in float32 with hidden size 576 and chunks of 512:

    tokens x words           ours            torch's
    8,192 x 4,096            0.909, 61 MiB   0.938, 72 MiB
    the same, frozen head    0.613, 61 MiB   0.574, 49 MiB
    2,048 x 49,152           4.00            4.01

The loss is a sum over tokens times `scale`. With scale = world size / targets of the global batch,
the gradient after DeepSpeed's average over the ranks is that of the mean over all targets.

Legend: B batch, T tokens, N = B*T, C tokens of one chunk, E hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longreach.attention.hf import with_documents
from longreach.attention.lm_head import check_logits, logit_changes
from longreach.training.corpus import IGNORED


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NE: Tensor,
        weight_VE: Tensor,
        target_N: Tensor,
        weight_N: Tensor | None,
        scale: float,
        chunk: int,
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden_NE = torch.empty_like(hidden_NE) if wants_hidden else None
        # float32 even for bfloat16 weights: a sum over thousands of tokens
        wide = torch.promote_types(weight_VE.dtype, torch.float32)
        d_weight_VE = torch.zeros_like(weight_VE, dtype=wide) if wants_weight else None
        total = torch.zeros((), dtype=torch.float64, device=hidden_NE.device)
        for at in range(0, hidden_NE.shape[0], chunk):
            hidden_CE, target_C = hidden_NE[at : at + chunk], target_N[at : at + chunk]
            weight_C1 = (target_C != IGNORED).to(wide)[:, None] * scale
            if weight_N is not None:
                weight_C1 *= weight_N[at : at + chunk].to(wide)[:, None]
            index_C1 = target_C.clamp(min=0)[:, None]
            logits_CV = (hidden_CE @ weight_VE.t()).to(wide)
            # softmax in place and with one exp: torch.logsumexp would need a second [C, V] buffer
            # and another exp
            logits_CV.sub_(logits_CV.amax(-1, keepdim=True))
            wanted_C1 = logits_CV.gather(1, index_C1)
            sum_C1 = logits_CV.exp_().sum(-1, keepdim=True)
            total += ((sum_C1.log() - wanted_C1) * weight_C1).sum(dtype=torch.float64)
            if d_hidden_NE is None and d_weight_VE is None:
                continue
            d_logits_CV = logits_CV.mul_(weight_C1 / sum_C1).scatter_add_(1, index_C1, -weight_C1)
            d_logits_CV = d_logits_CV.to(weight_VE.dtype)
            if d_hidden_NE is not None:
                torch.mm(d_logits_CV, weight_VE, out=d_hidden_NE[at : at + chunk])
            if d_weight_VE is not None and d_weight_VE.dtype == hidden_CE.dtype:
                d_weight_VE.addmm_(d_logits_CV.t(), hidden_CE)
            elif d_weight_VE is not None:
                d_weight_VE += d_logits_CV.t() @ hidden_CE
        ctx.save_for_backward(d_hidden_NE, None if d_weight_VE is None else d_weight_VE.to(weight_VE.dtype))
        return total.to(wide)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # In place: a second backward through one loss would need the buffers that this one gives
        # away, and torch's version counter refuses it.
        return *(None if d is None else d.mul_(grad) for d in ctx.saved_tensors), None, None, None, None


def fused_linear_cross_entropy(
    hidden_BTE: Tensor,
    weight_VE: Tensor,
    labels_BT: Tensor,
    *,
    scale: float = 1.0,
    chunk_tokens: int = 512,
    weights_BT: Tensor | None = None,
) -> Tensor:
    """Return scale * sum over targets of -log softmax(hidden @ weight.T)[label], at least float32.

    weights_BT: a factor for each label's term in the sum; None: all are 1.

    labels_BT are int64 and *not* shifted: position t is scored against label t+1, and -100 is no
    target. They are [B, T+1] if the row continues on another rank. Frozen weights cost nothing.
    Memory: chunk_tokens x V.
    """
    target_BT = torch.full(hidden_BTE.shape[:2], IGNORED, device=labels_BT.device)
    ahead = labels_BT.shape[1] - 1
    target_BT[:, :ahead] = labels_BT[:, 1:]  # shifting the labels avoids a copy of the hidden states
    weight_N = None
    if weights_BT is not None:
        weight_BT = torch.zeros(target_BT.shape, device=labels_BT.device)
        weight_BT[:, :ahead] = weights_BT[:, 1:]
        weight_N = weight_BT.reshape(-1)
    hidden_NE = hidden_BTE.reshape(-1, hidden_BTE.shape[-1])
    return _FusedLinearCrossEntropy.apply(hidden_NE, weight_VE, target_BT.reshape(-1), weight_N, scale, chunk_tokens)


def count_targets(labels_BT: Tensor) -> int:
    """Return the number of targets in unshifted labels."""
    return int((labels_BT[:, 1:] != IGNORED).sum())


def weight_of_targets(batch: dict[str, Tensor]) -> float:
    """Return the sum of a batch's loss weights over its targets. Without weights this is the number
    of targets."""
    labels_BT, weights_BT = batch["labels"], batch.get("weights")
    if weights_BT is None:
        return count_targets(labels_BT)
    return float(weights_BT[:, 1:][labels_BT[:, 1:] != IGNORED].double().sum())


class TokenLoss(nn.Module):
    """A causal LM (plain or peft) with its loss, as one module so that DeepSpeed's hooks see all.

    The model's own lm_head is never called; its weight goes into the fused loss.
    """

    def __init__(self, model: nn.Module, chunk_tokens: int = 512) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens
        lm: Any = causal_lm(model)
        self.logit_factor, cap = logit_changes(lm.config)
        if cap is not None or getattr(lm.get_output_embeddings(), "bias", None) is not None:
            raise ValueError(
                f"{type(lm).__name__} cannot be trained: its logits have {'a bias' if cap is None else 'a soft cap'}, "
                f"which the fused loss over hidden @ weight.T does not support; use a model without one"
            )
        check_logits(lm, torch.arange(8)[None])

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        scale: float,
        weights: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Return scale * summed token loss of [B, T] rows; labels and their weights are unshifted.

        documents: positions that restart at each document, for position_ids that skip
        (attention/hf.py).
        """
        lm: Any = causal_lm(self.model)
        if documents is not None:
            position_ids = with_documents(position_ids, documents)
        outputs = lm.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        hidden_BTE = outputs.last_hidden_state
        if self.logit_factor != 1:
            hidden_BTE = hidden_BTE * self.logit_factor
        weight_VE = lm.get_output_embeddings().weight
        return fused_linear_cross_entropy(
            hidden_BTE, weight_VE, labels, scale=scale, chunk_tokens=self.chunk_tokens, weights_BT=weights
        )


def causal_lm(model: Any) -> PreTrainedModel:
    """Return the transformers model, with peft's wrapper removed if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
