"""A KV cache of fixed size for endless texts (StreamingLLM, arXiv:2309.17453), for `model.generate`
of transformers 5.

It keeps the first `sink_tokens` tokens of the text and the `window_tokens` most recent ones. With the
current token, a query sees sink_tokens + window_tokens + 1 keys. With positions="cache", keys have
positions 0, 1, 2, ... in the order of the cache, whatever transformers passes as position_ids. With
positions="text", they keep their positions in the text.

    cache = SinkCache(model.config, sink_tokens=4, window_tokens=1020)
    model.generate(**tokenizer(text, return_tensors="pt"), past_key_values=cache, max_new_tokens=10_000)

A step costs the same at any text length for these reasons:
  - Keys and values are in one ring buffer, allocated once. A new token replaces the oldest recent
    one. The order of keys does not matter to a single query. With 1 sink and a window of 2, there
    are S + W + 1 = 4 slots:

        token read      0           1           2           3           4           5
        slots        [0 . . .]   [0 1 . .]   [0 1 2 .]   [0 1 2 3]   [0 4 2 3]   [0 4 5 3]

    So token 4 sees the sink 0, its window 2 and 3, and itself. It replaced token 1, the oldest.
  - RoPE is relative, so recent keys are already at their true distance. Only the sinks, of which an
    unchanged copy is kept, are rotated further, by the number of evicted tokens.
  - transformers' float32 angles are off by 4e-3 radians at position 100,000. From position
    CORRECTED_FROM on, the known rounding of each angle is removed from query and key, so that the
    millionth token decodes like the thousandth. (It is known if positions count a row's tokens from 0 without
    padding, as in `generate`.)

A forward pass over several tokens (a prompt or a chunk of one, of any length) gives the same result as
one pass per token (attention/streamed.py). This needs the query, which a cache does not get. So
`update` returns the keys as a special tensor type, and `scaled_dot_product_attention` calls the cache
through torch's __torch_function__ protocol. Therefore "sdpa" attention, transformers' default, works
without changes. Models with a sink in the softmax (zero and logit sinks, gpt-oss) do not support
"sdpa". They use the attention "sink_cache", which importing this file registers and which works for
every model that accepts another attention. Any other use of such keys is an error.

    model.set_attn_implementation("sink_cache")      # or: with reading_sink_cache(model): ...

Legend: B batch, T new tokens, H query heads, K key/value heads, D head dim, S sinks, W window.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from longreach.attention.rope import CORRECTED_FROM, Rotary, rotate_pairs
from longreach.attention.sink_softmax import with_sink
from longreach.attention.streamed import plain, streamed_attention

ATTENTION = "sink_cache"
"""The attention implementation with which a model can only read a SinkCache."""


class SinkCache(Cache):
    """Sinks and recent keys in every layer. The module's docstring explains `positions`.

    `sink_tokens` 0 is plain window attention. Left-padded batches are supported if the first
    forward pass gets the mask; each row's sinks are its own first tokens. Raises ValueError for
    invalid sizes, and for a model whose keys cannot be moved (see Rotary.of) or whose own window is
    no longer than this one.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        sink_tokens: int = 4,
        window_tokens: int = 1020,
        positions: Literal["cache", "text"] = "cache",
    ) -> None:
        config = config.get_text_config(decoder=True)
        if sink_tokens < 0 or window_tokens < 1:
            raise ValueError(f"sink_tokens {sink_tokens} and window_tokens {window_tokens}: at least 0 and at least 1")
        if positions not in ("cache", "text"):
            raise ValueError(f"positions is {positions!r}, but must be 'cache' or 'text'")
        own = own_window(config)
        if own is not None and own <= sink_tokens + window_tokens:
            raise ValueError(
                f"the model's own window of {own} tokens is shorter than {sink_tokens} sinks + {window_tokens} recent "
                f"tokens + 1: lower window_tokens to at most {own - sink_tokens - 1}"
            )
        rotations = SharedRotations(Rotary.of(config) if positions == "cache" else None)
        super().__init__(
            layers=[SinkLayer(sink_tokens, window_tokens, rotations) for _ in range(config.num_hidden_layers)]
        )


