"""Load a model from a converted folder, with RoPE stretched, or create a Llama from scratch.

`rope_parameters` must be in the config before the model is built. The RoPE module computes its
frequencies once, at construction, so a config that is changed afterwards would not match the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteSWAConfig,
    GraniteSWAForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from longreach.attention.rope import check_stretched, stretched_config
from longreach.training.convert import convert, is_adapter
from longreach.training.recipe import LlamaRecipe, RopeRecipe
from longreach.training.weights import check_weights


def load_model(
    folder: Path | str, *, rope: RopeRecipe | None = None, dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal LM, stretched by `rope`, and its tokenizer from a folder, without downloads.

    ValueError if the tokenizer has more tokens than the embedding, or the model has an encoder.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.is_encoder_decoder:
        raise ValueError(f"{folder}: {config.model_type} is an encoder-decoder model: use a decoder-only model")
    if rope is not None and rope.type != "none":
        config = stretched_config(config, rope.type, rope.factor, rope.theta, rope.yarn())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rows = config.get_text_config(decoder=True).vocab_size
    if len(tokenizer) > rows:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the embedding has {rows} rows; "
            f"they are from different models, or the embedding was not resized with the tokenizer"
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
    )
    if rope is not None and rope.type != "none":
        check_stretched(model)
    return model, tokenizer


def load_source(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and tokenizer of any source that `convert` accepts, in float32.

    A model folder is loaded in place. Any other source is converted into a temporary folder. Raises
    ValueError like `convert`.
    """
    folder = Path(source)
    if (folder / "config.json").is_file() and not is_adapter(folder):
        check_weights(folder)
        return load_model(folder)
    with tempfile.TemporaryDirectory() as scratch:
        convert(source, scratch)
        return load_model(scratch)


def restretched(folder: Path | str, base: Path | str, rope: RopeRecipe) -> PreTrainedConfig:
    """Return a model's config with another stretch than it was trained with, relative to the
    context length of its base.

    ValueError if the base cannot be stretched in this way.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    plain = AutoConfig.from_pretrained(base, local_files_only=True)
    asked = stretched_config(plain, rope.type, rope.factor, rope.theta, rope.yarn())
    for name in ("rope_parameters", "max_position_embeddings", "layer_rope_theta"):
        if hasattr(asked, name):
            setattr(config, name, getattr(asked, name))
    return config


def describe(folder: Path | str) -> dict[str, Any]:
    """Return a model's shape from its config.json, and its number of parameters, without loading
    weights."""
    whole = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(whole)
    config = whole.get_text_config(decoder=True)  # differs for models that also see images
    first = config.per_layer_config[0]  # Gemma 4's layers differ; these are the first one's sizes
    heads = getattr(first, "num_attention_heads", 0)
    return {
        "architecture": type(model).__name__,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(first, "num_key_value_heads", heads),
        "head_dim": getattr(first, "head_dim", None) or first.hidden_size // max(heads, 1),
        "hidden": config.hidden_size,
        "intermediate": getattr(first, "intermediate_size", 0),
        "vocab": config.vocab_size,
        "context_length": getattr(config, "max_position_embeddings", None),
        "rope": getattr(config, "rope_parameters", None),
        "tied": getattr(whole, "tie_word_embeddings", False),
        "parameters": model.num_parameters(),
    }


def fresh_llama(recipe: LlamaRecipe, vocab_size: int, seed: int) -> LlamaForCausalLM:
    """Return a float32 Llama with tied embeddings. It depends on `seed`, not on the global random
    state."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context_length,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def with_softmax_sinks(model: PreTrainedModel) -> GraniteSWAForCausalLM:
    """Return the same Llama with a sink logit per head, initially 0, in each softmax.

    It is transformers' `granite_swa`, which equals Llama with these logits if every layer has full
    attention. So plain transformers loads the saved folder. ValueError for other architectures.
    """
    old = model.config
    if not isinstance(old, LlamaConfig) or old.attention_bias or old.mlp_bias:
        raise ValueError(
            f"{type(model).__name__} does not support a sink in its softmax: sinks 'zero' and 'logit' need a Llama "
            f"without biases; use sink 'token', or another base"
        )
    head_dim = old.head_dim or old.hidden_size // old.num_attention_heads
    same = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"]
    same += ["num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters"]
    same += ["tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "head_dim", "dtype"]
    config = GraniteSWAConfig(
        **{name: getattr(old, name) for name in same},
        layer_types=["full_attention"] * old.num_hidden_layers,
        sliding_window=old.max_position_embeddings,  # no layer uses it, but transformers still makes its mask
        attention_multiplier=head_dim**-0.5,
    )
    with torch.random.fork_rng(devices=[]):
        sunk = GraniteSWAForCausalLM(config)
    missing = sunk.load_state_dict(model.state_dict(), strict=False)
    assert {key.rpartition(".")[2] for key in missing.missing_keys} == {"sinks"}, "only the sinks may be missing"
    return sunk


def fit_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, known: Mapping[str, int] | None = None
) -> int:
    """Give every token of the tokenizer an embedding row, and return how many rows were added.

    The row of a new token (the sink token's) starts as the mean of the old ones, which is the same in
    every run.

    known: vocabulary of the model's own tokenizer. Models may have more rows than it has tokens, and
        a new token then takes one of these unused rows. Without it, only added rows are new.
    """
    rows = model.config.get_text_config(decoder=True).vocab_size
    added = max(0, len(tokenizer) - rows)
    if added:
        model.resize_token_embeddings(rows + added, mean_resizing=False)
    known_rows, unused = list(range(rows)), []
    if known is not None:
        known_rows = sorted(row for row in known.values() if row < rows)
        unused = sorted(row for row in {*tokenizer.get_vocab().values()} - {*known.values()} if row < rows)
    if new := [*unused, *range(rows, rows + added)]:
        with torch.no_grad():
            for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
                layer.weight[new] = layer.weight[known_rows].mean(0)
    return added
