"""Which tokens stand in which row, in pure NumPy; training/corpus.py reads and writes.

best_fit puts whole documents together with least waste: longest first, each into the fullest row
that has room (best-fit decreasing, "Fewer Truncations Improve Language Modeling",
arXiv:2404.10830). Of a document longer than a row only the remainder is fitted; no token is
dropped. position_ids restart at each document, which isolates them. concat joins documents and cuts
every seq_len tokens, with one range of positions a row.

    from longreach.training.packing import best_fit
    print(best_fit([5, 3, 6, 2], 8))      # [1 1 0 0]: 6 + 2, 5 + 3

Legend: D documents, S segments (pieces of documents), R rows, T tokens of a row.
"""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


def copies(lengths_D: np.ndarray, weight: float, rng: np.random.Generator) -> np.ndarray:
    """Return how often each document stands in the rows, [D] int64.

    All stand there floor(weight) times. For the rest of the weight whole documents are drawn until
    their tokens are as near as can be to that share.
    """
    copies_D = np.full(len(lengths_D), int(weight), np.int64)
    wanted = (weight - int(weight)) * lengths_D.sum()
    if wanted and len(lengths_D):
        order_D = rng.permutation(len(lengths_D))
        drawn = np.concatenate([[0], np.cumsum(lengths_D[order_D])])  # tokens of the first 0, 1, 2, ...
        copies_D[order_D[: np.abs(drawn - wanted).argmin()]] += 1
    return copies_D


