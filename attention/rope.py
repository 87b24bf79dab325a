"""Stretch RoPE past the trained context through transformers' own `rope_parameters`, and rotate
keys to other positions.

A model trained on positions 0..L-1 has never seen the rotation of position L. Position
interpolation (arXiv:2306.15595) divides positions by the factor, so that new ones fall between old
ones. NTK-aware scaling raises the base frequency: `theta` to a fixed value, `dynamic` by the length
of the input. YaRN (arXiv:2309.00071) and Llama-3 scaling interpolate slow frequencies and keep fast
ones.

`Rotary` moves keys or queries that a model has already rotated to another position. RoPE
(arXiv:2104.09864) is relative, so moving a key by n positions is one more rotation, whatever
scaling the frequencies have.

    stretched_config(AutoConfig.from_pretrained(folder), "linear", 2.0)

Legend: T tokens, D head dim, R rotated pairs (2R <= D).
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

TYPES = ("none", "linear", "dynamic", "yarn", "llama3", "theta")
CORRECTED_FROM = 2**13
"""From this position on, the rounding of float32 angles is corrected (it is 5e-4 radians here and
4e-3 at position 100,000)."""


def stretched_config(
    config: PretrainedConfig,
    type: str,
    factor: float = 1.0,
    theta: float | None = None,
    yarn: Mapping[str, float] = MappingProxyType({}),
) -> PretrainedConfig:
    """Return a copy of a config whose context is `factor` times as long, to build the model from.

    `max_position_embeddings` becomes the new context length, except for "dynamic": there
    transformers reads the trained context length from it, and stretches as the input grows beyond
    it. Raises ValueError for an unknown type, a model without RoPE or already stretched, or a
    missing or unneeded theta.

    Args:
        config: of a model with RoPE that is not yet stretched.
        type: one of TYPES.
        factor: ratio of the new context length to the trained one, at least 1.
        theta: the new base frequency, for type "theta" only.
        yarn: more of transformers' `rope_parameters`, for type "yarn" only. If it has
            original_max_position_embeddings, `factor` is relative to that.
    """
    if type not in TYPES:
        raise ValueError(f"unknown rope type {type!r}: use one of {', '.join(TYPES)}")
    whole = copy.deepcopy(config)
    config = whole.get_text_config(decoder=True)  # the same object, except for models that also see images
    rope = _checked_parameters(config, type, factor, theta)
    if type == "none":
        return whole
    if getattr(config, "head_dim", 0) is None:  # as in Mixtral, where transformers' own YaRN then fails
        config.head_dim = config.hidden_size // config.num_attention_heads
    trained = config.max_position_embeddings
    if type == "theta":
        config.rope_parameters = {**rope, "rope_theta": theta}
        if {*(getattr(config, "layer_rope_theta", None) or ())} == {rope["rope_theta"]}:  # Granite's, which win over it
            config.layer_rope_theta = [theta] * config.num_hidden_layers
    else:
        config.rope_parameters = {**rope, "rope_type": type, "factor": factor}
    if type in ("yarn", "llama3"):
        config.rope_parameters |= {"original_max_position_embeddings": trained, **yarn}
    if type == "llama3":
        config.rope_parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if type != "dynamic":
        original = yarn.get("original_max_position_embeddings", trained)
        config.max_position_embeddings = _stretched_limit(trained, original, factor)
    try:  # some families reject types of RoPE, but only when they are saved
        config.validate()
    except StrictDataclassError as error:
        why = str(error).splitlines()[-1].strip()
        raise ValueError(f"{config.model_type} does not support rope type {type!r} ({why}): use 'theta'") from error
    return whole


def _checked_parameters(config: PretrainedConfig, type: str, factor: float, theta: float | None) -> dict[str, Any]:
    """Return the config's `rope_parameters`. ValueError if they cannot be stretched in this way."""
    rope: dict[str, Any] | None = getattr(config, "rope_parameters", None)
    if rope is None and type != "none":
        raise ValueError(f"{config.model_type} has no RoPE: it cannot be stretched")
    if rope is None or "rope_theta" not in rope:
        raise ValueError(
            f"{config.model_type} has no single set of RoPE parameters ({', '.join(sorted(rope or ['none']))}): "
            f"it cannot be stretched"
        )
    if rope.get("rope_type", "default") != "default" and type != "none":
        raise ValueError(f"the model's RoPE is {rope['rope_type']!r} already: stretch the model it was made from")
    if factor < 1:
        raise ValueError(f"rope factor is {factor:g}, but must be at least 1")
    if type == "theta" and theta is None:
        raise ValueError("rope type 'theta' needs theta: set it, or use another type")
    if type != "theta" and theta is not None:
        raise ValueError(f"rope type {type!r} with theta {theta:g}: leave theta out, or use type 'theta'")
    if type != "none" and rope["rope_theta"] is None:
        raise ValueError(f"{config.model_type} has no rope_theta in its config.json: add it there")
    return rope


