"""Counting against what torch itself counts: FLOPs, floats saved for the backward pass, keys under a mask."""

import json
from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.utils.flop_counter import FlopCounterMode
from toy_models import job, train

from longreach.attention import PATTERNS
from longreach.attention.hf import set_pattern
from longreach.infra.resources import Resources
from longreach.training import cost, throughput
from longreach.training.cost import Machine, Shape, predict
from longreach.training.longlora import apply_arm, trainable_parameters
from longreach.training.loss import TokenLoss
from longreach.training.model import fresh_llama
from longreach.training.recipe import ATTENTION_PROJECTIONS, ArmRecipe, LlamaRecipe
from longreach.training.summary import TrainingSummary

RECIPE = LlamaRecipe(hidden=64, layers=3, heads=4, kv_heads=2, context_length=128)
T, VOCAB = 128, 96
ARMS = ["all", "lora", "lora+norm", "lora+embed+norm"]
SMOLLM2 = Shape(30, 576, 1536, 9, 3, 64, 49152, tied=True)


def tuned(tune, target_modules=ATTENTION_PROJECTIONS):
    arm = ArmRecipe(tune=tune, target_modules=target_modules)
    model = apply_arm(fresh_llama(RECIPE, VOCAB, seed=0), arm)
    set_pattern(model, PATTERNS["causal"]())
    model.enable_input_require_grads()  # the first layer's frozen inputs pass gradients on, as counted
    return model.train()


def shape_of(model):
    return Shape.of(model.config.to_dict())


def loss_of(model, loss=None):
    ids = torch.randint(VOCAB, (1, T), generator=torch.Generator().manual_seed(0))
    return (loss or TokenLoss(model))(ids, torch.arange(T)[None], ids, scale=1.0)


def test_smollm2_is_counted_to_the_last_parameter():
    assert SMOLLM2.parameters == 134_515_008
    trained = SMOLLM2.trained(ArmRecipe(tune="lora+embed+norm"))
    assert trained["embed"] == 28_311_552
    assert sum(trained.values()) == 29_268_288  # what training.json says of the quickstart's arm


@pytest.mark.parametrize("tune", ARMS)
def test_parameters_are_those_of_the_model(tune):
    model = tuned(tune)
    kinds = shape_of(model).trained(ArmRecipe(tune=tune))
    assert sum(kinds.values()) == trainable_parameters(model).total
    assert shape_of(model).counts(model.num_parameters() - kinds["lora"])


@pytest.mark.parametrize("tune", ARMS)
def test_flops_are_those_that_torch_counts(tune):
    """torch counts matrix products; attention's own are compared by themselves. 5%: products with LoRA's inputs."""
    model = tuned(tune)
    loss = TokenLoss(model)  # tries the model's logits once, which no step does
    with FlopCounterMode(display=False) as counter:
        loss_of(model, loss).backward()
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    matrices = sum(flops for op, flops in counted.items() if "attention" not in op)
    shape, arm = shape_of(model), ArmRecipe(tune=tune)
    predicted = predict(shape, arm, rows=1, seq_len=T, resources=Resources(workers=1)).flops
    keys = arm.attention.mean_keys(T)
    attention = T * 4 * keys * shape.heads * shape.head_dim * shape.layers * 3.5
    assert predicted - attention == pytest.approx(matrices, rel=0.05)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tune", ["all", "lora", "lora+embed+norm"])
def test_the_heads_gradient_is_counted_where_the_loss_makes_one(tune, tied):
    """A head of its own is frozen beside LoRA, whatever trains of the embedding."""
    model = fresh_llama(RECIPE, VOCAB, seed=0)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    head = model.lm_head.weight
    model = apply_arm(model, ArmRecipe(tune=tune)).train()
    model.enable_input_require_grads()
    loss_of(model).backward()
    plain = cost._Step(shape_of(model), ArmRecipe(tune=tune), Resources(workers=1), rows=1, seq_len=T)
    products = plain.flops_per_token(T)["loss"] / (2 * VOCAB * RECIPE.hidden)
    assert products == (2 if head.grad is None else 3)
    gradient = plain.memory()["loss"] - 4 * T * (VOCAB + RECIPE.hidden)
    assert gradient == (0 if head.grad is None else 4 * VOCAB * RECIPE.hidden)


