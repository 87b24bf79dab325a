"""Position ids that skip, so that short rows train the positions of long ones (PoSE,
arXiv:2309.10400).

Each run of a row (an isolated document, or the whole row if documents are joined) is cut into
chunks at random places. Before every chunk except the first, positions jump ahead. So training sees
distances up to the whole context length at the cost of short rows. The tokens do not change:
nothing is left out between chunks.

    tokens       the cat sat on the mat
    plain        0   1   2   3  4   5
    2 chunks     0   1   9  10 11  12       of a context of 16: jumps add up to at most 16 - 6

Attention and losses recognize documents by positions that restart, which the batch keeps as
`documents`. Random draws depend on the seed, the step, the row, and how often the step has read the
row before (in a small corpus, or at the border of two epochs). So resumed runs, other ranks and
micro-batches draw the same, and a row gets new positions each time it is read.

    pytest tests/test_training_positions.py

Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from longreach.training.recipe import PositionsRecipe


def skip_positions(
    batch: dict[str, Tensor],
    row_ids: Sequence[int] | np.ndarray,
    repeats_B: Sequence[int] | np.ndarray,
    recipe: PositionsRecipe,
    *,
    seed: int,
    step: int,
) -> dict[str, Tensor]:
    """Return a batch of whole rows with position_ids that skip, and the plain ones as `documents`.

    repeats_B: how often each row occurs earlier in the step, on any rank
    (RowOrder.repeats_of_step).
    """
    plain_BT = batch["position_ids"]
    added = np.zeros(plain_BT.shape, np.int64)
    for added_T, plain_T, row, repeats in zip(added, plain_BT.numpy(), row_ids, repeats_B, strict=True):
        # numpy pads seeds with zeros, so a row's first occurrence draws as with [seed, step, row] in earlier results
        rng = np.random.default_rng([seed, step, int(row), int(repeats)])
        starts = np.flatnonzero(plain_T == 0)
        for begin, end in zip(starts, [*starts[1:], len(plain_T)], strict=True):
            added_T[begin:end] = _jumps(int(end - begin), recipe, rng)
    return {**batch, "position_ids": plain_BT + torch.from_numpy(added), "documents": plain_BT}


def _jumps(length: int, recipe: PositionsRecipe, rng: np.random.Generator) -> np.ndarray:
    """Return the offsets of the positions of a run: 0 in its first chunk, then non-decreasing."""
    chunks = min(recipe.chunks, length)
    cuts = 1 + np.sort(rng.choice(length - 1, chunks - 1, replace=False))
    added = np.zeros(length, np.int64)
    jump, most = 0, recipe.context_length - length
    for cut in cuts:
        jump = int(rng.integers(jump, most, endpoint=True))  # u_i ~ U(u_(i-1), L_t - L_c), section 3.2
        added[cut:] = jump
    return added
