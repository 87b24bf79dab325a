"""What a training step will cost, before it is trained: FLOPs, memory and seconds, by counting.

FLOPs are those of the matrices and of the keys that a pattern lets a query see; memory is what ZeRO leaves on a rank
plus what the backward pass needs of each layer; seconds are the FLOPs and bytes over what this machine was measured to
do (training/throughput.py `calibrate`), each kind of work at its own rate. Llama-like models (q, k, v, o, a gated MLP).
No torch here: `longreach plan` reads this in milliseconds.

    predict(Shape.of(config), arm, rows=2, seq_len=1024, resources=resources, machine=machine).step_s

"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from longreach.infra.resources import Resources
from longreach.training.recipe import ArmRecipe

GIB = 2**30
CONFIG_KEYS = ("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
LOSS_CHUNK = 512
"""Tokens whose logits exist at once (training/loss.py)."""
ATTENTION_BACKWARD = 2.5
"""Products of the flash backward over those of its forward: scores again, and four for the gradients, over two."""
PASSES = 3
"""Elementwise operations read about two floats for each that they write."""
LOSS_PASSES = 12
"""Times that a logit is read or written: made, summed, lowered, exponentiated, marked, weighted, and used twice."""
OPTIMIZER_BYTES = 7 * 4
"""AdamW reads weight, gradient and two moments, and writes three of them."""
SHARDED_BYTES = 6 * 4
"""ZeRO copies each gradient into a bucket and into its owner's part, and each new weight back into the model."""
BUCKET, PREFETCH = 5e8, 5e7
"""Numbers that one collective carries at most, and what ZeRO-3 gathers ahead at once (DeepSpeed's defaults)."""
LIVE = 1e9
"""Weights that ZeRO-3 keeps whole on each GPU at most (DeepSpeed's stage3_max_live_parameters)."""
PROCESS_GIB = 0.65
"""A rank with torch, DeepSpeed and Ray before it has a model, where none was measured."""


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
        """From a config.json's content; what it does not say is 0, and then nothing `counts`."""
        config = dict.fromkeys(CONFIG_KEYS, 0) | dict(config)
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // max(heads, 1),
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
        )

    def counts(self, parameters: int) -> bool:
        """Whether this counting fits a model of `parameters` parameters (LoRA's left out): within 2%."""
        return abs(self.parameters - parameters) < 0.02 * parameters

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
        return {
            "layers": 0,
            "lora": lora,
            "norm": self.norm_parameters * norm,
            "embed": self.embedding_parameters * embed,
        }


@dataclass(frozen=True)
class Machine:
    """What one rank does in a second, all ranks at work; measured (training/throughput.py)."""

    matmul: float
    """FLOPs of the model's own matrices."""
    attention: float
    """FLOPs of the attention kernel, forward."""
    attention_backward: float
    """The same, backward."""
    bytes: float
    """Bytes that a layer's elementwise operations read and write, by PASSES' counting, forward and backward."""
    process_gib: float
    """A rank before it has a model."""
    exchange: float | None = None
    """Bytes of a tensor that all ranks add up (all-reduce); None for a rank alone."""
    host: float | None = None
    """Bytes between a GPU and what was offloaded to its host's memory; None where that was not measured."""
    latency: float = 0.0
    """Seconds of an all-reduce of next to nothing; where `exchange` was measured it is in there."""


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
    seconds: dict[str, float] = field(default_factory=dict)
    """The same by what they go into; nothing is taken to overlap."""


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
    keys = arm.attention.mean_keys(document or seq_len)
    forward = 2 * (shape.layer_parameters + trained["lora"])
    backward = forward + 2 * (trained["layers"] + trained["lora"])
    loss = 2 * shape.vocab * shape.hidden * (2 + bool(trained["embed"]))
    attention = 4 * keys * shape.heads * shape.head_dim * shape.layers
    again = bool(resources.activation_checkpointing)
    flops = tokens * (forward + backward + loss + attention * (1 + ATTENTION_BACKWARD))
    memory = _memory(shape, arm, trained, resources, seq_len)
    memory["process"] = (machine.process_gib if machine else PROCESS_GIB) * GIB * (not resources.gpus_per_worker)
    by_kind = {kind: world * size / GIB for kind, size in memory.items()}
    if machine is None:
        return Prediction(flops, sum(by_kind.values()), by_kind, None)
    share, count = tokens / world, sum(trained.values())
    size, stage = 2 if resources.dtype == "bfloat16" else 4, resources.zero_stage
    sharded, passes = stage > 0, rows * resources.sequence_parallel / (world * resources.micro_batch_rows)
    product = (1 + again) / machine.attention + ATTENTION_BACKWARD / machine.attention_backward
    moved = share * (_traffic(shape, arm, size) * (1 + again / 3) + LOSS_PASSES * 4 * shape.vocab)
    updated = count * (OPTIMIZER_BYTES / (world if sharded else 1) + SHARDED_BYTES * sharded)
    seconds = {
        "matrices": share * (forward * (1 + again) + backward + loss) / machine.matmul,
        "attention": share * attention * product,
        "elementwise": moved / machine.bytes,
        "optimizer": updated / machine.bytes,
    }
    if machine.exchange:
        numbers = _exchanged(shape.parameters, count, passes, stage) + share * _resharded(shape, resources)
        gathers, buckets = math.ceil(shape.parameters / PREFETCH), math.ceil(count / BUCKET)
        times = _exchanged(gathers, buckets, passes, stage)
        seconds["exchange"] = numbers * size / machine.exchange + times * machine.latency
    if machine.host and resources.gpus_per_worker and resources.offload != "none":
        fetched = count * OPTIMIZER_BYTES + resources.offload_parameters * 2 * passes * size * shape.parameters
        seconds["host"] = fetched / world / machine.host
    return Prediction(flops, sum(by_kind.values()), by_kind, sum(seconds.values()), seconds)


