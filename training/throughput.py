"""Cost of training: seconds by phase, tokens per second, memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from longreach.training.cost import GIB


class Clock:
    """Wall-clock seconds by phase since creation. On a GPU a phase ends when its kernels do."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._begun = self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to `phase`."""
        if torch.cuda.is_initialized():  # a rank on the CPU must not initialize the machine's GPU
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[phase] = self.laps.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Total seconds of all laps."""
        return self._last - self._begun


def peak_gib() -> float:
    """Return this rank's peak memory in GiB: of its GPU, else of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # Linux counts in KiB


def summary(rows: list[dict[str, Any]], kinds: Sequence[str]) -> dict[str, Any]:
    """Return TrainingSummary's fields on steps, tokens, seconds and losses.

    kinds: for each row, what distinguishes steps of different duration, such as the attention
    pattern. tokens_per_s uses the median of each kind for its steps; with one median for all, a few
    slow steps at the end would not count.
    """
    trained = [row for row in rows if not row["skipped"]]
    seconds = [row["seconds"] for row in rows]
    warm = list(zip(kinds, seconds, strict=True))[1:] or [(kinds[0], seconds[0])]
    typical_of = {kind: median(taken for other, taken in warm if other == kind) for kind, _ in warm}
    typical_s = sum(typical_of.get(kind, seconds[0]) for kind in kinds)
    tokens = sum(row["tokens"] for row in rows)
    return {
        "steps": len(rows),
        "skipped_steps": len(rows) - len(trained),
        "tokens": tokens,
        "targets": sum(row["targets"] for row in rows),
        "wall_s": sum(seconds),
        "checkpoints_s": sum(row["phases"].get("checkpoint", 0.0) for row in rows),
        "step_s_median": median(taken for _, taken in warm),
        "tokens_per_s": tokens / typical_s,
        "loss_first": trained[0]["loss"],
        "loss_last": trained[-1]["loss"],
    }