@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize("target_modules", [ATTENTION_PROJECTIONS, ("up_proj",), ("down_proj",), "all-linear"])
@pytest.mark.parametrize("tune", ARMS)
def test_floats_saved_are_those_that_torch_saves(monkeypatch, tune, target_modules, zero_stage):
    """6%: what LoRA's inner products leave is estimated. ZeRO-3 brings a linear of its own, for good once it ran."""
    if tune == "all" and target_modules != ATTENTION_PROJECTIONS:
        pytest.skip("full fine-tuning has no adapters")
    arm = ArmRecipe(tune=tune, target_modules=target_modules)
    linear = zero3_linear_wrap if zero_stage == 3 else torch._C._nn.linear
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    model = tuned(tune, target_modules)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved, alive = {}, []

    def pack(x):
        if (at := x.untyped_storage().data_ptr()) not in weights:
            saved[at] = x.untyped_storage().nbytes() // 4
            alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss_of(model)
    gpu = Resources(workers=1, gpus_per_worker=1, zero_stage=zero_stage)
    memory = predict(shape_of(model), arm, rows=1, seq_len=T, resources=gpu).memory_gib
    layers = memory["activations"] * 2**30 / 4
    head = T * RECIPE.hidden * (1 + (tune != "lora") * 2) + (VOCAB * RECIPE.hidden) * (tune == "all" or "embed" in tune)
    adapted = sum(arm.adapts(name) for name in SMOLLM2.matrices)
    inner = 3 * adapted * T * 8 * (tune != "all") + 3 * T * 4
    assert layers + head + inner == pytest.approx(sum(saved.values()), rel=0.06)


def test_zero_leaves_less_on_a_rank_and_recomputing_less_still():
    arm = ArmRecipe()

    def gib(**choices):
        gpus = Resources(workers=4, gpus_per_worker=1, **choices)
        return predict(SMOLLM2, arm, rows=4, seq_len=1024, resources=gpus).peak_gib

    stages = [gib(zero_stage=stage) for stage in range(4)]
    assert stages[3] == min(stages)
    assert gib(zero_stage=2, activation_checkpointing=True) < 0.7 * gib(zero_stage=2)
    assert gib(zero_stage=2, offload="cpu") < gib(zero_stage=2)


# SmolLM2-135M on CPUs, of all ranks together (RESULTS.md): arm, rows of all ranks, tokens of a row, resources, GiB
R8, R64 = {"tune": "lora+embed+norm"}, {"tune": "lora+embed+norm", "target_modules": "all-linear", "lora_rank": 64}
TWO, ONE = {"workers": 2, "zero_stage": 2}, {"workers": 1, "zero_stage": 2}
MEASURED = [
    ({"tune": "all"}, 2, 1024, TWO, 9.68),
    ({"tune": "lora"}, 2, 1024, TWO, 7.53),
    (R8, 2, 1024, TWO, 8.29),
    (R8, 2, 2048, TWO, 9.28),
    (R64, 2, 2048, TWO, 11.3),
    (R64, 1, 2048, ONE | {"zero_stage": 0}, 5.55),
    (R8, 2, 4096, ONE, 10.3),
    (R64, 2, 4096, ONE, 12.1),
    ({"tune": "all"}, 2, 4096, ONE, 12.1),
]


