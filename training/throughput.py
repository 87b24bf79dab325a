"""What training costs: seconds by phase, tokens per second, memory; and what this machine could do at best.

Ratios depend on width and length, so a speed is only worth something beside both.

    from longreach.training.throughput import Clock
    clock = Clock(); sum(range(10**7)); clock.lap("sum"); print(clock.laps)
"""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from longreach.infra.files import write_whole
from longreach.training.batches import PackedRows
from longreach.training.planner import GIB, PASSES, Machine, Prediction, Shape, outputs, predict
from longreach.training.recipe import ArmRecipe, TrainJob
from longreach.training.summary import PackSummary

FRESH = 4
"""Layers whose elementwise results live at once while bandwidth is measured: no cache holds them."""
EXCHANGED = 32 * 2**20
"""Bytes that the ranks add up while that is measured."""
CALIBRATED = {"cpu": 2048, "cuda": 8192}
"""Tokens from which on rates change little, by device: with fewer a GPU waits for its kernels to be launched."""


class Clock:
    """Wall seconds since it was made, split by what they went into. On a GPU a phase ends when its kernels do."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._begun = self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Books the time since the last lap on `phase`."""
        if torch.cuda.is_initialized():  # a rank on the CPU leaves the machine's GPU alone
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[phase] = self.laps.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds of all laps."""
        return self._last - self._begun


def peak_gib() -> float:
    """The most memory that this rank held: of the GPU if it has one, else resident memory of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # Linux counts in KiB


