"""What each evaluation measures, typed. No torch here: `longreach plan` reads this in milliseconds."""

from typing import Literal

from pydantic import Field, model_validator

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
    """A key from 1 to 49,999 hidden in filler sentences (LongLoRA, section 4.2; 2305.16300)."""

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
    sink_tokens: tuple[int, ...] = Field(default=(4,), min_length=1)
    """How many first tokens the sink cache keeps; each number is a way of its own."""
    ways: tuple[Literal["dense", "window", "recompute", "sinks"], ...] = ("dense", "window", "recompute", "sinks")
    """Which of the four."""
    recompute_every: int = Field(default=16, ge=1)
    """The `recompute` way scores every n-th token, as each needs a pass over its own window; 1 scores all."""
    positions: Literal["cache", "text"] = "cache"
    """Where positions are counted: inside the cache (the paper's way) or in the text."""

    @model_validator(mode="after")
    def _fits(self) -> "StreamingRecipe":
        if min(self.sink_tokens) < 1 or len({*self.sink_tokens}) < len(self.sink_tokens):
            raise ValueError(f"sink_tokens {list(self.sink_tokens)}: each number once, from 1 (none: way 'window')")
        if (most := max(self.sink_tokens)) >= self.cache_tokens:
            raise ValueError(
                f"sink_tokens {most} leave no room for recent tokens in cache_tokens {self.cache_tokens}: "
                f"use fewer sinks or a larger cache"
            )
        if self.cache_tokens >= self.tokens:
            raise ValueError(
                f"tokens {self.tokens} do not outgrow cache_tokens {self.cache_tokens}, so all ways would be the same: "
                f"score more tokens or use a smaller cache"
            )
        return self
