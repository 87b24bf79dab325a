"""Negative log-likelihood (NLL) of every token of a text in one causal pass, without materializing
all logits at once (attention/lm_head.py).

A causal model's prediction at position t sees only positions 0..t, so one pass over T tokens scores
each of them with all text before it. Measured on SmolLM2 with 8,192 tokens on a CPU, this is faster
than prefilling a KV cache chunk by chunk, where attention needs an explicit mask (RESULTS.md).

Legend: T tokens, E width.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from longreach.attention.hf import attending_by, own_attention
from longreach.attention.lm_head import check_logits, nll_of


@torch.inference_mode()
def token_nll(model: PreTrainedModel, ids_T: np.ndarray, name: str, last: int | None = None) -> np.ndarray:
    """Return the NLL in nats of tokens 1..T-1, each given all tokens before it.

    Args:
        ids_T: token ids [T], T >= 2, including the first token that the model expects, if any.
        name: name of the document, for error messages.
        last: number of tokens at the end to score; None: all.

    Returns:
        float64 [T-1], entry t for token t + 1; with `last`, only the last `last` entries.

    Raises:
        ValueError: an id is outside the model's vocabulary.
        FloatingPointError: logits are not finite; the message names the document and the first such
            token.
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
    """Return the NLL, float64 [T], of target_T predicted by the head from the body's output. Errors
    are those of `token_nll`.

    before: number of the text's predictions that are left out before these, for error messages.
    """
    nll_T = nll_of(model, hidden_TE, target_T)
    if not torch.isfinite(nll_T).all():
        token = before + int((~torch.isfinite(nll_T)).nonzero()[0, 0]) + 1
        raise FloatingPointError(f"{name}: the logits that predict token {token} are not finite; check the weights")
    return nll_T


def check_head(model: PreTrainedModel) -> None:
    """Raise ValueError if the model's logits cannot be computed in chunks.

    This is tried on eight arbitrary tokens, because a document may have only one token or none.
    """
    check_logits(model, torch.arange(8)[None])


def position_table(model: PreTrainedModel) -> int | None:
    """Return the number of positions in the model's table, learned (GPT-2, OPT) or computed (GPT-J).
    None if positions are unlimited, as with the usual rotary embeddings and ALiBi."""
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
            rows = module.num_embeddings - getattr(module, "offset", 0)  # OPT's first two rows are not positions
        if rows == limit:
            return rows
    return None


def check_reach(model: PreTrainedModel, tokens: int, where: str) -> None:
    """Raise ValueError if this many tokens, read at once, exceed the model's table of positions."""
    positions = position_table(model)
    if positions is not None and tokens > positions:
        raise ValueError(
            f"{where} reads {tokens} tokens at once, including answers and first token, but {type(model).__name__} "
            f"has a table of {positions} positions, which cannot be stretched: use shorter texts, or list only models "
            f"that reach them in `models`"
        )


def check_ids(model: PreTrainedModel, ids_T: torch.Tensor, name: str) -> None:
    """Raise ValueError if a token id has no embedding."""
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if int(ids_T.max()) >= rows:
        raise ValueError(
            f"{name} has token id {int(ids_T.max())}, but the model has only {rows} embeddings: "
            f"the text was tokenized for another model"
        )


def check_attention(model: PreTrainedModel) -> None:
    """Raise ValueError if a layer's attention is more than causal softmax attention, and so cannot be
    replaced."""
    if own := own_attention(model):
        raise ValueError(f"{type(model).__name__}: {own}: its attention cannot be replaced without changing the model")
    with attending_by(model, "tried", lambda *args, **kwargs: None):
        pass


@torch.inference_mode()
def forget_length(model: PreTrainedModel) -> None:
    """Reset rotary frequencies that depend on the input's length, so that earlier inputs have no effect.

    transformers keeps the frequencies of the longest input until it gets a short one. This does
    nothing for other models.
    """
    if is_dynamic(model):
        model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)


def is_dynamic(model: PreTrainedModel) -> bool:
    """Return whether the model's rotary frequencies depend on the input's length, so that one pass
    cannot serve two lengths."""
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return rope.get("rope_type") in ("dynamic", "longrope")
