"""Assign tokens to rows, in pure NumPy. training/corpus.py does the reading and writing.

best_fit combines whole documents with the least padding: longest first, each into the fullest row
that has room for it (best-fit decreasing, "Fewer Truncations Improve Language Modeling",
arXiv:2404.10830). A document longer than a row fills whole rows, and only its remainder is fitted,
so no token is dropped. position_ids restart at each document, which isolates it from the others.
concat joins documents and cuts every seq_len tokens, with one range of positions per row.

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
    """Return how often each document occurs in the rows, [D] int64.

    Every document occurs floor(weight) times. For the fractional part of the weight, random whole
    documents are added whose total tokens come as close as possible to this share.
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

    Items of equal length are placed together, into all rows with equal room at a time, and a row is
    touched only when it receives an item. The running time is that of sorting plus the number of
    distinct lengths and the number of rows.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths {lengths.min()} to {lengths.max()} do not fit rows of {capacity}: split them first")
    row_of, rows = np.empty(len(lengths), np.int64), 0
    rooms: list[int] = []  # sorted: the amounts of room that some row has
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
            each = room // length  # the row just used stays the fullest one with room until it is full
            needed = -(-len(items) // each)
            if at < len(rooms):
                there = rows_with[room]
                used = [there.popleft() for _ in range(min(needed, len(there)))]
                if not there:
                    del rows_with[rooms.pop(at)]
            else:  # no row has room: open as many new ones as needed
                used = list(range(rows, rows + needed))
                rows += needed
            placed = min(len(items), len(used) * each)
            missing = len(used) * each - placed
            row_of[items[:placed]] = np.repeat(used, each)[:placed]
            if missing:  # only the last row is not filled
                put_back(room - each * length, used[:-1])
                put_back(room - (each - missing) * length, used[-1:])
            else:
                put_back(room - each * length, used)
            items = items[placed:]
    return row_of


class Segments(NamedTuple):
    """Pieces of the token stream, ordered by row and place in the row; each [S] int64."""

    row: np.ndarray
    source: np.ndarray  # index of its first token in the stream
    length: np.ndarray


def split_and_fit(starts_D: np.ndarray, lengths_D: np.ndarray, seq_len: int, lead: int) -> Segments:
    """Return the best fit of documents; longer ones are split into full pieces and a remainder.

    `lead` tokens (sink or BOS) come before each piece.
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
    """Return the joined documents, cut where a row is full, with `lead` tokens before each row."""
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
    """The layout of all rows. Only `fill` copies tokens."""

    segments: Segments
    seq_len: int
    first_token: int | None
    """The first token of each row, or of each isolated document; None for no such token."""
    pad_token: int
    isolated: bool  # position_ids restart at each document

    @property
    def count(self) -> int:
        """Return the number of rows."""
        return int(self.segments.row[-1]) + 1 if len(self.segments.row) else 0

    def lengths(self) -> np.ndarray:
        """Return the number of tokens in each row, without padding, [R] int32."""
        row_S, _, length_S = self.segments
        return np.bincount(row_S, length_S + self._lead(row_S), self.count).astype(np.int32)

    def run_lengths(self) -> np.ndarray:
        """Return the length of each run, which sees nothing before it: a document part or a row."""
        if self.isolated:
            return self.segments.length + self._lead(self.segments.row)
        return self.lengths()

    def _lead(self, row_S: np.ndarray) -> np.ndarray:
        """Return the number of first tokens before each segment, 0 or 1, [S] int64.

        row_S must begin with the first segment of a row.
        """
        if self.first_token is None or self.isolated:
            return np.full(len(row_S), self.first_token is not None, np.int64)
        return (np.diff(row_S, prepend=-1) > 0).astype(np.int64)

    def fill(self, start: int, stop: int, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return input_ids [R, T], position_ids [R, T] and length [R] of rows start to stop, int32.

        Padding is at the end of a row, and its positions restart like those of a document.
        """
        low, high = np.searchsorted(self.segments.row, [start, stop])
        row_S, source_S, length_S = (column[low:high] for column in self.segments)
        row_S = row_S - start
        count, lead_S = stop - start, self._lead(row_S)
        whole_S = length_S + lead_S
        before_S, whole_before_S = (np.cumsum(n) - n for n in (length_S, whole_S))
        opens_S = np.diff(row_S, prepend=-1) > 0
        place_S = whole_before_S - np.repeat(whole_before_S[opens_S], np.bincount(row_S, minlength=count))
        flat = np.arange(length_S.sum())  # every token of these rows that comes from a document
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
