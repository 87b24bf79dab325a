"""Build the model that an arm starts from: base or new weights, stretched, fitted to the rows, with
LoRA.

All arms of a comparison start from the same weights; an arm's own changes are applied last. The
training loop sets the attention pattern, since it may change during training.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from longreach.attention.hf import check_documents, own_attention
from longreach.attention.rope import fix_frequencies
from longreach.training.longlora import apply_arm
from longreach.training.model import fit_embeddings, fresh_llama, load_model, with_softmax_sinks
from longreach.training.recipe import TrainJob
from longreach.training.summary import PackSummary


def build(job: TrainJob, packed: PackSummary) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return the arm's model, and the tokenizer to save with it.

    ValueError if the rows have another tokenizer or are longer than the stretched context, or for
    an adapter with resized embeddings.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        Path(job.corpus) / "tokenizer", local_files_only=True
    )
    if job.kind == "pretrain":
        model, tokenizer = _to_pretrain(job, packed, tokenizer)
    else:
        model = _to_finetune(job, packed, tokenizer)
    # infinite for models without a limit, such as ALiBi and state spaces
    reach = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf
    if job.rope.type == "dynamic":  # stretches past the trained length only when rows reach it, and the config keeps it
        reach *= job.rope.factor
    longest = job.arm.longest_row(packed.seq_len, job.optim)
    if longest > reach:
        raise ValueError(
            f"rows of {longest} tokens exceed the model's {reach:,.0f} positions: "
            f"raise rope.factor, or lower pack.seq_len"
        )
    skipping = job.arm.positions
    if skipping is not None and skipping.context_length > reach:
        raise ValueError(
            f"arm.positions.context_length {skipping.context_length} exceeds the model's {reach:,.0f} positions: "
            f"raise rope.factor, or lower context_length"
        )
    if skipping is not None:
        check_documents(model)
    fix_frequencies(model, longest if skipping is None else skipping.context_length)
    model.config.use_cache = True  # for users of the saved model; training passes use_cache=False
    if job.resources.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted = apply_arm(model, job.arm)
    if job.train == "sink":
        train_sink_alone(model, packed.first_token_id if job.sink == "token" else None)
    if job.sink == "zero":
        for name, parameter in adapted.named_parameters():
            if name.endswith(".sinks"):
                parameter.requires_grad_(False)  # a zero sink stays zero
    return adapted, tokenizer


def _to_pretrain(
    job: TrainJob, packed: PackSummary, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a new model, or the base, with the arm's sink, and its tokenizer, which adds a sink
    token only for sink 'token'.

    Every sink arm gets the sink token's embedding row, so that all start from the same weights.
    """
    model: PreTrainedModel
    base_tokenizer: PreTrainedTokenizerBase
    if job.model is not None:
        base_tokenizer = AutoTokenizer.from_pretrained(job.base, local_files_only=True)
        model = fresh_llama(job.model, packed.vocab_size, job.seed)
        for config in (model.config, model.generation_config):
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(config, key, getattr(tokenizer, key))
    else:
        model, base_tokenizer = load_model(job.base)
        known = base_tokenizer.get_vocab()
        check_tokenizer(known, tokenizer.get_vocab())
        fit_embeddings(model, tokenizer, known)
    if job.sink in ("zero", "logit"):
        model = with_softmax_sinks(model)
    return model, tokenizer if job.sink == "token" else base_tokenizer


def _to_finetune(job: TrainJob, packed: PackSummary, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the stretched base, with an embedding for a first token that the base lacks."""
    model, base_tokenizer = load_model(job.base, rope=job.rope)
    if refusal := own_attention(model):
        raise ValueError(
            f"{type(model).__name__} cannot be trained: {refusal}, which attention on packed rows does not support; "
            f"use a base without it"
        )
    known, vocab = base_tokenizer.get_vocab(), tokenizer.get_vocab()
    check_tokenizer(known, vocab)
    added = fit_embeddings(model, tokenizer, known)
    new = vocab.keys() - known.keys()
    if job.arm.tune != "all" and (added or ("embed" not in job.arm.tune and new)):
        reason = "a resized embedding" if added else "an embedding that it does not train"
        raise ValueError(
            f"the rows begin with a token that the base lacks ({packed.first_token!r}): an adapter cannot store "
            f"{reason}, so use tune 'all', or set pack.first_token to 'none' or 'bos'"
        )
    return model


def train_sink_alone(model: PreTrainedModel, token_id: int | None) -> None:
    """Make only the sink trainable: the embedding of a token, or without `token_id` the sink logits
    of the softmax.

    Embeddings of other tokens are rows of the same tensor. With zero gradients and no weight decay,
    AdamW does not change them.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(token_id is None and name.endswith(".sinks"))
    if token_id is None:
        return
    (weight,) = model.get_input_embeddings().parameters()
    weight.requires_grad_(True)

    def keep_own_row(grad_VE: Tensor) -> Tensor:
        own_VE = torch.zeros_like(grad_VE)
        own_VE[token_id] = grad_VE[token_id]
        return own_VE

    weight.register_hook(keep_own_row)


def check_tokenizer(base: dict[str, int], corpus: dict[str, int]) -> None:
    """Raise ValueError unless the rows' vocabulary is the base's, possibly with new tokens at the
    end."""
    wrong = [token for token, number in base.items() if corpus.get(token) != number]
    if wrong or len(corpus) < len(base):
        raise ValueError(
            f"the corpus was packed with another tokenizer: {len(wrong)} of the base's {len(base)} tokens have another "
            f"id or none in it (for example {wrong[:3]}): pack the corpus with this base"
        )
