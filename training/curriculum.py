"""Rows that are short at first: a step reads some of its rows in pieces, as if each were a row of
its own.

Short contexts are learned first, at less cost (GrowLength, arXiv:2310.00576), or, with a share
below 1, long and short rows stand beside each other in each step. The rows are those of all arms,
packed once: a row that is read in pieces keeps its tokens, and what changes is that nothing is seen
across the pieces' borders. So every step has as many tokens as without a curriculum, and only the
first token of each piece is no target. Positions restart at each piece, which is how attention
and losses know documents apart.

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
    """Return the part of a curriculum that a step (from 0) belongs to; None after its end."""
    end = 0
    for stage in curriculum:
        end += stage.steps
        if step < end:
            return stage
    return None


def in_pieces(batch: dict[str, Tensor], places_B: np.ndarray, stage: LengthStage) -> dict[str, Tensor]:
    """Return a batch of whole rows with the stage's share of them in pieces.

    places_B: the rows' places in the line of all steps' rows, by which they are chosen: ranks and
    micro-batches do not matter.
    """
    chosen_B = np.array([_is_chosen(int(place), stage.share) for place in places_B])
    contexts_BT = effective_contexts(batch["position_ids"])
    column_T = torch.arange(contexts_BT.shape[1])
    # a piece begins where the row's next row_tokens begin, or later, where its document does
    in_piece_BT = torch.minimum(contexts_BT, column_T % stage.row_tokens)
    positions_BT = torch.where(torch.from_numpy(chosen_B)[:, None], in_piece_BT, batch["position_ids"])
    labels_BT = batch["labels"].masked_fill(positions_BT == 0, IGNORED)
    return {**batch, "position_ids": positions_BT, "labels": labels_BT}


def _is_chosen(place: int, share: float) -> bool:
    """Whether a row is one of the share, which is spread evenly: of 0.25 it is each fourth."""
    return math.floor((place + 1) * share) > math.floor(place * share)