def calibrate(
    shape: Shape, *, tokens: int, span: int, process_gib: float, device: torch.device, dtype: torch.dtype
) -> Machine:
    """What this rank does in a second, each kind of work measured for itself: a few seconds. All ranks at once.

    tokens: in one forward pass; span: tokens of a document or group, within which attention works; of both no more than
    CALIBRATED are tried, which a rank that trains has room for. process_gib: this rank before it had a model.
    """
    tokens, span = min(tokens, CALIBRATED[device.type]), min(span, CALIBRATED[device.type])

    def tensor(*sizes: int) -> Tensor:
        return torch.ones(sizes, device=device, dtype=dtype)  # nothing drawn: training's random state stays as it is

    sizes = list(shape.matrices.values())
    matrices = [(tensor(tokens, n), tensor(n, m), tensor(tokens, m)) for n, m in sizes]

    def a_layer() -> None:
        for x_TN, w_NM, dy_TM in matrices:
            _ = x_TN @ w_NM, dy_TM @ w_NM.t(), x_TN.t() @ dy_TM

    matmul = 6 * tokens * sum(n * m for n, m in sizes) / _seconds(a_layer, device)
    matrices.clear()
    q_1HTD = tensor(1, shape.heads, span, shape.head_dim).requires_grad_()

    def forward() -> Tensor:
        return scaled_dot_product_attention(q_1HTD, q_1HTD, q_1HTD, is_causal=True)

    once = _seconds(forward, device)
    both = _seconds(lambda: forward().sum().backward(), device)
    flops = 2 * span * (span + 1) * shape.heads * shape.head_dim
    norm = LlamaRMSNorm(shape.hidden).to(device, dtype)
    x_TE, gate_TI = (tensor(1, tokens, n).requires_grad_() for n in (shape.hidden, shape.intermediate))
    q, k = (tensor(1, n, tokens, shape.head_dim).requires_grad_() for n in (shape.heads, shape.kv_heads))
    turn = tensor(1, tokens, shape.head_dim)

    def elementwise() -> None:
        results: list[Tensor] = []
        for _ in range(FRESH):
            for normed in (norm(x_TE), norm(x_TE)):
                results += [normed, x_TE + x_TE]
            results += [*apply_rotary_pos_emb(q, k, turn, turn), silu(gate_TI) * gate_TI]
        torch.autograd.backward(results, [torch.ones_like(one) for one in results])

    # what matrices and the attention return is no elementwise result
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    own = outputs(shape, ArmRecipe(tune="all")) - 3 * q_width - 2 * kv_width - 2 * shape.intermediate
    moved = x_TE.element_size() * 3 * PASSES * FRESH * own * tokens
    move = moved / _seconds(elementwise, device)
    exchange = None
    if dist.get_world_size() > 1:
        whole = torch.ones(EXCHANGED // 4, device=device)
        exchange = EXCHANGED / _seconds(lambda: dist.all_reduce(whole), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return Machine(matmul, flops / once, 2.5 * flops / max(both - once, once), move, process_gib, exchange)


def calibrated(folders: Sequence[Path], **asked: Any) -> Machine:
    """`calibrate(**asked)`, once: what an earlier start on this host measured with as many ranks and threads is read.

    Every rank calls it. folders: of this attempt, which keeps the answer, and of those before it.
    """
    about: dict[str, Any] = {name: str(value) for name, value in asked.items() if name != "process_gib"}
    about |= {"host": platform.node(), "ranks": dist.get_world_size(), "threads": torch.get_num_threads()}
    known: list[Any] = [None]
    if dist.get_rank() == 0:
        kept = [json.loads(p.read_text()) for folder in folders if (p := folder / "machine.json").is_file()]
        known = [next((one["machine"] for one in kept if one["about"] == about), None)]
    dist.broadcast_object_list(known)
    if known[0]:
        return Machine(**{**known[0], "process_gib": asked["process_gib"]})
    machine = calibrate(**asked)
    if dist.get_rank() == 0:
        folders[0].mkdir(parents=True, exist_ok=True)
        write_whole(folders[0] / "machine.json", json.dumps({"about": about, "machine": asdict(machine)}))
    return machine


def measure_and_predict(
    job: TrainJob, model: Any, rows: PackedRows, *, parameters: int, device: torch.device, process_gib: float
) -> tuple[Machine | None, Prediction | None]:
    """Return what a rank does in a second, measured, and what a step should cost.

    Every rank calls it. Both are None for an architecture that the cost model does not know.

    Args:
        parameters: of the model, without LoRA's.
        process_gib: memory of this rank before it had a model.
    """
    shape = Shape.of(model.config.to_dict())
    if not shape.counts(parameters):
        return None, None
    resources, seq_len, document = job.resources, rows.summary.seq_len, rows.mean_document()
    machine = calibrated(
        [Path(job.work), *map(Path, job.earlier)],
        shape=shape,
        tokens=resources.micro_batch_rows * seq_len // resources.sequence_parallel,
        span=job.arm.attention.span(int(document)),
        process_gib=process_gib,
        device=device,
        dtype=next(model.parameters()).dtype,
    )
    predicted = predict(
        shape,
        job.arm,
        rows=job.optim.global_batch_tokens // seq_len,
        seq_len=seq_len,
        resources=resources,
        machine=machine,
        document=document,
    )
    return machine, predicted


def what_would_fit(job: TrainJob, error: str) -> str:
    """Return the message of an OutOfMemory: what was asked for, and what to change, the least costly change first."""
    resources, seq_len = job.resources, PackSummary.read(job.corpus).seq_len
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


def _seconds(work: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """The median of some runs, after one that warms up."""
    took = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - begun)
    return median(took[1:])


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return TrainingSummary's fields on steps, tokens, seconds and losses, from a run's metrics rows in order."""
    trained = [row for row in rows if not row["skipped"]]
    seconds = [row["seconds"] for row in rows]
    typical = median(seconds[1:] or seconds)
    tokens = sum(row["tokens"] for row in rows)
    return {
        "steps": len(rows),
        "skipped_steps": len(rows) - len(trained),
        "tokens": tokens,
        "targets": sum(row["targets"] for row in rows),
        "wall_s": sum(seconds),
        "checkpoints_s": sum(row["phases"].get("checkpoint", 0.0) for row in rows),
        "step_s_median": typical,
        "tokens_per_s": tokens / len(rows) / typical,
        "loss_first": trained[0]["loss"],
        "loss_last": trained[-1]["loss"],
    }
