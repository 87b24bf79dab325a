"""Stretching rotary positions past the trained context, through transformers' own `rope_parameters`.

A model trained on positions 0..L-1 has never seen the rotation of position L. Position interpolation (arXiv:2306.15595)
divides positions by the factor, so that new ones fall between old ones; NTK-aware, YaRN (arXiv:2309.00071) and
Llama-3 scaling treat slow and fast frequencies apart; `theta` only raises the base frequency, without any training.

    stretched_config(AutoConfig.from_pretrained(folder), "linear", 2.0)
"""

from __future__ import annotations

import copy
import math
from typing import Any

from transformers import PretrainedConfig

TYPES = ("none", "linear", "dynamic", "yarn", "llama3", "theta")


def stretched_config(
    config: PretrainedConfig, type: str, factor: float = 1.0, theta: float | None = None
) -> PretrainedConfig:
    """A copy of a config whose context is `factor` times as long; build the model from it.

    Args:
        config: of a model with rotary positions that is not yet stretched.
        type: one of TYPES.
        factor: new context length over the trained one, at least 1.
        theta: the new base frequency, for type "theta" only.

    Raises:
        ValueError: unknown type, a model without RoPE, one that is stretched already, a missing or needless theta.
    """
    rope: dict[str, Any] | None = getattr(config, "rope_parameters", None)
    if type not in TYPES:
        raise ValueError(f"rope type {type!r}: known are {', '.join(TYPES)}")
    if rope is None or "rope_theta" not in rope:
        raise ValueError(f"{config.model_type} has no single set of rotary parameters ({rope}): it cannot be stretched")
    if rope.get("rope_type", "default") != "default" and type != "none":
        raise ValueError(f"the model's RoPE is {rope['rope_type']!r} already: stretch the one that it was made from")
    if (type == "theta") != (theta is not None) or factor < 1:
        raise ValueError(
            f"rope type {type!r} with theta {theta} and factor {factor}: theta goes with type 'theta' only"
        )
    config = copy.deepcopy(config)
    if type == "none":
        return config
    trained = config.max_position_embeddings
    more: dict[str, Any] = {
        "linear": {"factor": factor},
        "dynamic": {"factor": factor},
        "yarn": {"factor": factor, "original_max_position_embeddings": trained},
        "llama3": {
            "factor": factor,
            "original_max_position_embeddings": trained,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        "theta": {"rope_theta": theta},
    }[type]
    config.rope_parameters = {**rope, **more} if type == "theta" else {**rope, "rope_type": type, **more}
    config.max_position_embeddings = math.ceil(trained * factor)
    return config
