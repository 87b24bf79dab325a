"""Scale on paper: what a Llama costs on 8 to 1,024 GPUs, where it stops scaling and where it does not fit.

The arithmetic is the one that predicts runs on this machine (training/planner.py); only the rates are not measured but
taken from data sheets, times an assumed share that is really reached. The batch stays the same however many GPUs
share it; once it has fewer rows than there are GPUs, neighbours share rows (DeepSpeed-Ulysses). Layers are recomputed
in the backward pass, weights are bfloat16, and nothing overlaps.

    longreach scale llama-2-7b --row 32768
    longreach scale --paper
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from longreach.infra.resources import Resources
from longreach.training.attention_recipe import AttentionRecipe
from longreach.training.planner import CONFIG_KEYS, GIB, Machine, Prediction, Shape, predict
from longreach.training.recipe import ArmRecipe

MODELS = {
    "llama-2-7b": Shape(32, 4096, 11008, 32, 32, 128, 32000, tied=False),
    "llama-2-13b": Shape(40, 5120, 13824, 40, 40, 128, 32000, tied=False),
    "llama-2-70b": Shape(80, 8192, 28672, 64, 8, 128, 32000, tied=False),
}
PER_NODE = 8
"""GPUs in a node."""
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
UTILISATION = 0.6
"""Assumed: what matrices and attention reach of the peak. FlashAttention-2 reports 50 to 73% on an A100
(arXiv:2307.08691)."""
REACHED_BYTES = 0.8
"""Assumed: what memory and links reach of their bandwidth."""
BEGIN_S, HOP_S, NETWORK_HOP_S = 8.4e-6, 3.4e-6, 9.6e-6
"""What NCCL reckons a ring to take for its start, a step inside a node and one between nodes, whatever it carries
(src/graph/tuning.cc, ring, simple protocol, NVLink)."""
RESERVED_GIB = 4.0
"""Assumed: what CUDA, NCCL and the allocator's fragments take of a GPU."""
OFFLOADED_BYTES = 4 * 4
"""The optimizer's weight and two moments, and the gradient."""
STOPS = 0.5
"""Efficiency under which more GPUs are no longer worth it."""


@dataclass(frozen=True)
class Gpu:
    """A data sheet. Bandwidths in bytes a second, links in one direction."""

    flops: float
    """Dense bfloat16."""
    bytes: float
    """Of its memory."""
    memory_gib: float
    node: float
    """To the other GPUs of its node."""
    network: float
    """Its share of what leaves the node."""
    host: float
    """To the host's memory, which is taken to be as fast."""

    def machine(self, world: int, utilisation: float) -> Machine:
        """What each of so many does in a second. An all-reduce in a ring moves 2 (n - 1) / n times the tensor through
        each GPU's link, or, between nodes, through all links of a node together."""
        link = self.node if world <= PER_NODE else min(self.node, PER_NODE * self.network)
        reached = utilisation * self.flops
        exchange = REACHED_BYTES * link * world / (2 * (world - 1)) if world > 1 else None
        host = REACHED_BYTES * self.host
        outside = math.ceil(world / PER_NODE) - 1
        latency = BEGIN_S + 2 * (outside * NETWORK_HOP_S + (world - 1 - outside) * HOP_S)
        return Machine(reached, reached, reached, REACHED_BYTES * self.bytes, 0.0, exchange, host, latency)


GPUS = {
    "a100-80gb": Gpu(312e12, 2.039e12, 80, 300e9, 25e9, 32e9),  # SXM: NVLink 600 GB/s both ways, HDR 200 Gb/s, PCIe 4
    "h100-80gb": Gpu(989e12, 3.35e12, 80, 450e9, 50e9, 64e9),  # SXM: NVLink 900 GB/s both ways, NDR 400 Gb/s, PCIe 5
}
WAYS: dict[str, dict[str, Any]] = {
    **{str(stage): {"zero_stage": stage} for stage in range(4)},
    "3+host": {"zero_stage": 3, "offload": "cpu", "offload_parameters": True},
}
"""ZeRO stages; the last one with weights and optimizer in the host's memory."""


