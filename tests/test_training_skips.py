"""Steps that are left out, going back, stopping on request, and the pattern of the last steps."""

import json
import math
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_models import job, train

from longreach.infra.errors import Stopped
from longreach.infra.tracking import Spool, read_events
from longreach.training.attention_recipe import AttentionRecipe
from longreach.training.loop import Progress, Training
from longreach.training.recipe import OptimRecipe
from longreach.training.row_order import RowOrder
from longreach.training.skips import Skips

S2 = {"pattern": "shifted_sparse", "group_tokens": 8}
OPTIM = {"schedule": "constant", "warmup_steps": 0}


def rows(todo):
    return [json.loads(line) for line in (Path(todo["out"]) / "metrics.jsonl").read_text().splitlines()]


def weights(todo):
    return load_file(next(Path(todo["out"]).glob("*.safetensors")))


def same(one, other):
    a, b = weights(one), weights(other)
    return all(torch.equal(a[name], b[name]) for name in a)


def distrusting(monkeypatch, *steps):
    monkeypatch.setattr(
        Skips, "distrusts", lambda self, step, loss: self.bad.get(step, "we say so") if step in steps else ""
    )


RESOURCES = [
    {"zero_stage": 0},
    {"zero_stage": 1, "micro_batch_rows": 2},
    {"zero_stage": 2, "offload": "cpu"},
    {"zero_stage": 3},
    {"zero_stage": 0, "dtype": "bfloat16"},
    {"zero_stage": 2, "dtype": "bfloat16"},
]


@pytest.mark.parametrize("resources", RESOURCES, ids=str)
def test_a_skipped_step_leaves_weights_and_optimizer_as_they_were(tmp_path, monkeypatch, resources):
    """Bit by bit what a run gives that never had the step."""
    skipping = job(tmp_path, name="skipping", optim=OPTIM | {"steps": 4}, resources=resources)
    without = job(tmp_path, name="without", optim=OPTIM | {"steps": 3}, resources=resources)
    with monkeypatch.context() as patch:
        distrusting(patch, 2)
        summary = train(skipping)
    assert [row["skipped"] for row in rows(skipping)] == [False, False, True, False]
    assert (summary.steps, summary.skipped_steps) == (4, 1)
    real = RowOrder.rows_of_step
    monkeypatch.setattr(RowOrder, "rows_of_step", lambda self, step: real(self, 3 if step == 2 else step))
    train(without)
    assert [row["rows"] for row in rows(without)] == [rows(skipping)[n]["rows"] for n in (0, 1, 3)]
    assert same(skipping, without)


def test_after_too_many_in_a_row_training_goes_back_once_and_leaves_the_bad_steps_out(tmp_path, monkeypatch):
    spool = tmp_path / "a.jsonl"
    Spool.open(spool, run="0" * 32, parent=None, experiment="e", name="n", kind="attempt")
    todo = job(tmp_path, optim=OPTIM | {"steps": 10}, resources={"checkpoint_every_steps": 2}, spool=str(spool))
    visits = []
    real = RowOrder.for_rank
    monkeypatch.setattr(RowOrder, "for_rank", lambda self, at, *args: visits.append(at) or real(self, at, *args))
    distrusting(monkeypatch, 5, 6, 7)
    train(todo)
    assert visits == [*range(8), *range(4, 10)], "back to the checkpoint after step 4"
    assert [row["step"] for row in rows(todo) if row["skipped"]] == [6, 7, 8]
    assert [row["step"] for row in rows(todo)] == list(range(1, 11))
    told = [event["value"] for event in read_events(spool)[0] if event.get("key") == "longreach.note"]
    assert told[0].startswith("step 6 skipped: we say so, in rows [")
    assert len({text for text in told if text.startswith("step 6 ")}) == 1, "said the same when it is met again"
    points = [event["step"] for event in read_events(spool)[0] if event["event"] == "metrics"]
    assert points == list(range(1, 11)), "one point a step, though some were trained twice"


def test_without_a_valid_checkpoint_training_does_not_start_again_on_what_it_has_trained(tmp_path, monkeypatch):
    todo = job(tmp_path, optim=OPTIM | {"steps": 10}, resources={"checkpoint_every_steps": 2})
    distrusting(monkeypatch, 5, 6, 7)
    real = Training._go_back

    def damaged(training):
        for file in training.checkpoints.folder.glob("step-*/*.pt"):
            file.write_bytes(b"damaged")
        real(training)

    monkeypatch.setattr(Training, "_go_back", damaged)
    with pytest.raises(FloatingPointError, match=r"no valid checkpoint to go back to .*damaged.*run the same command"):
        train(todo)


def test_a_checkpoint_that_falls_on_a_skipped_step_is_written_after_the_next_trained_one(tmp_path, monkeypatch):
    saved, real = [], Training.save
    monkeypatch.setattr(Training, "save", lambda self: saved.append(self.progress.step) or real(self))
    distrusting(monkeypatch, 3)  # step 4
    train(job(tmp_path, optim=OPTIM | {"steps": 9}, resources={"checkpoint_every_steps": 2}))
    assert saved == [2, 5, 6, 8]


