"""Each target's weight is what a long context tells about it, by the frozen start of the training."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from families import config_of
from pydantic import ValidationError
from ranks import run_spawned
from test_training_loop import ACROSS_RANKS, S2, steps
from tiny_models import tiny_llama
from toy_models import VOCAB, job, packed_corpus, train

from longreach.infra.resources import Resources
from longreach.pipelines import stages
from longreach.training.corpus import IGNORED, PackedRows
from longreach.training.long_ce import CAP, TokenGains, gains, long_ce_weights, rows_of_training
from longreach.training.model import load_model
from longreach.training.recipe import ArmRecipe, FinetuneRecipe, RopeRecipe

LONG_CE = S2.model_copy(update={"objective": "long_ce", "short_tokens": 4})


def log_p(model, ids):
    """Log probability of the last token given all before it, by the whole logits."""
    with torch.no_grad():
        return float(model(torch.tensor(ids)[None]).logits[0, -2].log_softmax(-1)[ids[-1]])


@pytest.mark.parametrize("method", ["best_fit", "concat"])
def test_a_gain_is_the_long_context_less_the_short_one_of_the_same_document(tmp_path, method):
    """The oracle reads each target's two contexts as texts of their own. 2e-5: float32 over other lengths."""
    rows = PackedRows(packed_corpus(tmp_path, method=method))
    model = tiny_llama(vocab_size=VOCAB)
    batch = rows.batch(range(3))
    got = gains(model, batch, short_tokens=4)
    unlike = 0
    for row in range(3):
        ids, positions = batch["input_ids"][row].tolist(), batch["position_ids"][row].tolist()
        for column in range(16):
            seen = positions[column]
            # the second half of pieces of 4 that overlap by 2: the token's own half, and all of the one before it
            short = min(seen, 2 + column % 2)
            expected = 0.0
            if batch["labels"][row, column] != IGNORED and short < seen:
                here = ids[column - seen : column + 1]
                expected = log_p(model, here) - log_p(model, ids[column - short : column + 1])
                unlike += 1
            assert float(got[row, column]) == pytest.approx(expected, abs=2e-5), (row, column)
    assert unlike > 15
    assert got.abs().max() > 1e-3


@pytest.mark.parametrize("family", ["granite", "cohere"])
def test_a_gain_has_the_factor_by_which_a_family_scales_its_logits(family):
    config = config_of(family)
    config.initializer_range = 0.3  # else all tokens are about as probable, whatever the factor
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(VOCAB, (1, 10))
    got = gains(model, {"input_ids": ids, "position_ids": torch.arange(10)[None], "labels": ids}, short_tokens=4)
    whole = ids[0].tolist()
    for column in range(4, 10):
        short = whole[column - 2 - column % 2 : column + 1]
        expected = log_p(model, whole[: column + 1]) - log_p(model, short)
        assert float(got[0, column]) == pytest.approx(expected, abs=2e-5)
    assert got.abs().max() > 1e-2


def test_weights_are_the_exponential_of_the_gain_up_to_the_cap():
    weights = long_ce_weights(torch.tensor([[0.0, float(np.log(2)), -float(np.log(4)), 9.0]]))
    assert weights.tolist() == [pytest.approx([1.0, 2.0, 0.25, CAP])]


def test_all_rows_that_training_reads_are_scored_and_no_other():
    assert rows_of_training(10, 0, 4, 5).tolist() == list(range(10))
    few = rows_of_training(100, 0, 4, 2)
    assert len(few) == 8
    assert few.tolist() == sorted(few.tolist())


def scored(todo, tmp_path):
    """Run the stage for a job, and return the job with the folder that it wrote."""
    out = tmp_path / "gains"
    if not out.exists():
        out.mkdir()
        recipe = stages.GainsRecipe(
            rope=RopeRecipe(**todo["rope"]), short_tokens=4, global_batch_tokens=64, steps=6, seed=0
        )
        corpus = SimpleNamespace(path=tmp_path / "corpus")
        seen = []
        run = SimpleNamespace(spool=SimpleNamespace(progress=lambda done, total, unit: seen.append((done, total))))
        base = SimpleNamespace(path=tmp_path / "base")
        summary = stages.gains(corpus, base, recipe=recipe, resources=Resources(), out=out, run=run)
        assert seen[-1] == (summary["rows"], summary["rows"])
        assert 0.5 < summary["mean_weight"] < CAP
    return todo | {"gains": str(out)}