def best_fit(lengths: ArrayLike, capacity: int) -> np.ndarray:
    """Return the row of each item, [items] int64. ValueError unless lengths are 1 to capacity.

    Items of one length are placed together, into all rows of one room at a time, and a row is
    touched only when it gets something: the time is that of sorting, plus the numbers of distinct
    lengths and of rows.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths {lengths.min()} to {lengths.max()} do not fit rows of {capacity}: split them first")
    row_of, rows = np.empty(len(lengths), np.int64), 0
    rooms: list[int] = []  # in which some row has exactly that room, sorted
    rows_with: dict[int, deque[int]] = {}

    def put_back(room: int, some: list[int]) -> None:
        if room and some:
            if room not in rows_with:
                bisect.insort(rooms, room)
            rows_with.setdefault(room, deque()).extend(some)

    order = np.argsort(-lengths, kind="stable")
    for items in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        length = int(lengths[items[0]]) if len(items) else capacity
        while len(items):
            at = bisect.bisect_left(rooms, length)
            room = rooms[at] if at < len(rooms) else capacity
            each = room // length  # the fullest row with room is the one just used, until it has none
            needed = -(-len(items) // each)
            if at < len(rooms):
                there = rows_with[room]
                used = [there.popleft() for _ in range(min(needed, len(there)))]
                if not there:
                    del rows_with[rooms.pop(at)]
            else:  # no row has room: as many new ones as it takes
                used = list(range(rows, rows + needed))
                rows += needed
            placed = min(len(items), len(used) * each)
            missing = len(used) * each - placed
            row_of[items[:placed]] = np.repeat(used, each)[:placed]
            if missing:  # in the last of them only
                put_back(room - each * length, used[:-1])
                put_back(room - (each - missing) * length, used[-1:])
            else:
                put_back(room - each * length, used)
            items = items[placed:]
    return row_of


class Segments(NamedTuple):
    """Pieces of the token stream, by row and place in it; each [S] int64."""

    row: np.ndarray
    source: np.ndarray  # first token, in the stream
    length: np.ndarray


def split_and_fit(starts_D: np.ndarray, lengths_D: np.ndarray, seq_len: int, lead: int) -> Segments:
    """Return the best fit of documents, longer ones split into full pieces and a remainder.

    `lead` tokens (the sink's or BOS's) stand before each piece.
    """
    capacity = seq_len - lead
    pieces_D = -(-lengths_D // capacity)
    document_S = np.repeat(np.arange(len(lengths_D)), pieces_D)
    skipped_S = (np.arange(len(document_S)) - np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)) * capacity
    length_S = np.minimum(capacity, lengths_D[document_S] - skipped_S)
    row_S = best_fit(length_S + lead, seq_len)
    by_row = np.argsort(row_S, kind="stable")
    return Segments(row_S[by_row], (starts_D[document_S] + skipped_S)[by_row], length_S[by_row])


def concat(starts_D: np.ndarray, lengths_D: np.ndarray, seq_len: int, lead: int) -> Segments:
    """Return documents joined, and cut where a row is full, with `lead` tokens before each row."""
    capacity = seq_len - lead
    ends_D = np.cumsum(lengths_D)
    total = int(lengths_D.sum())
    edges = np.union1d(ends_D - lengths_D, np.arange(0, total, capacity))  # in the joined documents
    document_S = np.searchsorted(ends_D, edges, side="right")
    source_S = starts_D[document_S] + edges - (ends_D - lengths_D)[document_S]
    return Segments(edges // capacity, source_S, np.diff(edges, append=total))


METHODS = {"best_fit": split_and_fit, "concat": concat}


@dataclass(frozen=True)
class Rows:
    """All rows as arithmetic; tokens are only moved by `fill`."""

    segments: Segments
    seq_len: int
    first_token: int | None
    """Stands first in each row, and in each isolated document; None: nothing does."""
    pad_token: int
    isolated: bool  # position_ids restart at each document

    @property
    def count(self) -> int:
        """Return the number of rows."""
        return int(self.segments.row[-1]) + 1 if len(self.segments.row) else 0

    def lengths(self) -> np.ndarray:
        """Return the tokens before the padding, [R] int32."""
        row_S, _, length_S = self.segments
        return np.bincount(row_S, length_S + self._lead(row_S), self.count).astype(np.int32)

    def run_lengths(self) -> np.ndarray:
        """Return the tokens of each run that sees nothing before it: of documents, or of rows."""
        if self.isolated:
            return self.segments.length + self._lead(self.segments.row)
        return self.lengths()

    def _lead(self, row_S: np.ndarray) -> np.ndarray:
        """Return the tokens before each segment, 0 or 1; row_S begins with a row's first one."""
        if self.first_token is None or self.isolated:
            return np.full(len(row_S), self.first_token is not None, np.int64)
        return (np.diff(row_S, prepend=-1) > 0).astype(np.int64)

    def fill(self, start: int, stop: int, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return input_ids [R, T], position_ids [R, T] and length [R] of some rows, int32.

        Padding stands at the end of a row, and its positions restart like a document's.
        """
        low, high = np.searchsorted(self.segments.row, [start, stop])
        row_S, source_S, length_S = (column[low:high] for column in self.segments)
        row_S = row_S - start
        count, lead_S = stop - start, self._lead(row_S)
        whole_S = length_S + lead_S
        before_S, whole_before_S = (np.cumsum(n) - n for n in (length_S, whole_S))
        opens_S = np.diff(row_S, prepend=-1) > 0
        place_S = whole_before_S - np.repeat(whole_before_S[opens_S], np.bincount(row_S, minlength=count))
        flat = np.arange(length_S.sum())  # every real token of these rows
        target = np.repeat(row_S * self.seq_len + place_S + lead_S - before_S, length_S) + flat
        leads = (row_S * self.seq_len + place_S)[lead_S > 0]

        ids_RT = np.full((count, self.seq_len), self.pad_token, np.int32)
        if self.first_token is not None:
            ids_RT.reshape(-1)[leads] = self.first_token
        ids_RT.reshape(-1)[target] = tokens[np.repeat(source_S - before_S, length_S) + flat]

        length_R = np.bincount(row_S, whole_S, count).astype(np.int32)
        column_T = np.arange(self.seq_len, dtype=np.int32)
        positions_RT = np.where(column_T < length_R[:, None], column_T, column_T - length_R[:, None])
        if self.isolated:
            positions_RT.reshape(-1)[target] -= np.repeat(place_S.astype(np.int32), length_S)
            positions_RT.reshape(-1)[leads] = 0
        return ids_RT, positions_RT, length_R