def arms(row: int) -> dict[str, ArmRecipe]:
    """The methods; LongLoRA's groups are a quarter of the row."""
    sparse = AttentionRecipe.of(pattern="shifted_sparse", group_tokens=row // 4)
    return {
        "full": ArmRecipe(),
        "lora": ArmRecipe(tune="lora"),
        "longlora": ArmRecipe(tune="lora+embed+norm", attention=sparse),
    }


@dataclass(frozen=True)
class Setting:
    """One way to train on so many GPUs."""

    way: str
    """Key in WAYS."""
    ranks: int
    """GPUs that share a row."""
    gib: float
    """A GPU."""
    host_gib: float
    """A node's host, of what was offloaded to it."""
    cost: Prediction

    @property
    def step_s(self) -> float:
        assert self.cost.step_s is not None
        return self.cost.step_s


@dataclass(frozen=True)
class Point:
    """A method on so many GPUs: the fastest setting that fits, and all with its ranks a row."""

    arm: str
    gpus: int
    ways: dict[str, Setting]
    """By ZeRO stage; empty where the batch has no work for so many."""
    best: Setting | None
    """None where nothing fits."""
    efficiency: float = 0.0
    """Work a GPU does, over the most that it does with any number of them."""


def setting(shape: Shape, arm: ArmRecipe, gpu: Gpu, way: str, *, row: int, rows: int, gpus: int, ranks: int = 1,
            utilisation: float = UTILISATION) -> Setting:  # fmt: skip
    """What it costs, a row at a time on each GPU (on each `ranks` GPUs that share one)."""
    choices = {"workers": gpus, "gpus_per_worker": 1, "sequence_parallel": ranks, "dtype": "bfloat16", **WAYS[way]}
    resources = Resources(**choices, activation_checkpointing=True)
    machine = gpu.machine(gpus, utilisation)
    cost = predict(shape, arm, rows=rows, seq_len=row, resources=resources, machine=machine)
    offloaded = 2 * shape.parameters + OFFLOADED_BYTES * sum(shape.trained(arm).values())
    host = offloaded * min(gpus, PER_NODE) / gpus / GIB if resources.offload_parameters else 0.0
    return Setting(way, ranks, cost.peak_gib / gpus, host, cost)


def sweep(
    shape: Shape, gpu: Gpu, *, row: int, rows: int, counts: tuple[int, ...] = COUNTS, utilisation: float = UTILISATION
) -> Iterator[Point]:
    """Every method on every number of GPUs, a batch of so many rows each step."""
    room = gpu.memory_gib - RESERVED_GIB
    for name, arm in arms(row).items():
        points = []
        for gpus in counts:
            shared = [
                n for n in range(1, gpus + 1)
                if gpus % n == 0 and shape.heads % n == 0 and row % n == 0 and rows * n % gpus == 0
            ]  # fmt: skip
            by_ranks = {
                n: {
                    way: setting(shape, arm, gpu, way, row=row, rows=rows, gpus=gpus, ranks=n, utilisation=utilisation)
                    for way in WAYS
                }
                for n in shared
            }
            fitting = [one for ways in by_ranks.values() for one in ways.values() if one.gib <= room]
            best = min(fitting, key=lambda one: one.step_s, default=None)
            shown = best.ranks if best else max(shared, default=0)
            points.append(Point(name, gpus, by_ranks.get(shown, {}), best))
        least = min((p.best.step_s * p.gpus for p in points if p.best), default=math.nan)
        yield from (replace(p, efficiency=least / (p.best.step_s * p.gpus) if p.best else 0.0) for p in points)


def verdicts(points: list[Point], gpu: Gpu) -> Iterator[str]:
    """Where each method fits, and where it stops scaling."""
    room = gpu.memory_gib - RESERVED_GIB
    for name in dict.fromkeys(p.arm for p in points):
        own = [p for p in points if p.arm == name]
        fits = [p for p in own if p.best]
        if not fits:
            needed = min((s.gib for p in own for s in p.ways.values()), default=math.nan)
            yield f"{name}: does not fit: at least {needed:.0f} GiB a GPU, where {room:.0f} are free"
            continue
        first, last = fits[0], fits[-1]
        ways = [s for s in first.ways.values() if s.gib <= room]
        parts = [f"fits from {first.gpus:,} GPUs with ZeRO {', '.join(s.way for s in ways)}"]
        parts[0] += f" and {ways[0].host_gib:,.0f} GiB of each host's memory" if ways[0].host_gib else ""
        slow = [p for p in fits if p.efficiency < STOPS]
        parts.append(
            f"stops scaling at {slow[0].gpus:,} GPUs ({slow[0].efficiency:.0%} efficient)"
            if slow
            else f"{last.efficiency:.0%} efficient on {last.gpus:,}"
        )
        idle = [f"{p.gpus:,}" for p in own if not p.ways]
        parts += [f"the batch has no even shares for {', '.join(idle)}"] if idle else []
        yield f"{name}: {'; '.join(parts)}"


def tables(points: list[Point], gpu: Gpu) -> Iterator[tuple[list[str], list[list[str]]]]:
    """(columns, rows) of memory and time, and of the wire."""
    room = gpu.memory_gib - RESERVED_GIB
    columns = ["", "GPUs", "ranks/row", *headed("GiB: ZeRO"), "fastest", "s/step", "efficiency"]
    rows, wire = [], []
    for p in points:
        gib = [f"{s.gib:.1f}{'' if s.gib <= room else ' !'}" for s in p.ways.values()] or ["-"] * len(WAYS)
        ranks = str(next(iter(p.ways.values())).ranks) if p.ways else "-"
        told = [f"ZeRO {p.best.way}", f"{p.best.step_s:.3g}", f"{p.efficiency:.0%}"] if p.best else ["none", "-", "-"]
        rows.append([p.arm, f"{p.gpus:,}", ranks, *gib, *told])
        seconds = [f"{s.cost.seconds.get('exchange', 0) + s.cost.seconds.get('host', 0):.3g}" for s in p.ways.values()]
        wire.append([p.arm, f"{p.gpus:,}", ranks, *(seconds or ["-"] * len(WAYS))])
    yield columns, rows
    yield ["", "GPUs", "ranks/row", *headed("s on the wire: ZeRO")], wire


def headed(title: str) -> list[str]:
    first, *others = WAYS
    return [f"{title} {first}", *others]


def shape_of(model: str) -> Shape:
    """A known model, or what a config.json (or its folder) says.

    Raises:
        ValueError: there is none, or it does not say enough.
    """
    if model in MODELS:
        return MODELS[model]
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no model {model!r}: name one of {', '.join(MODELS)}, or a folder with a config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    if missing := [key for key in CONFIG_KEYS if not config.get(key)]:
        raise ValueError(f"{path} does not say {', '.join(missing)}: it is no Llama to the planner")
    return Shape.of(config)


def gpu_of(text: str) -> Gpu:
    """`a100-80gb`, or with other facts: `h100-80gb,memory_gib=141,bytes=4.8e12`.

    Raises:
        ValueError: an unknown name or fact.
    """
    name, *facts = text.split(",")
    if name not in GPUS:
        raise ValueError(
            f"no GPU {name!r}: name one of {', '.join(GPUS)}; other facts follow, e.g. {name},bytes=4.8e12"
        )
    known, changed = {field.name for field in fields(Gpu)}, {}
    for fact in facts:
        key, _, value = fact.partition("=")
        try:
            changed[key] = float(value)
        except ValueError:
            raise ValueError(f"{fact!r} of {name}: write it as FACT=NUMBER") from None
        if key not in known or changed[key] <= 0:
            raise ValueError(f"{fact!r} of {name}: facts are {', '.join(sorted(known))}, each above 0")
    return replace(GPUS[name], **changed)


PAPER = (
    (8192, "full", 7.4, None), (8192, "lora", 6.0, None), (8192, "longlora", 5.2, None),
    (16384, "full", 16.3, None), (16384, "lora", 14.0, None), (16384, "longlora", 11.3, None),
    (32768, "full", 39.8, None), (32768, "lora", 36.5, None), (32768, "longlora", 24.6, None),
    (65536, "lora", 92.5, 71.1), (65536, "longlora", 52.4, 69.8),
)  # fmt: skip
"""LongLoRA (arXiv:2309.12307), Llama-2-7B on 8 A100 of 80 GB, ZeRO 2, 1,000 steps of 64 rows: (row, method, hours, GB).
From secondary sources, not re-read in the paper; memory is known for two of them."""


def compared(utilisation: float = UTILISATION) -> Iterator[tuple[int, str, float, float, float, float | None]]:
    """(row, method, hours predicted, hours reported, GiB predicted, GB reported)."""
    gpu, shape = GPUS["a100-80gb"], MODELS["llama-2-7b"]
    for row, name, hours, gb in PAPER:
        one = setting(shape, arms(row)[name], gpu, "2", row=row, rows=64, gpus=8, utilisation=utilisation)
        yield row, name, one.step_s * 1000 / 3600, hours, one.gib, gb


def against_paper(utilisation: float = UTILISATION) -> tuple[list[str], list[list[str]]]:
    """The same as a table, with errors."""
    lines = []
    for row, name, hours, reported, gib, gb in compared(utilisation):
        memory = ["-", "-"] if gb is None else [f"{gb}", f"{gib / gb - 1:+.0%}"]
        told = [f"{hours:.1f}", f"{reported}", f"{hours / reported - 1:+.0%}", f"{gib:.1f}"]
        lines.append([f"{row:,}", name, *told, *memory])
    return ["row", "", "hours", "reported", "error", "GiB", "reported", "error"], lines
