"""Measure the share of attention on sinks: on a text's first tokens, and on a sink logit in the
softmax if there is one.

In trained models, from the third layer on, most heads put most of their attention on the first
token (StreamingLLM, arXiv:2309.17453, figure 2). A uniform head would give it 1 / (t + 1) at
position t. Mass is exp(score - log-sum-exp), computed for BLOCK queries at a time. The full
attention of a layer is only kept if its map is requested.

A mean hides a few heads that attend only to the sink, so heads are counted, too: Sink^eps_k ("When
Attention Sink Emerges", arXiv:2410.10781, section 3.1) is the share of heads, over layers and
texts, whose mean attention to token k is above eps, in texts of 64 tokens.

Two properties that accompany sinks in trained models are also measured: the sink token's values are
small, so that attention to it does nothing, and its residual stream has a much larger norm than
that of other tokens ("Massive Activations", arXiv:2402.17762).

    mass = attention_mass(model, ids_BT)
    print(sink_mass(mass), sink_heads(mass))         # {"first_token": one per layer, ...}, {"first_token_0.3": ...}

Legend: B batch, T tokens, H query heads, K key/value heads, D head dim, L layers, N first tokens, Q
queries of a block.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longreach.attention.hf import attending_by

BLOCK = 128
SINK_TOKENS = 64
"""T of Sink^eps_k: number of tokens at the start of a text over which a head's attention to token k
is averaged."""
EPSILONS = (0.3, 0.2)
"""Mean attention above which a token counts as a head's sink: the paper's value, and a lower
one."""


@dataclass(frozen=True)
class AttentionMass:
    """Share of attention on sinks by layer and head, and norms of the sink token.

    Unless stated otherwise, these are means over texts, and over the queries in the second half of
    each text.
    """

    first_LHN: Tensor
    """Attention to each of the first N tokens."""
    softmax_LH: Tensor
    """Attention to the sink logit; 0 without one."""
    early_BLHN: Tensor
    """For each text, attention to each of the first N tokens, over those of the first SINK_TOKENS
    queries that see it."""
    early_softmax_BLH: Tensor
    """For each text, attention to the sink logit, over the first SINK_TOKENS queries; 0 without
    one."""
    values_L2: Tensor
    """Norm of a head's value: of the first token, and the mean of all others."""
    residual_L2: Tensor
    """Norm of the residual stream after a layer: of the first token, and the mean of all others."""
    maps: dict[int, Tensor]
    """Attention by layer: [T, T], query x key, means over texts and heads."""

    def heads_L(self, epsilon: float, token: int = 0) -> Tensor:
        """Return, for each layer, the share of heads, over texts, whose mean attention to `token`
        is above epsilon."""
        return (self.early_BLHN[..., token] > epsilon).float().mean((0, 2))

    def softmax_heads_L(self, epsilon: float) -> Tensor:
        """Return the same for the sink logit."""
        return (self.early_softmax_BLH > epsilon).float().mean((0, 2))


class _Layer(NamedTuple):
    """Measurements of one layer's attention, as in AttentionMass without L."""

    first_HN: Tensor
    softmax_H: Tensor
    early_BHN: Tensor
    early_softmax_BH: Tensor
    values_2: Tensor


