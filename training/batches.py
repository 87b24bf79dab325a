"""(seed, step, rank) -> rows: what a step reads is arithmetic, so a resumed run, or one on other ranks, reads the same.

Each epoch is a permutation of all rows, drawn from (seed, epoch); a step takes the next global_batch_rows of the
endless line of epochs. Nothing is stored, nothing is skipped over on resuming.

    RowOrder(rows=1000, seed=0, global_batch_rows=8).for_rank(step=3, rank=1, world=2, micro_batch_rows=2)

Legend: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from longreach.training.summary import PackSummary

IGNORED = -100
"""The label that torch's cross entropy leaves out."""


@dataclass(frozen=True)
class RowOrder:
    """Which rows each optimizer step reads."""

    rows: int
    seed: int
    global_batch_rows: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.global_batch_rows < 1:
            raise ValueError(f"{self.rows} rows in batches of {self.global_batch_rows}: both must be at least 1")

    def rows_of_step(self, step: int) -> np.ndarray:
        """Global row ids of a step (from 0), in order: [global_batch_rows] int64."""
        at = np.arange(step * self.global_batch_rows, (step + 1) * self.global_batch_rows)
        epochs, places = np.divmod(at, self.rows)
        return np.concatenate(
            [_permutation(self.rows, self.seed, int(e))[places[epochs == e]] for e in np.unique(epochs)]
        )

    def for_rank(self, step: int, rank: int, world: int, micro_batch_rows: int) -> list[np.ndarray]:
        """A rank's micro-batches of a step: the ranks' in order of rank are rows_of_step, whatever the number of ranks.

        ValueError if world x micro_batch_rows does not divide the global batch.
        """
        at_once = world * micro_batch_rows
        if self.global_batch_rows % at_once:
            raise ValueError(
                f"{world} ranks x micro_batch_rows {micro_batch_rows} = {at_once} does not divide the global batch of "
                f"{self.global_batch_rows} rows: change resources.workers, micro_batch_rows or global_batch_tokens"
            )
        mine = np.split(self.rows_of_step(step), world)[rank]
        return np.split(mine, len(mine) // micro_batch_rows)


@functools.lru_cache(maxsize=2)
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(rows)


class PackedRows:
    """The rows of a PackedCorpus folder, memory-mapped: opening takes milliseconds, reading copies what is read."""

    def __init__(self, corpus_dir: Path | str) -> None:
        folder = Path(corpus_dir)
        self.summary = PackSummary.read(folder)
        state = json.loads((folder / "rows" / "state.json").read_text(encoding="utf-8"))
        files = [folder / "rows" / entry["filename"] for entry in state["_data_files"]]
        blocks = [
            block for file in files for block in pa.ipc.open_stream(pa.memory_map(str(file))).read_all().to_batches()
        ]
        self._ends = np.cumsum([len(block) for block in blocks])
        self._columns = {
            name: [_view(block[name]) for block in blocks] for name in ("input_ids", "position_ids", "length")
        }
        if len(self) != self.summary.rows:
            raise ValueError(f"{folder}: packed.json counts {self.summary.rows} rows, rows/ holds {len(self)}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _read(self, column: str, row_ids: np.ndarray) -> torch.Tensor:
        """Some rows of a column: [B, ...] int64."""
        block_B = np.searchsorted(self._ends, row_ids, side="right")
        rows = [self._columns[column][b][row - self._ends[b]] for b, row in zip(block_B, row_ids, strict=True)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def mean_document(self, rows: int = 256) -> float:
        """Tokens of the document that a token stands in, on average over the first rows: 2 x mean position + 1."""
        return 2 * float(self._read("position_ids", np.arange(min(rows, len(self)))).double().mean()) + 1

    def batch(self, row_ids: Sequence[int] | np.ndarray, drop_first: bool = False) -> dict[str, torch.Tensor]:
        """input_ids, position_ids and labels of some rows: [B, T] int64 each.

        labels are the input_ids, not shifted (the loss shifts), with -100 where there is nothing to predict from: the
        first token of a row, of a document that is isolated, and padding.

        drop_first leaves out the sink or BOS before each row or document, with padding at the end instead, so a model
        without it reads the same text. ValueError if the rows have none.
        """
        row_ids = np.asarray(row_ids)
        if len(row_ids) and not 0 <= row_ids.min() <= row_ids.max() < len(self):
            raise IndexError(f"rows {row_ids.min()} to {row_ids.max()} of {len(self)}")
        ids_BT, positions_BT = self._read("input_ids", row_ids), self._read("position_ids", row_ids)
        length_B1 = self._read("length", row_ids)[:, None]
        if drop_first:
            ids_BT, positions_BT, length_B1 = self._without_first(ids_BT, positions_BT, length_B1)
        nothing_BT = (positions_BT == 0) | (torch.arange(ids_BT.shape[1]) >= length_B1)
        return {
            "input_ids": ids_BT.contiguous(),
            "position_ids": positions_BT.contiguous(),
            "labels": ids_BT.masked_fill(nothing_BT, IGNORED),
        }

    def _without_first(
        self, ids_BT: torch.Tensor, positions_BT: torch.Tensor, length_B1: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows without their sink or BOS tokens, the rest moved up."""
        if (first := self.summary.first_token_id) is None:
            raise ValueError("drop_first on rows without a first token: pack them with first_token 'sink' or 'bos'")
        column_T = torch.arange(ids_BT.shape[1])
        first_BT = (ids_BT == first) & (positions_BT == 0) & (column_T < length_B1)
        kept_BT = torch.argsort(first_BT, dim=1, stable=True)
        length_B1 = length_B1 - first_BT.sum(1, keepdim=True)
        padding_BT = column_T >= length_B1
        ids_BT = ids_BT.gather(1, kept_BT).masked_fill(padding_BT, self.summary.pad_token_id)
        positions_BT = torch.where(padding_BT, column_T - length_B1, positions_BT.gather(1, kept_BT) - 1)
        return ids_BT, positions_BT, length_B1


def _view(column: pa.Array) -> np.ndarray:
    """An Arrow column as NumPy without a copy; lists, all of one length, as [rows, length]."""
    return column.values.to_numpy().reshape(len(column), -1) if pa.types.is_list(column.type) else column.to_numpy()
