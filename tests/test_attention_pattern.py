"""Every pattern in PATTERNS: what its predicate may never do, and the three patterns spelled out token by token."""

from itertools import pairwise, product

import pytest
import torch
from attention_cases import EVERY_PATTERN, HEADS, ROWS, positions

from longreach.attention import PATTERNS
from longreach.attention.pattern import Heads, and_, causal, document_starts, or_
from longreach.attention.reference import dense_mask, starts

patterns = pytest.mark.parametrize("pattern", EVERY_PATTERN, ids=str)
rows = pytest.mark.parametrize("row", ROWS)


def mask_of(pattern, T, documents=None, heads=(4, 2), layer=0):
    """Booleans [B, H, T, T] of a row given as document lengths."""
    position_ids = None if documents is None else positions(*documents)
    return dense_mask(
        pattern, Heads(*heads, layer), starts(position_ids, len(documents or [0]), T, torch.device("cpu"))
    )


@rows
@patterns
def test_no_pattern_sees_the_future(pattern, row):
    T, documents = ROWS[row]
    for layer in (0, 1):
        mask = mask_of(pattern, T, documents, layer=layer)
        assert not (mask & torch.ones(T, T, dtype=torch.bool).triu(1)).any()


@rows
@patterns
def test_every_token_sees_itself(pattern, row):
    assert mask_of(pattern, *ROWS[row]).diagonal(dim1=-2, dim2=-1).all()


@rows
@patterns
def test_no_pattern_sees_another_document(pattern, row):
    T, documents = ROWS[row]
    mask = mask_of(pattern, T, documents)
    for b, lengths in enumerate(documents or [(T,)]):
        document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        assert not (mask[b] & (document_T[:, None] != document_T[None, :])).any()


@patterns
def test_the_first_tokens_of_a_document_are_seen_as_far_as_sink_tokens_say(pattern):
    sink_tokens = getattr(pattern, "sink_tokens", 0)
    mask = mask_of(pattern, 41, [(1, 2, 7, 12, 19)])
    for begin, end in ((10, 22), (22, 41)):
        for j in range(sink_tokens):
            assert mask[0, :, begin + j : end, begin + j].all()


