"""What a step reads is arithmetic: the same rows on any ranks, every row once an epoch, labels after a beginning."""

import numpy as np
import pytest
import torch
from toy_models import packed_corpus

from longreach.training.corpus import IGNORED, PackedRows
from longreach.training.row_order import RowOrder

ORDER = RowOrder(rows=100, seed=0, global_batch_rows=12)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """{first_token: PackedCorpus folder}, isolated documents in rows of 16."""
    folder = tmp_path_factory.mktemp("packed")
    return {first: packed_corpus(folder / first, first_token=first) for first in ("none", "sink")}


def joined(batch):
    """Tensors side by side that compare as one."""
    return torch.stack([batch[name] for name in ("input_ids", "position_ids", "labels")])


# Order


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 12), (2, 1), (2, 3), (3, 2), (4, 3), (12, 1)])
def test_a_step_reads_the_same_rows_in_the_same_order_on_any_ranks(world, micro):
    for step in (0, 7, 8, 1000):  # an epoch ends within step 8
        ranks = [ORDER.for_rank(step, rank, world, micro) for rank in range(world)]
        assert {len(batch) for rank in ranks for batch in rank} == {micro}
        read = np.concatenate([batch for rank in ranks for batch in rank])
        assert np.array_equal(read, ORDER.rows_of_step(step))


def test_every_row_is_read_once_an_epoch_and_each_epoch_in_another_order():
    read = np.concatenate([ORDER.rows_of_step(step) for step in range(25)]).reshape(3, 100)
    for epoch in read:
        assert sorted(epoch) == list(range(100))
    assert len({tuple(epoch) for epoch in read.tolist()}) == 3
    assert not any(np.array_equal(epoch, np.arange(100)) for epoch in read)


def test_an_epoch_may_be_shorter_than_a_step():
    order = RowOrder(rows=3, seed=1, global_batch_rows=8)
    read = np.concatenate([order.rows_of_step(step) for step in range(3)])
    assert [sorted(read[at : at + 3]) for at in range(0, 24, 3)] == [[0, 1, 2]] * 8


def test_the_order_is_the_seeds_alone():
    assert np.array_equal(RowOrder(100, 0, 12).rows_of_step(5), ORDER.rows_of_step(5))
    assert not np.array_equal(RowOrder(100, 1, 12).rows_of_step(5), ORDER.rows_of_step(5))
    # The batch size only says where the line of rows is cut: arms with other batches read the same line.
    halves = [RowOrder(100, 0, 6).rows_of_step(step) for step in (10, 11)]
    assert np.array_equal(np.concatenate(halves), ORDER.rows_of_step(5))
    # Golden: a run that another version began must go on with the same rows.
    assert ORDER.rows_of_step(0).tolist() == [82, 36, 20, 5, 93, 16, 94, 52, 72, 90, 83, 13]


def test_ranks_that_do_not_divide_the_batch_are_refused_with_all_numbers():
    with pytest.raises(
        ValueError, match="2 ranks x micro_batch_rows 4 = 8 does not divide the global batch of 12 rows"
    ):
        ORDER.for_rank(0, 0, 2, 4)
    with pytest.raises(ValueError, match="0 rows in batches of 12"):
        RowOrder(0, 0, 12)


# Rows


def test_labels_are_the_tokens_wherever_a_document_has_gone_before(corpus):
    rows = PackedRows(corpus["none"])
    batch = rows.batch(range(len(rows)))
    documents = padded = 0
    for row in range(len(rows)):
        length = int(rows._read("length", np.array([row])))
        for t in range(16):
            ids, position, label = (batch[k][row, t] for k in ("input_ids", "position_ids", "labels"))
            documents += int(position == 0)
            padded += int(t >= length)
            assert label == (IGNORED if position == 0 or t >= length else ids)
    assert documents > len(rows)
    assert padded
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_rows_come_in_the_order_asked_for_from_any_record_batch(tmp_path, monkeypatch, corpus):
    monkeypatch.setattr("longreach.training.corpus.WRITE_BYTES", 300)
    monkeypatch.setattr("longreach.training.corpus.SHARD_BYTES", 1000)
    cut, whole = PackedRows(packed_corpus(tmp_path)), PackedRows(corpus["none"])
    assert len(list((tmp_path / "corpus/rows").glob("*.arrow"))) > 2
    every = joined(whole.batch(range(len(whole))))
    for some in ([5, 0, 5], [len(whole) - 1], range(len(whole))):
        assert torch.equal(joined(cut.batch(some)), every[:, list(some)])


def test_without_the_sinks_the_rest_is_the_same_text(corpus):
    rows = PackedRows(corpus["sink"])
    sink = rows.summary.first_token_id
    every = range(len(rows))
    with_sink, without = rows.batch(every), rows.batch(every, drop_first=True)
    assert (with_sink["input_ids"][:, 0] == sink).all()
    assert not (without["input_ids"] == sink).any()
    several = 0
    for row, length in enumerate(rows._read("length", np.array(every)).tolist()):
        ids, positions, labels = (with_sink[key][row, :length] for key in ("input_ids", "position_ids", "labels"))
        kept = ids != sink
        several += int((~kept).sum() > 1)
        left = int(kept.sum())
        got = [without[key][row] for key in ("input_ids", "position_ids", "labels")]
        assert torch.equal(got[0][:left], ids[kept])
        assert torch.equal(got[1][:left], positions[kept] - 1)
        # A document's first word is predicted from the sink, or from nothing: that target is missing.
        assert torch.equal(got[2][:left], labels[kept].masked_fill(got[1][:left] == 0, IGNORED))
        assert (got[0][left:] == rows.summary.pad_token_id).all()
        assert got[1][left:].tolist() == list(range(16 - left))
        assert (got[2][left:] == IGNORED).all()
    assert several


def test_the_sink_is_never_a_target(corpus):
    rows = PackedRows(corpus["sink"])
    assert not (rows.batch(range(len(rows)))["labels"] == rows.summary.first_token_id).any()


def test_a_column_that_is_not_there_cannot_be_dropped(corpus):
    with pytest.raises(ValueError, match="rows with a first token: pack them with first_token 'sink' or 'bos'"):
        PackedRows(corpus["none"]).batch([0], drop_first=True)


@pytest.mark.parametrize("row", [-1, 10_000])
def test_rows_that_are_not_there_are_named(corpus, row):
    with pytest.raises(IndexError, match=f"{row}"):
        PackedRows(corpus["none"]).batch([row])


def test_a_folder_that_lost_rows_is_refused_with_both_numbers(tmp_path):
    folder = packed_corpus(tmp_path)
    text = (folder / "packed.json").read_text()
    count = len(PackedRows(folder))
    (folder / "packed.json").write_text(text.replace(f'"rows": {count}', f'"rows": {count + 1}'))
    with pytest.raises(ValueError, match=rf"packed\.json counts {count + 1} rows, but rows/ contains {count}"):
        PackedRows(folder)
