"""Every ZeRO stage on 1 and 2 ranks against a plain torch loop: the same losses, norms and weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_spawned
from toy_models import TINY, VOCAB

from longreach.infra.launch import run_local
from longreach.infra.resources import Resources
from longreach.training.longlora import apply_arm
from longreach.training.loss import TokenLoss, causal_lm, count_targets
from longreach.training.model import fresh_llama
from longreach.training.recipe import ArmRecipe, OptimRecipe
from longreach.training.zero import backward, check_nvme, deepspeed_config, skip_shm_build, start_engine, step, whole

# Such a decay takes 3% of the weights with each step: one too many shows in bfloat16, too.
OPTIM = OptimRecipe(steps=4, global_batch_tokens=4 * 24, warmup_steps=0, clip_norm=0.5, weight_decay=10.0)
RATE = 3e-3
# float32 sums in another order: 1e-7 a step on the loss. AdamW divides by the gradient's size, so where a gradient is
# near zero that noise turns into a step of up to the learning rate: weights are compared by their distance as a whole.
# bfloat16 keeps 8 bits, of gradients that are added, too; measured: 2e-4 (loss), 6e-4 (norm), 2.2e-3 (weights).
TOLERANCES = {"float32": (2e-6, 1e-5, 1e-4), "bfloat16": (1e-3, 2e-3, 4e-3)}


def global_batch(step_number):
    """Four rows of very different numbers of targets, so that a mean of means would show."""
    g = torch.Generator().manual_seed(step_number)
    ids = torch.randint(0, VOCAB, (4, 24), generator=g)
    labels = ids.clone()
    for row, length in enumerate((24, 3, 11, 20)):
        labels[row, length:] = -100
    return {"input_ids": ids, "position_ids": torch.arange(24).expand(4, -1), "labels": labels}


def fresh(tune):
    torch.manual_seed(0)
    return apply_arm(fresh_llama(TINY, VOCAB, seed=0), ArmRecipe(tune=tune, lora_rank=4))


EMBED_SCALE = 0.1
"""The embeddings' learning rate over that of the others."""


def plain_loop(tune="all", dtype="float32"):
    """The oracle: no DeepSpeed, one rank, the whole batch at once; AdamW steps on float32 weights."""
    model = fresh(tune).to(getattr(torch, dtype))
    trained = [p for p in model.parameters() if p.requires_grad]
    masters = [p.detach().float() for p in trained]
    embed = set(causal_lm(model).get_input_embeddings().parameters())
    rates = [RATE * EMBED_SCALE if p in embed else RATE for p in trained]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(masters, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, OPTIM.beta2), weight_decay=OPTIM.weight_decay)
    losses, norms = [], []
    for n in range(OPTIM.steps):
        batch = global_batch(n)
        loss = TokenLoss(model)(**batch, scale=1 / count_targets(batch["labels"]))
        loss.backward()
        for p, master in zip(trained, masters, strict=True):
            master.grad, p.grad = p.grad.float(), None
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters, OPTIM.clip_norm)))
        optimizer.step()
        for p, master in zip(trained, masters, strict=True):
            p.data.copy_(master)
        losses.append(loss.item())
    return losses, norms, [p.detach().float().flatten().tolist() for p in trained]


def engine_loop(job):
    """The same through DeepSpeed on however many ranks there are: [losses, norms, trained weights]."""
    rank, world = dist.get_rank(), dist.get_world_size()
    resources = Resources(**job["resources"])
    model = fresh(job["tune"])
    scales = dict.fromkeys(causal_lm(model).get_input_embeddings().parameters(), EMBED_SCALE)
    engine = start_engine(TokenLoss(model), OPTIM, resources, global_batch_rows=4, rate_scales=scales)
    losses, norms = [], []
    for n in range(OPTIM.steps):
        batch = global_batch(n)
        scale, total = world / count_targets(batch["labels"]), torch.zeros(())
        for at in range(rank * resources.micro_batch_rows, 4, world * resources.micro_batch_rows):
            part = {k: v[at : at + resources.micro_batch_rows] for k, v in batch.items()}
            loss = engine(**part, scale=scale)
            backward(engine, loss)
            norm = step(engine, RATE)
            total += loss.detach().float() / world
        dist.all_reduce(total)
        losses.append(float(total))
        norms.append(norm)
    with whole(model.parameters()):
        weights = [p.detach().float().flatten().tolist() for p in model.parameters() if p.requires_grad]
    return [losses, norms, weights]


def assert_trains_like_a_plain_loop(got, case):
    dtype = case["resources"]["dtype"]
    expected, (loss, norm, weights) = plain_loop(case["tune"], dtype), TOLERANCES[dtype]
    assert got[0] == pytest.approx(expected[0], abs=loss)
    assert got[1] == pytest.approx(expected[1], rel=norm)
    ours, oracle = (torch.tensor([x for w in tensors for x in w]) for tensors in (got[2], expected[2]))
    assert float((ours - oracle).norm() / oracle.norm()) < weights


