"""Loss on held-out text while training goes on, so that the best weights can be kept and not only the last.

Rows are cut from the corpus' validation documents, a piece of each in turn; attention is full and causal whatever the
arm trains with (LongLoRA, section 3.2), so arms compare. The loss is a mean over all targets, whatever the ranks.
"""

from __future__ import annotations

from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longreach.training.corpus import IGNORED
from longreach.training.loss import count_targets
from longreach.training.summary import PackSummary


def validation_rows(corpus: Path, count: int, *, drop_first: bool) -> list[dict[str, torch.Tensor]]:
    """At most `count` rows [1, T] as PackedRows.batch gives them, the first token of the corpus' rows in front.

    drop_first: without it and with padding at the end, as for the arms that read rows so. ValueError if no document is
    as long as a row.
    """
    import datasets

    packed = PackSummary.read(corpus)
    lead = [] if packed.first_token_id is None or drop_first else [packed.first_token_id]
    length = packed.seq_len - (packed.first_token_id is not None)
    held_out = datasets.load_from_disk(str(corpus / "documents")).with_format("numpy")
    texts = [row["input_ids"].astype(np.int64) for row in held_out if row["split"] == "validation"]
    pieces = [[text[at : at + length] for at in range(0, len(text) - length + 1, length)] for text in texts]
    in_turn = [piece for piece in chain.from_iterable(zip_longest(*pieces)) if piece is not None][:count]
    if not in_turn:
        raise ValueError(
            f"validate_every_steps: none of the {len(texts)} validation documents has {length} tokens, which a row "
            f"takes: name longer ones in corpus.validation, or set it to 0"
        )
    column_T = torch.arange(packed.seq_len)
    end = len(lead) + length
    rows = []
    for piece in in_turn:
        ids_T = torch.full_like(column_T, packed.pad_token_id)
        ids_T[:end] = torch.from_numpy(np.concatenate([np.array(lead, np.int64), piece]))
        # arms with and without a sink token score the same tokens
        labels_T = ids_T.masked_fill((column_T <= len(lead)) | (column_T >= end), IGNORED)
        row = {"input_ids": ids_T, "position_ids": column_T % end, "labels": labels_T}  # padding: a run of its own
        rows.append({name: x_T[None] for name, x_T in row.items()})
    return rows


@torch.no_grad()
def validation_loss(engine: Any, rows: list[dict[str, torch.Tensor]], rank: int, world: int) -> tuple[float, int]:
    """(summed loss, targets) of this rank's share of the rows. Every rank makes as many passes."""
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
