"""The rows that each rank reads in each step, computed from (seed, step, rank).

So resumed runs and runs with another number of ranks read the same rows. Each epoch is a
permutation of all rows, drawn from (seed, epoch). A step takes the next global_batch_rows of the
infinite sequence of epochs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RowOrder:
    """Which rows each optimizer step reads."""

    rows: int
    seed: int
    global_batch_rows: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.global_batch_rows < 1:
            raise ValueError(f"{self.rows} rows in batches of {self.global_batch_rows}: both must be at least 1")

    def rows_of_step(self, step: int) -> np.ndarray:
        """Return the row ids of a step (from 0), in order: [global_batch_rows] int64."""
        at = np.arange(step * self.global_batch_rows, (step + 1) * self.global_batch_rows)
        epochs, places = np.divmod(at, self.rows)
        return np.concatenate(
            [_permutation(self.rows, self.seed, int(e))[places[epochs == e]] for e in np.unique(epochs)]
        )

    def repeats_of_step(self, step: int) -> np.ndarray:
        """Return how often each of a step's rows occurs earlier in the step, [global_batch_rows]
        int64. Rows repeat if a step reads from more than one epoch."""
        rows = self.rows_of_step(step)
        return np.array([np.count_nonzero(rows[:n] == row) for n, row in enumerate(rows)])

    def first_place(self, step: int, rank: int, world: int) -> int:
        """Return the index of a rank's first row of a step in the infinite sequence."""
        return step * self.global_batch_rows + rank * self.global_batch_rows // world

    def for_rank(self, step: int, rank: int, world: int, micro_batch_rows: int) -> list[np.ndarray]:
        """Return a rank's micro-batches. Those of all ranks, in rank order, are rows_of_step.

        ValueError if world x micro_batch_rows does not divide the global batch.
        """
        at_once = world * micro_batch_rows
        if self.global_batch_rows % at_once:
            raise ValueError(
                f"{world} ranks x micro_batch_rows {micro_batch_rows} = {at_once} does not divide the global batch of "
                f"{self.global_batch_rows} rows: change resources.workers, micro_batch_rows or global_batch_tokens"
            )
        mine = np.split(self.rows_of_step(step), world)[rank]
        return np.split(mine, len(mine) // micro_batch_rows)


@functools.lru_cache(maxsize=2)
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(rows)