CASES = {
    f"zero{stage}-{dtype}-micro{micro}-{tune}": {
        "tune": tune,
        "resources": {
            "zero_stage": stage,
            "dtype": dtype,
            "micro_batch_rows": micro,
            "offload": offload,
            "offload_parameters": params,
        },
    }
    for stage, dtype, micro, tune, offload, params in [
        (0, "float32", 1, "all", "none", False),
        (0, "float32", 2, "lora+embed+norm", "none", False),
        (0, "bfloat16", 2, "all", "none", False),
        (1, "float32", 2, "all", "none", False),
        (1, "bfloat16", 2, "all", "none", False),
        (2, "float32", 1, "lora", "none", False),
        (2, "float32", 2, "all", "none", False),
        (2, "float32", 1, "all", "cpu", False),
        (2, "bfloat16", 2, "all", "none", False),
        (3, "float32", 1, "all", "none", False),
        (3, "float32", 1, "lora+embed+norm", "none", False),
        (3, "float32", 1, "lora+norm", "cpu", True),
        (3, "bfloat16", 2, "all", "none", False),
    ]
}


@pytest.mark.parametrize("case", CASES)
def test_one_rank_trains_like_a_plain_torch_loop(case):
    got = run_local("test_training_zero:engine_loop", CASES[case])
    assert_trains_like_a_plain_loop(got, CASES[case])


def engine_loops(job):
    return {name: engine_loop(case) for name, case in job.items()}


def test_two_ranks_train_like_a_plain_torch_loop(tmp_path):
    for rank in run_spawned("test_training_zero:engine_loops", CASES, world=2, folder=tmp_path):
        for case, got in rank.items():
            assert_trains_like_a_plain_loop(got, CASES[case])


def test_rotary_frequencies_stay_in_float32_beside_bfloat16_weights():
    """With 8 bits of frequency the thousandth position is off by radians; DeepSpeed rounded them before 0.19.2."""
    run_local("test_training_zero:check_frequencies", {"resources": {"dtype": "bfloat16", "zero_stage": 0}})


def check_frequencies(job):
    model = fresh_llama(TINY, VOCAB, 0)
    engine = start_engine(model, OPTIM, Resources(workers=1, **job["resources"]), global_batch_rows=4)
    assert next(engine.module.parameters()).dtype == torch.bfloat16
    assert engine.module.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_global_batch_that_does_not_divide_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="6 rows is not divisible by 2 ranks x micro_batch_rows 2"):
        deepspeed_config(OPTIM, Resources(micro_batch_rows=2), global_batch_rows=6, world=2)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"zero_stage": 0, "offload": "cpu"}, "offload cpu needs zero_stage 1 or more; it is 0"),
        ({"zero_stage": 2, "offload_parameters": True}, "offload_parameters needs zero_stage 3; it is 2"),
        ({"zero_stage": 2, "offload": "nvme", "nvme_path": "/d"}, "offload nvme needs zero_stage 3; it is 2"),
        ({"zero_stage": 3, "offload": "nvme"}, "offload nvme with nvme_path None: set both"),
        ({"zero_stage": 3, "offload": "cpu", "nvme_path": "/d"}, "offload cpu with nvme_path /d: set both, or neither"),
    ],
)
def test_offload_that_cannot_be_is_refused_with_the_recipe(choices, message):
    with pytest.raises(ValueError, match=message):
        Resources(**choices)


def test_a_disk_is_named_to_deepspeed_for_both_kinds_of_state():
    resources = Resources(zero_stage=3, offload="nvme", nvme_path="/disk", offload_parameters=True)
    zero = deepspeed_config(OPTIM, resources, global_batch_rows=2, world=2)["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "nvme", "nvme_path": "/disk"}


def test_a_disk_that_is_not_there_or_no_async_io_is_said_before_a_model_is_loaded(tmp_path, monkeypatch):
    there = {"zero_stage": 3, "offload": "nvme", "nvme_path": str(tmp_path)}
    with pytest.raises(ValueError, match=rf"nvme_path {tmp_path}/none is not a folder"):
        check_nvme(Resources(**there | {"nvme_path": f"{tmp_path}/none"}))
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda self: False)
    with pytest.raises(ValueError, match="async_io cannot be built here, because libaio's headers are missing"):
        check_nvme(Resources(**there))


def test_nothing_is_compiled_to_start_a_process_group():
    """Guards a private table: without our line DeepSpeed builds a C++ op for 68 s."""
    import deepspeed.ops
    from deepspeed.comm.torch import build_shm_op

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    skip_shm_build()
    assert build_shm_op() is None


def test_an_arm_that_trains_nothing_is_refused():
    module = TokenLoss(fresh_llama(TINY, VOCAB, seed=0).requires_grad_(False))
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        start_engine(module, OPTIM, Resources(), global_batch_rows=4)


def test_training_does_not_import_torchs_compiler(tmp_path):
    """DeepSpeed's Muon does, at import: 1.4 s of each start of each rank."""
    code = (
        "import os, sys; from pathlib import Path; from toy_models import job;"
        "from longreach.infra.launch import run_local;"
        "run_local('longreach.training.loop:train', job(Path(sys.argv[1])));"
        "assert 'TORCHDYNAMO_DISABLE' not in os.environ;"
        "assert 'deepspeed.runtime.zero.muon.muon_optimizer' in sys.modules, 'then skip_muon_compilation may go';"
        "print('torch._inductor.compile_fx' in sys.modules)"
    )
    tests = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": str(tests)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, check=True)
    assert done.stdout.split()[-1] == b"False"
