"""The models whose attention `longreach verify-attention` tries: a folder's, or a tiny one for each arm of a recipe.

longreach verify-attention quickstart
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedModel

from longreach.attention.hf import set_pattern
from longreach.pipelines.reader import load
from longreach.training.model import fresh_llama, load_model
from longreach.training.recipe import LlamaRecipe

TOKENS = 64
"""Least tokens of a test row."""


def models_to_verify(target: str, overrides: list[str] | None) -> Iterator[tuple[str, PreTrainedModel, int]]:
    """Yield (name, model, tokens of a row that show its pattern).

    Args:
        target: a Hugging Face folder, or a recipe, for each of whose arms a tiny Llama gets the arm's pattern.
        overrides: of the recipe, as in `load`.
    """
    if Path(target, "config.json").is_file():
        yield target, load_model(target)[0], TOKENS
        return
    finetune = load(target, overrides).recipe.finetune
    for name, arm in (finetune.every_arm() if finetune else {}).items():
        pattern = arm.attention.pattern_at(step=0, steps=1)
        tokens = max(TOKENS, 3 * pattern.block_tokens)
        # an odd number of KV heads has unequal halves, which change roles from layer to layer: two layers show both
        tiny = LlamaRecipe(hidden=48, layers=2, heads=6, kv_heads=3, context_length=tokens)
        model = fresh_llama(tiny, vocab_size=256, seed=0)
        yield f"{name} ({set_pattern(model, pattern)})", model, tokens
