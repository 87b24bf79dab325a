"""Models for `longreach verify-attention`: that of a source, or a tiny one for each arm of a
recipe.

longreach verify-attention quickstart
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedModel

from longreach.attention.hf import set_pattern
from longreach.pipelines.reader import load
from longreach.training.convert import is_source
from longreach.training.model import fresh_llama, load_source
from longreach.training.recipe import LlamaRecipe

TOKENS = 64  # minimum length of a test row


def models_to_verify(target: str, overrides: list[str] | None) -> Iterator[tuple[str, PreTrainedModel, int]]:
    """Yield (name, model, row length in tokens that shows its pattern).

    Args:
        target: A source as for `evaluate`, or a recipe; a recipe yields a tiny Llama for each arm,
            with the arm's pattern.
    """
    if is_source(target):
        yield target, load_source(target)[0], TOKENS
        return
    recipe = load(target, overrides).recipe
    patterns = {}
    if recipe.finetune:
        for name, arm in recipe.finetune.every_arm().items():
            patterns[name] = arm.attention.own_pattern()
    for name, pretrained in recipe.pretrained_arms().items():
        if pretrained.attention.pattern != "causal":
            patterns[name] = pretrained.attention.own_pattern()
    for name, pattern in patterns.items():
        tokens = max(TOKENS, 3 * pattern.block_tokens)
        # 3 KV heads split into unequal halves, which swap roles in each layer: two layers test both
        tiny = LlamaRecipe(hidden=48, layers=2, heads=6, kv_heads=3, context_length=tokens)
        model = fresh_llama(tiny, vocab_size=256, seed=0)
        yield f"{name} ({set_pattern(model, pattern)})", model, tokens
