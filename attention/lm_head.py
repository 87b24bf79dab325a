"""From the hidden states of a model's body to logits and losses, in chunks.

Logits of all tokens at once dominate memory: 8,192 tokens x 49,152 words in float32 are 1.6 GiB. So
the body runs once, and the head runs over one chunk of tokens at a time. Families change their
logits after the head, by a factor or a soft cap, which has to be repeated here.

    check_logits(model, torch.arange(8)[None])        # this model's head can be used like this
    hidden_BTE = model.base_model(ids_BT, use_cache=False).last_hidden_state
    nll_N = nll_of(model, hidden_BTE[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())

Legend: B rows, T tokens, N = B*T, C tokens of one chunk, E hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, PreTrainedModel

CHUNK, CPU_CHUNK = 512, 128
"""Tokens whose logits exist at the same time. On a CPU, fewer stay in its caches (RESULTS.md); a GPU
needs more to be busy."""


def nll_of(model: PreTrainedModel, hidden_NE: Tensor, target_N: Tensor) -> Tensor:
    """Return the negative log-likelihood of tokens in nats, float64 [N], from the body's output for
    the tokens before them."""
    chunk = CPU_CHUNK if hidden_NE.device.type == "cpu" else CHUNK
    parts = []
    for hidden_CE, target_C in zip(hidden_NE.split(chunk), target_N.split(chunk), strict=True):
        parts.append(cross_entropy(_logits(model, hidden_CE), target_C, reduction="none").double())
    return torch.cat(parts)


def _logits(model: PreTrainedModel, hidden_CE: Tensor) -> Tensor:
    """Return the float32 logits that the model makes of its body's output."""
    head: Any = model.get_output_embeddings()
    factor, cap = logit_changes(model.config)
    logits_CV: Tensor = head(hidden_CE).float()
    if factor != 1:  # a pass over all logits
        logits_CV = logits_CV * factor
    return logits_CV if cap is None else cap * torch.tanh(logits_CV / cap)


def logit_changes(config: PretrainedConfig) -> tuple[float, float | None]:
    """Return what a family does to its logits after the head: a factor, and a soft cap or None."""
    text = config.get_text_config(decoder=True)
    factor = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere's; Falcon-H1's
        factor *= getattr(text, name, None) or 1.0
    scaling = getattr(text, "logits_scaling", None) or 1.0
    if text.model_type != "hyperclovax":  # HyperCLOVA X multiplies by it, Granite divides
        scaling = 1 / scaling
    return factor * scaling, getattr(text, "final_logit_softcapping", None)


@torch.no_grad()
def check_logits(model: PreTrainedModel, ids_1T: Tensor) -> None:
    """Check that logits do not depend on later tokens, and that they are the output embedding of
    the body's output, changed as `logit_changes` says. Raises ValueError otherwise.

    This is tried on a few tokens. It matters because losses are computed without the model's head.
    """
    if model.base_model is model:
        raise ValueError(
            f"{type(model).__name__} has no part without a head that transformers finds (base_model), so its loss "
            f"cannot be computed in chunks; use a base of another family"
        )
    ids_1T = ids_1T.to(model.device)

    def passed(call: Callable[..., Any], ids_1T: Tensor) -> Any:
        torch.manual_seed(0)  # all passes have the same dropout, if any
        return call(input_ids=ids_1T, use_cache=False)

    with torch.random.fork_rng([ids_1T.device] if ids_1T.is_cuda else []):  # keeps training's random state
        whole_1TV = passed(model, ids_1T).logits.float()
        hidden_1TE = passed(model.base_model, ids_1T).last_hidden_state
        other_1T = ids_1T.clone()
        other_1T[:, -1] = (ids_1T[:, -1] + 1) % model.config.get_text_config(decoder=True).vocab_size
        other_1TV = passed(model, other_1T).logits.float()
    head: Any = model.get_output_embeddings()
    if head is None or head.weight.shape[1] != hidden_1TE.shape[2]:
        raise ValueError(
            f"{type(model).__name__} changes its hidden states between its body and its output embedding, so its loss "
            f"cannot be computed in chunks; use a base of another family"
        )
    ours_1TV = _logits(model, hidden_1TE)
    # relative to the largest logit, since small logits differ little in any case; bfloat16 rounds to 0.004
    largest = whole_1TV.abs().max()
    leaked = float((whole_1TV - other_1TV)[:, :-1].abs().max() / largest)
    if leaked > 0.01:
        raise ValueError(
            f"{type(model).__name__} is no causal language model: other tokens at the end change earlier logits "
            f"(by {leaked:.3g} of the largest logit); use a decoder"
        )
    off = float((whole_1TV - ours_1TV).abs().max() / largest)
    if off > 0.01:
        raise ValueError(
            f"{type(model).__name__} changes its logits after the output embedding in an unknown way (by {off:.3g} of "
            f"the largest), so its loss cannot be computed; use a base of another family"
        )
