"""PoSE: positions skip, documents stay apart, and what is drawn depends on seed, step, row and its repeats alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from ranks import run_spawned
from test_training_loop import ACROSS_RANKS, S2, at_step, s2_mask, steps
from toy_models import job, packed_corpus, tiny_folder, train, training_summary
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PersimmonConfig, PersimmonForCausalLM

from longreach.pipelines.costs import at_length
from longreach.pipelines.report.findings import about_arm
from longreach.training import loop, positions
from longreach.training.corpus import PackedRows
from longreach.training.positions import skip_positions
from longreach.training.recipe import ArmRecipe, FinetuneRecipe, PositionsRecipe
from longreach.training.row_order import RowOrder

POSE = PositionsRecipe(context_length=128)
ROW = torch.cat([torch.arange(n) for n in (9, 1, 20, 2)])[None]  # documents of so many tokens
BOTH = [ArmRecipe(positions=POSE), S2.model_copy(update={"positions": POSE})]
arms = pytest.mark.parametrize("arm", BOTH, ids=["causal", "s2"])


def skipped(row=ROW, recipe=POSE, seed=0, step=0, row_ids=(5,), repeats=None):
    repeats = [0] * len(row_ids) if repeats is None else repeats
    return skip_positions({"position_ids": row}, row_ids, repeats, recipe, seed=seed, step=step)["position_ids"]


@pytest.mark.parametrize("chunks", [2, 3, 7])
def test_each_document_begins_at_0_and_jumps_ahead_before_each_further_chunk(chunks):
    starts = [0, 9, 10, 30, 32]
    jumps, greatest = 0, 0
    for step in range(300):
        got_T = skipped(recipe=PositionsRecipe(chunks=chunks, context_length=128), step=step)[0]
        for begin, end in pairwise(starts):
            run = got_T[begin:end]
            gaps = run.diff()
            assert run[0] == 0
            assert (gaps >= 1).all()
            assert (gaps > 1).sum() < chunks
            jumps += int((gaps > 1).sum())
            greatest = max(greatest, int(run[-1]))
    assert greatest == 127
    assert jumps > 300


def test_the_first_jump_goes_anywhere_and_cuts_fall_anywhere():
    row = torch.arange(16)[None]
    drawn = [skipped(row, step=step)[0].diff() for step in range(2000)]
    cuts = [int(gaps.argmax()) + 1 for gaps in drawn if gaps.max() > 1]
    lengths = [int(gaps.max()) - 1 for gaps in drawn]
    assert set(cuts) == set(range(1, 16))
    assert max(lengths) == 128 - 16
    assert np.mean(lengths) == pytest.approx((128 - 16) / 2, abs=3)  # 2,000 draws: a standard error of 0.7


def test_other_rows_of_the_batch_and_their_order_change_nothing_and_seed_step_and_row_do():
    two = skipped(ROW.expand(2, -1), row_ids=(5, 9))
    assert torch.equal(two[0], skipped()[0])
    assert torch.equal(two.flip(0), skipped(ROW.expand(2, -1), row_ids=(9, 5)))
    for other in (skipped(seed=1), skipped(step=1), skipped(row_ids=(9,)), skipped(repeats=(1,))):
        assert not torch.equal(other, skipped())


def test_a_row_that_stands_twice_in_a_step_skips_anew_and_the_first_time_as_in_earlier_results():
    order = RowOrder(rows=3, seed=0, global_batch_rows=8)
    for step in range(3):
        rows, repeats = order.rows_of_step(step), order.repeats_of_step(step)
        assert len({*zip(rows.tolist(), repeats.tolist(), strict=True)}) == 8
        got = skipped(torch.arange(16).expand(8, -1), seed=1, step=step, row_ids=rows, repeats=repeats)
        assert len(torch.unique(got, dim=0)) == 8
        for row, repeat, got_T in zip(rows, repeats, got, strict=True):
            before = positions._jumps(16, POSE, np.random.default_rng([1, step, int(row)])) + np.arange(16)
            assert (got_T.tolist() == before.tolist()) == (repeat == 0)
    assert not RowOrder(rows=8, seed=0, global_batch_rows=8).repeats_of_step(5).any(), "each row once"


def test_ranks_and_micro_batches_count_what_the_whole_step_read_before(tmp_path, monkeypatch):
    todo = job(tmp_path, arm=BOTH[0], optim={"steps": 1, "global_batch_tokens": 128 * 16},
               resources={"micro_batch_rows": 4})  # fmt: skip
    read = []

    def noted(batch, row_ids, repeats_B, *args, **kwargs):
        read.extend(zip(row_ids.tolist(), repeats_B.tolist(), strict=True))
        return skip_positions(batch, row_ids, repeats_B, *args, **kwargs)

    monkeypatch.setattr(loop, "skip_positions", noted)
    train(todo)
    rows = [row for row, _ in read]
    assert rows == steps(todo)[0]["rows"]
    assert [repeats for _, repeats in read] == [rows[:n].count(row) for n, row in enumerate(rows)]
    assert len({*rows}) < 128, "a small corpus"


def test_the_batch_keeps_tokens_labels_and_plain_positions():
    ids = torch.arange(32)[None]
    batch = {"input_ids": ids, "position_ids": ROW, "labels": ids}
    got = skip_positions(batch, [0], [0], POSE, seed=0, step=0)
    assert got["documents"] is ROW
    assert got["input_ids"] is got["labels"] is ids
    assert not torch.equal(got["position_ids"], ROW)
    assert batch.keys() == {"input_ids", "position_ids", "labels"}


@arms
def test_the_first_loss_is_that_of_plain_transformers_at_the_skipped_positions(tmp_path, arm):
    arm = arm.model_copy(update={"tune": "all"})
    if arm.attention.pattern != "causal":
        arm = ArmRecipe(positions=POSE, attention={"pattern": "shifted_sparse", "group_tokens": 8})
    todo = job(tmp_path, arm=arm, optim={"steps": 1})
    base = AutoModelForCausalLM.from_pretrained(todo["base"])
    with torch.no_grad():
        for weight in base.parameters():
            weight.mul_(10 if weight.dim() == 2 else 1)  # so that it matters who sees what, and from where
    base.save_pretrained(todo["base"])
    train(todo)
    rows = steps(todo)[0]["rows"]
    batch = skip_positions(PackedRows(todo["corpus"]).batch(rows), rows, [0] * len(rows), POSE, seed=0, step=0)
    stretch = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    plain = LlamaForCausalLM.from_pretrained(todo["base"], attn_implementation="eager", rope_parameters=stretch)
    group = 8 if arm.attention.pattern == "shifted_sparse" else 1000

    def loss_at(position_ids, documents):
        mask = s2_mask(documents, group, heads=4, shifted_from=2)
        with torch.no_grad():
            logits = plain(batch["input_ids"], position_ids=position_ids, attention_mask=mask).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).item()

    right = loss_at(batch["position_ids"], batch["documents"])
    assert steps(todo)[0]["loss"] == pytest.approx(right, rel=1e-6)  # rounding of float32
    assert abs(right - loss_at(batch["documents"], batch["documents"])) > 0.001


@arms
def test_without_a_jump_training_is_plain_training(tmp_path, arm, monkeypatch):
    monkeypatch.setattr(positions, "_jumps", lambda length, recipe, rng: np.zeros(length, np.int64))
    skipping = job(tmp_path, name="skipping", arm=arm)
    plain = job(tmp_path, name="plain", arm=arm.model_copy(update={"positions": None}))
    for todo in (skipping, plain):
        train(todo)
    assert [row["loss"] for row in steps(skipping)] == [row["loss"] for row in steps(plain)]


@arms
def test_a_resumed_training_skips_where_an_undisturbed_one_does(tmp_path, arm, monkeypatch):
    whole, broken = job(tmp_path, name="whole", arm=arm), job(tmp_path, name="broken", arm=arm)
    train(whole)

    def die():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_step(patch, 5, die)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    assert train(broken).resumed_from_step == 4
    assert [row["loss"] for row in steps(broken)] == [row["loss"] for row in steps(whole)]


@pytest.mark.parametrize("resources", [{"zero_stage": 2}, {"zero_stage": 3, "sequence_parallel": 2}], ids=str)
def test_two_ranks_skip_as_one_does_with_activations_recomputed_too(tmp_path, resources):
    tiny_folder(tmp_path / "base")
    packed_corpus(tmp_path)
    one = job(tmp_path, name="one", arm=BOTH[1], resources={"micro_batch_rows": 2})
    two = job(tmp_path, name="two", arm=BOTH[1],
              resources={"workers": 2, "activation_checkpointing": True, **resources})  # fmt: skip
    train(one)
    run_spawned("longreach.training.loop:train", two, world=2, folder=tmp_path)
    for a, b in zip(steps(one), steps(two), strict=True):
        assert a["rows"] == b["rows"]
        assert a["loss"] == pytest.approx(b["loss"], abs=ACROSS_RANKS)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_positions_beyond_the_stretched_context_are_refused_with_both_numbers(tmp_path):
    arm = ArmRecipe(positions={"context_length": 256})
    with pytest.raises(ValueError, match=r"positions\.context_length 256 exceeds the model's 128 positions: raise"):
        train(job(tmp_path, arm=arm))


def test_a_family_whose_attention_cannot_know_documents_where_positions_skip_is_refused_before_it_trains(tmp_path):
    todo = job(tmp_path, arm=ArmRecipe(positions=POSE))
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 0}
    PersimmonForCausalLM(PersimmonConfig(**sizes, **heads)).save_pretrained(todo["base"])
    with pytest.raises(ValueError, match=r"Persimmon.* does not pass its positions .* leave arm\.positions out"):
        train(todo)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"context_length": 16}, r"arms\.a\.positions\.context_length 16 is not above pack\.seq_len 16: such rows"),
        ({"context_length": 64, "chunks": 17}, r"arms\.a\.positions\.chunks 17 is above pack\.seq_len 16"),
        ({"context_length": 64, "rope": {"type": "dynamic", "factor": 4.0}}, r"arms\.a\.positions with rope type 'dyn"),
        ({"context_length": 64, "chunks": 1}, r"arms\.a\.positions\.chunks[\s\S]*greater than or equal to 2"),
    ],
)
def test_choices_that_cannot_be_are_refused_with_both_numbers(choices, said):
    arm = {"rope": choices.pop("rope", None), "positions": choices}
    with pytest.raises(ValidationError, match=said):
        FinetuneRecipe(steps=1, global_batch_tokens=16, pack={"seq_len": 16}, arms={"a": arm})


def test_the_report_says_how_far_positions_skip():
    summary = training_summary(arm=ArmRecipe(positions=POSE))
    assert about_arm(summary) == "all weights, positions skip to 128 (PoSE, 2 chunks)"


def test_an_arm_measured_on_rows_of_another_length_does_not_skip():
    assert at_length(ArmRecipe(positions=POSE), 16, 256) == ArmRecipe()


def test_an_arm_without_it_keeps_its_identity():
    assert "positions" not in ArmRecipe().identity()
    assert ArmRecipe(positions=POSE).identity()["positions"]["context_length"] == 128
