"""One rank's life: it learns, its ranks agree, it stops where it must, and refuses what cannot be."""

import json
import math
from pathlib import Path

import pytest
import torch
from ranks import run_spawned
from toy_models import job, packed_corpus, read_json, tiny_folder

from infra.launch import Superseded, run_local
from training import loop
from training.loop import learning_rate
from training.recipe import ArmRecipe, OptimRecipe, TinyModelRecipe

S2 = ArmRecipe(tune="lora+embed+norm", attention={"pattern": "shifted_sparse", "group_tokens": 8, "sink_tokens": 2})
ACROSS_RANKS = 2e-5
"""Of a loss of about 4 in float32: the ranks' gradients are added in another order, six AdamW steps long."""


def train(todo):
    return run_local("training.loop:train", todo)


def steps(todo):
    return [json.loads(line) for line in (Path(todo["out"]) / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_the_asked_pattern_is_what_ran(tmp_path):
    todo = job(tmp_path, arm=S2, optim={"steps": 30})
    summary = train(todo)
    assert summary["loss_last"] < summary["loss_first"] - 0.3
    assert summary["pattern"] == "shifted_sparse(group_tokens=8, sink_tokens=2)"
    assert summary["kernel"] == "sdpa"
    assert summary == read_json(Path(todo["out"]) / "training.json")
    assert [row["step"] for row in steps(todo)] == list(range(1, 31))


@pytest.mark.parametrize("arm", [ArmRecipe(), S2], ids=["full", "longlora"])
def test_one_and_two_ranks_read_the_same_rows_and_end_with_the_same_loss(tmp_path, arm):
    one = job(tmp_path, name="one", arm=arm)
    two = job(tmp_path, name="two", arm=arm, resources={"workers": 2})
    train(one)
    run_spawned("training.loop:train", two, world=2, folder=tmp_path)
    assert [row["rows"] for row in steps(one)] == [row["rows"] for row in steps(two)]
    for a, b in zip(steps(one), steps(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=ACROSS_RANKS)
        assert (a["tokens"], a["targets"]) == (b["tokens"], b["targets"])


def test_training_fails_if_another_pattern_is_on_than_the_asked_one(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "active_pattern", lambda model: None)
    with pytest.raises(RuntimeError, match=r"asked for attention shifted_sparse.*but None is on"):
        train(job(tmp_path, arm=S2))


def test_a_superseded_attempt_stops_at_its_next_step(tmp_path):
    todo = job(tmp_path)
    Path(todo["superseded_file"]).parent.mkdir(parents=True, exist_ok=True)
    Path(todo["superseded_file"]).touch()
    with pytest.raises(Superseded, match="step 1: a newer attempt took over"):
        train(todo)


def test_a_loss_that_is_not_finite_names_the_step_and_the_rows(tmp_path):
    todo = job(tmp_path, optim={"learning_rate": 1e30, "warmup_steps": 0, "clip_norm": 1e30})
    with pytest.raises(
        FloatingPointError, match=r"step 2: loss .*norm (inf|nan).*in rows \[\d+, \d+, \d+, \d+\]: lower learning_rate"
    ):
        train(todo)


def test_rows_of_another_tokenizer_are_refused(tmp_path):
    todo = job(tmp_path)
    other = tiny_folder(tmp_path / "other", vocab=80)
    with pytest.raises(ValueError, match=r"another tokenizer: 16 of the base's 80 tokens"):
        train(todo | {"base": str(other)})


def test_rows_beyond_the_stretched_context_are_refused_with_both_numbers(tmp_path):
    todo = job(tmp_path)
    corpus = packed_corpus(tmp_path / "long", seq_len=256)
    with pytest.raises(ValueError, match=r"rows of 256 tokens exceed the model's 128 positions"):
        train(todo | {"corpus": str(corpus), "optim": todo["optim"] | {"global_batch_tokens": 512}})


def test_a_target_module_that_the_architecture_lacks_is_named_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="no linear layer 'q_pro'; nearest: q_proj"):
        train(job(tmp_path, arm=ArmRecipe(tune="lora", target_modules=("q_pro",))))


def test_sink_arms_start_from_the_same_weights_and_read_the_same_text(tmp_path, monkeypatch):
    tiny_folder(tmp_path / "base")
    packed_corpus(tmp_path, first_token="sink", method="concat")
    digests, read = [], {}
    real = loop.checkpoint.tensor_digests
    monkeypatch.setattr(loop.checkpoint, "tensor_digests", lambda model: digests.append(real(model)) or digests[-1])
    for sink in ("none", "token"):
        todo = job(tmp_path, name=sink, kind="pretrain", sink=sink, rope={}, model=TinyModelRecipe(context_length=64))
        train(todo)
        read[sink] = steps(todo)
    start, end, other_start, other_end = digests
    assert start == other_start
    assert end != other_end
    assert [row["rows"] for row in read["none"]] == [row["rows"] for row in read["token"]]
    # without the sink nothing predicts a row's first token
    assert all(b["targets"] - a["targets"] == 4 for a, b in zip(read["none"], read["token"], strict=True))


def test_schedules_warm_up_without_a_step_at_zero_and_end_as_they_say():
    for schedule, last in (("constant", 1.0), ("linear", 1 / 8), ("cosine", (1 + math.cos(math.pi * 7 / 8)) / 2)):
        optim = OptimRecipe(steps=10, global_batch_tokens=1, warmup_steps=2, schedule=schedule)
        rates = [learning_rate(optim, 1.0, step) for step in range(10)]
        assert rates[:3] == [0.5, 1.0, 1.0]
        assert rates[-1] == pytest.approx(last)


def test_totals_over_ranks_are_exact():
    class Engine:
        device = torch.device("cpu")

    run_local("test_training_loop:nothing", {})
    assert loop.all_sum(Engine(), [2.0**53 - 1, 0.1]) == [2.0**53 - 1, 0.1]


def nothing(todo):
    return {}
