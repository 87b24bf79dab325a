"""The loss on held-out text: what it is made of, that ranks agree on it, and that the best weights can leave."""

import json
import math
from pathlib import Path

import pytest
import torch
from ranks import run_spawned
from toy_models import job, packed_corpus, tiny_folder, train
from transformers import AutoModelForCausalLM

from longreach.training import loop
from longreach.training.corpus import IGNORED
from longreach.training.recipe import OptimRecipe
from longreach.training.summary import TrainingSummary
from longreach.training.validation import validation_rows

HELD_OUT = ("count3[89]*",)


@pytest.fixture
def corpus(tmp_path):
    tiny_folder(tmp_path / "base")
    return packed_corpus(tmp_path, validation=HELD_OUT)


def rows_of(todo):
    return [json.loads(line) for line in (Path(todo["out"]) / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_whole_pieces_of_each_document_in_turn(tmp_path, corpus):
    rows = validation_rows(corpus, 3, drop_first=False)
    starts = [2 + (n * 7) % 62 for n in (38, 39)]
    assert [int(row["input_ids"][0, 0]) for row in rows] == [*starts, 2 + (starts[0] - 2 + 16) % 62]
    assert all(row["labels"][0, 0] == IGNORED and (row["labels"][0, 1:] != IGNORED).all() for row in rows)
    assert len(validation_rows(corpus, 100, drop_first=False)) == 4


def test_the_corpus_first_token_stands_first_unless_the_arm_reads_without(tmp_path):
    corpus = packed_corpus(tmp_path, validation=HELD_OUT, first_token="sink")
    with_sink, without = (validation_rows(corpus, 1, drop_first=drop)[0] for drop in (False, True))
    assert int(with_sink["input_ids"][0, 0]) == 64
    assert torch.equal(with_sink["input_ids"][:, 1:], without["input_ids"][:, :-1])
    assert torch.equal(with_sink["labels"][:, 1:], without["labels"][:, :-1])
    assert (without["labels"][0, -1], without["position_ids"][0, -1]) == (IGNORED, 0)


def test_it_is_the_loss_of_plain_transformers_on_the_saved_weights(tmp_path, corpus):
    todo = job(tmp_path, optim={"validate_every_steps": 2})
    train(todo)
    steps = {row["step"]: row["validation_loss"] for row in rows_of(todo) if "validation_loss" in row}
    assert list(steps) == [1, 2, 4, 6], "the first step's loss shows where training began"
    model = AutoModelForCausalLM.from_pretrained(todo["out"])
    with torch.no_grad():
        losses = [model(**row).loss.item() for row in validation_rows(corpus, 8, drop_first=False)]
    assert steps[6] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_ranks_agree_on_it_and_training_does_not_notice(tmp_path, corpus):
    plain = job(tmp_path, name="plain")
    train(plain)
    found = {}
    for world in (1, 2):
        resources = {"workers": world, "zero_stage": 3}
        optim = {"validate_every_steps": 3, "validation_rows": 3}  # a rank without a row of its own
        todo = job(tmp_path, name=f"on{world}", resources=resources, optim=optim)
        run_spawned("longreach.training.loop:train", todo, world=world, folder=tmp_path / f"on{world}")
        found[world] = rows_of(todo)
    for a, b, without in zip(found[1], found[2], rows_of(plain), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-6)
        assert a["loss"] == pytest.approx(without["loss"], abs=2e-6)
        assert a.get("validation_loss") == pytest.approx(b.get("validation_loss"), abs=2e-6)


def test_the_best_weights_leave_though_later_ones_were_trained(tmp_path, corpus, monkeypatch):
    """The best checkpoint outlives the last ones, and its weights are those that were measured as best."""
    weights, values = [], iter([5.0, 4.0, 3.0, math.nan, 9.0, 8.0, 7.0, 6.0])

    def measured(engine, rows, rank, world):
        weights.append({name: p.detach().clone() for name, p in engine.module.model.named_parameters()})
        return next(values), 1

    monkeypatch.setattr(loop, "validation_loss", measured)
    optim = {"steps": 8, "validate_every_steps": 1, "result": "best"}
    todo = job(tmp_path, optim=optim, resources={"keep_last": 1})
    assert train(todo).left_after_step == 3
    model = AutoModelForCausalLM.from_pretrained(todo["out"])
    assert all(torch.equal(p, weights[2][name]) for name, p in model.named_parameters())
    assert not all(torch.equal(p, weights[7][name]) for name, p in model.named_parameters())
    kept = {path.name for path in (Path(todo["work"]) / "checkpoints").glob("step-*")}
    assert kept == {"step-00000003", "step-00000006"}


def test_where_the_last_weights_leave_no_best_checkpoint_is_kept(tmp_path, corpus, monkeypatch):
    values = iter(range(1, 9))
    monkeypatch.setattr(loop, "validation_loss", lambda *args: (float(next(values)), 1))
    todo = job(tmp_path, optim={"steps": 8, "validate_every_steps": 1}, resources={"keep_last": 1})
    assert train(todo).left_after_step == 8
    assert {path.name for path in (Path(todo["work"]) / "checkpoints").glob("step-*")} == {"step-00000006"}


def test_a_skipped_step_is_never_the_best(tmp_path, corpus, monkeypatch):
    """Its checkpoint does not exist; found by a review."""
    values, norms = iter([5.0, 4.0, 3.0, 6.0]), iter([1.0, 1.0, math.nan, 1.0])
    monkeypatch.setattr(loop, "validation_loss", lambda *args: (next(values), 1))
    real = loop.zero.step
    monkeypatch.setattr(loop.zero, "step", lambda engine, rate: real(engine, rate) * next(norms))
    todo = job(tmp_path, optim={"steps": 4, "global_batch_tokens": 16, "validate_every_steps": 1, "result": "best"})
    facts = train(todo)
    assert facts.skipped_steps == 1
    assert facts.left_after_step == 2


def test_an_adapter_may_leave_after_its_first_step_and_the_pattern_said_is_the_arms(tmp_path, corpus, monkeypatch):
    values = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(loop, "validation_loss", lambda *args: (next(values), 1))
    arm = {"tune": "lora", "attention": {"pattern": "shifted_sparse", "group_tokens": 8}}
    facts = train(job(tmp_path, arm=arm, optim={"steps": 3, "validate_every_steps": 1, "result": "best"}))
    assert facts.left_after_step == 1
    assert facts.pattern_at_the_end.startswith("shifted_sparse")


def test_a_resumed_run_remembers_which_was_best(tmp_path, corpus, monkeypatch):
    optim = {"steps": 8, "validate_every_steps": 1, "learning_rate": 0.3, "warmup_steps": 0, "schedule": "constant"}
    optim |= {"spike_factor": 1e9, "result": "best"}
    whole = job(tmp_path, name="whole", optim=optim)
    train(whole)
    first = job(tmp_path, name="first", optim=optim)
    second = job(tmp_path, name="second", optim=optim, earlier=[first["work"]])

    real = loop.validation_loss

    def dies_at_six(engine, rows, rank, world):
        value = real(engine, rows, rank, world)
        seen.append(value)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return value

    seen = []
    monkeypatch.setattr(loop, "validation_loss", dies_at_six)
    with pytest.raises(KeyboardInterrupt):
        train(first)
    monkeypatch.setattr(loop, "validation_loss", real)
    facts = train(second)
    assert facts.resumed_from_step > 0
    assert facts.left_after_step == TrainingSummary.read(whole["out"]).left_after_step


def test_documents_shorter_than_a_row_are_named_as_the_reason(tmp_path):
    tiny_folder(tmp_path / "base")
    packed_corpus(tmp_path, validation=("count02*",))
    with pytest.raises(ValueError, match="none of the 1 validation documents has 16 tokens"):
        train(job(tmp_path, optim={"validate_every_steps": 2}))


def test_best_without_a_measure_is_refused():
    with pytest.raises(ValueError, match="result 'best' needs a validation loss"):
        OptimRecipe(steps=1, global_batch_tokens=8, result="best")
