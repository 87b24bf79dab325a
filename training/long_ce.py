"""A loss that weights each token by how much a long context helps to predict it (LongCE,
arXiv:2410.23771, section 4).

Most tokens are predicted just as well from the nearest text alone. So each target's term of the
loss is multiplied by

    min(exp(log p_long - log p_short), 5)

where p_long is its probability given all tokens of its own document before it in the row, and
p_short given only the nearest tokens. The weighted sum is divided by the sum of the weights, not by
the number of targets as in the paper, so that the scale of the loss does not grow with them. Adam
mostly absorbs this difference; `clip_norm` does not.

The paper computes both probabilities with the model in training, at every step. Here they are
computed once, with the model that training starts from, stretched as the arm requires and with full
causal attention. So arms with the same start share them, whatever their pattern, and a resumed
training uses the same ones. In 2503.09202, frozen scores were as good as live ones.

The short context of a token has between half of `short_tokens` and `short_tokens` - 1 tokens. It
comes from two passes over pieces of the row that overlap by half:

    row             0 1 2 3 4 5 6 7 8 9 ...
    first pass     [. . 2 3|. . 6 7|. . ...     short_tokens 4: of each piece the second half counts
    second pass    [0 1|. . 4 5|. . 8 9|...     the same, half a piece later

If the document has no more tokens than that before the target, the gain is 0 and the weight is 1.

    pytest tests/test_training_long_ce.py

Legend: B rows, T tokens of a row, R rows that were scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from transformers import PreTrainedModel

from longreach.attention.causal import Causal
from longreach.attention.hf import set_pattern
from longreach.attention.lm_head import nll_of
from longreach.attention.rope import fix_frequencies
from longreach.training.corpus import IGNORED, PackedRows
from longreach.training.exposure import effective_contexts
from longreach.training.loss import TokenLoss
from longreach.training.row_order import RowOrder

CAP = 5.0
"""Largest weight, the paper's gamma."""
ROWS, GAINS = "rows.npy", "gains.npy"


def rows_of_training(rows: int, seed: int, global_batch_rows: int, steps: int) -> np.ndarray:
    """Return the rows that a training of `steps` steps reads, each once, in order: [R] int64."""
    order = RowOrder(rows, seed, global_batch_rows)
    return np.unique(np.concatenate([order.rows_of_step(step) for step in range(steps)]))


@torch.no_grad()
def score_rows(
    model: PreTrainedModel,
    rows: PackedRows,
    row_ids: Sequence[int] | np.ndarray,
    short_tokens: int,
    out: Path,
    progress: Callable[[int, int], None],
) -> float:
    """Write the gain of every target in some rows to `out`, and return the targets' mean weight.

    progress: called with (rows done, all rows). FloatingPointError if a probability is not finite.
    """
    TokenLoss(model)  # rejects models that change their logits other than by a factor
    model.eval()
    set_pattern(model, Causal())
    fix_frequencies(model, rows.summary.seq_len)  # for all passes, as in training
    np.save(out / ROWS, np.asarray(row_ids))
    shape = (len(row_ids), rows.summary.seq_len)
    gains_RT = open_memmap(out / GAINS, mode="w+", dtype=np.float16, shape=shape)
    weights, targets = 0.0, 0
    for number, row in enumerate(row_ids):
        batch = rows.batch([int(row)])
        gain_BT = gains(model, batch, short_tokens)
        if not torch.isfinite(gain_BT).all():
            raise FloatingPointError(f"row {row}: the base's log probabilities are not finite; check its weights")
        gains_RT[number] = gain_BT[0].half().numpy()
        scored_BT = batch["labels"] != IGNORED
        weights += float(long_ce_weights(gain_BT)[scored_BT].double().sum())
        targets += int(scored_BT.sum())
        progress(number + 1, len(row_ids))
    gains_RT.flush()
    return weights / max(1, targets)


@torch.no_grad()
def gains(model: PreTrainedModel, batch: dict[str, Tensor], short_tokens: int) -> Tensor:
    """Return log p_long - log p_short of each token, [B, T] float32; 0 for tokens that are no
    target."""
    half = short_tokens // 2
    context_BT = effective_contexts(batch["position_ids"])
    column_T = torch.arange(context_BT.shape[1])
    long_BT = _log_p(model, batch, context_BT)
    short_BT, seen_BT = torch.zeros_like(long_BT), torch.zeros_like(context_BT)
    for shift in (0, half):
        place_T = (column_T + shift) % short_tokens  # index in its piece
        piece_BT = torch.minimum(context_BT, place_T)
        counts_T = place_T >= half
        short_BT = torch.where(counts_T, _log_p(model, batch, piece_BT), short_BT)
        seen_BT = torch.where(counts_T, piece_BT, seen_BT)
    nothing_BT = (seen_BT == context_BT) | (batch["labels"] == IGNORED)
    return (long_BT - short_BT).masked_fill(nothing_BT, 0.0)


def _log_p(model: PreTrainedModel, batch: dict[str, Tensor], positions_BT: Tensor) -> Tensor:
    """Return the log probability of each token, [B, T], with runs isolated where positions restart;
    0 in the first column."""
    ids_BT = batch["input_ids"].to(model.device)
    output = model.base_model(input_ids=ids_BT, position_ids=positions_BT.to(model.device), use_cache=False)
    nll_N = nll_of(model, output.last_hidden_state[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    log_p_BT = torch.zeros(ids_BT.shape)
    log_p_BT[:, 1:] = -nll_N.reshape(len(ids_BT), -1).cpu()
    return log_p_BT


def long_ce_weights(gain_BT: Tensor) -> Tensor:
    """Return the loss weight of each token from its gain, [B, T] float32."""
    return gain_BT.float().exp().clamp(max=CAP)


class TokenGains:
    """Memory-mapped gains that `score_rows` wrote."""

    def __init__(self, folder: Path | str) -> None:
        self.rows_R = np.load(Path(folder) / ROWS)
        self.gains_RT = np.load(Path(folder) / GAINS, mmap_mode="r")

    def weights(self, row_ids: Sequence[int] | np.ndarray) -> Tensor:
        """Return the loss weights of some rows, [B, T] float32. ValueError if a row was not
        scored."""
        row_ids = np.asarray(row_ids)
        at_B = np.searchsorted(self.rows_R, row_ids).clip(max=len(self.rows_R) - 1)
        if (self.rows_R[at_B] != row_ids).any():
            missing = row_ids[self.rows_R[at_B] != row_ids]
            raise ValueError(f"rows {missing.tolist()} have no gains: {len(self.rows_R)} others were scored")
        return long_ce_weights(torch.from_numpy(self.gains_RT[at_B]))
