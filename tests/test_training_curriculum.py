"""Rows that are short at first: the same tokens, read in pieces that do not see each other."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test_training_loop import ACROSS_RANKS, S2, steps
from toy_models import job, packed_corpus, train, training_summary
from transformers import LlamaForCausalLM

from longreach.pipelines.report.findings import about_arm
from longreach.training.corpus import IGNORED, PackedRows
from longreach.training.curriculum import in_pieces, stage_of
from longreach.training.recipe import ArmRecipe, FinetuneRecipe, LengthStage
from longreach.training.row_order import RowOrder

HALVES = LengthStage(steps=2, row_tokens=8)


@pytest.mark.parametrize("method", ["best_fit", "concat"])
def test_pieces_restart_positions_and_their_first_tokens_are_no_targets(tmp_path, method):
    batch = PackedRows(packed_corpus(tmp_path, method=method)).batch(range(6))
    cut = in_pieces(batch, np.arange(6), HALVES)
    for whole, pieces, before, after in zip(
        batch["position_ids"].tolist(), cut["position_ids"].tolist(), batch["labels"].tolist(), cut["labels"].tolist(),
        strict=True,
    ):  # fmt: skip
        position = 0
        for column in range(16):
            position = 0 if whole[column] == 0 or column in (0, 8) else position + 1
            assert pieces[column] == position
            assert after[column] == (IGNORED if position == 0 else before[column])
    assert cut["input_ids"] is batch["input_ids"]


def test_a_share_is_spread_evenly_over_all_rows_of_all_steps():
    rows = {"position_ids": torch.arange(16).repeat(8, 1), "labels": torch.ones(8, 16, dtype=torch.int64)}
    quarter = HALVES.model_copy(update={"share": 0.25})
    cut = in_pieces(rows, np.arange(8), quarter)["position_ids"][:, 8] == 0
    assert cut.tolist() == [False, False, False, True] * 2
    order = RowOrder(rows=100, seed=0, global_batch_rows=4)
    assert [order.first_place(3, rank, 2) for rank in range(2)] == [12, 14], "three steps of four rows, two a rank"


def test_parts_follow_one_another_and_rows_are_whole_afterwards():
    parts = (HALVES, LengthStage(steps=3, row_tokens=4))
    assert [stage_of(parts, step) for step in range(6)] == [parts[0]] * 2 + [parts[1]] * 3 + [None]
    assert stage_of((), 0) is None


def test_a_step_in_pieces_is_one_on_rows_of_that_length(tmp_path):
    """The oracle: transformers on the pieces as rows of their own. 1e-6: rounding of float32."""
    arm = ArmRecipe(curriculum=(HALVES,))
    todo = job(tmp_path, arm=arm, corpus=str(packed_corpus(tmp_path / "joined", method="concat")))
    train(todo)
    whole = job(tmp_path, name="whole", arm=ArmRecipe(), corpus=todo["corpus"])
    train(whole)
    rows = steps(todo)[0]["rows"]
    assert rows == steps(whole)[0]["rows"]
    ids = PackedRows(todo["corpus"]).batch(rows)["input_ids"].reshape(-1, 8)
    stretch = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    plain = LlamaForCausalLM.from_pretrained(todo["base"], rope_parameters=stretch)
    with torch.no_grad():
        logits = plain(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item()
    assert steps(todo)[0]["loss"] == pytest.approx(expected, rel=1e-6)
    assert abs(steps(whole)[0]["loss"] - expected) > 1e-4
    assert [row["targets"] for row in steps(todo)] == [4 * 2 * 7] * 2 + [4 * 15] * 4, "whole again after two steps"
    assert [row["tokens"] for row in steps(todo)] == [64] * 6


@pytest.mark.parametrize("objective", ["plain", "exact"])
def test_micro_batches_cut_the_same_rows_under_every_pattern_and_loss(tmp_path, objective):
    parts = (LengthStage(steps=6, row_tokens=8, share=0.5),)
    arm = S2.model_copy(update={"curriculum": parts, "objective": objective})
    one, other = (
        job(tmp_path, name="one", arm=arm),
        job(tmp_path, name="other", arm=arm, resources={"micro_batch_rows": 4}),
    )
    train(one)
    train(other)
    for a, b in zip(steps(one), steps(other), strict=True):
        assert a["targets"] == b["targets"]
        assert a["loss"] == pytest.approx(b["loss"], abs=ACROSS_RANKS)


@pytest.mark.parametrize(
    ("parts", "pack", "message"),
    [
        ([{"steps": 6, "row_tokens": 8}, {"steps": 5, "row_tokens": 4}], {}, "curriculum has 11 steps.*steps is 10"),
        ([{"steps": 6, "row_tokens": 16}], {}, r"curriculum\.0\.row_tokens 16 does not cut.*seq_len 16"),
        ([{"steps": 2, "row_tokens": 8}, {"steps": 2, "row_tokens": 5}], {}, r"curriculum\.1\.row_tokens 5 does not"),
        ([{"steps": 2, "row_tokens": 8}], {"first_token": "bos"}, "curriculum with pack.first_token 'bos'"),
    ],
)
def test_a_curriculum_that_does_not_fit_is_refused_with_both_numbers(parts, pack, message):
    with pytest.raises(ValidationError, match=message):
        FinetuneRecipe(steps=10, global_batch_tokens=16, pack={"seq_len": 16} | pack, arms={"a": {"curriculum": parts}})


def test_the_report_says_how_rows_were_read():
    arm = ArmRecipe(curriculum=(LengthStage(steps=20, row_tokens=1024), LengthStage(steps=5, row_tokens=64, share=0.5)))
    assert about_arm(training_summary(arm=arm)) == (
        "all weights, rows in pieces of 1,024 for 20 steps, 50% of rows in pieces of 64 for 5 steps"
    )