def group_of(token, shift, G):
    """The group of a token, counted by hand: with a shift the first group has G - shift tokens."""
    groups, left = 0, G - shift
    for _ in range(token):
        left -= 1
        if left == 0:
            groups, left = groups + 1, G
    return groups


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("H", "K"), HEADS)
@pytest.mark.parametrize("name", ["grouped", "shifted_sparse"])
def test_grouped_heads_see_their_own_group_and_the_sinks(name, H, K, layer):
    G, n, T = 6, 2, 19
    mask = mask_of(PATTERNS[name](group_tokens=G, sink_tokens=n), T, [(10, 9)], (H, K), layer)
    stay = -(-K // 2)
    for h in range(H):
        second = (h // (H // K) >= stay) != (K % 2 == 1 and layer == 1)
        group = [group_of(token, G // 2 if name == "shifted_sparse" and second else 0, G) for token in range(T)]
        for q in range(T):
            begin = 0 if q < 10 else 10
            expected = [begin <= kv <= q and (group[q] == group[kv] or kv < begin + n) for kv in range(T)]
            assert mask[0, h, q].tolist() == expected, (h, q)


def test_first_and_last_half_groups_are_never_one_group():
    """The leak of every rolling copy: the row's end must not see its beginning either, in any head."""
    mask = mask_of(PATTERNS["shifted_sparse"](group_tokens=8), 32, heads=(8, 8))
    assert not mask[0, :, 28:, :4].any()
    assert mask[0, 7, 3, :4].all()
    assert not mask[0, 7, 4, :4].any()


@pytest.mark.parametrize("K", [1, 2, 3, 5, 8])
def test_over_two_layers_every_head_count_has_both_plain_and_shifted_heads(K):
    pattern = PATTERNS["shifted_sparse"](group_tokens=8)
    by_layer = [[pattern.shifted(Heads(K, K, layer), k) for k in range(K)] for layer in (0, 1)]
    assert by_layer[0].count(False) == -(-K // 2)
    if K % 2:
        assert by_layer[1] == [not shifted for shifted in by_layer[0]]
    assert {True, False} == {shifted for layer in by_layer for shifted in layer}


@pytest.mark.parametrize(("n", "W"), [(0, 1), (0, 5), (2, 1), (2, 5), (4, 40)])
def test_sink_window_sees_the_first_tokens_and_the_last(n, W):
    mask = mask_of(PATTERNS["sink_window"](sink_tokens=n, window_tokens=W), 19, [(10, 9)])
    for q in range(19):
        begin = 0 if q < 10 else 10
        expected = [begin <= kv <= q and (kv > q - W or kv < begin + n) for kv in range(19)]
        assert mask[0, 0, q].tolist() == expected


@rows
@pytest.mark.parametrize(("H", "K"), [(2, 1), (4, 2), (3, 3)])
@patterns
def test_rectangles_cover_exactly_what_the_predicate_allows(pattern, row, H, K):
    """Each (query, key) pair once."""
    if pattern.rectangles(None, 0, 1) is None:
        pytest.skip("a predicate only")
    T, documents = ROWS[row]
    for layer in (0, 1):
        heads = Heads(H, K, layer)
        start_BT = starts(None if documents is None else positions(*documents), len(documents or [0]), T, "cpu")
        covered = torch.zeros(len(start_BT), K, T, T, dtype=torch.int)
        for b, k in product(range(len(start_BT)), range(K)):
            begins = sorted(set(start_BT[b].tolist()))
            for begin, end in pairwise([*begins, T]):
                for r in pattern.rectangles(pattern.variants(heads)[k], begin, end):
                    covered[b, k, slice(*r.q), slice(*r.k)] += inside(r)
        assert torch.equal(covered, dense_mask(pattern, heads, start_BT)[:, :: H // K].int())


@pytest.mark.parametrize(
    ("name", "choices", "tolerance"),
    [
        ("causal", {}, 1e-9),
        ("grouped", {"group_tokens": 32}, 1e-9),
        ("shifted_sparse", {"group_tokens": 32}, 0.01),  # half groups at both ends are counted as one whole
        ("shifted_sparse", {"group_tokens": 64, "sink_tokens": 4}, 0.03),
        ("shifted_sparse", {"group_tokens": 512, "sink_tokens": 4}, 1e-9),
        ("sink_window", {"window_tokens": 32}, 1e-9),
        ("sink_window", {"window_tokens": 32, "sink_tokens": 0}, 1e-9),
        ("sink_window", {"window_tokens": 255, "sink_tokens": 9}, 1e-9),
    ],
)
def test_mean_keys_are_those_under_the_mask(name, choices, tolerance):
    pattern = PATTERNS[name](**choices)
    mask = mask_of(pattern, 256, heads=(4, 4))
    assert pattern.mean_keys(256) == pytest.approx(float(mask.float().sum(-1).mean()), rel=tolerance)


def inside(r):
    """A rectangle's pairs, 0 or 1."""
    pairs = torch.ones(r.q[1] - r.q[0], r.k[1] - r.k[0], dtype=torch.int)
    if r.causal:
        assert pairs.shape[0] == pairs.shape[1]
        pairs = pairs.tril()
    return pairs if r.window is None else pairs.triu(1 - r.window)


def test_documents_begin_where_positions_do_not_go_on():
    rows = [[0, 1, 2, 0, 1, 0, 0, 1], [5, 6, 7, 8, 2, 3, 3, 4], [0, 0, 0, 0, 1, 2, 3, 4]]
    expected = [[0, 0, 0, 3, 3, 5, 6, 6], [0, 0, 0, 0, 4, 4, 6, 6], [0, 1, 2, 3, 3, 3, 3, 3]]
    assert document_starts(torch.tensor(rows)).tolist() == expected


def test_predicates_combine():
    even = lambda b, h, q, kv: kv % 2 == 0  # noqa: E731
    own = lambda b, h, q, kv: kv == q  # noqa: E731
    q, kv = torch.arange(5)[:, None], torch.arange(5)[None, :]
    zero = torch.zeros((), dtype=torch.long)
    mask = and_(causal, or_(even, own))(zero, zero, q, kv)
    assert mask[3].tolist() == [True, False, True, True, False]


def test_a_pattern_says_its_name_and_choices():
    assert str(PATTERNS["shifted_sparse"](group_tokens=8)) == "shifted_sparse(group_tokens=8, sink_tokens=0)"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PATTERNS["grouped"](group_tokens=7), "7 is odd, but groups are shifted by half: use 6 or 8"),
        (lambda: PATTERNS["shifted_sparse"](group_tokens=0), r"group_tokens\n.* equal to 2 .*input_value=0"),
        (lambda: PATTERNS["grouped"](group_tokens=8, sink_tokens=-1), r"sink_tokens\n.* equal to 0"),
        (lambda: PATTERNS["sink_window"](window_tokens=0), r"window_tokens\n.* equal to 1"),
        (
            lambda: PATTERNS["sink_window"](window_tokens=4, sink_tokens=-2),
            r"sink_tokens\n.* equal to 0",
        ),
        (lambda: Heads(8, 3), "3 key/value heads do not divide 8"),
    ],
)
def test_choices_that_make_no_sense_are_refused_with_the_number(build, message):
    with pytest.raises(ValueError, match=message):
        build()