@pytest.mark.parametrize("every", [2, 3])
def test_only_a_skipped_step_moves_a_checkpoint(every):
    """A training that resumes from a checkpoint between two intervals, too, writes the next one where it was."""
    training = object.__new__(Training)
    training.job = types.SimpleNamespace(resources=types.SimpleNamespace(checkpoint_every_steps=every))
    training.optim = types.SimpleNamespace(result="last", steps=12)
    for first in range(12):
        due, saved = [], first
        for step in range(first + 1, 13):
            training.progress = Progress(step, saved, {}, [], [])
            if training._checkpoint_due():
                saved = step
                due.append(step)
        assert due == [step for step in range(first + 1, 12) if step % every == 0]


def test_when_going_back_does_not_help_training_stops_and_names_the_rows(tmp_path, monkeypatch):
    distrusting(monkeypatch, *range(5, 20))
    todo = job(tmp_path, optim=OPTIM | {"steps": 20})
    message = r"step 11 skipped: we say so, in rows \[\d+, .*3 steps in a row, again after going back: lower learning_r"
    with pytest.raises(FloatingPointError, match=message):
        train(todo)


def test_weights_that_blow_up_stop_training_and_no_checkpoint_of_them_is_kept(tmp_path):
    todo = job(tmp_path, optim={"learning_rate": 1e30, "warmup_steps": 0, "clip_norm": 1e30})
    with pytest.raises(
        FloatingPointError, match=r"step 4 skipped: its (loss|gradient norm) is (inf|nan).*no checkpoint"
    ):
        train(todo)
    assert not list((Path(todo["work"]) / "checkpoints").glob("step-*"))
    assert [row["skipped"] for row in rows(todo)] == [False, True, True, True]


def test_a_spike_is_a_loss_far_above_the_usual_one_once_there_is_a_usual_one():
    skips = Skips(OptimRecipe(steps=1, global_batch_tokens=1))
    for step in range(4):
        skips.trained(step, 4.0)
    assert not skips.distrusts(4, 100.0), "four losses are no custom"
    skips.trained(4, 4.0)
    assert skips.distrusts(5, 12.1) == "its loss 12.1 is over 3 times 4, the usual one"
    assert not skips.distrusts(5, 11.9)
    assert skips.distrusts(5, math.nan) == "its loss is nan"


def test_a_model_that_knows_its_rows_by_heart_may_have_a_loss_three_times_the_usual_one():
    skips = Skips(OptimRecipe(steps=1, global_batch_tokens=1))
    for step in range(10):
        skips.trained(step, 0.05)
    assert not skips.distrusts(10, 0.9), "a row that it knows less well"
    assert skips.distrusts(10, 1.1) == "its loss 1.1 is over 3 times 0.05, the usual one"


def test_asked_to_stop_it_writes_a_checkpoint_and_the_next_run_goes_on_from_that_very_step(tmp_path, monkeypatch):
    whole = job(tmp_path, name="whole")
    todo = job(tmp_path, name="stopped", stop_file=str(tmp_path / "stop"), resources={"checkpoint_every_steps": 50})
    train(whole)
    real = RowOrder.for_rank

    def for_rank(self, at, *args):
        if at == 3:
            (tmp_path / "stop").touch()
        return real(self, at, *args)

    monkeypatch.setattr(RowOrder, "for_rank", for_rank)
    with pytest.raises(Stopped, match="stopped after step 3 of 6: run the same command to resume"):
        train(todo)
    (tmp_path / "stop").unlink()
    monkeypatch.setattr(RowOrder, "for_rank", real)
    assert train(todo).resumed_from_step == 3
    assert same(whole, todo)


def test_the_last_steps_see_what_the_arm_anneals_to(tmp_path):
    annealed = job(tmp_path, name="a", arm={"attention": S2 | {"anneal_to": "causal", "anneal_fraction": 0.5}})
    sparse = job(tmp_path, name="b", arm={"attention": S2})
    summary = train(annealed)
    train(sparse)
    assert summary.pattern == "shifted_sparse(group_tokens=8, sink_tokens=0)"
    assert summary.pattern_at_the_end == "causal()"
    ours, theirs = ([row["loss"] for row in rows(todo)] for todo in (annealed, sparse))
    assert ours[:3] == theirs[:3]
    assert ours[3] != theirs[3]


@pytest.mark.parametrize(("fraction", "annealed"), [(0.04, 1), (0.004, 1), (0.3, 3), (0.99, 10)])
def test_an_anneal_has_a_last_step_however_small_its_share(fraction, annealed):
    attention = AttentionRecipe.of(**S2, anneal_to="causal", anneal_fraction=fraction)
    kinds = [attention.pattern_at(step, 10).pattern for step in range(10)]
    assert kinds == ["shifted_sparse"] * (10 - annealed) + ["causal"] * annealed
    assert f"the last {100 * fraction:g}% of steps full attention" in attention.about()


def test_a_run_killed_in_the_anneal_goes_on_in_it(tmp_path, monkeypatch):
    choices = {"arm": {"attention": S2 | {"anneal_to": "causal", "anneal_fraction": 0.5}}}
    whole, broken = job(tmp_path, name="whole", **choices), job(tmp_path, name="broken", **choices)
    train(whole)
    real = RowOrder.for_rank

    def for_rank(self, at, *args):
        if at == 5:
            raise KeyboardInterrupt
        return real(self, at, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RowOrder, "for_rank", for_rank)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    assert train(broken).resumed_from_step == 4
    assert same(whole, broken)
