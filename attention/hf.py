"""Make transformers models use a pattern, through its AttentionInterface and without
monkeypatching.

    set_pattern(model, PATTERNS["shifted_sparse"](group_tokens=512))      # train sparse
    print(active_pattern(model))                                          # shifted_sparse(...) by kernel sdpa
    set_pattern(model, PATTERNS["causal"]())                              # evaluate dense

Each pair of a pattern and a kernel is registered under its own name, which becomes the model's
attention implementation. This also works with PEFT and gradient checkpointing. Packed rows are
marked by position_ids that restart, padding by a 2-D mask; both become document borders. If
positions skip inside a document, attention also needs the plain positions, which restart only at
each document: model(..., position_ids=with_documents(skipping, plain)). Pass `use_cache=False`,
since with a cache queries and keys differ in length.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from longreach.attention.call import AttentionCall
from longreach.attention.kernels import Situation, attend_call, choose
from longreach.attention.pattern import Pattern
from longreach.attention.ulysses import ALONE, SequenceRanks, attend_in_parts, check_heads


@dataclass(frozen=True)
class ActivePattern:
    """The pattern and kernel that a model computes its attention with."""

    pattern: Pattern
    kernel: str
    """The kernel for the device and dtype that the model had when the pattern was set."""
    asked: str = "auto"
    """The requested kernel. With "auto" each forward pass chooses, so that the model may move to a
    GPU or another dtype."""
    sequence: SequenceRanks = ALONE
    """The ranks that share each row's tokens (attention/ulysses.py)."""

    def __str__(self) -> str:
        return f"{self.pattern} by kernel {self.kernel}"


_registered: dict[str, ActivePattern] = {}
_documents = WeakIdKeyDictionary()
"""position_ids that skip -> plain position_ids. All layers pass position_ids on to their attention,
also when they are recomputed, while some families (StableLM, Nemotron) drop additional keywords."""


def set_pattern(
    model: nn.Module, pattern: Pattern, kernel: str = "auto", sequence: SequenceRanks = ALONE
) -> ActivePattern:
    """Make every attention layer of a transformers model (or of a PEFT model around one) use
    `pattern`.

    sequence: the ranks that share each row; each then calls the model on its part of the tokens.
    Raises ValueError if the kernel cannot compute the pattern, if the architecture does not use the
    AttentionInterface, or if the number of ranks does not divide the heads.
    """
    inner = _transformers_model(model)
    runs = choose(pattern, kernel, Situation(inner.device.type, inner.dtype))
    active = ActivePattern(pattern, runs, kernel, sequence)
    if sequence.size > 1:
        text = inner.config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        check_heads(heads, getattr(text, "num_key_value_heads", None) or heads, sequence.size)
    if refusal := own_attention(inner):
        raise ValueError(f"{type(inner).__name__}: {refusal}, which {pattern} would silently leave out")
    name = _registered_name(active)
    try:
        inner.set_attn_implementation(name)
    except ValueError as error:
        raise ValueError(f"{type(inner).__name__} does not accept another attention: {error}") from error
    if active_pattern(model) != active or not any(hasattr(m, "is_causal") for m in inner.modules()):
        raise ValueError(
            f"{type(inner).__name__} computes its attention itself: no pattern can replace it, and packed documents "
            f"would not be isolated; use a base of another family"
        )
    return active


def active_pattern(model: nn.Module) -> ActivePattern | None:
    """Return the pattern that every attention layer of the model uses; None for transformers' own
    attention. Raises ValueError if layers use different ones."""
    names = set()
    for m in model.modules():
        if hasattr(m, "config") and (hasattr(m, "is_causal") or isinstance(m, PreTrainedModel)):
            names.add(getattr(m.config, "_attn_implementation", None))
    if len(names) != 1:
        raise ValueError(f"the model's layers use different attention implementations: {sorted(map(str, names))}")
    return _registered.get(str(names.pop()))


@contextmanager
def attending_by(model: PreTrainedModel, name: str, attend: Callable[..., Any]) -> Iterator[None]:
    """Make `attend` the model's attention inside the block. It is called as by the
    AttentionInterface, without a mask. ValueError for a model that computes its attention
    itself."""
    before = model.config._attn_implementation
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:  # transformers only warns
        raise ValueError(f"{type(model).__name__} computes its attention itself: no other one can replace it")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _registered_name(active: ActivePattern) -> str:
    """Register a pattern and return its name. Names have a number instead of the kernel's name,
    because transformers searches them for "sdpa", "flash" and "flex"."""
    for name, known in _registered.items():
        if known == active:
            return name
    name = f"longreach_{len(_registered)}_{active.pattern.pattern}"
    AttentionInterface.register(name, _forward_of(active))
    AttentionMaskInterface.register(name, _padding_only)
    _registered[name] = active
    return name


