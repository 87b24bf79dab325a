"""Estimate what training a Llama costs on 8 to 1,024 GPUs, where it fits and when it stops scaling.

The arithmetic is that of training/cost.py, with rates from a data sheet times an assumed
utilisation. The batch is the same for every number of GPUs. If it has fewer rows than there are
GPUs, neighbouring GPUs share rows (DeepSpeed-Ulysses). Layers are recomputed in the backward pass,
weights are bfloat16, and nothing overlaps.

    longreach scale llama-2-7b --row 32768
    longreach scale --paper
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

from longreach.infra.files import read_object
from longreach.infra.resources import Resources
from longreach.training.attention_recipe import AttentionRecipe
from longreach.training.cost import CONFIG_KEYS, GIB, Machine, Prediction, Shape, predict
from longreach.training.recipe import ArmRecipe

MODELS = {
    "llama-2-7b": Shape(32, 4096, 11008, 32, 32, 128, 32000, tied=False),
    "llama-2-13b": Shape(40, 5120, 13824, 40, 40, 128, 32000, tied=False),
    "llama-2-70b": Shape(80, 8192, 28672, 64, 8, 128, 32000, tied=False),
}
GPUS_PER_NODE = 8
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)  # default numbers of GPUs
UTILISATION = 0.6
"""Assumed share of the peak that matrices and attention reach. FlashAttention-2 reports 50 to 73%
on an A100 (arXiv:2307.08691)."""
REACHED_BYTES = 0.8  # assumed share of the peak bandwidth that memory or a link reaches
START_S, HOP_S, NETWORK_HOP_S = 8.4e-6, 3.4e-6, 9.6e-6
"""NCCL's estimates in seconds for the start of a ring, for a step between two GPUs of a node, and
for a step between two nodes (its src/graph/tuning.cc: ring, simple protocol, NVLink)."""
RESERVED_GIB = 4.0  # assumed GPU memory for CUDA, NCCL and fragmentation
OFFLOADED_BYTES = 16
"""Bytes on the host per trained parameter: the optimizer's weight and moments, and the gradient."""
MIN_EFFICIENCY = 0.5  # efficiency below which training counts as no longer scaling


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet: bfloat16 FLOP/s and bytes/s, with link bandwidth in one direction."""

    flops: float
    bytes: float  # memory bandwidth
    memory_gib: float
    node: float  # bandwidth to the other GPUs of its node
    network: float  # its share of the node's bandwidth to other nodes
    host: float  # bandwidth to the host's memory, which is assumed to be as fast

    def machine(self, world: int, utilisation: float) -> Machine:
        """Return the rates of each of `world` GPUs if its matrices reach this share of the peak."""
        compute = utilisation * self.flops
        exchange = None
        if world > 1:
            link = self.node
            if world > GPUS_PER_NODE:  # a ring across nodes uses all links of a node together
                link = min(self.node, GPUS_PER_NODE * self.network)
            # An all-reduce in a ring moves 2 (n - 1) / n times the tensor through each link.
            exchange = REACHED_BYTES * link * world / (2 * (world - 1))
        network_hops = math.ceil(world / GPUS_PER_NODE) - 1
        node_hops = world - 1 - network_hops
        # An all-reduce goes round the ring twice: once to sum, once to distribute the sum.
        latency = START_S + 2 * (network_hops * NETWORK_HOP_S + node_hops * HOP_S)
        return Machine(
            compute, compute, compute, REACHED_BYTES * self.bytes, 0.0, exchange, REACHED_BYTES * self.host, latency
        )


GPUS = {
    "a100-80gb": Gpu(312e12, 2.039e12, 80, 300e9, 25e9, 32e9),  # SXM: NVLink 600 GB/s both ways, HDR 200 Gb/s, PCIe 4
    "h100-80gb": Gpu(989e12, 3.35e12, 80, 450e9, 50e9, 64e9),  # SXM: NVLink 900 GB/s both ways, NDR 400 Gb/s, PCIe 5
}
WAYS: dict[str, dict[str, Any]] = {str(stage): {"zero_stage": stage} for stage in range(4)}
WAYS["3+host"] = {"zero_stage": 3, "offload": "cpu", "offload_parameters": True}
"""Resources for each ZeRO stage. "3+host" keeps weights and optimizer in the host's memory."""


