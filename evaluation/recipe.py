"""What each evaluation measures, typed. No torch here: `longreach plan` reads this in milliseconds."""

from typing import Literal

from pydantic import Field

from infra.choices import Choices


class EvalRecipe(Choices):
    """Choices that every evaluation has."""

    models: tuple[str, ...] | None = None
    """Names of the models (baselines and arms) to evaluate; all of them without it."""
    seed: int = 0
    """Seeds whatever the evaluation draws."""


class PerplexityRecipe(EvalRecipe):
    """Perplexity by context length on held-out documents."""

    lengths: tuple[int, ...] = Field(min_length=1)
    """Context lengths in tokens, below and above the trained one."""
    documents: tuple[str, ...] = ("*",)
    """Names (shell patterns) of held-out documents; those shorter than a length do not count at that length."""
    last_tokens: int = Field(default=256, ge=1)
    """The `last_stride` protocol scores this many tokens at the end of each context."""


class PasskeyRecipe(EvalRecipe):
    """A five-digit key hidden in filler sentences (LongLoRA, appendix; 2305.16300)."""

    lengths: tuple[int, ...] = Field(min_length=1)
    """Prompt lengths in tokens."""
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    """Where the key stands: 0 first, 1 last."""
    trials: int = Field(default=1, ge=1)
    """Keys tried for each length and depth."""


class StreamingRecipe(EvalRecipe):
    """StreamingLLM's four ways through one text (2309.17453, figure 3)."""

    document: str = "2026-Trump-1"
    """Held-out document (name)."""
    tokens: int = Field(default=1024, ge=2)
    """Tokens of it that are scored."""
    cache_tokens: int = Field(default=256, ge=2)
    """Keys that each way keeps, sinks included (dense keeps all)."""
    sink_tokens: int = Field(default=4, ge=1)
    """First tokens that the sink cache keeps."""
    ways: tuple[Literal["dense", "window", "recompute", "sinks"], ...] = ("dense", "window", "recompute", "sinks")
    """Which of the four."""
    positions: Literal["cache", "text"] = "cache"
    """Where positions are counted: inside the cache (the paper's way) or in the text."""
