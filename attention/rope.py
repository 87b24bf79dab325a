"""Stretching rotary positions past the trained context, through transformers' own
`rope_parameters`; turning keys on.

A model trained on positions 0..L-1 has never seen the rotation of position L. Position
interpolation (arXiv:2306.15595) divides positions by the factor, so that new ones fall between old
ones; NTK-aware, YaRN (arXiv:2309.00071) and Llama-3 scaling treat slow and fast frequencies apart;
`theta` only raises the base frequency, without any training.

`Rotary` moves keys or queries that a model has rotated already to another position: RoPE
(arXiv:2104.09864) is relative, so turning a key on by n positions is one more rotation, whatever
scaling the frequencies carry.

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
from transformers import PretrainedConfig

TYPES = ("none", "linear", "dynamic", "yarn", "llama3", "theta")
FAR = 2**13
"""From this position on, rounding of float32 angles is put right (it is 5e-4 radians here, 4e-3 at
100,000)."""


def stretched_config(
    config: PretrainedConfig,
    type: str,
    factor: float = 1.0,
    theta: float | None = None,
    yarn: Mapping[str, float] = MappingProxyType({}),
) -> PretrainedConfig:
    """A copy of a config whose context is `factor` times as long; build the model from it.

    `max_position_embeddings` becomes the new context, except for "dynamic": transformers reads the
    trained context from it there, and stretches by itself as the input grows beyond that. Raises
    ValueError: unknown type, a model without RoPE, one that is stretched already, a missing or
    needless theta.

    Args:
        config: of a model with rotary positions that is not yet stretched.
        type: one of TYPES.
        factor: new context length over the trained one, at least 1.
        theta: the new base frequency, for type "theta" only.
        yarn: more of transformers' `rope_parameters`, for type "yarn" only; `factor` counts from
            its
            original_max_position_embeddings, where that is given.
    """
    if type not in TYPES:
        raise ValueError(f"rope type {type!r}: known are {', '.join(TYPES)}")
    whole = copy.deepcopy(config)
    config = whole.get_text_config(decoder=True)  # which is the whole, but for a model that also sees images
    rope: dict[str, Any] | None = getattr(config, "rope_parameters", None)
    if rope is None and type != "none":
        raise ValueError(f"{config.model_type} has no rotary positions: it cannot be stretched")
    if rope is None or "rope_theta" not in rope:
        raise ValueError(
            f"{config.model_type} has no single set of rotary parameters ({', '.join(sorted(rope or ['none']))}): "
            f"it cannot be stretched"
        )
    if rope.get("rope_type", "default") != "default" and type != "none":
        raise ValueError(f"the model's RoPE is {rope['rope_type']!r} already: stretch the one that it was made from")
    if (type == "theta") != (theta is not None) or factor < 1:
        raise ValueError(
            f"rope type {type!r} with theta {theta} and factor {factor}: theta goes with type 'theta' only"
        )
    if type == "none":
        return whole
    if rope["rope_theta"] is None:
        raise ValueError(f"{config.model_type} does not say its rope_theta in config.json: write it there")
    if getattr(config, "head_dim", 0) is None:  # Mixtral's, which transformers' own YaRN then cannot multiply
        config.head_dim = config.hidden_size // config.num_attention_heads
    trained = config.max_position_embeddings
    if type == "theta":
        config.rope_parameters = {**rope, "rope_theta": theta}
    else:
        config.rope_parameters = {**rope, "rope_type": type, "factor": factor}
    if type in ("yarn", "llama3"):
        config.rope_parameters |= {"original_max_position_embeddings": trained, **yarn}
    if type == "llama3":
        config.rope_parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if type != "dynamic":
        original = yarn.get("original_max_position_embeddings", trained)
        config.max_position_embeddings = math.ceil(original * factor)
        if config.max_position_embeddings < trained:
            raise ValueError(
                f"rope original_length {original} with factor {factor:g} gives {config.max_position_embeddings} "
                f"positions, less than the model's {trained}: raise factor to {trained / original:g} or more"
            )
    try:  # some families refuse types of RoPE, but only when they are saved
        config.validate()
    except StrictDataclassError as error:
        why = str(error).splitlines()[-1].strip()
        raise ValueError(f"{config.model_type} does not take rope type {type!r} ({why}): take 'theta'") from error
    return whole


@torch.no_grad()
def fix_frequencies(model: nn.Module, tokens: int) -> None:
    """Let rotary frequencies that depend on how long the input is be those of `tokens` from now on.

    transformers takes them from the greatest position of a batch ("longrope"), or of all batches so
    far ("dynamic"). So packed rows would be rotated otherwise by the documents beside them, and by
    what a rank has read since it was started.
    """
    for module in model.modules():
        if getattr(module, "rope_type", None) in ("dynamic", "longrope"):
            rotary: Any = module
            rotary(rotary.inv_freq, torch.tensor([[tokens - 1]], device=rotary.inv_freq.device))
            rotary.rope_type = "default"  # whose frequencies stay


@dataclass(frozen=True)
class Rotary:
    """The rotation that a model's attention applies to its queries and keys."""

    inv_freq_R: Tensor
    """Radians a position, float32, as transformers has them."""
    interleaved: bool
    """Whether pairs are neighbours (2i, 2i+1), as in Cohere and GLM, or halves (i, i+R), as in
    Llama."""

    @classmethod
    def of(cls, config: PretrainedConfig) -> Rotary:
        """From a model's config; how pairs lie is found by trying the family's own function. Raises
        ValueError: no rotary positions, or ones that further rotations cannot move: frequencies
        that differ by layer or change with the length of the input."""
        rope = getattr(config, "rope_parameters", None) or {}
        if not rope:
            raise ValueError(f"{config.model_type} has no rotary positions: its keys cannot be moved to other places")
        if "rope_theta" not in rope:
            raise ValueError(
                f"{config.model_type} rotates keys otherwise in some of its layers ({', '.join(sorted(rope))}): they "
                f"cannot be moved alike; count positions in the text"
            )
        if rope.get("rope_type") in ("dynamic", "longrope"):
            raise ValueError(
                f"rope type {rope['rope_type']!r} changes frequencies with the length of the input: keys that were "
                f"rotated before cannot be moved exactly; use 'linear', 'yarn' or 'llama3'"
            )
        thetas = {rope["rope_theta"], *(getattr(config, "layer_rope_theta", None) or ())}
        if len(thetas) > 1 or not all(getattr(config, "no_rope_layers", None) or ()):
            raise ValueError(
                f"{config.model_type} rotates keys otherwise in some of its layers, or not at all: they cannot be "
                f"moved alike; count positions in the text"
            )
        family = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
        names = [name for name in vars(family) if name.endswith("RotaryEmbedding") and "Vision" not in name]
        if len(names) != 1 or not hasattr(family, "apply_rotary_pos_emb"):
            raise ValueError(f"{config.model_type}: no single rotary embedding in {family.__name__} ({names})")
        embedding = getattr(family, names[0])(config)
        for interleaved in (False, True):
            rotary = cls(embedding.inv_freq.detach().float().cpu(), interleaved)
            if rotary._is_that_of(family, embedding):
                return rotary
        raise ValueError(f"{config.model_type} lays out rotated pairs neither as halves nor as neighbours")

    def _is_that_of(self, family: Any, embedding: Any) -> bool:
        """Whether three positions come out as from the family's own function."""
        x_1HTD = torch.randn(1, 1, 3, 2 * len(self.inv_freq_R), generator=torch.Generator().manual_seed(0))
        at_T = torch.tensor([0, 1, 5])
        cos, sin = embedding(x_1HTD, at_T[None])
        theirs, _ = family.apply_rotary_pos_emb(x_1HTD, x_1HTD, cos, sin)
        ours = turned(x_1HTD, self.cos_sin(self.angles(at_T), x_1HTD), self.interleaved) * embedding.attention_scaling
        return torch.allclose(theirs, ours, rtol=1e-4, atol=1e-4)

    def angles(self, by_T: Tensor) -> Tensor:
        """Return the radians [T, R] of a turn by so many positions, in float64, on the positions'
        device."""
        return by_T.double()[:, None] * self.inv_freq_R.to(by_T.device).double()

    def rounding(self, at_T: Tensor) -> Tensor:
        """Radians [T, R] that transformers' float32 angle of a position falls short of the true
        one; 0 before FAR."""
        off_TR = self.angles(at_T) - (at_T.float()[:, None] * self.inv_freq_R.to(at_T.device)).double()
        return off_TR * (at_T >= FAR)[:, None]

    def put_right(self, x_BHTD: Tensor, at_T: Tensor) -> Tensor:
        """Queries or keys that transformers rotated to at_T, free of the rounding of far angles."""
        if int(at_T.max()) < FAR:
            return x_BHTD
        return turned(x_BHTD, self.cos_sin(self.rounding(at_T.to(x_BHTD.device)), x_BHTD), self.interleaved)

    def turn(self, x_BHTD: Tensor, by_T: Tensor) -> Tensor:
        """Rotated queries or keys as they would be by_T positions later."""
        return turned(x_BHTD, self.cos_sin(self.angles(by_T.to(x_BHTD.device)), x_BHTD), self.interleaved)

    @staticmethod
    def cos_sin(angles_TR: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of angles, in the type and place of another tensor."""
        return angles_TR.cos().to(like), angles_TR.sin().to(like)


def turned(x: Tensor, cos_sin: tuple[Tensor, Tensor], interleaved: bool = False) -> Tensor:
    """x [..., T, D] with its first 2R values rotated, pair by pair; cosine and sine are [..., T,
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
    if x.shape[-1] > 2 * pairs:  # an empty tensor would be copied all the same
        rotated.append(x[..., 2 * pairs :])
    return torch.cat(rotated, -1)
