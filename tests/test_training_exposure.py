"""What each target sees of its own document, and the loss that weighs it: the same however rows are spread."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from ranks import run_spawned
from test_training_loop import ACROSS_RANKS, S2, steps
from test_training_loss import case
from toy_models import job, packed_corpus, train

from longreach.attention.ulysses import SequenceRanks, part_of
from longreach.training.corpus import IGNORED, PackedRows
from longreach.training.exposure import EXTRA, MAX_EXTRA_WEIGHT, context_counts, effective_contexts, exact_weights
from longreach.training.loss import fused_linear_cross_entropy, weight_of_targets
from longreach.training.recipe import FinetuneRecipe

EXACT = S2.model_copy(update={"objective": "exact"})


@pytest.mark.parametrize("method", ["best_fit", "concat"])
@pytest.mark.parametrize("first_token", ["none", "sink"])
def test_contexts_are_counted_as_a_plain_loop_over_the_rows_counts_them(tmp_path, method, first_token):
    rows = PackedRows(packed_corpus(tmp_path, method=method, first_token=first_token))
    batch = rows.batch(range(len(rows)))
    counts = np.zeros(16, np.int64)
    for positions, labels in zip(batch["position_ids"].tolist(), batch["labels"].tolist(), strict=True):
        seen = 0
        for position, label in zip(positions, labels, strict=True):
            seen = 0 if position == 0 else seen + 1
            counts[seen] += label != IGNORED
    assert rows.context_counts().tolist() == counts.tolist()
    assert counts.sum() == (batch["labels"] != IGNORED).sum()
    assert sum(one.targets for one in rows.summary.contexts) == counts.sum()
    assert [one.targets for one in rows.summary.contexts] == [
        counts[1], counts[2], counts[3:5].sum(), counts[5:9].sum(), counts[9:].sum()
    ]  # fmt: skip


def test_the_tail_gets_its_extra_share_and_each_of_its_bins_as_much_as_any_other():
    counts = context_counts(np.array([4096] * 2 + [3000] * 20 + [500] * 100), 4096)
    weights = exact_weights(counts)
    assert (weights[:1024] == 1).all(), "what sees less than a quarter of a row keeps its weight"
    extra = (weights - 1) * counts
    assert extra.sum() == pytest.approx(EXTRA * counts.sum(), rel=1e-6)
    edges = np.ceil(1024 * 2 ** (np.arange(9) / 4)).astype(int)
    each = [extra[low:high].sum() for low, high in pairwise(edges)]
    assert each == pytest.approx([extra.sum() / 8] * 8, rel=1e-6)
    assert weights[4000] > weights[2000] > 1, "fewer targets see 4,000 tokens than 2,000"


def test_a_rare_context_is_not_the_whole_loss_and_rows_of_short_documents_stay_plain():
    assert exact_weights(context_counts(np.array([4096] + [1100] * 999), 4096)).max() == 1 + MAX_EXTRA_WEIGHT
    assert (exact_weights(context_counts(np.array([500] * 9), 4096)) == 1).all()


def test_weights_multiply_the_terms_of_the_loss_and_its_gradients():
    hidden, weight, labels = case()
    factors = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) * 3
    logits = (hidden @ weight.t())[:, :-1].flatten(0, 1)
    terms = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
    expected = (terms * factors[:, 1:].flatten()).sum()
    got = fused_linear_cross_entropy(hidden, weight, labels, weights_BT=factors, chunk_tokens=7)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    for ours, oracle in zip(torch.autograd.grad(got, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)


def test_ranks_that_share_a_row_weigh_each_target_once(tmp_path):
    rows = PackedRows(packed_corpus(tmp_path))
    batch = rows.batch(range(4))
    table = torch.from_numpy(exact_weights(rows.context_counts()))
    batch["weights"] = table[effective_contexts(batch["position_ids"])]
    parts = [part_of(batch, SequenceRanks(None, 2, rank)) for rank in range(2)]
    assert sum(weight_of_targets(part) for part in parts) == pytest.approx(weight_of_targets(batch), rel=1e-12)
    assert weight_of_targets(batch) > (batch["labels"] != IGNORED).sum()


@pytest.mark.parametrize("resources", [{"micro_batch_rows": 4}, {"workers": 2, "zero_stage": 2}], ids=str)
def test_the_weighted_loss_is_the_same_over_micro_batches_and_ranks(tmp_path, resources):
    one, other = job(tmp_path, name="one", arm=EXACT), job(tmp_path, name="other", arm=EXACT, resources=resources)
    train(one)
    if resources.get("workers"):
        run_spawned("longreach.training.loop:train", other, world=2, folder=tmp_path)
    else:
        train(other)
    for a, b in zip(steps(one), steps(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=ACROSS_RANKS)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    plain = job(tmp_path, name="plain", arm=S2)
    train(plain)
    assert abs(steps(plain)[0]["loss"] - steps(one)[0]["loss"]) > 1e-5, "the weights are active"
    assert [row["targets"] for row in steps(plain)] == [row["targets"] for row in steps(one)]


def test_joined_documents_have_no_contexts_of_their_own_to_weigh():
    with pytest.raises(ValueError, match=r"arms\.a\.objective 'exact' with pack\.method 'concat'.*'best_fit'"):
        FinetuneRecipe(
            steps=1,
            global_batch_tokens=16,
            pack={"seq_len": 16, "method": "concat"},
            arms={"a": {"objective": "exact"}},
        )
