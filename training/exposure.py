"""How much of its own document each target sees, and losses that give long contexts more weight.

In packed rows with isolated documents the effective context of a target is the number of tokens of
its own document that stand before it in the row. However long the rows are, most are short. EXACT
(arXiv:2605.10544) gives targets with long ones a fixed extra share of the loss, spread by inverse
frequency within that tail. We know its abstract and summaries only; the constants are our own:

    bins       4 to an octave of the effective context
    tail       bins that begin at a quarter of the row or later
    weight(c)  1 outside of the tail; in it 1 + min(9, EXTRA * targets / (tail bins * targets of c's bin))

So without the limit each bin of the tail gets as much extra weight as any other, and all together
EXTRA of what all targets weigh. Of each global batch the loss is the weighted mean: the sum of
weight * loss over the sum of weights, however rows are spread over ranks and micro-batches.

Legend: B rows, T tokens of a row, C effective contexts from 0 to T - 1.
"""

from __future__ import annotations

import numpy as np
import torch

EXTRA = 0.5
BINS_PER_OCTAVE = 4
TAIL_OF_ROW = 1 / 4
MOST = 9.0
"""Largest extra weight: a bin of three targets in a corpus must not make up half of a step's
loss."""


def context_counts(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Return the number of targets of each effective context, [C] int64.

    lengths: tokens of the runs that see nothing before them: isolated documents, or whole rows.
    """
    runs_of = np.bincount(lengths, minlength=seq_len + 1)[: seq_len + 1]
    longer = np.cumsum(runs_of[::-1])[::-1]  # runs of at least 0, 1, 2, ... tokens
    counts_C = longer[1:].astype(np.int64)  # a run of n tokens has one target of each context below n
    counts_C[0] = 0  # a first token is predicted from nothing: it is no target
    return counts_C


def exact_weights(counts_C: np.ndarray) -> np.ndarray:
    """Return the loss weight of each effective context, [C] float32 (the formula is above)."""
    seq_len = len(counts_C)
    context_C = np.arange(1, seq_len)
    bin_C = np.floor(BINS_PER_OCTAVE * np.log2(context_C) + 1e-9).astype(np.int64)
    tail = np.ceil(BINS_PER_OCTAVE * np.log2(max(1.0, TAIL_OF_ROW * seq_len)) - 1e-9)
    targets = np.bincount(bin_C, counts_C[1:])
    filled = np.flatnonzero((targets > 0) & (np.arange(len(targets)) >= tail))
    extra = np.zeros(len(targets))
    extra[filled] = np.minimum(MOST, EXTRA * counts_C.sum() / (len(filled) * targets[filled]))
    return np.concatenate([[1.0], 1.0 + extra[bin_C]]).astype(np.float32)


def effective_contexts(position_ids_BT: torch.Tensor) -> torch.Tensor:
    """Return how many tokens of its own run stand before each token of whole rows, [B, T] int64."""
    column_T = torch.arange(position_ids_BT.shape[1])
    start_BT = torch.where(position_ids_BT == 0, column_T, 0).cummax(1).values
    return column_T - start_BT