def _stretched_limit(trained: int, original: float, factor: float) -> int:
    """Return the new position limit. ValueError if `original`, the length that `factor` refers to, does
    not fit the model's trained length."""
    if original > trained:
        raise ValueError(
            f"rope original_length {original:g} exceeds the {trained} positions of the model: lower it, or leave it out"
        )
    limit = math.ceil(original * factor)
    if limit < trained:
        raise ValueError(
            f"rope original_length {original} with factor {factor:g} gives {limit} positions, fewer than the model's "
            f"{trained}: raise factor to {trained / original:g} or more"
        )
    return limit


def check_stretched(model: PreTrainedModel) -> None:
    """Check that every rotary embedding of a model follows its config's `rope_parameters`.

    Some families rotate by other numbers, or not at all, so a stretch would have no effect.
    ValueError then.
    """
    asked = model.config.get_text_config(decoder=True).rope_parameters
    embeddings: list[Any] = [
        m for m in model.get_decoder().modules() if isinstance(getattr(m, "inv_freq", None), Tensor)
    ]
    if not embeddings:
        raise ValueError(f"{type(model).__name__} has no rotary embedding: it cannot be stretched")
    others = [
        m.config.rope_parameters for m in embeddings if hasattr(m, "config") and m.config.rope_parameters != asked
    ]
    if others:
        raise ValueError(
            f"{type(model).__name__} rotates keys in some of its layers by {others[0]}, not by {asked}: it cannot be "
            f"stretched in this way"
        )


@torch.no_grad()
def fix_frequencies(model: nn.Module, tokens: int) -> None:
    """Fix RoPE frequencies that depend on the input length to those of `tokens` from now on.

    transformers derives them from the largest position in a batch ("longrope"), or in all batches
    so far ("dynamic"). So the rotation of packed rows would depend on the documents in the same
    batch, and on what a rank has read since it started.
    """
    for module in model.modules():
        if getattr(module, "rope_type", None) in ("dynamic", "longrope"):
            rotary: Any = module
            rotary(rotary.inv_freq, torch.tensor([[tokens - 1]], device=rotary.inv_freq.device))
            rotary.rope_type = "default"  # does not change its frequencies


