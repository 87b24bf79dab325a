"""Steps that are skipped because of a non-finite loss or gradient, or a loss spike.

A skipped step does not change weights or optimizer. Several in a row mean that the weights are bad:
training returns to its last checkpoint, once, and then skips the steps that were bad. If that does
not help, it fails and names the rows. All ranks decide the same, since all see the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median

from longreach.training.recipe import OptimRecipe

MAX_LOSSES, MIN_LOSSES = 20, 5  # maximum and minimum number of losses for the median
MIN_SPIKE_NATS = 1.0
"""Nats by which a spike must exceed the median. A model that has memorized its rows has losses
around 0.05, and a good step is sometimes three times that: without this limit, 60 of 2,000 were
skipped."""


class Skips:
    """The skipped steps, and whether to skip more or return to a checkpoint."""

    def __init__(self, optim: OptimRecipe, losses: Iterable[tuple[int, float]] = ()) -> None:
        self.spike_factor, self.allowed = optim.spike_factor, optim.max_skipped
        self.losses = dict(losses)
        self.bad: dict[int, str] = {}
        """Step -> why it was skipped."""
        self.in_a_row = 0
        self.went_back = False

    def distrusts(self, step: int, loss: float) -> str:
        """Return why a step with this loss must not change the weights; empty if it may."""
        if step in self.bad:
            return self.bad[step]
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        earlier = sorted(s for s in self.losses if s < step)
        recent = [self.losses[s] for s in earlier[-MAX_LOSSES:]]
        if len(recent) < MIN_LOSSES:
            return ""
        usual = median(recent)
        if loss > max(self.spike_factor * usual, usual + MIN_SPIKE_NATS):
            return f"its loss {loss:.4g} is over {self.spike_factor:g} times {usual:.4g}, the usual one"
        return ""

    def trained(self, step: int, loss: float) -> None:
        """Record that the step changed the weights."""
        self.losses[step] = loss
        self.in_a_row = 0

    def skipped(self, step: int, why: str) -> bool:
        """Record that the step was skipped; return whether training must return to a checkpoint."""
        if step not in self.bad:  # steps known to be bad are not counted again
            self.bad[step] = why
            self.in_a_row += 1
        return self.in_a_row >= self.allowed

    def go_back(self) -> None:
        """Record that training restarts from a checkpoint."""
        self.in_a_row = 0
        self.went_back = True
