"""A few steps of one arm at one row length, of which only the cost is kept: the ranks' part of the
stage `costs`.

The rows are the corpus' tokens, cut to the length that is asked for, each row one run of them: what
a long document gives. It is the loop of training with nothing saved, so what is measured is what
training does.

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
"""Share of a machine's memory that stays free: Ray kills a process where less is left."""

LOOKS = 10
"""How often it is looked whether memory is free, a second apart: ranks of the trial before may
still be ending."""


class Trial(BaseModel):
    """What is measured, and how often."""

    job: TrainJob
    """Its corpus gives the tokens; its out and work are not used."""
    length: int
    """Tokens of a row."""
    needs_gib: float | None = None
    """Memory that one rank is predicted to need; None if that is not known."""


class TrialTraining(Training):
    """Training that leaves nothing behind."""

    def save(self) -> None:
        """Write no checkpoint, since it takes longer than the trial."""


def measure(trial: dict[str, Any]) -> dict[str, Any]:
    """Train as a Trial says; rank 0 returns a CostCell's measurements, or why it is `left_out`; the
    others {}.

    Every rank calls it, with the process group up. The first step, which warms up, is not in the
    measurements.
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
    """Return the memory that is free for each rank, once it is enough or does not become so; every
    rank calls it."""
    for looks_left in reversed(range(LOOKS)):
        free_gib = torch.tensor(_free_gib(gpu), dtype=torch.float64, device="cuda" if gpu else "cpu")
        dist.all_reduce(free_gib, dist.ReduceOp.MIN)
        if free_gib.item() >= needs_gib or not looks_left:
            break
        time.sleep(1)
    return free_gib.item()


def _free_gib(gpu: bool) -> float:
    """Return the memory that this rank may take: of its GPU, else its part of what is free on its
    machine."""
    if gpu:
        return torch.cuda.mem_get_info()[0] / GIB
    memory = psutil.virtual_memory()
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0.0, memory.available - KEPT_FREE * memory.total) / ranks_here / GIB
