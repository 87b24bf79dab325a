"""How much attention rests on a sink: on the text's first token, and on a sink logit in the softmax where there is one.

In trained models most of the attention of most heads rests on the first token from the third layer on (StreamingLLM,
arXiv:2309.17453, figure 2). A uniform head would give it 1 / (t + 1) at position t.

    sink_mass(model, ids_BT)["first_token"]          # a number a layer

Legend: B batch, T tokens, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attention.hf import attending_by


@torch.no_grad()
def sink_mass(model: PreTrainedModel, ids_BT: Tensor) -> dict[str, list[float]]:
    """Mean attention over texts, heads and the queries of the second half of each text, a number a layer.

    Returns {"first_token": on position 0, "softmax_sink": on the sink logit (0 without one)}. ids_BT: whole texts from
    their first token on, as the model is fed. Every score exists at once: [B, H, T, T] a layer.
    """
    seen: dict[int, tuple[float, float]] = {}

    def attend(
        module: nn.Module, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Any, *, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        repeat, T = q_BHTD.shape[1] // k_BKTD.shape[1], q_BHTD.shape[2]
        k_BHTD, v_BHTD = (x.repeat_interleave(repeat, 1) for x in (k_BKTD, v_BKTD))
        future_TT = torch.ones(T, T, dtype=torch.bool, device=q_BHTD.device).triu(1)
        scores_BHTT = ((q_BHTD @ k_BHTD.mT).float() * scaling).masked_fill(future_TT, -torch.inf)
        total_BHT = scores_BHTT.logsumexp(-1)
        if (sink_H := kwargs.get("s_aux")) is not None:
            total_BHT = torch.logaddexp(total_BHT, sink_H.float()[:, None])
        mass_BHTT = (scores_BHTT - total_BHT[..., None]).exp()
        late_BHTT = mass_BHTT[:, :, T // 2 :]
        seen[int(module.layer_idx)] = (  # type: ignore[arg-type]
            float(late_BHTT[..., 0].mean()),
            float((1 - late_BHTT.sum(-1)).mean()) if sink_H is not None else 0.0,
        )
        return (mass_BHTT.to(v_BHTD.dtype) @ v_BHTD).transpose(1, 2), None

    with attending_by(model, "sink_mass", attend):
        model(input_ids=ids_BT, use_cache=False, logits_to_keep=1)
    layers = [seen[n] for n in sorted(seen)]
    return {"first_token": [first for first, _ in layers], "softmax_sink": [sink for _, sink in layers]}
