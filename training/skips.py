"""Steps that are not trained on: a loss or gradient that is no number, or a loss that jumps.

A skipped step leaves weights and optimizer as they were. Several in a row mean that the weights
went wrong: training goes back to its last checkpoint, once, and then leaves out the steps that were
bad. If that does not help it stops and names the rows. Every rank decides the same, since all see
the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median

from longreach.training.recipe import OptimRecipe

RECENT, ENOUGH = 20, 5  # how many losses the median is over, and how few say nothing yet
LEAST_JUMP = 1.0
"""Nats by which a loss that jumps is over the usual one. A model that knows its rows by heart has
losses around 0.05, and a good step is three times that now and then: 60 of 2,000 were skipped."""


class Skips:
    """What was skipped, and what to do about it."""

    def __init__(self, optim: OptimRecipe, losses: Iterable[tuple[int, float]] = ()) -> None:
        self.spike_factor, self.allowed = optim.spike_factor, optim.max_skipped
        self.losses = dict(losses)
        self.bad: dict[int, str] = {}
        """Step -> what was wrong with it."""
        self.in_a_row = 0
        self.went_back = False

    def distrusts(self, step: int, loss: float) -> str:
        """Return why a step with this loss must not change the weights; empty if it may."""
        if step in self.bad:
            return self.bad[step]
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        earlier = sorted(s for s in self.losses if s < step)
        recent = [self.losses[s] for s in earlier[-RECENT:]]
        if len(recent) < ENOUGH:
            return ""
        usual = median(recent)
        if loss > max(self.spike_factor * usual, usual + LEAST_JUMP):
            return f"its loss {loss:.4g} is over {self.spike_factor:g} times {usual:.4g}, the usual one"
        return ""

    def trained(self, step: int, loss: float) -> None:
        """The step changed the weights."""
        self.losses[step] = loss
        self.in_a_row = 0

    def skipped(self, step: int, why: str) -> bool:
        """The step did not; return whether there were so many that training has to go back."""
        if step not in self.bad:  # those known to be bad say nothing new
            self.bad[step] = why
            self.in_a_row += 1
        return self.in_a_row >= self.allowed

    def go_back(self) -> None:
        """Training begins again at a checkpoint."""
        self.in_a_row = 0
        self.went_back = True
