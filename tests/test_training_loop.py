"""One rank's life: it learns, its ranks agree, it stops where it must, and refuses what cannot be."""

import json
import math
from pathlib import Path

import pytest
import torch
from ranks import run_spawned
from toy_models import VOCAB, job, packed_corpus, tiny_folder, train
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM

from longreach.infra.errors import OutOfMemory, Superseded
from longreach.infra.launch import run_local
from longreach.infra.tracking import Spool, read_events
from longreach.training import export, loop
from longreach.training.build import build
from longreach.training.corpus import PackedRows
from longreach.training.loop import learning_rate
from longreach.training.model import with_softmax_sinks
from longreach.training.recipe import ArmRecipe, LengthStage, LlamaRecipe, OptimRecipe, RopeRecipe, TrainJob
from longreach.training.row_order import RowOrder
from longreach.training.summary import TrainingSummary

S2 = ArmRecipe(tune="lora+embed+norm", attention={"pattern": "shifted_sparse", "group_tokens": 8, "sink_tokens": 2})
ACROSS_RANKS = 2e-5
"""Of a loss of about 4 in float32: the ranks' gradients are added in another order, six AdamW steps long."""


def steps(todo):
    return [json.loads(line) for line in (Path(todo["out"]) / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_the_asked_pattern_is_what_ran(tmp_path):
    todo = job(tmp_path, arm=S2, optim={"steps": 30})
    summary = train(todo)
    assert summary.loss_last < summary.loss_first - 0.3
    assert summary.pattern == "shifted_sparse(group_tokens=8, sink_tokens=2)"
    assert summary.kernel == "sdpa"
    assert summary == TrainingSummary.read(todo["out"])
    assert [row["step"] for row in steps(todo)] == list(range(1, 31))


@pytest.mark.parametrize(("arm", "zero_stage"), [(ArmRecipe(), 2), (S2, 3)], ids=["full, ZeRO-2", "longlora, ZeRO-3"])
def test_one_and_two_ranks_read_the_same_rows_and_end_with_the_same_loss(tmp_path, arm, zero_stage):
    one = job(tmp_path, name="one", arm=arm)
    two = job(tmp_path, name="two", arm=arm, resources={"workers": 2, "zero_stage": zero_stage})
    train(one)
    run_spawned("longreach.training.loop:train", two, world=2, folder=tmp_path)
    assert [row["rows"] for row in steps(one)] == [row["rows"] for row in steps(two)]
    for a, b in zip(steps(one), steps(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=ACROSS_RANKS)
        assert (a["tokens"], a["targets"]) == (b["tokens"], b["targets"])


def s2_mask(positions_BT, group, heads, shifted_from):
    """What S²-Attn lets each head see, one pair of tokens after the other: additive [B, H, T, T]."""
    B, T = positions_BT.shape
    document = (positions_BT == 0).cumsum(1)
    mask = torch.full((B, heads, T, T), float("-inf"))
    for b in range(B):
        for h in range(heads):
            shift = group // 2 if h >= shifted_from else 0
            for q in range(T):
                for k in range(q + 1):
                    if document[b, q] == document[b, k] and (q + shift) // group == (k + shift) // group:
                        mask[b, h, q, k] = 0
    return mask


@pytest.mark.parametrize("attention", [{}, {"pattern": "shifted_sparse", "group_tokens": 8}], ids=["causal", "s2"])
def test_the_first_loss_is_that_of_plain_transformers_with_the_mask_of_the_pattern(tmp_path, attention):
    todo = job(tmp_path, arm={"attention": attention}, optim={"steps": 1})
    base = AutoModelForCausalLM.from_pretrained(todo["base"])
    with torch.no_grad():
        for weight in base.parameters():
            weight.mul_(10 if weight.dim() == 2 else 1)  # so that it matters who sees what
    base.save_pretrained(todo["base"])
    train(todo)
    batch = PackedRows(todo["corpus"]).batch(steps(todo)[0]["rows"])
    stretch = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    plain = LlamaForCausalLM.from_pretrained(todo["base"], attn_implementation="eager", rope_parameters=stretch)

    def loss_of(group):
        mask = s2_mask(batch["position_ids"], group, heads=4, shifted_from=2)
        with torch.no_grad():
            logits = plain(batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).item()

    right, wrong = (loss_of(8), loss_of(1000)) if attention else (loss_of(1000), loss_of(8))
    assert steps(todo)[0]["loss"] == pytest.approx(right, rel=1e-6)  # rounding of float32
    assert abs(right - wrong) > 0.01


@pytest.mark.parametrize(("sink", "kept"), [("token", 1), ("none", 0)])
def test_a_pretraining_arm_trains_with_the_window_and_the_sinks_of_a_streaming_cache(tmp_path, sink, kept):
    """Its first loss is that of plain transformers with a mask of what such a cache keeps."""
    tiny_folder(tmp_path / "base")
    packed_corpus(tmp_path, first_token="sink", method="concat")
    attention = {"pattern": "sink_window", "window_tokens": 4, "sink_tokens": kept}
    choices = {"kind": "pretrain", "sink": sink, "rope": {}, "model": LlamaRecipe(context_length=64)}
    todo = job(tmp_path, attention=attention, optim={"steps": 1}, **choices)
    summary = train(todo)
    assert summary.pattern == f"sink_window(window_tokens=4, sink_tokens={kept})"
    batch = PackedRows(todo["corpus"]).batch(steps(todo)[0]["rows"], drop_first=sink == "none")
    plain, _ = build(TrainJob.model_validate(todo), PackedRows(todo["corpus"]).summary)
    plain.set_attn_implementation("eager")
    t = torch.arange(batch["input_ids"].shape[1])
    distance = t[:, None] - t

    def loss_of(seen):
        mask = torch.where(seen, 0.0, float("-inf")).expand(len(batch["input_ids"]), 1, len(t), len(t))
        with torch.no_grad():
            logits = plain(batch["input_ids"], attention_mask=mask, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).item()

    right, wrong = (loss_of((distance >= 0) & ((distance < window) | (t < kept))) for window in (4, 100))
    assert steps(todo)[0]["loss"] == pytest.approx(right, rel=1e-6)  # rounding of float32
    assert abs(right - wrong) > 1e-5


RESOURCES = [{"micro_batch_rows": 4}, {"zero_stage": 0}, {"zero_stage": 3}, {"activation_checkpointing": True}]


@pytest.mark.parametrize("resources", RESOURCES, ids=str)
def test_resources_do_not_change_what_is_learned(tmp_path, resources):
    one, other = job(tmp_path, name="one", arm=S2), job(tmp_path, name="other", arm=S2, resources=resources)
    train(one)
    train(other)
    assert [row["rows"] for row in steps(one)] == [row["rows"] for row in steps(other)]
    for a, b in zip(steps(one), steps(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=ACROSS_RANKS)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_training_fails_if_another_pattern_is_on_than_the_asked_one(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "active_pattern", lambda model: None)
    with pytest.raises(RuntimeError, match=r"asked for attention shifted_sparse.*but None is active"):
        train(job(tmp_path, arm=S2))


def test_a_superseded_attempt_stops_at_its_next_step(tmp_path):
    todo = job(tmp_path)
    Path(todo["superseded_file"]).parent.mkdir(parents=True, exist_ok=True)
    Path(todo["superseded_file"]).touch()
    with pytest.raises(Superseded, match="step 1: a newer attempt took over"):
        train(todo)


def at_step(monkeypatch, step, act):
    """Calls `act` when training comes to a step (counted from 0)."""

    def for_rank(self, at, *args, real=RowOrder.for_rank):
        if at == step:
            act()
        return real(self, at, *args)

    monkeypatch.setattr(RowOrder, "for_rank", for_rank)


def test_an_attempt_superseded_while_it_trains_ends_its_step_and_leaves_no_result(tmp_path, monkeypatch):
    todo = job(tmp_path)
    at_step(monkeypatch, 3, lambda: Path(todo["superseded_file"]).touch())
    with pytest.raises(Superseded, match="step 5: a newer attempt took over"):
        train(todo)
    assert [row["step"] for row in steps(todo)] == [1, 2, 3, 4]
    assert not (Path(todo["out"]) / TrainingSummary.file).exists()


def test_each_step_is_recorded_once_and_told_once_whatever_was_repeated(tmp_path, monkeypatch):
    def die():
        raise KeyboardInterrupt

    Spool.open(tmp_path / "a.jsonl", run="0" * 32, parent=None, experiment="e", name="n", kind="attempt")
    todo = job(tmp_path, spool=str(tmp_path / "a.jsonl"))
    with monkeypatch.context() as patch:
        at_step(patch, 5, die)
        with pytest.raises(KeyboardInterrupt):
            train(todo)
    assert len(steps(todo)) == 5
    with monkeypatch.context() as patch:  # again, before it is where it was
        at_step(patch, 4, die)
        with pytest.raises(KeyboardInterrupt):
            train(todo)
    assert train(todo).resumed_from_step == 4
    assert [row["step"] for row in steps(todo)] == [1, 2, 3, 4, 5, 6]
    told = [event for event in read_events(tmp_path / "a.jsonl")[0] if event["event"] == "metrics"]
    assert [event["step"] for event in told] == [1, 2, 3, 4, 5, 6]
    assert [event["values"]["train/loss"] for event in told] == [row["loss"] for row in steps(todo)]


def test_out_of_memory_says_what_would_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.TokenLoss, "forward", lambda self, **batch: torch.empty(1 << 50))
    message = (
        r"out of memory with 4 rows of 16 tokens at once \(.*can't allocate memory.*\): in this order, try "
        r"resources.micro_batch_rows 4 -> 2, resources.activation_checkpointing true, pack.seq_len 16 -> 8"
    )
    with pytest.raises(OutOfMemory, match=message):
        train(job(tmp_path, resources={"micro_batch_rows": 4}))


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


def test_rows_beyond_the_context_train_in_pieces_that_fit(tmp_path):
    """The control of an extension: the same tokens, at the base's own length."""
    pieces = LengthStage(steps=2, row_tokens=64)
    corpus = packed_corpus(tmp_path / "long", seq_len=256)
    optim = {"steps": 2, "global_batch_tokens": 256}
    fits = job(tmp_path, rope=RopeRecipe(), optim=optim, arm=ArmRecipe(curriculum=(pieces,)))
    assert train(fits | {"corpus": str(corpus)}).steps == 2
    for choices in (
        {"optim": optim | {"steps": 3}, "arm": ArmRecipe(curriculum=(pieces,))},
        {"optim": optim, "arm": ArmRecipe(curriculum=(pieces.model_copy(update={"share": 0.5}),))},
    ):
        with pytest.raises(ValueError, match=r"rows of 256 tokens exceed the model's 64 positions"):
            train(job(tmp_path, rope=RopeRecipe(), **choices) | {"corpus": str(corpus)})
    arm, validated = ArmRecipe(curriculum=(pieces,)), OptimRecipe(warmup_steps=1, **optim, validate_every_steps=1)
    assert arm.longest_row(256, OptimRecipe(warmup_steps=1, **optim)) == 64
    assert arm.longest_row(256, validated) == 256, "validation reads whole rows"


def test_a_target_module_that_the_architecture_lacks_is_named_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="no linear layer 'q_pro'; nearest: q_proj"):
        train(job(tmp_path, arm=ArmRecipe(tune="lora", target_modules=("q_pro",))))


def test_sink_arms_start_from_the_same_weights_and_read_the_same_text(tmp_path, monkeypatch):
    tiny_folder(tmp_path / "base")
    packed_corpus(tmp_path, first_token="sink", method="concat")
    digests, read = [], {}
    real = export.tensor_digests
    monkeypatch.setattr(export, "tensor_digests", lambda *asked: digests.append(real(*asked)) or digests[-1])
    for sink in ("none", "token"):
        todo = job(tmp_path, name=sink, kind="pretrain", sink=sink, rope={}, model=LlamaRecipe(context_length=64))
        train(todo)
        read[sink] = steps(todo)
    start, end, other_start, other_end = digests
    assert start == other_start
    assert end != other_end
    assert [row["rows"] for row in read["none"]] == [row["rows"] for row in read["token"]]
    # without the sink nothing predicts a row's first token
    assert all(b["targets"] - a["targets"] == 4 for a, b in zip(read["none"], read["token"], strict=True))


@pytest.mark.parametrize("start", ["scratch", "base"])
@pytest.mark.parametrize("sink", ["none", "zero", "token", "logit"])
def test_each_sink_arm_is_what_plain_transformers_loads(tmp_path, monkeypatch, sink, start):
    """Its logits, its tokenizer, its sinks; from scratch and as continued pretraining."""
    tiny_folder(tmp_path / "base")
    packed_corpus(tmp_path, first_token="sink")
    model = LlamaRecipe(context_length=64) if start == "scratch" else None
    todo = job(tmp_path, name=sink, kind="pretrain", sink=sink, rope={}, model=model, sink_mass_every=4)
    seen, real = {}, export.check_trained
    ids = torch.arange(2, 34)[None]

    def spy(model, *args):
        with torch.no_grad():
            seen["logits"] = model.eval()(ids, use_cache=False).logits
        real(model, *args)

    monkeypatch.setattr("longreach.training.export.check_trained", spy)
    train(todo)
    tokenizer, plain = (kind.from_pretrained(todo["out"]) for kind in (AutoTokenizer, AutoModelForCausalLM))
    assert tokenizer("w7 w8").input_ids == [*([VOCAB] if sink == "token" else []), 7, 8]
    assert plain.config.vocab_size == VOCAB + 1
    if start == "scratch":  # a base keeps its own
        assert plain.generation_config.eos_token_id == tokenizer.eos_token_id
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, seen["logits"], atol=2e-6, rtol=0)
    sinks = [p for name, p in plain.named_parameters() if name.endswith("sinks")]
    assert bool(sinks) == (sink in ("zero", "logit"))
    assert all((p != 0).all() if sink == "logit" else (p == 0).all() for p in sinks)
    rows = steps(todo)
    assert [row["step"] for row in rows if "sink_mass" in row] == [1, 4, 6]
    mass = rows[-1]["sink_mass"]
    assert [0 < m < 1 for m in mass["first_token"]] == [True] * plain.config.num_hidden_layers
    assert all((m > 0) == (sink in ("zero", "logit")) for m in mass["softmax_sink"])
    heads = rows[-1]["sink_heads"]
    assert heads.keys() == {f"{place}_{epsilon}" for place in mass for epsilon in ("0.3", "0.2")}
    assert all(0 <= share <= 1 for share in heads.values())


def test_where_attention_rests_is_the_same_on_sharded_weights(tmp_path):
    tiny_folder(tmp_path / "base")
    packed_corpus(tmp_path, first_token="sink", method="concat")
    some = {
        "kind": "pretrain",
        "sink": "logit",
        "rope": {},
        "model": LlamaRecipe(context_length=64),
        "sink_mass_every": 2,
    }
    one = job(tmp_path, name="one", **some)
    train(one)
    two = job(tmp_path, name="two", resources={"workers": 2, "zero_stage": 3}, **some)
    run_spawned("longreach.training.loop:train", two, world=2, folder=tmp_path / "ranks")
    for a, b in zip(steps(one), steps(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-6)
        for kind, layers in a.get("sink_mass", {}).items():
            assert b["sink_mass"][kind] == pytest.approx(layers, abs=1e-6)
        assert a.get("sink_heads") == b.get("sink_heads")


def test_sink_arms_start_alike_from_a_base_too(tmp_path):
    """Before training, a model with a zero sink differs from the base by that alone."""
    tiny_folder(tmp_path / "base")
    packed_corpus(tmp_path, first_token="sink")
    built = {}
    for sink in ("none", "zero", "token", "logit"):
        todo = TrainJob.model_validate(job(tmp_path, kind="pretrain", sink=sink, rope={}))
        built[sink], _ = build(todo, PackedRows(todo.corpus).summary)
    weights = {sink: dict(model.named_parameters()) for sink, model in built.items()}
    for sink in weights:
        assert all(torch.equal(p, weights[sink][name]) for name, p in weights["none"].items())
    assert not any(p.requires_grad for name, p in weights["zero"].items() if "sinks" in name)
    assert all(p.requires_grad for p in weights["logit"].values())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_sink_token_s_embedding_can_train_alone(tmp_path, stage):
    """Every other weight of the result is the base's, bit by bit, under every ZeRO stage."""
    tiny_folder(tmp_path / "base")
    packed_corpus(tmp_path, first_token="sink")
    resources = {"zero_stage": stage}
    todo = job(tmp_path, kind="pretrain", sink="token", train="sink", rope={}, resources=resources)
    train(todo)
    base, trained = (AutoModelForCausalLM.from_pretrained(at).state_dict() for at in (tmp_path / "base", todo["out"]))
    embeddings = ("model.embed_tokens.weight", "lm_head.weight")
    for name, weight in trained.items():
        rows = VOCAB if name in embeddings else len(weight)
        assert torch.equal(weight[:rows], base[name])
    start = base["model.embed_tokens.weight"].mean(0)
    assert not torch.allclose(trained["model.embed_tokens.weight"][VOCAB], start, atol=1e-3)


def test_sink_logits_can_train_alone(tmp_path):
    tiny_folder(tmp_path / "base")
    packed_corpus(tmp_path, first_token="sink")
    todo = job(tmp_path, kind="pretrain", sink="logit", train="sink", rope={})
    train(todo)
    base, trained = (AutoModelForCausalLM.from_pretrained(at).state_dict() for at in (tmp_path / "base", todo["out"]))
    for name, weight in base.items():
        assert torch.equal(trained[name][: len(weight)], weight)
    sinks = [weight for name, weight in trained.items() if name.endswith("sinks")]
    assert len(sinks) == 2
    assert all((weight != 0).all() for weight in sinks)


def test_a_base_that_cannot_have_a_sink_in_its_softmax_is_refused(tmp_path):
    config = GPTNeoXConfig(vocab_size=65, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM does not support a sink in its softmax"):
        with_softmax_sinks(GPTNeoXForCausalLM(config))


def test_rows_with_a_sink_that_the_base_lacks_need_full_tuning(tmp_path):
    tiny_folder(tmp_path / "base")
    packed_corpus(tmp_path, first_token="sink")
    with pytest.raises(ValueError, match=r"a token that the base lacks \('sink'\): an adapter cannot store"):
        train(job(tmp_path, arm=S2))
    todo = job(tmp_path)
    train(todo)
    assert len(AutoTokenizer.from_pretrained(todo["out"])) == VOCAB + 1
    assert AutoModelForCausalLM.from_pretrained(todo["out"]).model.embed_tokens.weight.shape[0] == VOCAB + 1


def test_a_sink_in_an_unused_row_of_a_padded_base_needs_its_embedding_trained(tmp_path):
    folder = tiny_folder(tmp_path / "base")
    padded = AutoModelForCausalLM.from_pretrained(folder)
    padded.resize_token_embeddings(VOCAB + 8)
    padded.save_pretrained(folder)
    packed_corpus(tmp_path, first_token="sink")
    with pytest.raises(ValueError, match=r"cannot store an embedding that it does not train, so use tune 'all'"):
        train(job(tmp_path, arm=ArmRecipe(tune="lora")))
    assert train(job(tmp_path, arm=S2, optim={"steps": 1})).trainable.embed > 0


def test_a_global_batch_that_the_ranks_do_not_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match="4 rows is not divisible by 1 ranks x micro_batch_rows 3"):
        train(job(tmp_path, resources={"micro_batch_rows": 3}))


def test_an_adapter_may_train_for_a_single_step(tmp_path):
    train(job(tmp_path, arm=S2, optim={"steps": 1}))


def test_schedules_warm_up_without_a_step_at_zero_and_end_as_they_say():
    for schedule, last in (("constant", 1.0), ("linear", 1 / 8), ("cosine", (1 + math.cos(math.pi * 7 / 8)) / 2)):
        optim = OptimRecipe(steps=10, global_batch_tokens=1, warmup_steps=2, schedule=schedule)
        rates = [learning_rate(optim, 1.0, step) for step in range(10)]
        assert rates[:3] == [0.5, 1.0, 1.0]
        assert rates[-1] == pytest.approx(last)


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({"schedule": "wsd", "decay_fraction": 0.4}, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({"schedule": "wsd", "decay_fraction": 0.2, "min_lr_ratio": 0.2}, [0.5, *[1] * 8, 0.6]),
        ({"schedule": "linear", "min_lr_ratio": 0.2}, [0.5, 1, *(1 - n / 10 for n in range(8))]),
    ],
    ids=str,
)
def test_a_rate_falls_where_and_as_far_as_it_shall(choices, expected):
    optim = OptimRecipe(steps=10, global_batch_tokens=1, warmup_steps=2, **choices)
    assert [learning_rate(optim, 1.0, step) for step in range(10)] == pytest.approx(expected)


def test_a_cosine_with_a_least_rate_ends_above_it():
    optim = OptimRecipe(steps=1000, global_batch_tokens=1, warmup_steps=0, schedule="cosine", min_lr_ratio=0.1)
    assert learning_rate(optim, 2.0, 999) == pytest.approx(0.2, abs=1e-4)
    assert learning_rate(optim, 2.0, 500) == pytest.approx(1.1)


def test_lora_plus_trains_b_at_a_multiple_of_the_rate_of_a(tmp_path, monkeypatch):
    seen = []

    def start_engine(*args, rate_scales, real=loop.zero.start_engine, **more):
        engine = real(*args, rate_scales=rate_scales, **more)
        seen.extend(engine.optimizer.param_groups)
        return engine

    monkeypatch.setattr(loop.zero, "start_engine", start_engine)
    train(job(tmp_path, arm={"tune": "lora", "lora_plus_ratio": 16}, resources={"zero_stage": 0}))
    (a, b) = sorted(seen, key=lambda group: group["rate_scale"])
    assert (a["rate_scale"], b["rate_scale"]) == (1.0, 16.0)
    assert b["lr"] == pytest.approx(16 * a["lr"])
    assert {p.shape[1] for p in b["params"]} == {8}, "B maps from the rank"


def test_totals_over_ranks_are_exact():
    class Engine:
        device = torch.device("cpu")

    run_local("test_training_loop:nothing", {})
    assert loop.all_sum(Engine(), [2.0**53 - 1, 0.1]) == [2.0**53 - 1, 0.1]


def nothing(todo):
    return {}