def arms(row: int) -> dict[str, ArmRecipe]:
    """Return the training methods by name; LongLoRA's groups are an even quarter of the row."""
    sparse = AttentionRecipe.of(pattern="shifted_sparse", group_tokens=row // 8 * 2)
    return {
        "full": ArmRecipe(),
        "lora": ArmRecipe(tune="lora"),
        "longlora": ArmRecipe(tune="lora+embed+norm", attention=sparse),
    }


@dataclass(frozen=True)
class Setting:
    """One way to train on a given number of GPUs, and its cost."""

    way: str  # key in WAYS
    ranks: int  # GPUs that share a row
    gib: float  # memory of each GPU
    host_gib: float  # host memory of each node for offloading
    cost: Prediction

    @property
    def step_s(self) -> float:
        """Return the seconds per step, which are always known, because the rates are given."""
        assert self.cost.step_s is not None
        return self.cost.step_s


@dataclass(frozen=True)
class Point:
    """A method on a number of GPUs: the fastest setting that fits, and its alternatives."""

    arm: str
    gpus: int
    ways: dict[str, Setting]
    """Settings by ZeRO stage; empty if the batch does not divide evenly."""
    best: Setting | None  # the fastest setting that fits; None if none fits
    efficiency: float = 0.0
    """A GPU's throughput relative to the highest one over all numbers of GPUs."""


def setting(
    shape: Shape,
    arm: ArmRecipe,
    gpu: Gpu,
    way: str,
    *,
    row: int,
    rows: int,
    gpus: int,
    ranks: int = 1,
    utilisation: float = UTILISATION,
) -> Setting:
    """Return the cost of steps of `rows` rows, one row at a time on each group of `ranks` GPUs."""
    resources = Resources(
        workers=gpus, gpus_per_worker=1, sequence_parallel=ranks, dtype="bfloat16", activation_checkpointing=True,
        **WAYS[way],
    )  # fmt: skip
    machine = gpu.machine(gpus, utilisation)
    cost = predict(shape, arm, rows=rows, seq_len=row, resources=resources, machine=machine)
    host_gib = 0.0
    if resources.offload_parameters:
        # Weights in bfloat16 (2 bytes) and the optimizer's state; a node holds its GPUs' shards.
        offloaded = 2 * shape.parameters + OFFLOADED_BYTES * sum(shape.trained(arm).values())
        host_gib = offloaded * min(gpus, GPUS_PER_NODE) / gpus / GIB
    return Setting(way, ranks, cost.peak_gib / gpus, host_gib, cost)


def sweep(
    shape: Shape, gpu: Gpu, *, row: int, rows: int, counts: tuple[int, ...] = COUNTS, utilisation: float = UTILISATION
) -> Iterator[Point]:
    """Yield a Point for every method and every number of GPUs, for steps of `rows` rows."""
    for name, arm in arms(row).items():
        points = []
        least = math.inf  # fewest GPU-seconds per step over all numbers of GPUs, which count as 100% efficient
        for gpus in counts:
            settings = []
            shares = _ranks_per_row(shape, row, rows, gpus)
            for ranks, way in product(shares, WAYS):
                batch = {"row": row, "rows": rows, "gpus": gpus, "ranks": ranks}
                settings.append(setting(shape, arm, gpu, way, **batch, utilisation=utilisation))
            fitting = [one for one in settings if one.gib <= gpu.memory_gib - RESERVED_GIB]
            best = min(fitting, key=lambda one: one.step_s, default=None)
            ranks_shown = best.ranks if best else max(shares, default=0)
            ways = {one.way: one for one in settings if one.ranks == ranks_shown}
            points.append(Point(name, gpus, ways, best))
            if best:
                least = min(least, best.step_s * gpus)
        for point in points:
            if point.best:
                point = replace(point, efficiency=least / (point.best.step_s * point.gpus))
            yield point


def _ranks_per_row(shape: Shape, row: int, rows: int, gpus: int) -> list[int]:
    """Return numbers of GPUs that can share a row: query and key/value heads, tokens and rows divide
    evenly."""
    shares = []
    for ranks in range(1, gpus + 1):
        even_work = gpus % ranks == 0 and rows * ranks % gpus == 0
        if even_work and shape.heads % ranks == shape.kv_heads % ranks == row % ranks == 0:
            shares.append(ranks)
    return shares


def verdicts(points: list[Point], gpu: Gpu) -> Iterator[str]:
    """Yield a line for each method that says where it fits and where it stops scaling."""
    for name, own in groupby(points, key=lambda point: point.arm):
        yield f"{name}: {_verdict([*own], gpu.memory_gib - RESERVED_GIB)}"


def _verdict(points: list[Point], room: float) -> str:
    fitting = [point for point in points if point.best]
    if not fitting:
        needed = min((one.gib for point in points for one in point.ways.values()), default=math.nan)
        return f"does not fit: it needs at least {needed:.0f} GiB per GPU, but only {room:.0f} GiB are free"
    first, last = fitting[0], fitting[-1]
    ways = [one for one in first.ways.values() if one.gib <= room]
    text = f"fits from {first.gpus:,} GPUs with ZeRO {', '.join(one.way for one in ways)}"
    if ways[0].host_gib:
        text += f" and {ways[0].host_gib:,.0f} GiB of each host's memory"
    inefficient = [point for point in fitting if point.efficiency < MIN_EFFICIENCY]
    if inefficient:
        text += f"; stops scaling at {inefficient[0].gpus:,} GPUs ({inefficient[0].efficiency:.0%} efficient)"
    else:
        text += f"; {last.efficiency:.0%} efficient on {last.gpus:,}"
    uneven = [f"{point.gpus:,}" for point in points if not point.ways]
    if uneven:
        text += f"; the batch does not divide evenly over {', '.join(uneven)} GPUs"
    return text


def tables(points: list[Point], gpu: Gpu) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yield two tables as (columns, rows): memory and time, and seconds of communication."""
    room = gpu.memory_gib - RESERVED_GIB
    costs, communication = [], []
    for point in points:
        start = [point.arm, f"{point.gpus:,}", "-"]
        memory, seconds = [], []
        for one in point.ways.values():
            start[2] = str(one.ranks)  # the same for all ways
            gib = f"{one.gib:.1f}"
            if one.gib > room:
                gib += " !"
            memory.append(gib)
            wire = one.cost.seconds
            seconds.append(f"{wire.get('exchange', 0) + wire.get('host', 0):.3g}")
        if not point.ways:
            memory = seconds = ["-"] * len(WAYS)
        speed = ["none", "-", "-"]
        if point.best:
            speed = [f"ZeRO {point.best.way}", f"{point.best.step_s:.3g}", f"{point.efficiency:.0%}"]
        costs.append([*start, *memory, *speed])
        communication.append([*start, *seconds])
    start = ["", "GPUs", "ranks/row"]
    first, *others = WAYS
    yield [*start, f"GiB: ZeRO {first}", *others, "fastest", "s/step", "efficiency"], costs
    yield [*start, f"s on the wire: ZeRO {first}", *others], communication


def shape_of(model: str) -> Shape:
    """Return the shape of a known model, a config.json or a folder with one; else ValueError."""
    if model in MODELS:
        return MODELS[model]
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ValueError(f"no model {model!r}: use one of {', '.join(MODELS)}, or a folder with a config.json")
    config = read_object(path)
    missing = [key for key in CONFIG_KEYS if not config.get(key)]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: only Llama-like models can be planned")
    return Shape.of(config)


def gpu_of(text: str) -> Gpu:
    """Return a GPU by name, optionally with changed facts: `h100-80gb,memory_gib=141,bytes=4.8e12`.

    ValueError for an unknown name or fact.
    """
    name, *facts = text.split(",")
    if name not in GPUS:
        raise ValueError(
            f"no GPU {name!r}: use one of {', '.join(GPUS)}; changed facts follow, e.g. {name},bytes=4.8e12"
        )
    known = {field.name for field in fields(Gpu)}
    changed = {}
    for fact in facts:
        key, _, value = fact.partition("=")
        try:
            changed[key] = float(value)
        except ValueError:
            raise ValueError(f"{fact!r} of {name}: write it as FACT=NUMBER") from None
        if key not in known or not 0 < changed[key] < math.inf:
            raise ValueError(f"{fact!r} of {name}: facts are {', '.join(sorted(known))}, each a finite number above 0")
    return replace(GPUS[name], **changed)


PAPER = (
    (8192, "full", 7.4, None), (8192, "lora", 6.0, None), (8192, "longlora", 5.2, None),
    (16384, "full", 16.3, None), (16384, "lora", 14.0, None), (16384, "longlora", 11.3, None),
    (32768, "full", 39.8, None), (32768, "lora", 36.5, None), (32768, "longlora", 24.6, None),
    (65536, "lora", 92.5, 71.1), (65536, "longlora", 52.4, 69.8),
)  # fmt: skip
"""LongLoRA (arXiv:2309.12307): Llama-2-7B on 8 A100 with 80 GB, ZeRO 2, 1,000 steps of 64 rows, as
(row, method, hours, GB). The numbers are from secondary sources and were not checked in the paper.
Memory is known for two of them."""


def compared(utilisation: float = UTILISATION) -> Iterator[tuple[int, str, float, float, float, float | None]]:
    """Yield (row, method, hours, reported hours, GiB, reported GB) for each setting in PAPER."""
    gpu, shape = GPUS["a100-80gb"], MODELS["llama-2-7b"]
    for row, method, hours, gb in PAPER:
        cost = setting(shape, arms(row)[method], gpu, "2", row=row, rows=64, gpus=8, utilisation=utilisation)
        yield row, method, cost.step_s * 1000 / 3600, hours, cost.gib, gb


def against_paper(utilisation: float = UTILISATION) -> tuple[list[str], list[list[str]]]:
    """Return the result of `compared` as a table (columns, rows), with relative errors."""
    rows = []
    for row, method, hours, reported_hours, gib, reported_gb in compared(utilisation):
        time = [f"{hours:.1f}", f"{reported_hours}", f"{hours / reported_hours - 1:+.0%}"]
        memory = [f"{gib:.1f}", "-", "-"]
        if reported_gb is not None:
            memory[1:] = [f"{reported_gb}", f"{gib / reported_gb - 1:+.0%}"]
        rows.append([f"{row:,}", method, *time, *memory])
    return ["row", "", "hours", "reported", "error", "GiB", "reported", "error"], rows