@torch.no_grad()
def attention_mass(
    model: PreTrainedModel, ids_BT: Tensor, *, first_tokens: int = 1, map_layers: Collection[int] = ()
) -> AttentionMass:
    """Measure the share of attention on sinks by layer and head. ids_BT: texts from their first
    token on, as given to the model."""
    seen: dict[int, _Layer] = {}
    maps: dict[int, Tensor] = {}
    B, T = ids_BT.shape
    late, early = T - T // 2, min(SINK_TOKENS, T, BLOCK)
    seen_by_N = early - torch.arange(first_tokens, device=ids_BT.device).clamp(max=early - 1)

    def attend(
        module: nn.Module, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Any, *, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        repeat, layer = q_BHTD.shape[1] // k_BKTD.shape[1], int(module.layer_idx)  # type: ignore[arg-type]
        k_BHTD, v_BHTD = (x.repeat_interleave(repeat, 1) for x in (k_BKTD, v_BKTD))
        first_HN, softmax_H, blocks = 0.0, 0.0, []
        at_T = torch.arange(T, device=q_BHTD.device)
        outs = []
        for at_Q, q_BHQD in zip(at_T.split(BLOCK), q_BHTD.split(BLOCK, 2), strict=True):
            scores_BHQT = (q_BHQD @ k_BHTD.mT).float() * scaling
            scores_BHQT.masked_fill_(at_T > at_Q[:, None], -torch.inf)
            total_BHQ = scores_BHQT.logsumexp(-1)
            if (sink_H := kwargs.get("s_aux")) is not None:
                total_BHQ = torch.logaddexp(total_BHQ, sink_H.float()[:, None])
            mass_BHQT = (scores_BHQT - total_BHQ[..., None]).exp()
            outs.append(mass_BHQT.to(v_BHTD.dtype) @ v_BHTD)
            late_BHQT = mass_BHQT[:, :, at_Q >= T // 2]
            first_HN += late_BHQT[..., :first_tokens].sum((0, 2)) / late / B
            if sink_H is not None:
                softmax_H += (1 - late_BHQT.sum(-1)).sum((0, 2)) / late / B
            if at_Q[0] == 0:  # the first block is enough, since attention is causal
                early_BHQT = mass_BHQT[:, :, :early]
                early_BHN = early_BHQT[..., :first_tokens].sum(2) / seen_by_N
                early_softmax_BH = 1 - early_BHQT.sum((2, 3)) / early
            if layer in map_layers:
                blocks.append(mass_BHQT.mean((0, 1)))
        if sink_H is None:
            early_softmax_BH = torch.zeros_like(early_softmax_BH)  # otherwise 1 - 1 with rounding
        mean_softmax_H = torch.as_tensor(softmax_H).expand(q_BHTD.shape[1])
        values_2 = _first_and_others(v_BKTD.float().norm(dim=-1))
        seen[layer] = _Layer(torch.as_tensor(first_HN), mean_softmax_H, early_BHN, early_softmax_BH, values_2)
        if blocks:
            maps[layer] = torch.cat(blocks).cpu()
        return torch.cat(outs, 2).transpose(1, 2), None

    with attending_by(model, "sink_mass", attend), _residual_norms(model) as norms:
        model(input_ids=ids_BT, use_cache=False, logits_to_keep=1)
    layers = [seen[n] for n in sorted(seen)]
    return AttentionMass(
        torch.stack([layer.first_HN for layer in layers]).cpu(),
        torch.stack([layer.softmax_H for layer in layers]).cpu(),
        torch.stack([layer.early_BHN for layer in layers], 1).cpu(),
        torch.stack([layer.early_softmax_BH for layer in layers], 1).cpu(),
        torch.stack([layer.values_2 for layer in layers]).cpu(),
        torch.stack(norms).cpu(),
        maps,
    )


def _first_and_others(norms_T: Tensor) -> Tensor:
    """Return [2] from norms [..., T]: the mean over first tokens, and over all others."""
    return torch.stack([norms_T[..., 0].mean(), norms_T[..., 1:].mean()])


@contextmanager
def _residual_norms(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Yield a list to which each forward pass inside the block appends [2] per layer, in order: the
    norms of the residual stream after the layer (see `_first_and_others`)."""
    norms: list[Tensor] = []

    def note(layer: nn.Module, inputs: Any, output: Any) -> None:
        hidden_BTE = output[0] if isinstance(output, tuple) else output
        norms.append(_first_and_others(hidden_BTE.float().norm(dim=-1)))

    count = model.config.num_hidden_layers
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not stacks:
        raise ValueError(f"{type(model).__name__} has no list of its {count} layers: their outputs cannot be measured")
    hooks = [layer.register_forward_hook(note) for layer in stacks[0]]
    try:
        yield norms
    finally:
        for hook in hooks:
            hook.remove()


def sink_mass(mass: AttentionMass) -> dict[str, list[float]]:
    """Return {"first_token": attention to position 0, "softmax_sink": attention to the sink logit
    (0 without one)}: means over heads, one number per layer."""
    return {"first_token": mass.first_LHN[..., 0].mean(-1).tolist(), "softmax_sink": mass.softmax_LH.mean(-1).tolist()}


def sink_heads(mass: AttentionMass) -> dict[str, float]:
    """Return {"first_token_0.3": Sink^0.3_1, "softmax_sink_0.3": the same for the sink logit, ...},
    for each epsilon."""
    shares = {}
    for epsilon in EPSILONS:
        shares[f"first_token_{epsilon}"] = float(mass.heads_L(epsilon).mean())
        shares[f"softmax_sink_{epsilon}"] = float(mass.softmax_heads_L(epsilon).mean())
    return shares
