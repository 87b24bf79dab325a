"""Packing: no token is lost or doubled, rows are filled as best-fit decreasing fills them, positions restart."""

import time
from itertools import pairwise

import numpy as np
import pytest

from longreach.training.packing import METHODS, Rows, best_fit, concat, split_and_fit


def brute_force(lengths, capacity):
    """Room left in each row by best-fit decreasing, one item after the other as the textbook has it."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fullest = min((room for room in rooms if room >= length), default=None)
        if fullest is None:
            rooms.append(capacity - length)
        else:
            rooms[rooms.index(fullest)] -= length
    return sorted(rooms)


def stream(rng, documents, longest):
    """Tokens 1000, 1001, ... cut into documents, with gaps between them: (tokens, starts, lengths)."""
    lengths = rng.integers(1, longest + 1, documents)
    gaps = rng.integers(0, 4, documents)
    starts = np.cumsum(gaps + lengths) - lengths
    return np.arange(1000, 1000 + starts[-1] + longest), starts, lengths


@pytest.mark.parametrize("capacity", [1, 2, 7, 16, 100])
@pytest.mark.parametrize("seed", range(20))
def test_best_fit_fills_rows_as_the_textbook_does(seed, capacity):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, rng.integers(1, capacity + 1) + 1, rng.integers(1, 200))
    filled = np.bincount(best_fit(lengths, capacity), lengths)
    assert sorted(capacity - filled) == brute_force(lengths.tolist(), capacity)  # so none overflows, none is empty


def test_an_item_goes_into_the_fullest_row_that_has_room():
    assert best_fit([5, 3, 6, 2], 8).tolist() == [1, 1, 0, 0]
    assert best_fit([6, 5, 1], 8).tolist() == [0, 1, 0]
    assert best_fit([4, 4, 4, 4, 4], 8).tolist() == [0, 0, 1, 1, 2]


def test_best_fit_finds_the_perfect_packing_of_halves_and_quarters():
    lengths = np.repeat([64, 32, 16, 16], 250)
    assert np.bincount(best_fit(lengths, 128), lengths).tolist() == [128] * 250


@pytest.mark.parametrize(("lengths", "rows"), [([], []), ([8], [0]), ([8, 8], [0, 1]), ([1] * 9, [0] * 8 + [1])])
def test_rows_can_be_full_and_items_can_be_none(lengths, rows):
    assert best_fit(lengths, 8).tolist() == rows


@pytest.mark.parametrize("lengths", [[9, 1], [0, 1], [-1]])
def test_lengths_that_do_not_fit_are_refused_with_both_numbers(lengths):
    with pytest.raises(ValueError, match=rf"lengths {min(lengths)} to {max(lengths)} do not fit rows of 8"):
        best_fit(lengths, 8)


def test_many_rows_with_the_same_room_cost_nothing_until_they_are_used():
    lengths = np.concatenate([np.full(500_000, 8193), np.arange(1, 8001)])  # half a million rows have a room of 8191
    started = time.process_time()
    rows = best_fit(lengths, 16_384)
    assert time.process_time() - started < 5  # measured: 0.2 s; copying the list of rows for each item: 20 s
    assert np.bincount(rows, lengths).max() <= 16_384


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("capacity", [1, 5, 16])
@pytest.mark.parametrize("seed", range(10))
def test_each_token_stands_in_exactly_one_place(seed, capacity, method):
    tokens, starts, lengths = stream(np.random.default_rng(seed), 60, 40)
    row, source, length = METHODS[method](starts, lengths, capacity, 0)
    placed = np.concatenate([tokens[at : at + n] for at, n in zip(source, length, strict=True)])
    wanted = np.concatenate([tokens[at : at + n] for at, n in zip(starts, lengths, strict=True)])
    assert sorted(placed) == sorted(wanted)
    assert np.bincount(row, length).max() <= capacity
    assert (np.diff(row) >= 0).all()
    assert set(row) == set(range(row[-1] + 1))


def test_only_the_remainder_of_a_long_document_shares_a_row():
    row, source, length = split_and_fit(np.array([0, 100]), np.array([21, 3]), 8, 0)
    pieces = sorted(zip(source.tolist(), length.tolist(), row.tolist(), strict=True))
    assert [piece[:2] for piece in pieces] == [(0, 8), (8, 8), (16, 5), (100, 3)]
    assert pieces[2][2] == pieces[3][2]
    assert len(set(row)) == 3


def test_concat_joins_documents_in_order_and_cuts_every_capacity_tokens():
    row, source, length = concat(np.array([10, 20, 30]), np.array([5, 4, 3]), 9, 1)
    assert row.tolist() == [0, 0, 1, 1]
    assert source.tolist() == [10, 20, 23, 30]
    assert length.tolist() == [5, 3, 1, 3]


def expected_rows(segments, seq_len, first_token, pad, isolated, tokens):
    """Rows one token at a time: (ids, positions, length)."""
    for row in range(segments.row[-1] + 1):
        ids, positions = [], []
        for n, segment in enumerate(np.flatnonzero(segments.row == row)):
            at, length = segments.source[segment], segments.length[segment]
            lead = [first_token] * (first_token is not None and (isolated or n == 0))
            begin = 0 if isolated else len(ids)
            ids += lead + tokens[at : at + length].tolist()
            positions += range(begin, begin + len(lead) + length)
        padding = seq_len - len(ids)
        yield ids + [pad] * padding, positions + list(range(padding)), len(ids)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first_token", [None, 7])
@pytest.mark.parametrize("seed", range(5))
def test_filled_rows_are_those_of_a_plain_loop(seed, first_token, method):
    tokens, starts, lengths = stream(np.random.default_rng(seed), 50, 40)
    segments = METHODS[method](starts, lengths, 16, int(first_token is not None))
    isolated = method == "best_fit"
    rows = Rows(segments, 16, first_token, pad_token=3, isolated=isolated)
    expected = list(expected_rows(segments, 16, first_token, 3, isolated, tokens))
    assert rows.count == len(expected)
    assert rows.lengths().tolist() == [length for *_, length in expected]
    for start, stop in pairwise([0, 1, 2, 9, rows.count]):
        ids, positions, length = rows.fill(start, stop, tokens)
        assert (ids.dtype, positions.dtype, length.dtype) == (np.int32,) * 3
        for got_ids, got_positions, got_length, want in zip(ids, positions, length, expected[start:stop], strict=True):
            assert (got_ids.tolist(), got_positions.tolist(), got_length) == want


def test_positions_restart_at_each_document_and_at_the_padding():
    segments = split_and_fit(np.array([0, 10]), np.array([3, 2]), 8, 1)
    ids, positions, length = Rows(segments, 8, 99, 0, isolated=True).fill(0, 1, np.arange(50, 70))
    assert ids.tolist() == [[99, 50, 51, 52, 99, 60, 61, 0]]
    assert positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert length.tolist() == [7]


def test_concat_rows_have_one_range_of_positions():
    segments = concat(np.array([0, 10]), np.array([5, 5]), 8, 0)
    _, positions, _ = Rows(segments, 8, None, 0, isolated=False).fill(0, 2, np.arange(20))
    assert positions.tolist() == [list(range(8)), [0, 1, 0, 1, 2, 3, 4, 5]]


def test_vocabularies_over_65535_keep_their_ids():
    segments = split_and_fit(np.array([0]), np.array([4]), 8, 0)
    ids, _, _ = Rows(segments, 8, None, 151_645, isolated=True).fill(0, 1, np.array([65_536, 128_000, 151_643, 1]))
    assert ids.tolist() == [[65_536, 128_000, 151_643, 1, 151_645, 151_645, 151_645, 151_645]]