def own_window(config: PretrainedConfig) -> int | None:
    """Return the sliding window that some layers have; None if every layer sees all tokens.

    ValueError if layers cache something other than keys and values of single tokens.
    """
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"{config.model_type} caches a latent of rank {config.kv_lora_rank}, not keys and values")
    kinds = {*(getattr(config, "layer_types", None) or ["sliding_attention"])}
    if strange := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{config.model_type} has layers {sorted(strange)}, whose state a SinkCache cannot keep")
    if "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)


def attend_to_sink_cache(
    module: nn.Module, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute attention for transformers' AttentionInterface with the SinkCache that the keys come
    from."""
    if not isinstance(k_BKTD, NewKeys):
        raise TypeError(
            f"attention {ATTENTION!r} reads a SinkCache only: pass one as past_key_values, or restore the model's own "
            f"attention by set_attn_implementation"
        )
    for name in ("softcap", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} asks for {name}={kwargs[name]}, which a SinkCache leaves out")
    return k_BKTD.layer.attend(q_BHTD, attention_mask, scaling, kwargs.get("s_aux")).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attend_to_sink_cache)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # the cache finds padding in this mask


def read_sink_cache(model: PreTrainedModel) -> None:
    """Make a model use a SinkCache for attention. ValueError if it does not accept another
    attention."""
    for name, module in model.named_modules():
        if cap := getattr(module, "attn_logit_softcapping", None):
            raise ValueError(f"{type(model).__name__}: {name} caps its scores at {cap}, which a SinkCache leaves out")
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:  # transformers only warns
        raise ValueError(f"{type(model).__name__} computes its attention itself, so it cannot read a SinkCache")


@contextmanager
def reading_sink_cache(model: PreTrainedModel) -> Iterator[None]:
    """Make a model use a SinkCache for attention inside the block. Raises like `read_sink_cache`."""
    before = model.config._attn_implementation
    read_sink_cache(model)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class SharedRotations:
    """Cosines and sines of rotations that all layers share in a step."""

    def __init__(self, rotary: Rotary | None) -> None:
        self.rotary = rotary
        if rotary is not None:
            self.shift = lru_cache(2)(self._shift)
            self.correction = lru_cache(2)(self._correction)

    def _shift(self, by_B: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [B, 1, 1, R] that rotate each row's keys by `by_B` positions."""
        assert self.rotary is not None, "keys with positions counted in the text are never rotated further"
        cos, sin = self.rotary.cos_sin(
            self.rotary.angles(torch.tensor(by_B)), torch.empty(0, dtype=dtype, device=device)
        )
        return cos[:, None, None], sin[:, None, None]

    def _correction(
        self, first_B: tuple[int, ...], tokens: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [B, 1, T, R] that undo float32's rounding of the angles.

        Row b's tokens have positions first_B[b] .. first_B[b] + tokens - 1.
        """
        assert self.rotary is not None, "keys with positions counted in the text stay as transformers rotated them"
        at_BT = torch.tensor(first_B)[:, None] + torch.arange(tokens)
        angles_BTR = self.rotary.rounding(at_BT.flatten()).unflatten(0, at_BT.shape)
        cos, sin = self.rotary.cos_sin(angles_BTR, torch.empty(0, dtype=dtype, device=device))
        return cos[:, None], sin[:, None]


class NewKeys(Tensor):
    """Keys of new tokens that the cache returns to attention. Only `layer.attend` can use them."""

    layer: AttendingLayer

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return args[1].layer.attend(args[0], kwargs.get("attn_mask"), kwargs.get("scale"))
        if func in (Tensor.__getitem__, Tensor.expand, Tensor.reshape):
            return args[0]  # transformers repeats KV heads before a masked sdpa; here they are never repeated
        if getattr(func, "__name__", "") == "__get__":  # shape, dtype, device
            return super().__torch_function__(func, types, args, kwargs)
        raise ValueError(
            f"the keys of a SinkCache went into {getattr(func, '__name__', func)}, which cannot read them: call "
            f"model.set_attn_implementation('sdpa') first, or {ATTENTION!r} for a model with a sink in its softmax; if "
            f"neither helps, the family changes its keys before it attends, and cannot use this cache"
        )


class AttendingLayer(CacheLayerMixin):
    """One layer of a cache that computes the attention itself, since only it knows which keys a
    query sees."""

    keys: Tensor  # type: ignore[assignment]
    values: Tensor  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        """Number of tokens read so far, including evicted ones and padding. transformers counts
        positions from it."""
        self.new: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values [B, K, T, D]. Only `attend` can use the returned
        keys."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.keys.shape[0]:
            raise ValueError(
                f"the cache holds {self.keys.shape[0]} rows, the batch has {key_states.shape[0]}: reset() it"
            )
        if self.new is not None:
            raise RuntimeError("the last forward pass failed half-way and left this cache behind: reset() it")
        self.new = key_states.detach(), value_states.detach()
        self.seen += key_states.shape[2]
        keys = key_states.as_subclass(NewKeys)
        keys.layer = self
        return keys, value_states

    def take_new(self) -> tuple[Tensor, Tensor]:
        """Return the new tokens' keys and values, which `update` stored for `attend`."""
        if self.new is None:
            raise ValueError("a layer attends twice to the same keys, which a SinkCache cannot do: use another family")
        new, self.new = self.new, None
        return new

    @abstractmethod
    def attend(
        self, q_BHTD: Tensor, mask: Tensor | None, scale: float | None, sink_logit_H: Tensor | None = None
    ) -> Tensor:
        """Return the attention of the new tokens' queries, and cache those of their keys and values
        that are kept.

        sink_logit_H: a logit per head in each softmax (attention/sink_softmax.py), in addition to
        the tokens.
        """

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return sizes for a mask that shows padding among the new tokens; the cache masks the rest
        itself."""
        return query_length, self.seen

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a cache of fixed size cannot remove tokens: what they evicted is lost")


class SinkLayer(AttendingLayer):
    """One layer's keys and values. Slots 0..S-1 are for sinks; S..S+W are a ring of recent
    tokens."""

    keys: Tensor  # [B, K, S+W+1, D]
    values: Tensor
    sink_keys: Tensor  # [B, K, S, D], unchanged: never rotated further

    def __init__(self, sink_tokens: int, window_tokens: int, rotations: SharedRotations) -> None:
        super().__init__()
        self.S, self.W, self.rotations = sink_tokens, window_tokens, rotations
        self.padding_B: tuple[int, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        slots = self.S + self.W + 1
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        with torch.inference_mode(False):  # otherwise a cache created in inference mode could not be used outside it
            # zeros, because a row with padding reads slots that it never filled, and a masked NaN is
            # still a NaN
            B, K, _, D = key_states.shape
            self.keys = key_states.new_zeros(B, K, slots, D)
            self.values = value_states.new_zeros(B, K, slots, value_states.shape[3])
            self.sink_keys = key_states.new_zeros(B, K, self.S, D)

    def attend(
        self, q_BHTD: Tensor, mask: Tensor | None, scale: float | None, sink_logit_H: Tensor | None = None
    ) -> Tensor:
        (k_BKTD, v_BKTD), T = self.take_new(), q_BHTD.shape[2]
        self._note_padding(mask, len(q_BHTD), T)
        first_B = tuple(self.seen - T - padding for padding in self.padding_B)
        if scale is None:
            scale = q_BHTD.shape[3] ** -0.5
        with torch.no_grad():
            q = q_BHTD.detach()
            if self.rotations.rotary is not None and max(first_B) + T > CORRECTED_FROM:
                correction = self.rotations.correction(first_B, T, q.dtype, q.device)
                both = rotate_pairs(torch.cat([q, k_BKTD], 1), correction, self.rotations.rotary.interleaved)
                q, k_BKTD = both.split([q.shape[1], k_BKTD.shape[1]], 1)
            step = self._decode if T == 1 and min(first_B) >= 0 else self._prefill
            out_BHTD = step(q, k_BKTD, v_BKTD, first_B, scale, sink_logit_H)
        return inference_only(q_BHTD, out_BHTD)

    def _note_padding(self, mask: Tensor | None, batch: int, tokens: int) -> None:
        """Count the leading padding tokens of each row in the first mask. Padding tokens do not see
        themselves."""
        first = self.seen == tokens
        if first:
            self.padding_B = (0,) * batch
        if mask is None:
            return
        real_BT = sees_itself(mask, batch, tokens)
        padding_B = (~real_BT).sum(1).tolist()
        if not first and any(padding_B):
            raise ValueError(
                f"padding after the first {self.seen - tokens} tokens: a SinkCache takes left padding only"
            )
        if max(padding_B) == tokens or bool((real_BT[:, 1:] < real_BT[:, :-1]).any()):
            raise ValueError(
                f"in the first {tokens} tokens a row is padding only, or padded on its right: pad on the left, and let "
                f"the first forward pass reach every row's text"
            )
        if first:
            self.padding_B = tuple(padding_B)

    def _decode(
        self, q_BH1D: Tensor, k_BK1D: Tensor, v_BK1D: Tensor, first_B: tuple[int, ...], scale: float,
        sink_logit_H: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Store each row's single token in its slot, and attend over all used slots."""
        for rows, at in _together(first_B):
            self.keys[rows, :, self._slot(at)] = k_BK1D[rows, :, 0]
            self.values[rows, :, self._slot(at)] = v_BK1D[rows, :, 0]
            if at < self.S:
                self.sink_keys[rows, :, at] = k_BK1D[rows, :, 0]
        evicted_B = tuple(max(0, at - self.S - self.W) for at in first_B)
        if self.rotations.rotary is not None and self.S and any(evicted_B):
            shift = self.rotations.shift(evicted_B, self.dtype, self.device)
            self.keys[:, :, : self.S] = rotate_pairs(self.sink_keys, shift, self.rotations.rotary.interleaved)
        used_B = [min(at + 1, self.keys.shape[2]) for at in first_B]
        used, mask = max(used_B), None
        if min(used_B) < used:  # some rows are shorter because of padding
            in_use_BN = torch.arange(used, device=self.device) < torch.tensor(used_B, device=self.device)[:, None]
            mask = in_use_BN[:, None, None]
        keys, values = self.keys[:, :, :used], self.values[:, :, :used]
        if sink_logit_H is not None:  # it needs the log-sum-exp, which torch's function does not return
            unseen = None
            if mask is not None:
                unseen = ~mask[:, :, None]
            out, lse_BH1 = plain(q_BH1D, keys, values, scale, unseen)
            return with_sink(out, lse_BH1, sink_logit_H)
        grouped_BKRD = q_BH1D.reshape(len(first_B), keys.shape[1], -1, q_BH1D.shape[3])  # no KV head is repeated
        out = F.scaled_dot_product_attention(grouped_BKRD, keys, values, attn_mask=mask, scale=scale)
        return out.reshape(q_BH1D.shape)

    def _prefill(
        self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, first_B: tuple[int, ...], scale: float,
        sink_logit_H: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attend with many tokens at once, with rows of equal length together. Padding attends to
        nothing."""
        out_BHTD = torch.zeros_like(q_BHTD)
        for rows, first in _together(first_B):
            skip, first = max(0, -first), max(0, first)
            q, k, v = (x[rows, :, skip:] for x in (q_BHTD, k_BKTD, v_BKTD))
            sinks = max(0, min(self.S - first, q.shape[2]))
            slots = [self._slot(at) for at in range(max(self.S, first - self.W), first)]  # recent ones, oldest first
            recent_k, recent_v = k[:, :, sinks:], v[:, :, sinks:]
            if slots:
                recent_k = torch.cat([self.keys[rows][:, :, slots], recent_k], 2)
                recent_v = torch.cat([self.values[rows][:, :, slots], recent_v], 2)
            self._store(rows, first, k, v, sinks)
            known = min(self.S, first + q.shape[2])
            out_BHTD[rows, :, skip:] = streamed_attention(
                q, (recent_k, recent_v), (self.sink_keys[rows][:, :, :known], self.values[rows][:, :, :known]),
                first=first, sink_tokens=self.S, window_tokens=self.W, rotary=self.rotations.rotary, scale=scale,
                sink_logit_H=sink_logit_H,
            )  # fmt: skip
        return out_BHTD

    def _store(self, rows: slice, first: int, k_BKTD: Tensor, v_BKTD: Tensor, sinks: int) -> None:
        """Store the tokens from `first` on in their slots: sinks, and the last W of the others."""
        end = first + k_BKTD.shape[2]
        kept = [*range(first, first + sinks), *range(max(first + sinks, end - self.W), end)]
        slots, new = [self._slot(at) for at in kept], [at - first for at in kept]
        self.keys[rows, :, slots] = k_BKTD[:, :, new]
        self.values[rows, :, slots] = v_BKTD[:, :, new]
        self.sink_keys[rows, :, first : first + sinks] = k_BKTD[:, :, :sinks]

    def _slot(self, at: int) -> int:
        """Return the slot of a row's token number `at`: sinks first, then a ring of W + 1 slots."""
        if at < self.S:
            return at
        return self.S + (at - self.S) % (self.W + 1)

    def get_max_length(self) -> int:
        return self.S + self.W

    def reset(self) -> None:
        self.seen, self.padding_B, self.new = 0, (), None
        self.is_initialized = False  # the next batch may have another number of rows

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row n by row beam_idx[n], as beam search requires."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            rows = indices.to(self.device)
            with torch.inference_mode(False):
                self.keys, self.values, self.sink_keys = (x[rows] for x in (self.keys, self.values, self.sink_keys))
            self.padding_B = tuple(self.padding_B[n] for n in indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))


def sees_itself(mask: Tensor, batch: int, tokens: int) -> Tensor:
    """Return which of the new tokens see themselves, [B, T]: all except padding. The mask is [B, 1,
    T, N]."""
    real_BT = mask.diagonal(dim1=-2, dim2=-1)[:, 0].expand(batch, tokens)
    return real_BT if real_BT.dtype == torch.bool else real_BT == 0


def inference_only(q_BHTD: Tensor, out_BHTD: Tensor) -> Tensor:
    """Return attention's output. A backward pass through it is an error."""
    return _Inference.apply(q_BHTD, out_BHTD) if q_BHTD.requires_grad else out_BHTD


class _Inference(torch.autograd.Function):
    """Pass the output on. There is no gradient through the cache, so a backward pass is an error."""

    @staticmethod
    def forward(ctx: Any, q_BHTD: Tensor, out_BHTD: Tensor) -> Tensor:
        return out_BHTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("a cache of fixed size is for inference: train with use_cache=False")


def _together(first_B: tuple[int, ...]) -> list[tuple[slice, int]]:
    """Return (rows, token) for each run of neighbouring rows that are at the same token."""
    runs = []
    row = 0
    for first, same in groupby(first_B):
        count = len(list(same))
        runs.append((slice(row, row + count), first))
        row += count
    return runs
