"""A curriculum of row lengths: a step splits some of its rows into pieces that act as separate
rows.

Short contexts are learned first, at lower cost (GrowLength, arXiv:2310.00576). With a share below
1, each step mixes long and short rows. All arms use the same rows, packed once. A row in pieces
keeps its tokens; the only change is that attention does not cross the borders of pieces. So every
step has as many tokens as without a curriculum, and only the first token of each piece is no
target. Positions restart at each piece, which is how attention and losses tell documents apart.

    row of 8, pieces of 4    a a a a a | b b b
    positions, whole         0 1 2 3 4 | 0 1 2
    positions, in pieces     0 1 2 3 | 0 | 0 1 2

    pytest tests/test_training_curriculum.py

Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from longreach.training.corpus import IGNORED
from longreach.training.exposure import effective_contexts
from longreach.training.recipe import LengthStage


def stage_of(curriculum: Sequence[LengthStage], step: int) -> LengthStage | None:
    """Return the part of the curriculum for a step (from 0); None after its end."""
    end = 0
    for stage in curriculum:
        end += stage.steps
        if step < end:
            return stage
    return None


def in_pieces(batch: dict[str, Tensor], places_B: np.ndarray, stage: LengthStage) -> dict[str, Tensor]:
    """Return a batch of whole rows with the stage's share of them in pieces.

    places_B: the rows' indices in the sequence of all steps' rows. Rows are chosen by these, so
    that ranks and micro-batches do not matter.
    """
    chosen_B = np.array([_is_chosen(int(place), stage.share) for place in places_B])
    contexts_BT = effective_contexts(batch["position_ids"])
    column_T = torch.arange(contexts_BT.shape[1])
    # a piece begins at each multiple of row_tokens in the row, or where a document begins
    in_piece_BT = torch.minimum(contexts_BT, column_T % stage.row_tokens)
    positions_BT = torch.where(torch.from_numpy(chosen_B)[:, None], in_piece_BT, batch["position_ids"])
    labels_BT = batch["labels"].masked_fill(positions_BT == 0, IGNORED)
    return {**batch, "position_ids": positions_BT, "labels": labels_BT}


def _is_chosen(place: int, share: float) -> bool:
    """Return whether a row is in the share, which is spread evenly: with 0.25 every fourth row."""
    return math.floor((place + 1) * share) > math.floor(place * share)
