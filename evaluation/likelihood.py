"""Negative log-likelihood of every token of a text in one causal pass; the logits never exist
whole.

A causal model's prediction at position t sees positions 0..t whatever follows, so one pass over T
tokens scores each of them in its full context. The head is what hurts: T x vocabulary logits in
float32 are 1.6 GiB at 8,192 x 49,152. So the body runs once and the head runs over CHUNK positions
at a time (96 MiB). Measured on SmolLM2, 8,192 tokens, CPU: one pass is faster than prefilling a KV
cache chunk by chunk, where attention needs an explicit mask (RESULTS.md).

Legend: T tokens, C tokens of one chunk, V vocabulary, E width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from longreach.attention.hf import attending_by, check_logits, logit_changes, own_attention

CHUNK = 512


@torch.inference_mode()
def token_nll(model: PreTrainedModel, ids_T: np.ndarray, name: str, last: int | None = None) -> np.ndarray:
    """NLL in nats of tokens 1..T-1, each given all before it.

    Args:
        ids_T: token ids [T], T >= 2, with whatever the model expects first already in place.
        name: the document's, for errors.
        last: score only so many tokens, from the end; None: all.

    Returns:
        float64 [T-1], entry t for token t + 1; with `last`, the last so many of these.

    Raises:
        ValueError: an id outside of the model's vocabulary.
        FloatingPointError: logits that are not finite, with the document and the first such token.
    """
    x_T = torch.from_numpy(np.ascontiguousarray(ids_T, dtype=np.int64)).to(model.device)
    check_ids(model, x_T, name)
    forget_length(model)
    hidden_TE = model.base_model(input_ids=x_T[None], use_cache=False).last_hidden_state[0]
    first = 0 if last is None else len(x_T) - 1 - last
    return hidden_nll(model, hidden_TE[first:-1], x_T[first + 1 :], name, first).cpu().numpy()


def hidden_nll(
    model: PreTrainedModel, hidden_TE: torch.Tensor, target_T: torch.Tensor, name: str, before: int = 0
) -> torch.Tensor:
    """NLL float64 [T] of target_T under the head's predictions from the body's output; errors as
    `token_nll`.

    before: how many of the text's predictions are left out before these, for errors.
    """
    head, (factor, cap) = model.get_output_embeddings(), logit_changes(model.config)

    def logits_of(hidden_CE: torch.Tensor) -> torch.Tensor:
        logits_CV = head(hidden_CE).float() * factor
        return logits_CV if cap is None else cap * torch.tanh(logits_CV / cap)

    nll_T = torch.cat(
        [
            cross_entropy(logits_of(hidden_CE), target_C, reduction="none").double()
            for hidden_CE, target_C in zip(hidden_TE.split(CHUNK), target_T.split(CHUNK), strict=True)
        ]
    )
    if not torch.isfinite(nll_T).all():
        token = before + int((~torch.isfinite(nll_T)).nonzero()[0, 0]) + 1
        raise FloatingPointError(f"{name}: the logits that predict token {token} are not finite; check the weights")
    return nll_T


def check_head(model: PreTrainedModel) -> None:
    """ValueError unless the model's logits can be computed in chunks, tried on eight tokens, which
    are no text's: a document may have one token or none."""
    check_logits(model, torch.arange(8)[None])


def position_table(model: PreTrainedModel) -> int | None:
    """Return how many positions the model has in a table, learned (GPT-2, OPT) or computed (GPT-J); None
    for those that go on, as the usual rotary ones and ALiBi do."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    if not limit or getattr(config, "rope_parameters", None):
        return None
    for module in model.modules():
        rows = None
        computed = getattr(module, "embed_positions", getattr(module, "pos_encoding", None))  # GPT-J's; CTRL's
        if isinstance(computed, torch.Tensor):
            rows = len(computed)
        elif isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings():
            rows = module.num_embeddings - getattr(module, "offset", 0)  # OPT's first two are of no position
        if rows == limit:
            return rows
    return None


def check_reach(model: PreTrainedModel, tokens: int, where: str) -> None:
    """ValueError where so many tokens, read at once, go beyond the model's table of positions."""
    positions = position_table(model)
    if positions is not None and tokens > positions:
        raise ValueError(
            f"{where} reads {tokens} tokens at once, answers and first token included; {type(model).__name__} has a "
            f"table of {positions} positions, which cannot be stretched: ask for shorter texts, or name the models "
            f"that reach them in `models`"
        )


def check_ids(model: PreTrainedModel, ids_T: torch.Tensor, name: str) -> None:
    """ValueError where a token id has no embedding."""
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if int(ids_T.max()) >= rows:
        raise ValueError(
            f"{name}: token id {int(ids_T.max())}, but the model has {rows} embeddings: "
            f"the text was tokenised for another model"
        )


def check_attention(model: PreTrainedModel) -> None:
    """ValueError where a layer's attention is more than causal softmax attention, which could not
    be replaced."""
    if own := own_attention(model):
        raise ValueError(f"{type(model).__name__}: {own}: what another attention would give is not what the model does")
    with attending_by(model, "tried", lambda *args, **kwargs: None):
        pass


@torch.inference_mode()
def forget_length(model: PreTrainedModel) -> None:
    """Lets frequencies that depend on the input's length depend on no earlier input: transformers
    keeps those of the longest one until a short one comes. Nothing for other models."""
    if is_dynamic(model):
        model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)


def is_dynamic(model: PreTrainedModel) -> bool:
    """Whether the model's rotary frequencies depend on how long the input is, so that no pass can
    serve two lengths."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    return rope.get("rope_type") in ("dynamic", "longrope")
