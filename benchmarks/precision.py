"""Measure what lower precision saves on a CPU with instructions for it, and how much it changes results.

    python benchmarks/precision.py              # a quarter of an hour on two quiet cores
    python benchmarks/precision.py --tiny       # smoke test; its ratios mean nothing

The benchmark trains SmolLM2-135M with LongLoRA on plays and speeches, in rows of 2,048 tokens, with one row and one
single-threaded rank per core. Three settings alternate: float32, float32 with `resources.matmul_precision: medium`
(both factors of a product rounded to bfloat16, sums in float32), and `resources.dtype: bfloat16`. It prints seconds per
step (medians without the first step), the largest difference between the losses of the same steps, and the NLL and CPU
seconds of one window of 4,096 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from own_training import train
from peers import CORES, prepare

from longreach.evaluation.likelihood import token_nll
from longreach.infra.cluster import connected
from longreach.infra.resources import Resources
from longreach.training.corpus import PackedRows
from longreach.training.model import load_model
from longreach.training.recipe import ArmRecipe, AttentionRecipe, OptimRecipe

WAYS = {
    "float32": Resources(workers=CORES),
    "medium": Resources(workers=CORES, matmul_precision="medium"),
    "bfloat16": Resources(workers=CORES, dtype="bfloat16"),
}
ROW, WINDOW = 2048, 4096


def steps(folder: Path, name: str, resources: Resources, turn: int, count: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each step except the first, and the losses of all steps."""
    trained = train(
        folder / f"rows-{ROW}",
        folder / "base",
        folder / f"{name}-{turn}",
        ArmRecipe(
            tune="lora+embed+norm",
            embedding_learning_rate=2e-5,
            attention=AttentionRecipe.of(pattern="shifted_sparse", group_tokens=ROW // 4, sink_tokens=4),
        ),
        OptimRecipe(steps=count, global_batch_tokens=CORES * ROW, learning_rate=5e-4, warmup_steps=2),
        resources,
    )
    return [row["seconds"] for row in trained.steps[1:]], [row["loss"] for row in trained.steps]


def evaluated(folder: Path, resources: Resources) -> tuple[float, torch.Tensor]:
    """Return the CPU seconds and the NLL of each token of one window."""
    resources.prepare_torch(1)
    model, _ = load_model(folder / "base", dtype=resources.dtype)
    model.eval()
    ids_T = PackedRows(folder / f"rows-{WINDOW}").batch([0])["input_ids"][0]
    began = time.thread_time()
    nll_T = token_nll(model, ids_T.numpy(), "a window")
    return time.thread_time() - began, torch.as_tensor(nll_T).double()


def main() -> None:
    """Train and evaluate with each setting, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="use a model with two layers")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, [ROW, WINDOW], asked.tiny)
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        losses = {}
        with connected(None, cpus=CORES):
            for turn in range(asked.rounds):
                for name, resources in WAYS.items():
                    took, losses[name] = steps(folder, name, resources, turn, asked.steps)
                    seconds[name] += took
        exact = statistics.median(seconds["float32"])
        for name, took in seconds.items():
            median = statistics.median(took)
            apart = max(abs(loss - other) for loss, other in zip(losses[name], losses["float32"], strict=True))
            print(f"a step, {name:<9} {median:6.2f} s, {exact / median:.2f}x; losses up to {apart:.4f} nats apart")
        scored: dict[str, list[float]] = {name: [] for name in WAYS}
        nll = {}
        for _ in range(asked.rounds):
            for name, resources in WAYS.items():
                cpu_s, nll[name] = evaluated(folder, resources)
                scored[name].append(cpu_s)
        exact = statistics.median(scored["float32"])
        for name, took in scored.items():
            median, apart_T = statistics.median(took), nll[name] - nll["float32"]
            print(
                f"a window, {name:<9} {median:6.2f} CPU s, {exact / median:.2f}x; NLL {nll[name].mean():.4f}, mean "
                f"{apart_T.mean():+.5f}, of single tokens up to {apart_T.abs().max():.3f} apart"
            )


if __name__ == "__main__":
    main()
