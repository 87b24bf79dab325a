"""How much attention rests on a sink: on a text's first tokens, and on a sink logit in the softmax where there is one.

In trained models most of the attention of most heads rests on the first token from the third layer on (StreamingLLM,
arXiv:2309.17453, figure 2). A uniform head would give it 1 / (t + 1) at position t. Mass is exp(score - log-sum-exp),
for BLOCK queries at a time: no layer's attention exists whole, unless its map is asked for.

    sink_mass(model, ids_BT)["first_token"]          # a number a layer

Legend: B batch, T tokens, H query heads, K key/value heads, D head dim, L layers, N first tokens, Q queries of a block.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longreach.attention.hf import attending_by

BLOCK = 128


@dataclass(frozen=True)
class AttentionMass:
    """Means over texts and over the queries of the second half of each text."""

    first_LHN: Tensor
    """On each of the first N tokens."""
    softmax_LH: Tensor
    """On the sink logit; 0 without one."""
    maps: dict[int, Tensor]
    """By layer: [T, T], query x key, means over texts and heads."""


@torch.no_grad()
def attention_mass(
    model: PreTrainedModel, ids_BT: Tensor, *, first_tokens: int = 1, map_layers: Collection[int] = ()
) -> AttentionMass:
    """Where attention rests, by layer and head. ids_BT: whole texts from their first token on, as the model is fed."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    maps: dict[int, Tensor] = {}

    def attend(
        module: nn.Module, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Any, *, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        repeat, T, layer = q_BHTD.shape[1] // k_BKTD.shape[1], q_BHTD.shape[2], int(module.layer_idx)  # type: ignore[arg-type]
        k_BHTD, v_BHTD = (x.repeat_interleave(repeat, 1) for x in (k_BKTD, v_BKTD))
        first_HN, softmax_H, blocks = 0.0, 0.0, []
        at_T = torch.arange(T, device=q_BHTD.device)
        outs, late = [], T - T // 2
        for at_Q, q_BHQD in zip(at_T.split(BLOCK), q_BHTD.split(BLOCK, 2), strict=True):
            scores_BHQT = (q_BHQD @ k_BHTD.mT).float() * scaling
            scores_BHQT.masked_fill_(at_T > at_Q[:, None], -torch.inf)
            total_BHQ = scores_BHQT.logsumexp(-1)
            if (sink_H := kwargs.get("s_aux")) is not None:
                total_BHQ = torch.logaddexp(total_BHQ, sink_H.float()[:, None])
            mass_BHQT = (scores_BHQT - total_BHQ[..., None]).exp()
            outs.append(mass_BHQT.to(v_BHTD.dtype) @ v_BHTD)
            late_BHQT = mass_BHQT[:, :, at_Q >= T // 2]
            first_HN += late_BHQT[..., :first_tokens].sum((0, 2)) / late / len(ids_BT)
            if sink_H is not None:
                softmax_H += (1 - late_BHQT.sum(-1)).sum((0, 2)) / late / len(ids_BT)
            if layer in map_layers:
                blocks.append(mass_BHQT.mean((0, 1)))
        seen[layer] = torch.as_tensor(first_HN), torch.as_tensor(softmax_H).expand(q_BHTD.shape[1])
        if blocks:
            maps[layer] = torch.cat(blocks).cpu()
        return torch.cat(outs, 2).transpose(1, 2), None

    with attending_by(model, "sink_mass", attend):
        model(input_ids=ids_BT, use_cache=False, logits_to_keep=1)
    first, softmax = zip(*(seen[n] for n in sorted(seen)), strict=True)
    return AttentionMass(torch.stack(first).cpu(), torch.stack(softmax).cpu(), maps)


def sink_mass(model: PreTrainedModel, ids_BT: Tensor) -> dict[str, list[float]]:
    """{"first_token": on position 0, "softmax_sink": on the sink logit (0 without one)}: means over heads, a number a
    layer."""
    mass = attention_mass(model, ids_BT)
    return {"first_token": mass.first_LHN[..., 0].mean(-1).tolist(), "softmax_sink": mass.softmax_LH.mean(-1).tolist()}
