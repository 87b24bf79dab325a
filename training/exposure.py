"""The effective context of targets, and loss weights that favour long contexts.

In packed rows with isolated documents, the effective context of a target is the number of tokens of
its own document before it in the row. Even in long rows, most effective contexts are short. EXACT
(arXiv:2605.10544) gives targets with long ones a fixed extra share of the loss, distributed by
inverse frequency within that tail. We only know its abstract and summaries; the constants are our
own:

    bins       4 per octave of the effective context
    tail       bins that begin at a quarter of the row or later
    weight(c)  1 outside the tail; in it 1 + min(9, EXTRA * targets / (tail bins * targets of c's bin))

So without the limit, each bin of the tail gets the same extra weight, and all bins together get
EXTRA times the number of targets. The loss of a global batch is the weighted mean: the sum of
weight * loss over the sum of weights, however rows are spread over ranks and micro-batches.

Legend: B rows, T tokens of a row, C effective contexts from 0 to T - 1.
"""

from __future__ import annotations

import numpy as np
import torch

EXTRA = 0.5
BINS_PER_OCTAVE = 4
TAIL_OF_ROW = 1 / 4
MAX_EXTRA_WEIGHT = 9.0
"""Largest extra weight. Without it, a bin with three targets in the corpus could make up half of a
step's loss."""


def context_counts(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Return the number of targets for each effective context, [C] int64.

    lengths: tokens in each run (isolated document, or whole row); a run sees nothing before it.
    """
    runs_of = np.bincount(lengths, minlength=seq_len + 1)[: seq_len + 1]
    longer = np.cumsum(runs_of[::-1])[::-1]  # number of runs with at least 0, 1, 2, ... tokens
    counts_C = longer[1:].astype(np.int64)  # a run of n tokens has one target for each context below n
    counts_C[0] = 0  # a first token has no context, so it is no target
    return counts_C


def exact_weights(counts_C: np.ndarray) -> np.ndarray:
    """Return the loss weight for each effective context, [C] float32 (formula in the module's
    docstring)."""
    seq_len = len(counts_C)
    context_C = np.arange(1, seq_len)
    bin_C = np.floor(BINS_PER_OCTAVE * np.log2(context_C) + 1e-9).astype(np.int64)
    tail = np.ceil(BINS_PER_OCTAVE * np.log2(max(1.0, TAIL_OF_ROW * seq_len)) - 1e-9)
    targets = np.bincount(bin_C, counts_C[1:])
    filled = np.flatnonzero((targets > 0) & (np.arange(len(targets)) >= tail))
    extra = np.zeros(len(targets))
    extra[filled] = np.minimum(MAX_EXTRA_WEIGHT, EXTRA * counts_C.sum() / (len(filled) * targets[filled]))
    return np.concatenate([[1.0], 1.0 + extra[bin_C]]).astype(np.float32)


def effective_contexts(position_ids_BT: torch.Tensor) -> torch.Tensor:
    """Return how many tokens of its own run are before each token of whole rows, [B, T] int64."""
    column_T = torch.arange(position_ids_BT.shape[1])
    start_BT = torch.where(position_ids_BT == 0, column_T, 0).cummax(1).values
    return column_T - start_BT