def _family_of(config: PretrainedConfig) -> Any:
    """Return the module with the family's attention. Some families borrow another's: InternLM 3 has
    Llama's."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return importlib.import_module(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__)
    return importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))


@dataclass(frozen=True)
class Rotary:
    """The rotation that a model's attention applies to its queries and keys."""

    inv_freq_R: Tensor
    """Radians per position, float32, as in transformers."""
    interleaved: bool
    """Whether rotated pairs are neighbours (2i, 2i+1), as in Cohere and GLM, or halves (i, i+R), as
    in Llama."""

    @classmethod
    def of(cls, config: PretrainedConfig) -> Rotary:
        """Create the rotation of a model's config. The layout of pairs is found by trying the
        family's own function. Raises ValueError for a model without RoPE, or if further rotations
        cannot move its keys: frequencies differ by layer or change with the input length."""
        rope = getattr(config, "rope_parameters", None) or {}
        if not rope:
            raise ValueError(f"{config.model_type} has no RoPE: its keys cannot be moved to other positions")
        if "rope_theta" not in rope:
            raise ValueError(
                f"{config.model_type} rotates keys differently in some of its layers ({', '.join(sorted(rope))}), so "
                f"they cannot all be moved in the same way; count positions in the text"
            )
        if rope.get("rope_type") in ("dynamic", "longrope"):
            raise ValueError(
                f"rope type {rope['rope_type']!r} changes frequencies with the input length: keys that were rotated "
                f"before cannot be moved exactly; use 'linear', 'yarn' or 'llama3'"
            )
        thetas = {rope["rope_theta"], *(getattr(config, "layer_rope_theta", None) or ())}
        if len(thetas) > 1 or not all(getattr(config, "no_rope_layers", None) or ()):
            raise ValueError(
                f"{config.model_type} rotates keys differently or not at all in some of its layers, so they cannot "
                f"all be moved in the same way; count positions in the text"
            )
        family = _family_of(config)
        names = [name for name in vars(family) if name.endswith("RotaryEmbedding") and "Vision" not in name]
        if len(names) != 1 or not hasattr(family, "apply_rotary_pos_emb"):
            raise ValueError(f"{config.model_type}: no single rotary embedding in {family.__name__} ({names})")
        embedding = getattr(family, names[0])(config)
        for interleaved in (False, True):
            rotary = cls(embedding.inv_freq.detach().float().cpu(), interleaved)
            if rotary._is_that_of(family, embedding):
                return rotary
        raise ValueError(f"{config.model_type} has rotated pairs that are neither halves nor neighbours")

    def _is_that_of(self, family: Any, embedding: Any) -> bool:
        """Return whether three positions give the same result as the family's own function."""
        x_1HTD = torch.randn(1, 1, 3, 2 * len(self.inv_freq_R), generator=torch.Generator().manual_seed(0))
        at_T = torch.tensor([0, 1, 5])
        cos, sin = embedding(x_1HTD, at_T[None])
        theirs, _ = family.apply_rotary_pos_emb(x_1HTD, x_1HTD, cos, sin)
        ours = (
            rotate_pairs(x_1HTD, self.cos_sin(self.angles(at_T), x_1HTD), self.interleaved)
            * embedding.attention_scaling
        )
        return torch.allclose(theirs, ours, rtol=1e-4, atol=1e-4)

    def angles(self, by_T: Tensor) -> Tensor:
        """Return the angles [T, R] in radians of a rotation by so many positions, in float64, on
        the positions' device."""
        return by_T.double()[:, None] * self.inv_freq_R.to(by_T.device).double()

    def rounding(self, at_T: Tensor) -> Tensor:
        """Return the radians [T, R] by which transformers' float32 angle of a position is below the
        true one; 0 before CORRECTED_FROM."""
        off_TR = self.angles(at_T) - (at_T.float()[:, None] * self.inv_freq_R.to(at_T.device)).double()
        return off_TR * (at_T >= CORRECTED_FROM)[:, None]

    def correct_rounding(self, x_BHTD: Tensor, at_T: Tensor) -> Tensor:
        """Correct the rounding of far angles in queries or keys that transformers rotated to
        at_T."""
        if int(at_T.max()) < CORRECTED_FROM:
            return x_BHTD
        return rotate_pairs(x_BHTD, self.cos_sin(self.rounding(at_T.to(x_BHTD.device)), x_BHTD), self.interleaved)

    def rotate(self, x_BHTD: Tensor, by_T: Tensor) -> Tensor:
        """Move rotated queries or keys by_T positions further."""
        return rotate_pairs(x_BHTD, self.cos_sin(self.angles(by_T.to(x_BHTD.device)), x_BHTD), self.interleaved)

    @staticmethod
    def cos_sin(angles_TR: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosine and sine of angles, with the dtype and device of another tensor."""
        return angles_TR.cos().to(like), angles_TR.sin().to(like)


def rotate_pairs(x: Tensor, cos_sin: tuple[Tensor, Tensor], interleaved: bool = False) -> Tensor:
    """Return x [..., T, D] with its first 2R values rotated in pairs; cosine and sine are [..., T,
    R]."""
    cos, sin = cos_sin
    pairs = cos.shape[-1]
    if interleaved:
        one, two = x[..., : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    else:
        one, two = x[..., :pairs], x[..., pairs : 2 * pairs]
    rotated = [torch.addcmul(one * cos, two, sin, value=-1), torch.addcmul(two * cos, one, sin)]
    if interleaved:
        rotated = [torch.stack(rotated, -1).flatten(-2)]
    if x.shape[-1] > 2 * pairs:  # torch.cat would copy even with an empty tensor
        rotated.append(x[..., 2 * pairs :])
    return torch.cat(rotated, -1)