@pytest.mark.parametrize(("arm", "rows", "seq_len", "resources", "gib"), MEASURED)
def test_memory_on_a_cpu_is_within_a_quarter_of_what_was_measured(arm, rows, seq_len, resources, gib):
    attention = {"pattern": "causal"}
    if arm["tune"] != "all":
        attention = {"pattern": "shifted_sparse", "group_tokens": seq_len // 4}
    predicted = predict(
        SMOLLM2,
        ArmRecipe(**arm, attention=attention),
        rows=rows,
        seq_len=seq_len,
        resources=Resources(**resources, dtype="float32"),
    )
    assert predicted.peak_gib == pytest.approx(gib, rel=0.25)


def test_time_is_work_over_rate():
    machine = Machine(matmul=1e11, attention=5e10, attention_backward=5e10, bytes=1e10, process_gib=0.5)
    one = {"rows": 2, "seq_len": 1024, "resources": Resources(workers=2)}
    step = predict(SMOLLM2, ArmRecipe(), machine=machine, **one).step_s
    twice = replace(
        machine, **{name: 2 * getattr(machine, name) for name in ("matmul", "attention", "attention_backward", "bytes")}
    )
    assert predict(SMOLLM2, ArmRecipe(), machine=twice, **one).step_s == pytest.approx(step / 2)
    assert predict(SMOLLM2, ArmRecipe(tune="lora"), machine=machine, **one).step_s < step
    assert predict(SMOLLM2, ArmRecipe(), **one).step_s is None


def test_seconds_add_up_and_say_what_they_go_into():
    rates = dict.fromkeys(("matmul", "attention", "attention_backward", "bytes", "exchange", "host"), 1e11)
    machine = Machine(**rates, process_gib=0.0)

    def cost(**choices):
        gpus = Resources(**{"workers": 4, "gpus_per_worker": 1, "dtype": "bfloat16", **choices})
        return predict(SMOLLM2, ArmRecipe(), rows=8, seq_len=1024, resources=gpus, machine=machine)

    plain = cost(zero_stage=3)
    assert sum(plain.seconds.values()) == plain.step_s
    assert set(plain.seconds) == {"matrices", "attention", "elementwise", "optimizer", "exchange"}
    wide = cost(zero_stage=3, dtype="float32").seconds
    assert wide["exchange"] == 2 * plain.seconds["exchange"]
    assert plain.seconds["elementwise"] < wide["elementwise"] < 2 * plain.seconds["elementwise"], "logits are float32"
    by_stage = [cost(zero_stage=stage).seconds["exchange"] for stage in range(4)]
    assert by_stage == sorted(by_stage)
    shared = cost(zero_stage=0, sequence_parallel=3, workers=3).seconds["exchange"]
    assert shared > cost(zero_stage=0, workers=3).seconds["exchange"]
    slow = replace(machine, latency=1.0)
    waits = [1, 1.5, 1.5, 1 + 3]  # a bucket of gradients; new weights, half as long; three times 50 million weights
    for stage, seconds in enumerate(waits):
        resources = Resources(workers=4, gpus_per_worker=1, dtype="bfloat16", zero_stage=stage, micro_batch_rows=2)
        late = predict(SMOLLM2, ArmRecipe(), rows=8, seq_len=1024, resources=resources, machine=slow).seconds
        soon = predict(SMOLLM2, ArmRecipe(), rows=8, seq_len=1024, resources=resources, machine=machine).seconds
        assert late["exchange"] - soon["exchange"] == pytest.approx(seconds)
    hosted = cost(zero_stage=3, offload="cpu", offload_parameters=True)
    assert hosted.seconds["host"] > cost(zero_stage=3, offload="cpu").seconds["host"] > 0
    assert hosted.memory_gib["weights"] == hosted.memory_gib["optimizer"] == 0 < plain.memory_gib["weights"]
    assert cost(zero_stage=3, offload="cpu", gpus_per_worker=0).seconds.get("host") is None


def test_every_arm_keeps_what_was_predicted_beside_what_it_took(tmp_path):
    todo = job(tmp_path)
    train(todo)
    facts = TrainingSummary.read(tmp_path / "run/out")
    assert facts.predicted.step_s > 0
    assert facts.predicted.memory_gib["process"] == pytest.approx(facts.machine.process_gib)
    rows = [json.loads(line) for line in (tmp_path / "run/out/metrics.jsonl").read_text().splitlines()]
    expected = facts.predicted.flops / rows[0]["seconds"] / facts.machine.matmul
    assert rows[0]["mfu"] == pytest.approx(expected)


def test_this_machine_is_measured_once_and_not_again_after_a_restart(tmp_path, monkeypatch):
    measured = []
    real = cost.calibrate
    monkeypatch.setattr(cost, "calibrate", lambda **asked: measured.append(asked) or real(**asked))
    todo = job(tmp_path)
    machine = train(todo).machine
    again = todo | {"out": str(tmp_path / "again/out"), "work": str(tmp_path / "again/work")}
    found = train(again | {"earlier": [todo["work"]]}).machine
    assert len(measured) == 1
    assert replace(found, process_gib=0) == replace(machine, process_gib=0)
    train(again | {"resources": {**todo["resources"], "micro_batch_rows": 2}})
    assert len(measured) == 2, "so many tokens at once were never measured"


@pytest.mark.parametrize(
    ("kinds", "seconds", "speed"),
    [
        ("sssssscc", [9, 2, 2, 2, 9, 2, 6, 6], 8 * 100 / (6 * 2 + 2 * 6)),  # the last two under full attention
        ("ssssssss", [9, 2, 2, 2, 9, 2, 2, 2], 50.0),
        ("sc", [9, 6], 2 * 100 / (9 + 6)),
        ("s", [9], 100 / 9),
    ],
)
def test_steps_of_each_kind_count_with_the_median_of_their_kind(kinds, seconds, speed):
    """Not with that of all: a training that anneals would seem to be as fast as one that does not."""
    rows = [
        {"step": n, "seconds": taken, "tokens": 100, "targets": 99, "loss": 1.0, "skipped": False, "phases": {}}
        for n, taken in enumerate(seconds, start=1)
    ]
    assert throughput.summary(rows, kinds)["tokens_per_s"] == pytest.approx(speed)


def test_a_training_that_anneals_tells_its_kinds_of_steps_apart(tmp_path, monkeypatch):
    seen = []
    whole = throughput.summary
    monkeypatch.setattr(throughput, "summary", lambda rows, kinds: seen.append((rows, kinds)) or whole(rows, kinds))
    attention = {"pattern": "shifted_sparse", "group_tokens": 8, "anneal_to": "causal", "anneal_fraction": 0.25}
    train(job(tmp_path, arm={"tune": "lora", "attention": attention}, optim={"steps": 4, "warmup_steps": 1}))
    ((rows, (*sparse, last)),) = seen
    assert ["mfu" in row for row in rows] == [True, True, True, False], "the FLOPs of the last step were not counted"
    assert len(sparse) == 3
    assert len({*sparse}) == 1
    assert last not in sparse