def _exchanged(weights: int, count: int, passes: float, zero_stage: int) -> float:
    """Numbers (or collectives) that the ranks share in a step of so many forward passes, in all-reduced ones; gathering
    counts half. `weights`: of the model; `count`: those that are trained.

    Gradients are added up once, from stage 2 on after each pass; new weights are gathered once in stages 1 and 2, in
    stage 3 all weights twice a pass.
    """
    gathered = {0: 0.0, 1: count / 2, 2: count / 2, 3: passes * weights}[zero_stage]
    return count * (passes if zero_stage >= 2 else 1) + gathered


def _resharded(shape: Shape, resources: Resources) -> float:
    """Numbers a token of a rank's own that ranks sharing a row exchange, in all-reduced ones: q, k, v and the result of
    each layer change hands in the forward pass, its repetition and the backward; sending to others counts half."""
    ranks, repeated = resources.sequence_parallel, bool(resources.activation_checkpointing)
    if ranks == 1:
        return 0.0
    return (2 + repeated) * shape.layers * 2 * (shape.heads + shape.kv_heads) * shape.head_dim * (ranks - 1) / ranks / 2


def outputs(shape: Shape, arm: ArmRecipe) -> int:
    """Floats a token that the operations of one layer return in its forward pass, saved for the backward or not."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms, residuals, attention = 2 * 3 * shape.hidden, 2 * shape.hidden, 2 * q
    rotated = 5 * q + 6 * kv  # projected; times cos, turned by half, times sin, summed; v is only projected
    sizes = [shape.matrices[name][1] for name in arm.target_modules if name in shape.matrices]
    lora = 0 if arm.tune == "all" else 2 * sum(sizes)  # B's product, and its sum with the frozen one's
    return norms + residuals + attention + rotated + 4 * shape.intermediate + lora


def _saved(shape: Shape, arm: ArmRecipe, zero_stage: int) -> int:
    """Floats a token that one layer keeps for its backward pass. Frozen matrices and norms need no input, but ZeRO-3's
    own linear keeps it all the same."""
    every, norms = arm.tune == "all" or zero_stage == 3, arm.tune == "all" or "norm" in arm.tune
    kv = shape.kv_heads * shape.head_dim
    wide = (5 + 2 * norms + every) * shape.hidden
    return wide + (3 + every) * shape.intermediate + 2 * kv


def _memory(
    shape: Shape, arm: ArmRecipe, trained: Mapping[str, int], resources: Resources, seq_len: int
) -> dict[str, float]:
    """Bytes of one rank by what they are for, but for the process itself.

    On a CPU glibc's allocator keeps what it was given once (RESULTS.md), so that what every operation of a layer
    returns stays resident; a GPU's caching allocator gives freed blocks to the next layer.
    """
    world, stage = resources.workers, resources.zero_stage
    size = 2 if resources.dtype == "bfloat16" else 4
    tokens, count = resources.micro_batch_rows * seq_len // resources.sequence_parallel, sum(trained.values())
    share = {0: 1, 1: world, 2: world, 3: world}[stage]
    on_device = resources.offload == "none" or not resources.gpus_per_worker
    layer = outputs(shape, arm) if not resources.gpus_per_worker else _saved(shape, arm, stage)
    kept = (shape.layers * shape.hidden + layer) if resources.activation_checkpointing else shape.layers * layer
    chunk = min(tokens, LOSS_CHUNK) * shape.vocab
    away = resources.offload_parameters and not on_device
    gradients = {0: 1.0, 1: 1.0, 2: 1 + 1 / world, 3: on_device / world}[stage]
    return {
        "weights": size * shape.parameters / (world if stage == 3 else 1) * (not away),
        "gathered": size * min(LIVE, shape.parameters) * (stage == 3 and world > 1 and bool(resources.gpus_per_worker)),
        "gradients": size * count * gradients,
        "optimizer": (4 * (2 + bool(stage or size < 4)) * count / share) * on_device,
        "activations": size * kept * tokens,
        "loss": 4 * chunk + size * tokens * shape.hidden + 4 * shape.embedding_parameters * bool(trained["embed"]),
    }


def _traffic(shape: Shape, arm: ArmRecipe, size: int) -> float:
    """Bytes a token that a step's elementwise operations move, the backward twice as many as the forward."""
    return size * 3 * PASSES * shape.layers * outputs(shape, arm)