@pytest.mark.parametrize("resources", [{"micro_batch_rows": 4}, {"workers": 2, "zero_stage": 2}], ids=str)
def test_the_weighted_loss_is_the_same_over_micro_batches_and_ranks(tmp_path, resources):
    one = scored(job(tmp_path, name="one", arm=LONG_CE), tmp_path)
    other = scored(job(tmp_path, name="other", arm=LONG_CE, resources=resources), tmp_path)
    train(one)
    if resources.get("workers"):
        run_spawned("longreach.training.loop:train", other, world=2, folder=tmp_path)
    else:
        train(other)
    for a, b in zip(steps(one), steps(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=ACROSS_RANKS)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_the_first_loss_is_the_weighted_mean_over_the_targets_of_the_global_batch(tmp_path):
    """1e-5: rounding of float32; gains are stored as float16, and read back so by both."""
    todo = scored(job(tmp_path, arm=LONG_CE.model_copy(update={"attention": ArmRecipe().attention})), tmp_path)
    train(todo)
    row_ids = steps(todo)[0]["rows"]
    batch = PackedRows(todo["corpus"]).batch(row_ids)
    weights = TokenGains(todo["gains"]).weights(row_ids)
    model, _ = load_model(todo["base"], rope=RopeRecipe(**todo["rope"]))
    total, weight = 0.0, 0.0
    for row, column in (batch["labels"] != IGNORED).nonzero().tolist():
        begin = column - int(batch["position_ids"][row, column])
        factor = float(weights[row, column])
        total -= factor * log_p(model, batch["input_ids"][row, begin : column + 1].tolist())
        weight += factor
    assert steps(todo)[0]["loss"] == pytest.approx(total / weight, rel=1e-5)
    assert weight != pytest.approx((batch["labels"] != IGNORED).sum().item(), rel=1e-4), "the weights are active"


def test_the_loss_is_the_mean_however_little_the_targets_of_a_step_weigh(tmp_path):
    """60 targets of weight exp(-8) weigh 0.02 together: equal weights are the plain mean, up to float32."""
    plain = job(tmp_path, name="plain", arm=S2, optim={"steps": 1})
    todo = job(tmp_path, arm=LONG_CE, optim={"steps": 1})
    rows = len(PackedRows(todo["corpus"]))
    np.save(tmp_path / "rows.npy", np.arange(rows))
    np.save(tmp_path / "gains.npy", np.full((rows, 16), -8.0, np.float16))
    train(todo | {"gains": str(tmp_path)})
    train(plain)
    ours, theirs = steps(todo)[0], steps(plain)[0]
    for number in ("loss", "grad_norm"):
        assert ours[number] == pytest.approx(theirs[number], rel=1e-5)


def test_rows_that_were_not_scored_are_named(tmp_path):
    np.save(tmp_path / "rows.npy", np.array([1, 4]))
    np.save(tmp_path / "gains.npy", np.zeros((2, 3), np.float16))
    assert TokenGains(tmp_path).weights([4, 1]).tolist() == [[1.0] * 3] * 2
    with pytest.raises(ValueError, match=r"rows \[7\] have no gains"):
        TokenGains(tmp_path).weights([4, 7])


@pytest.mark.parametrize(
    ("arm", "pack", "message"),
    [
        ({"short_tokens": 16}, {}, r"short_tokens is 16, but must be at least 4 and below pack\.seq_len 16"),
        ({}, {}, r"short_tokens is 2, but must be at least 4"),
        ({"short_tokens": 8, "curriculum": [{"steps": 1, "row_tokens": 8}]}, {}, "'long_ce' with a curriculum"),
        ({"short_tokens": 8}, {"first_token": "bos"}, r"'long_ce' with pack\.first_token 'bos'"),
        ({"short_tokens": 8, "objective": "plain"}, {}, "short_tokens 8 with objective 'plain'"),
    ],
)
def test_contexts_that_cannot_be_compared_are_refused_with_both_numbers(arm, pack, message):
    arms = {"a": {"objective": "long_ce"} | arm}
    with pytest.raises(ValidationError, match=message):
        FinetuneRecipe(steps=1, global_batch_tokens=16, pack={"seq_len": 16} | pack, arms=arms)
