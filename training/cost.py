"""Predict the cost of a training step by counting: FLOPs, memory and seconds.

FLOPs are those of the matrices, and of attention for the keys that a pattern lets a query see.
Memory is what ZeRO leaves on a rank, plus what the backward pass needs from each layer. Seconds are
FLOPs and bytes divided by the measured rates of this machine (`calibrate`), one for each kind of
work. The model must be Llama-like. Assumed constants, which are not measured, come first.
This module does not import torch at import time, since `longreach plan` uses it.

    predict(Shape.of(config), arm, rows=2, seq_len=1024, resources=resources,
    machine=machine).step_s

Legend: T tokens, H heads, D head dim, E hidden size, I intermediate size, N and M a matrix's inputs
and outputs.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longreach.infra.files import write_whole
from longreach.infra.machine import GIB
from longreach.infra.resources import Resources
from longreach.training.recipe import ArmRecipe, TrainJob

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CONFIG_KEYS = ("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")

ATTENTION_BACKWARD = 2.5
"""Ratio of backward to forward FLOPs of the attention kernel. FlashAttention computes 2 products
forward (scores, values) and 5 backward (scores again, and gradients of q, k, v and scores)."""
BACKWARD_TRAFFIC = 2
"""Ratio of backward to forward memory traffic of elementwise operations, which read the saved input
and the gradient in the backward pass."""
PASSES = 3
"""Floats that an elementwise operation moves per returned one: about two reads and a write."""
LOSS_PASSES = 12
"""Memory passes over the logits in training/loss.py: the matmul writes 1, the maximum reads 1,
subtracting and exponentiating move 2 each, the sum reads 1, weighting moves 2, marking the targets
about 1, and the products for the two gradients read 1 each."""
LOSS_CHUNK = 512  # tokens whose logits exist at the same time (training/loss.py)
OPTIMIZER_BYTES = 7 * 4
"""Bytes that an AdamW step moves per trained parameter, in float32: it reads the weight, the
gradient and two moments, and writes all of these except the gradient."""
SHARDED_BYTES = 6 * 4
"""Bytes that ZeRO adds per trained parameter: it copies each gradient into a bucket and from there
to its owner's shard, and each new weight back into the model. Each copy is a read and a write."""
BUCKET_NUMBERS = 5e8  # maximum numbers in one collective (DeepSpeed's reduce_bucket_size)
PREFETCH_NUMBERS = 5e7
"""Numbers that ZeRO-3 gathers at once (DeepSpeed's stage3_prefetch_bucket_size)."""
LIVE_NUMBERS = 1e9
"""Most numbers that ZeRO-3 keeps gathered on a GPU (DeepSpeed's stage3_max_live_parameters)."""
PROCESS_GIB = 0.65
"""Memory of a rank with torch, DeepSpeed and Ray, but without a model, if it was not measured
(RESULTS.md)."""
KNOWN_WITHIN = 0.02
"""Largest relative error of the counted number of parameters. A model beyond it is not Llama-like,
and its cost is not predicted."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that determine its cost."""

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
        """Read the content of a config.json. Missing sizes are 0, so `counts` returns False."""
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

    @classmethod
    def from_summary(cls, facts: Mapping[str, Any]) -> Shape | None:
        """Return the shape in a converted model's summary; None if one of the sizes is missing."""
        names = [one.name for one in fields(cls)]
        if not facts.keys() >= {*names}:
            return None
        return cls(**{name: facts[name] for name in names})

    def counts(self, parameters: int) -> bool:
        """Return whether the count matches a model's number of parameters, without LoRA's."""
        return abs(self.parameters - parameters) < KNOWN_WITHIN * parameters

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return (inputs, outputs) of a layer's matrices by name."""
        return {
            "q_proj": (self.hidden, self.q_width),
            "k_proj": (self.hidden, self.kv_width),
            "v_proj": (self.hidden, self.kv_width),
            "o_proj": (self.q_width, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def layer_parameters(self) -> int:
        return self.layers * sum(inputs * outputs for inputs, outputs in self.matrices.values())

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def norm_parameters(self) -> int:
        return (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        """Return the number of parameters of the whole model; a tied head counts once."""
        heads = 1 if self.tied else 2
        return self.layer_parameters + heads * self.embedding_parameters + self.norm_parameters

    def trained(self, arm: ArmRecipe) -> dict[str, int]:
        """Return how many parameters an arm trains, by kind; an untied head is in `embed`."""
        if arm.tune == "all":
            embed = self.parameters - self.layer_parameters - self.norm_parameters
            return {"layers": self.layer_parameters, "lora": 0, "norm": self.norm_parameters, "embed": embed}
        trained = {"layers": 0, "lora": 0, "norm": 0, "embed": 0}
        for name, (inputs, outputs) in self.matrices.items():
            if arm.adapts(name):
                trained["lora"] += self.layers * arm.lora_rank * (inputs + outputs)
        if "norm" in arm.tune:
            trained["norm"] = self.norm_parameters
        if "embed" in arm.tune:
            trained["embed"] = self.embedding_parameters
        return trained

    def trains_head(self, arm: ArmRecipe) -> bool:
        """Return whether an arm trains the head's weight: with LoRA, only if it is tied."""
        return arm.tune == "all" or ("embed" in arm.tune and self.tied)


@dataclass(frozen=True)
class Machine:
    """The rates of a rank while all ranks work, as measured by `calibrate` or from a data sheet."""

    matmul: float  # FLOP/s of the model's own matrices
    attention: float  # FLOP/s of the attention kernel in the forward pass
    attention_backward: float
    bytes: float
    """Bytes/s of elementwise operations, counted with PASSES and BACKWARD_TRAFFIC."""
    process_gib: float  # memory of a rank without a model
    exchange: float | None = None
    """Bytes/s of an all-reduce; None for a single rank."""
    host: float | None = None
    """Bytes/s between a GPU and its host's memory, for offloading; None if it was not measured."""
    latency: float = 0.0
    """Seconds of an all-reduce of a tiny tensor; 0 if the measured `exchange` includes it."""


@dataclass(frozen=True)
class Prediction:
    """The predicted cost of one optimizer step."""

    flops: float  # FLOPs of all ranks, without recomputation, so that it does not increase MFU
    peak_gib: float  # peak memory of all ranks together
    memory_gib: dict[str, float]  # peak memory by use
    step_s: float | None  # seconds; None if the machine's rates are not known
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by kind of work, assuming that nothing overlaps."""


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
    """Predict the cost of a step of `rows` rows on all ranks together.

    Args:
        document: mean over tokens of their isolated document's length; None for whole rows.
    """
    step = _Step(shape, arm, resources, rows, seq_len)
    flops_per_token = step.flops_per_token(document or seq_len)
    flops = rows * seq_len * sum(flops_per_token.values())
    memory = step.memory()
    if not resources.gpus_per_worker:  # a GPU's peak_gib is what torch allocated there, without the process
        memory["process"] = (machine.process_gib if machine else PROCESS_GIB) * GIB
    memory_gib = {kind: resources.workers * size / GIB for kind, size in memory.items()}
    peak_gib = sum(memory_gib.values())
    if machine is None:
        return Prediction(flops, peak_gib, memory_gib, None)
    seconds = step.seconds(flops_per_token, machine)
    return Prediction(flops, peak_gib, memory_gib, sum(seconds.values()), seconds)


class _Step:
    """The cost of one optimizer step of an arm, for one rank."""

    def __init__(self, shape: Shape, arm: ArmRecipe, resources: Resources, rows: int, seq_len: int) -> None:
        self.shape, self.arm, self.resources = shape, arm, resources
        self.seq_len = seq_len
        self.tokens = rows * seq_len / resources.workers
        self.passes = rows * resources.sequence_parallel / (resources.workers * resources.micro_batch_rows)
        self.number_bytes = 2 if resources.dtype == "bfloat16" else 4  # size of a weight, gradient or activation
        self.trained = shape.trained(arm)
        self.trained_numbers = sum(self.trained.values())

    def flops_per_token(self, document: float) -> dict[str, float]:
        """Return the FLOPs per token by kind of work; a multiply-add counts as two."""
        shape, trained = self.shape, self.trained
        forward = 2 * (shape.layer_parameters + trained["lora"])
        # the backward pass uses each weight for its input's gradient, and again for its own gradient
        # if it is trained
        backward = forward + 2 * (trained["layers"] + trained["lora"])
        # the logits, the gradient of the hidden states, and that of the head's weight if it is
        # trained
        loss_products = 3 if shape.trains_head(self.arm) else 2
        # q·k and probabilities·v for each key that the pattern lets a query see
        attention = 4 * self.arm.attention.mean_keys(document) * shape.q_width * shape.layers
        return {
            "forward": forward,
            "backward": backward,
            "loss": 2 * shape.vocab * shape.hidden * loss_products,
            "attention_forward": attention,
            "attention_backward": attention * ATTENTION_BACKWARD,
        }

    def seconds(self, flops: Mapping[str, float], machine: Machine) -> dict[str, float]:
        """Return a rank's seconds by kind of work; `flops` are per token."""
        shape, resources = self.shape, self.resources
        forwards = 2 if resources.activation_checkpointing else 1  # the backward pass repeats each layer's forward
        matrix_flops = forwards * flops["forward"] + flops["backward"] + flops["loss"]
        attention_s = forwards * flops["attention_forward"] / machine.attention
        attention_s += flops["attention_backward"] / machine.attention_backward
        layer_bytes = self.number_bytes * PASSES * shape.layers * outputs(shape, self.arm)
        logit_bytes = 4 * LOSS_PASSES * shape.vocab  # always in float32
        token_bytes = (forwards + BACKWARD_TRAFFIC) * layer_bytes + logit_bytes
        update_bytes: float = OPTIMIZER_BYTES
        if resources.zero_stage:  # each rank updates its own share of the parameters
            update_bytes = OPTIMIZER_BYTES / resources.workers + SHARDED_BYTES
        seconds = {
            "matrices": self.tokens * matrix_flops / machine.matmul,
            "attention": self.tokens * attention_s,
            "elementwise": self.tokens * token_bytes / machine.bytes,
            "optimizer": self.trained_numbers * update_bytes / machine.bytes,
        }
        if machine.exchange:
            numbers = self._all_reduced(shape.parameters, self.trained_numbers)
            numbers += self.tokens * self._all_to_all_per_token()
            gathers = math.ceil(shape.parameters / PREFETCH_NUMBERS)
            collectives = self._all_reduced(gathers, math.ceil(self.trained_numbers / BUCKET_NUMBERS))
            seconds["exchange"] = numbers * self.number_bytes / machine.exchange + collectives * machine.latency
        if machine.host and resources.gpus_per_worker and resources.offload != "none":
            moved = float(self.trained_numbers * OPTIMIZER_BYTES)
            if resources.offload_parameters:  # fetched for each forward and each backward pass
                moved += 2 * self.passes * self.number_bytes * shape.parameters
            seconds["host"] = moved / resources.workers / machine.host
        return seconds

    def _all_reduced(self, weights: int, trained: int) -> float:
        """Return the volume of the collectives, in units of an all-reduce.

        An all-gather or a reduce-scatter counts 1/2. `weights` and `trained` are the numbers (or
        collectives) of the whole model and of the trained parameters.
        """
        if self.resources.zero_stage == 0:
            return trained  # gradients are summed once
        if self.resources.zero_stage == 1:
            return trained + trained / 2  # and the new weights are gathered once
        # from stage 2 on, a rank keeps only its own shard of the gradients, so they are summed after
        # each pass
        if self.resources.zero_stage == 2:
            return self.passes * trained + trained / 2
        # stage 3 gathers all weights for each forward and each backward pass
        return self.passes * trained + 2 * self.passes * weights / 2

    def _all_to_all_per_token(self) -> float:
        """Return the all-to-all volume of sequence parallelism, in numbers per token.

        It is in units of an all-reduce. Ranks that share a row exchange q, k, v and the attention
        output of each layer in the forward pass, its recomputation and the backward pass
        (attention/ulysses.py).
        """
        exchanges = 3 if self.resources.activation_checkpointing else 2
        per_layer = 2 * (self.shape.q_width + self.shape.kv_width)  # q and the output; k and v
        to_others = 1 - 1 / self.resources.sequence_parallel  # a rank keeps its own part
        return exchanges * self.shape.layers * per_layer * to_others / 2

    def memory(self) -> dict[str, float]:
        """Return the bytes of one rank by use, without the process itself."""
        shape, resources, number = self.shape, self.resources, self.number_bytes
        world, stage, on_gpu = resources.workers, resources.zero_stage, resources.gpus_per_worker > 0
        tokens = resources.micro_batch_rows * self.seq_len // resources.sequence_parallel
        offloaded = on_gpu and resources.offload != "none"

        weights: float = number * shape.parameters
        gathered = 0.0
        if stage == 3:
            if on_gpu and world > 1:  # each GPU gathers the weights of the layers it computes
                gathered = number * min(LIVE_NUMBERS, shape.parameters)
            weights /= world
        if offloaded and resources.offload_parameters:
            weights = 0

        gradients = float(number * self.trained_numbers)
        if stage == 2:
            gradients *= 1 + 1 / world  # a bucket of full gradients, and the rank's own shard
        elif stage == 3:
            gradients *= 0 if offloaded else 1 / world

        optimizer = 4.0 * 2 * self.trained_numbers  # two moments in float32
        if stage or number < 4:
            optimizer += 4 * self.trained_numbers  # and the float32 weight that ZeRO or bfloat16 training updates
        if stage:
            optimizer /= world
        if offloaded:
            optimizer = 0

        # On a CPU, glibc's allocator keeps freed memory (RESULTS.md), so nearly everything that a layer's
        # operations return stays resident: of an adapter's output and its sum with the frozen
        # matrix's, about one (measured). A GPU's caching allocator gives freed blocks to the next layer.
        layer = outputs(shape, self.arm) - adapter_outputs(shape, self.arm)
        if on_gpu:
            layer = saved(shape, self.arm, stage)
        kept = shape.layers * layer
        if resources.activation_checkpointing:  # the input of each layer, and everything of the layer being recomputed
            kept = shape.layers * shape.hidden + layer

        loss = 4 * min(tokens, LOSS_CHUNK) * shape.vocab  # logits
        loss += number * tokens * shape.hidden  # gradient of the hidden states
        if shape.trains_head(self.arm):
            loss += 4 * shape.embedding_parameters  # the head's gradient in float32
        memory = {"weights": weights, "gathered": gathered, "gradients": gradients, "optimizer": optimizer}
        return memory | {"activations": number * kept * tokens, "loss": loss}


def outputs(shape: Shape, arm: ArmRecipe) -> int:
    """Return the floats per token that a layer's operations return in the forward pass."""
    norms = 2 * 3 * shape.hidden  # two norms: squared, scaled to unit variance, times the weight
    residuals = 2 * shape.hidden
    attention = 2 * shape.q_width  # the kernel's output, and its copy in o_proj's layout
    # q and k: projected, times cos, its halves swapped, times sin, summed; v is only projected
    rotated = 5 * (shape.q_width + shape.kv_width) + shape.kv_width
    gated = 4 * shape.intermediate  # gate, up, silu(gate), and the product
    lora = 2 * adapter_outputs(shape, arm)  # the output of B, and its sum with the frozen matrix's output
    return norms + residuals + attention + rotated + gated + lora


def adapter_outputs(shape: Shape, arm: ArmRecipe) -> int:
    """Return the floats per token that a layer's adapters return; 0 without LoRA."""
    if arm.tune == "all":
        return 0
    return sum(width for name, (_, width) in shape.matrices.items() if arm.adapts(name))


def saved(shape: Shape, arm: ArmRecipe, zero_stage: int) -> int:
    """Return the floats per token that one layer keeps for its backward pass."""
    hidden, intermediate = 5, 3
    if arm.tune == "all" or "norm" in arm.tune:
        hidden += 2  # the input of each norm's weight
    # a frozen matrix does not need its input, but its adapter does, and ZeRO-3's linear keeps it
    every_input = arm.tune == "all" or zero_stage == 3
    if every_input or arm.adapts("gate_proj") or arm.adapts("up_proj"):
        hidden += 1
    if every_input or arm.adapts("down_proj"):
        intermediate += 1
    return hidden * shape.hidden + intermediate * shape.intermediate + 2 * shape.kv_width


def what_would_fit(resources: Resources, seq_len: int, error: str) -> str:
    """Return an out-of-memory message with the changes to try, the least costly change first."""
    changes = []
    if resources.micro_batch_rows > 1:
        changes.append(f"resources.micro_batch_rows {resources.micro_batch_rows} -> {resources.micro_batch_rows // 2}")
    if not resources.activation_checkpointing:
        changes.append("resources.activation_checkpointing true")
    if resources.zero_stage < 3 and resources.workers > 1:
        changes.append(f"resources.zero_stage {resources.zero_stage} -> 3")
    changes.append(f"pack.seq_len {seq_len} -> {seq_len // 2}")
    return (
        f"out of memory with {resources.micro_batch_rows} rows of {seq_len} tokens at once ({error.splitlines()[0]}): "
        f"in this order, try {', '.join(changes)}"
    )


CALIBRATION_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Number of tokens, by device, above which rates hardly change. With fewer tokens, kernel launches
limit a GPU."""
CALIBRATION_LAYERS = 4
"""Layers kept alive during the bandwidth test, so that their data exceeds every cache."""
CALIBRATION_EXCHANGE_BYTES = 32 * 2**20
"""Bytes of the tensor in the timed all-reduce."""
TIMED_RUNS = 5
TIMED_S = 1.0
"""Each kind of work is timed TIMED_RUNS times, or for TIMED_S seconds, but at least once."""


def measure_and_predict(
    job: TrainJob,
    model: Any,
    *,
    device: torch.device,
    parameters: int,
    seq_len: int,
    document: float,
    process_gib: float,
) -> tuple[Machine | None, Prediction | None]:
    """Return a rank's measured rates and the predicted cost of a step. Every rank calls this.

    Both are None for an unsupported architecture, whose number of `parameters` (without LoRA)
    differs from the counted one. document: mean over tokens of their document's length.
    """
    shape, resources = Shape.of(model.config.to_dict()), job.resources
    if not shape.counts(parameters):
        return None, None
    machine = calibrated(
        [Path(job.work), *map(Path, job.earlier)],
        shape=shape,
        tokens=resources.micro_batch_rows * seq_len // resources.sequence_parallel,
        span=job.trained_arm.attention.span(int(document)),
        process_gib=process_gib,
        device=device,
        dtype=next(model.parameters()).dtype,
    )
    rows = job.optim.global_batch_tokens // seq_len
    predicted = predict(
        shape, job.trained_arm, rows=rows, seq_len=seq_len, resources=resources, machine=machine, document=document
    )
    return machine, predicted


def calibrated(folders: Sequence[Path], **asked: Any) -> Machine:
    """Calibrate once, with the arguments of `calibrate`. Every rank calls this.

    A result that an earlier attempt measured on this host with the same arguments and the same
    number of ranks and threads is reused.

    Args:
        folders: the folder of this attempt, where the result is saved, and those of earlier ones.
    """
    import torch
    import torch.distributed as dist

    about: dict[str, Any] = {name: str(value) for name, value in asked.items() if name != "process_gib"}
    about |= {"host": platform.node(), "ranks": dist.get_world_size(), "threads": torch.get_num_threads()}
    about["precision"] = torch.get_float32_matmul_precision()
    known: list[Any] = [None]
    if dist.get_rank() == 0:
        for folder in reversed(folders):
            path = folder / "machine.json"
            if path.is_file() and (kept := json.loads(path.read_text()))["about"] == about:
                known = [kept["machine"]]
    dist.broadcast_object_list(known)
    if known[0]:
        return Machine(**{**known[0], "process_gib": asked["process_gib"]})
    machine = calibrate(**asked)
    if dist.get_rank() == 0:
        folders[0].mkdir(parents=True, exist_ok=True)
        write_whole(folders[0] / "machine.json", json.dumps({"about": about, "machine": asdict(machine)}))
    return machine


def calibrate(
    shape: Shape, *, tokens: int, span: int, process_gib: float, device: torch.device, dtype: torch.dtype
) -> Machine:
    """Measure this rank's rates, each kind of work separately, while all ranks do the same.

    tokens: tokens of one forward pass.
    span: tokens of the document or group that attention is limited to.

    Both are capped at CALIBRATION_TOKENS, for which a training rank has enough memory.
    """
    import torch
    import torch.distributed as dist

    tokens = min(tokens, CALIBRATION_TOKENS[device.type])
    span = min(span, CALIBRATION_TOKENS[device.type])
    machine = rates(shape, tokens=tokens, span=span, process_gib=process_gib, device=device, dtype=dtype)
    if dist.get_world_size() > 1:
        numbers = torch.ones(CALIBRATION_EXCHANGE_BYTES // 4, device=device)
        exchange_s = _seconds(lambda: dist.all_reduce(numbers), device.type, together=True)
        machine = replace(machine, exchange=CALIBRATION_EXCHANGE_BYTES / exchange_s)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # calibration is not part of training's peak
    return machine


def rates(
    shape: Shape, *, tokens: int, span: int, process_gib: float, device: torch.device, dtype: torch.dtype
) -> Machine:
    """Measure the rates of this process alone, as `calibrate` does, without an all-reduce."""
    import torch

    def tensor(*sizes: int) -> Tensor:
        return torch.ones(sizes, device=device, dtype=dtype)  # not random: training's random state stays unchanged

    matmul = _matmul_rate(shape, tokens, tensor)
    attention, attention_backward = _attention_rates(shape, span, tensor)
    return Machine(matmul, attention, attention_backward, _elementwise_rate(shape, tokens, tensor), process_gib)


def _matmul_rate(shape: Shape, tokens: int, tensor: Callable[..., Tensor]) -> float:
    """Measure the FLOP/s of a layer's matrices: forward, and backward to inputs and weights."""
    operands, flops = [], 0
    for n, m in shape.matrices.values():
        operands.append((tensor(tokens, n), tensor(n, m), tensor(tokens, m)))
        flops += 3 * 2 * tokens * n * m

    def a_layer() -> None:
        for x_TN, w_NM, dy_TM in operands:
            _ = x_TN @ w_NM, dy_TM @ w_NM.t(), x_TN.t() @ dy_TM

    return flops / _seconds(a_layer, operands[0][0].device.type)


def _attention_rates(shape: Shape, span: int, tensor: Callable[..., Tensor]) -> tuple[float, float]:
    """Measure the FLOP/s of causal attention, forward and backward."""
    from torch.nn.functional import scaled_dot_product_attention

    q_1HTD = tensor(1, shape.heads, span, shape.head_dim).requires_grad_()

    def forward() -> Tensor:
        return scaled_dot_product_attention(q_1HTD, q_1HTD, q_1HTD, is_causal=True)

    forward_s = _seconds(forward, q_1HTD.device.type)
    both_s = _seconds(lambda: forward().sum().backward(), q_1HTD.device.type)
    backward_s = max(both_s - forward_s, forward_s)  # noise must not make it negative
    flops = 2 * span * (span + 1) * shape.q_width  # 4 per key, and a query sees (span + 1) / 2 keys on average
    return flops / forward_s, ATTENTION_BACKWARD * flops / backward_s


def _elementwise_rate(shape: Shape, tokens: int, tensor: Callable[..., Tensor]) -> float:
    """Measure the bytes/s of a layer's elementwise operations, forward and backward.

    They are copies of those in transformers' Llama, whose import takes many times as long as this.
    """
    import torch
    from torch.nn.functional import silu

    x_1TE = tensor(1, tokens, shape.hidden).requires_grad_()
    gate_1TI = tensor(1, tokens, shape.intermediate).requires_grad_()
    q_1HTD = tensor(1, shape.heads, tokens, shape.head_dim).requires_grad_()
    k_1HTD = tensor(1, shape.kv_heads, tokens, shape.head_dim).requires_grad_()
    cos_TD, weight_E = tensor(tokens, shape.head_dim), tensor(shape.hidden)

    def norm(x: Tensor) -> Tensor:
        x32 = x.float()
        return weight_E * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos_TD + torch.cat((-second, first), dim=-1) * cos_TD

    def layers() -> None:
        results: list[Tensor] = []
        for _ in range(CALIBRATION_LAYERS):
            results += [norm(x_1TE), x_1TE + x_1TE, norm(x_1TE), x_1TE + x_1TE]
            results += [rotated(q_1HTD), rotated(k_1HTD)]
            results.append(silu(gate_1TI) * gate_1TI)
        torch.autograd.backward(results, list(map(torch.ones_like, results)))

    # without the outputs of the matrices and the attention kernel, which are not elementwise
    returned = outputs(shape, ArmRecipe(tune="all")) - 3 * shape.q_width - 2 * shape.kv_width - 2 * shape.intermediate
    moved = x_1TE.element_size() * (1 + BACKWARD_TRAFFIC) * PASSES * CALIBRATION_LAYERS * returned * tokens
    return moved / _seconds(layers, x_1TE.device.type)


def _seconds(work: Callable[[], object], device_type: str, *, together: bool = False) -> float:
    """Return the shortest time of several runs in seconds, after a warm-up run.

    On a CPU, only the time counts in which this thread runs on a core. With ten other processes on
    two cores, wall time would show a tenth of the speed that training has without them.

    Args:
        together: all ranks take part, so each must run equally often, and waiting counts.
    """
    import torch

    clock = time.perf_counter if together or device_type == "cuda" else time.thread_time
    begun = time.perf_counter()
    took: list[float] = []
    for _ in range(1 + TIMED_RUNS):
        last = clock()
        work()
        if device_type == "cuda":
            torch.cuda.synchronize()
        took.append(clock() - last)
        if len(took) > 1 and time.perf_counter() - begun > TIMED_S and not together:
            break
    return min(took[1:])
