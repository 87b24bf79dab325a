"""Validation loss during training, so that the best weights can be kept.

Rows are cut from the corpus' validation documents in turn. Of a chat only the first row is used,
and only its answers are targets. Attention is always full and causal, whatever pattern the arm
trains with (LongLoRA, section 3.2), so that arms are comparable.
"""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longreach.training.corpus import IGNORED
from longreach.training.loss import count_targets
from longreach.training.summary import PackSummary


def validation_rows(corpus: Path, count: int, *, drop_first: bool) -> list[dict[str, torch.Tensor]]:
    """Return at most `count` rows [1, T], in the format of PackedRows.batch.

    ValueError if no document is as long as a row, and no chat has an answer in its first row.
    """
    import datasets

    packed = PackSummary.read(corpus)
    lead, length = np.empty(0, np.int64), packed.seq_len
    if packed.first_token_id is not None:
        length -= 1  # even if it is dropped, so that arms with and without a sink token score the same tokens
        if not drop_first:
            lead = np.array([packed.first_token_id])
    held_out = datasets.load_from_disk(str(corpus / "documents")).with_format("numpy")
    documents = [row for row in held_out if row["split"] == "validation"]
    pieces: list[tuple[int, np.ndarray, np.ndarray]] = []  # with their index in the document, to take turns
    for document in documents:
        ids, given = document["input_ids"], np.zeros(len(document["input_ids"]), bool)
        if "given" in document:
            given = document["given"] == 1
        if given.any():  # a chat
            if not given[:length].all():
                pieces.append((0, ids[:length], given[:length]))
            continue
        whole = ids[: len(ids) // length * length].reshape(-1, length)
        pieces += [(number, piece, np.zeros(length, bool)) for number, piece in enumerate(whole)]
    if not pieces:
        raise ValueError(
            f"validate_every_steps: none of the {len(documents)} validation documents has {length} tokens, the length "
            f"of a row, or is a chat with an answer within that length: name others in corpus.validation, or set "
            f"validate_every_steps to 0"
        )
    column_T = torch.arange(packed.seq_len)
    rows = []
    for _, piece, given in sorted(pieces, key=itemgetter(0))[:count]:
        end = len(lead) + len(piece)
        ids_T = torch.full_like(column_T, packed.pad_token_id)
        ids_T[:end] = torch.from_numpy(np.concatenate([lead, piece]))
        labels_T = ids_T.masked_fill((column_T <= len(lead)) | (column_T >= end), IGNORED)
        labels_T[len(lead) : end][torch.from_numpy(given)] = IGNORED
        positions_T = torch.where(column_T < end, column_T, column_T - end)  # padding restarts at 0
        row = {"input_ids": ids_T, "position_ids": positions_T, "labels": labels_T}
        rows.append({name: x_T[None] for name, x_T in row.items()})
    return rows


@torch.no_grad()
def validation_loss(engine: Any, rows: list[dict[str, torch.Tensor]], rank: int, world: int) -> tuple[float, int]:
    """Return (summed loss, targets) of this rank's rows. Every rank makes the same number of
    forward passes."""
    total, targets = 0.0, 0
    engine.eval()
    for at in range(0, len(rows), world):
        mine = at + rank < len(rows)
        row = rows[at + rank] if mine else rows[0]
        loss = engine(**{k: v.to(engine.device) for k, v in row.items()}, scale=float(mine))
        total += float(loss)
        targets += mine * count_targets(row["labels"])
    engine.train()
    return total, targets
