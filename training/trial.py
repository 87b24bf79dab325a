"""Measure the cost of a few training steps of one arm at one row length, for the stage `costs`.

This is the part that runs on the ranks. The rows are the corpus' tokens, cut to the requested
length. Each row is a single run, as in a long document. The steps use the normal training loop
without saving anything, so the measured cost is that of training.

    run_local("longreach.training.trial:measure", trial)     # a Trial's fields
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from pydantic import BaseModel

from longreach.training import throughput
from longreach.training.corpus import write_whole_rows
from longreach.training.cost import GIB
from longreach.training.loop import Training, all_sum
from longreach.training.recipe import TrainJob

KEPT_FREE = 0.05
"""Share of a machine's memory to keep free, because Ray kills a process if less is left."""

LOOKS = 10
"""Number of checks for free memory, one second apart. Ranks of the previous trial may still be
shutting down."""


class Trial(BaseModel):
    """The training job and row length to measure."""

    job: TrainJob
    """Its corpus provides the tokens; its out and work folders are not used."""
    length: int
    """Tokens in a row."""
    needs_gib: float | None = None
    """Predicted memory of one rank; None if it is not known."""


class TrialTraining(Training):
    """Training that saves nothing."""

    def save(self) -> None:
        """Write no checkpoint, because that takes longer than the trial."""


def measure(trial: dict[str, Any]) -> dict[str, Any]:
    """Train as described by a Trial and return the measurements for a CostCell.

    Rank 0 returns the measurements. Other ranks return {}. If memory is short, every rank returns
    the reason as `left_out`. Every rank calls this, with an initialized process group. The first
    step is a warm-up and not measured.
    """
    asked = Trial.model_validate(trial)
    if asked.needs_gib is not None:
        free_gib = _wait_for_gib(asked.needs_gib, gpu=asked.job.resources.gpus_per_worker > 0)
        if free_gib < asked.needs_gib:
            reason = f"rows of {asked.length:,} tokens need about {asked.needs_gib:.1f} GiB on each rank"
            return {"left_out": f"{reason}, {free_gib:.1f} GiB are free for it"}
    with tempfile.TemporaryDirectory(prefix="longreach-trial-") as folder:
        rows = asked.job.optim.global_batch_tokens // asked.length * asked.job.optim.steps
        write_whole_rows(Path(folder, "corpus"), asked.job.corpus, seq_len=asked.length, rows=rows)
        places = {name: str(Path(folder, name)) for name in ("corpus", "out", "work")}
        training = TrialTraining(asked.job.model_copy(update=places))
        training.resume()
        while training.progress.step < asked.job.optim.steps:
            training.run_step()
        (peak_gib,) = all_sum(training.engine, [throughput.peak_gib()])
    if training.log is None:
        return {}
    timed = training.log.rows[1:]
    predicted = training.predicted
    return {
        "tokens": timed[0]["tokens"],
        "seconds": [row["seconds"] for row in timed],
        "peak_gib": peak_gib,
        "predicted_s": predicted.step_s if predicted else None,
        "predicted_gib": predicted.peak_gib if predicted else None,
        "kernel": training.kernel,
    }


def _wait_for_gib(needs_gib: float, *, gpu: bool) -> float:
    """Wait until each rank has enough free memory or LOOKS checks are done; return the free memory.

    Every rank calls this.
    """
    for looks_left in reversed(range(LOOKS)):
        free_gib = torch.tensor(_free_gib(gpu), dtype=torch.float64, device="cuda" if gpu else "cpu")
        dist.all_reduce(free_gib, dist.ReduceOp.MIN)
        if free_gib.item() >= needs_gib or not looks_left:
            break
        time.sleep(1)
    return free_gib.item()


def _free_gib(gpu: bool) -> float:
    """Return the memory available to this rank: its GPU's, or its share of the machine's."""
    if gpu:
        return torch.cuda.mem_get_info()[0] / GIB
    memory = psutil.virtual_memory()
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0.0, memory.available - KEPT_FREE * memory.total) / ranks_here / GIB
