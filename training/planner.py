"""What a training step will cost, before it is trained: FLOPs, memory and seconds, by counting.

FLOPs are those of the matrices and of the keys that a pattern lets a query see; memory is what ZeRO leaves on a rank
plus what the backward pass needs of each layer; seconds are the FLOPs and bytes over what this machine was measured to
do (training/throughput.py `calibrate`), each kind of work at its own rate. Llama-like models (q, k, v, o, a gated MLP).
No torch here: `longreach plan` reads this in milliseconds.

    predict(Shape.of(config), arm, tokens=1024, seq_len=1024, resources=..., machine=...)

Legend: a row is seq_len tokens; a rank holds `tokens` of them at once; floats are numbers of the compute type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from infra.resources import Resources
from training.recipe import ArmRecipe, AttentionRecipe

GIB = 2**30
LOSS_CHUNK = 512
"""Tokens whose logits exist at once (training/loss.py)."""
ATTENTION_BACKWARD = 2.5
"""Products of the flash backward over those of its forward: scores again, and four for the gradients, over two."""


@dataclass(frozen=True)
class Shape:
    """What of a model decides its cost."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From a config.json's content."""
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
        )

    @property
    def attention_matrices(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's attention matrices by name."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
        }

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(in, out) of all of a layer's matrices by name."""
        wide = {"gate_proj": (self.hidden, self.intermediate), "up_proj": (self.hidden, self.intermediate)}
        return self.attention_matrices | wide | {"down_proj": (self.intermediate, self.hidden)}

    @property
    def layer_parameters(self) -> int:
        """Of all layers' matrices."""
        return self.layers * sum(a * b for a, b in self.matrices.values())

    @property
    def embedding_parameters(self) -> int:
        """Of the input embedding."""
        return self.vocab * self.hidden

    @property
    def norm_parameters(self) -> int:
        """Of all norms."""
        return (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        """All."""
        head = 0 if self.tied else self.embedding_parameters
        return self.layer_parameters + self.embedding_parameters + head + self.norm_parameters

    def trained(self, arm: ArmRecipe) -> dict[str, int]:
        """Parameters that an arm trains, by kind."""
        if arm.tune == "all":
            return {"layers": self.layer_parameters, "lora": 0, "norm": self.norm_parameters,
                    "embed": self.parameters - self.layer_parameters - self.norm_parameters}  # fmt: skip
        lora = self.layers * sum(
            arm.lora_rank * sum(sizes) for name, sizes in self.matrices.items() if name in arm.target_modules
        )
        embed, norm = "embed" in arm.tune, "norm" in arm.tune
        return {"layers": 0, "lora": lora, "norm": self.norm_parameters * norm, "embed": self.embedding_parameters * embed}


@dataclass(frozen=True)
class Machine:
    """What one rank does in a second, all ranks of its host at work; measured."""

    matmul: float
    """FLOPs of the model's own matrices."""
    attention: float
    """FLOPs of the attention kernel, forward."""
    attention_backward: float
    """The same, backward."""
    bytes: float
    """Bytes read and written by elementwise operations on fresh tensors."""
    process_gib: float
    """A rank before it has a model."""


@dataclass(frozen=True)
class Prediction:
    """Of one optimizer step."""

    flops: float
    """Of all ranks; recomputation is not in it, so that MFU does not reward it."""
    peak_gib: float
    """Of all ranks together."""
    memory_gib: dict[str, float]
    """The same by what it is for."""
    step_s: float | None
    """Seconds; None for a machine that was not measured."""

    def facts(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def mean_keys(attention: AttentionRecipe, document: float) -> float:
    """How many keys a query sees on average in documents of so many tokens: the pattern's density."""
    group = attention.group_tokens
    if attention.pattern == "causal" or group is None or group >= document:
        return (document + 1) / 2
    grouped = (group + 1) / 2
    # half the heads are shifted: document / group - 1 whole groups between two halves
    shifted = grouped * (1 - group / (2 * document)) if attention.pattern == "shifted_sparse" else grouped
    return (grouped + shifted) / 2 + attention.sink_tokens * (1 - group / document)


def predict(
    shape: Shape,
    arm: ArmRecipe,
    *,
    rows: int,
    seq_len: int,
    resources: Resources,
    machine: Machine | None = None,
    document: float | None = None,
) -> Prediction:
    """What a step of `rows` rows costs on all ranks together.

    document: mean length of the document that a token stands in (of isolated documents); a whole row without it.
    """
    tokens, world = rows * seq_len, resources.workers
    trained = shape.trained(arm)
    keys = mean_keys(arm.attention, document or seq_len)
    forward = 2 * (shape.layer_parameters + trained["lora"])
    backward = forward + 2 * (trained["layers"] + trained["lora"])
    loss = 2 * shape.vocab * shape.hidden * (2 + bool(trained["embed"]))
    attention = 4 * keys * shape.heads * shape.head_dim * shape.layers
    again = bool(resources.activation_checkpointing)
    flops = tokens * (forward + backward + loss + attention * (1 + ATTENTION_BACKWARD))
    memory = _memory(shape, arm, trained, resources, seq_len)
    process = machine.process_gib if machine else PROCESS_GIB
    by_kind = {"process": world * process} | {kind: world * size / GIB for kind, size in memory.items()}
    step_s = None
    if machine:
        share = tokens / world
        step_s = share * (forward * (1 + again) + backward + loss) / machine.matmul
        step_s += share * attention * ((1 + again) / machine.attention + ATTENTION_BACKWARD / machine.attention_backward)
        step_s += share * _traffic(shape, arm) * (1 + again / 3) / machine.bytes
        step_s += OPTIMIZER_BYTES * sum(trained.values()) / (world if resources.zero_stage else 1) / machine.bytes
    return Prediction(flops, sum(by_kind.values()), by_kind, step_s)