def own_attention(model: nn.Module) -> str:
    """Describe what a layer's attention does beyond causal softmax attention; empty if nothing."""
    config = getattr(model, "config", None)
    if latent := getattr(config, "kv_lora_rank", None):
        return f"it has latent attention (kv_lora_rank {latent}), whose keys and values differ in size"
    if getattr(config, "vision_config", None) or getattr(config, "audio_config", None):
        return "it reads more than text, by layers that are not causal"
    for kinds in ("layer_types", "layers_block_type", "block_types"):
        other = {*(getattr(config, kinds, None) or ())} - {"full_attention", "sliding_attention", "attention"}
        if other:
            return f"it has layers of {', '.join(sorted(other))}"
    for name, module in model.named_modules():
        if not hasattr(module, "is_causal") or not hasattr(module, "config"):
            continue
        if not module.is_causal:
            return f"{name} is not causal"
        if window := getattr(module, "sliding_window", getattr(module.config, "sliding_window", None)):
            return f"{name} has a sliding window of {window} tokens (sliding_window=None turns it off)"
        if cap := getattr(module, "attn_logit_softcapping", None):
            return f"{name} caps its scores at {cap} (attn_logit_softcapping=None turns it off)"
    return ""


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    found = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} contains no transformers model")
    return found


def _padding_only(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Return the padding mask if there is padding. transformers calls this once per forward pass
    for a mask, but patterns make their own and only need the padding."""
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


def _forward_of(active: ActivePattern) -> Any:
    def forward(
        module: nn.Module, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, dropout: float = 0.0, position_ids: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        if dropout:
            raise ValueError(f"attention dropout {dropout} is not supported with {active.pattern}: set it to 0")
        for name in ("softcap", "sliding_window", "position_bias"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{type(module).__name__} asks for {name}={kwargs[name]}: {active.pattern} has none")
        if position_ids is None:
            raise ValueError(f"{type(module).__name__} gets no position_ids: packed documents would see each other")
        documents_BT = _documents.get(position_ids, position_ids)  # plain ones, since a jump starts a new document
        if attention_mask is not None:
            documents_BT = split_padding(documents_BT, attention_mask)
        layer = getattr(module, "layer_idx", None) or 0
        call = AttentionCall(active.pattern, documents_BT, kwargs.get("s_aux"), scaling, layer)
        if active.sequence.size > 1:
            out_BHTD = attend_in_parts(q_BHTD, k_BKTD, v_BKTD, call, active.asked, active.sequence)
        else:
            out_BHTD = attend_call(q_BHTD, k_BKTD, v_BKTD, call, active.asked)
        return out_BHTD.transpose(1, 2), None

    return forward


def with_documents(position_ids_BT: Tensor, documents_BT: Tensor) -> Tensor:
    """Return the same positions, for which attention takes the documents from `documents_BT`:
    positions that restart at each document and never skip."""
    position_ids_BT = position_ids_BT.detach()  # a new object, so that the caller's tensor is not affected
    _documents[position_ids_BT] = documents_BT
    return position_ids_BT


@torch.no_grad()
def check_documents(model: PreTrainedModel) -> None:
    """Raise ValueError unless every attention layer recognizes documents when positions skip. This
    is tried on a few tokens."""
    plain_1T = torch.arange(4, device=model.device)[None]
    known: list[bool] = []

    def attend(
        module: nn.Module, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Tensor | None,
        position_ids: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        known.append(position_ids is not None and _documents.get(position_ids) is plain_1T)
        return v_BKTD.repeat_interleave(q_BHTD.shape[1] // v_BKTD.shape[1], 1).transpose(1, 2), None

    with attending_by(model, "documents_tried", attend):
        model.base_model(input_ids=plain_1T, position_ids=with_documents(plain_1T, plain_1T), use_cache=False)
    if not known or not all(known):
        raise ValueError(
            f"{type(model).__name__} does not pass its positions on to its attention unchanged: if they skip, each "
            f"jump would be taken for a new document; leave arm.positions out, or use a base of another family"
        )


def split_padding(position_ids_BT: Tensor | None, mask_BT: Tensor) -> Tensor:
    """Return positions [B, T] that also restart where padding begins and ends, so that no token
    sees padding."""
    if mask_BT.dim() != 2:
        raise ValueError(
            f"a padding mask is [batch, tokens]; got {tuple(mask_BT.shape)}: leave 4-D masks to the pattern"
        )
    index_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    positions_BT = (index_T if position_ids_BT is None else position_ids_BT).expand_as(mask_BT)
    breaks_BT = torch.zeros_like(mask_BT, dtype=torch.bool)
    breaks_BT[:, 1:] = (mask_BT[:, 1:] != mask_BT[:, :-1]) | (positions_BT[:, 1:] != positions_BT[:, :-1] + 1)
    begin_BT = torch.where(breaks_BT, index_T, 0).cummax(1).values
    return index_T - begin_BT
