"""Recipe + resources -> a DeepSpeed engine. All of DeepSpeed's config keys and private corners are
here.

AdamW is torch's own, handed in as a client optimizer: DeepSpeed's would compile C++ for minutes
first. The loss is already divided by the targets of the whole global batch (training/loss.py), so
DeepSpeed may average over ranks but must not divide by the number of micro-batches: `backward`
undoes that.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from longreach.infra.resources import Resources
from longreach.training.recipe import OptimRecipe


def deepspeed_config(
    recipe: OptimRecipe, resources: Resources, *, global_batch_rows: int, world: int
) -> dict[str, Any]:
    """Return DeepSpeed's config. Raises ValueError: the batch does not divide."""
    accumulation = resources.accumulation(global_batch_rows, world)
    zero: dict[str, Any] = {"stage": resources.zero_stage}
    disk = {"nvme_path": resources.nvme_path} if resources.offload == "nvme" else {}
    if resources.offload_parameters:
        zero["offload_param"] = {"device": "nvme" if disk else "cpu", **disk}
    if resources.offload != "none":
        zero["offload_optimizer"] = {"device": resources.offload, **disk}
    return {
        "train_micro_batch_size_per_gpu": resources.micro_batch_rows,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.clip_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # offload with torch's AdamW, not the compiled one
        "bf16": {"enabled": resources.dtype == "bfloat16", "check_grad_overflow": True},
        "steps_per_print": 1 << 30,  # the loop reports
    }


def check_nvme(resources: Resources) -> None:
    """Raise ValueError where weights or optimizer state are to live on a disk and cannot."""
    if resources.offload != "nvme":
        return
    assert resources.nvme_path is not None
    if not os.access(resources.nvme_path, os.W_OK):
        raise ValueError(f"resources.nvme_path {resources.nvme_path}: no folder that this rank may write to")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise ValueError(
            "resources.offload nvme: DeepSpeed's async_io cannot be built here, libaio's headers are missing (Debian: "
            "libaio-dev); install them, or offload to cpu"
        )


def start_engine(
    module: nn.Module,
    recipe: OptimRecipe,
    resources: Resources,
    *,
    global_batch_rows: int,
    rate_scales: Mapping[nn.Parameter, float] = MappingProxyType({}),
) -> Any:
    """Return the DeepSpeed engine around `module`, which trains what requires a gradient.

    rate_scales: what the learning rate of some parameters is multiplied by; `step` gives the rate.
    """
    if not resources.gpus_per_worker:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would take the first GPU that it sees
    skip_shm_build()
    skip_muon_compilation()
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.init_distributed(dist_backend="nccl" if resources.gpus_per_worker else "gloo", verbose=False)
    world = torch.distributed.get_world_size()
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter requires a gradient: the arm would train nothing")
    by_scale: dict[float, list[nn.Parameter]] = {}
    for p in trained:
        by_scale.setdefault(rate_scales.get(p, 1.0), []).append(p)
    groups = [{"params": by_scale[scale], "rate_scale": scale} for scale in sorted(by_scale)]
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay, fused=True
    )
    config = deepspeed_config(recipe, resources, global_batch_rows=global_batch_rows, world=world)
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
    if not resources.zero_stage:
        # Around bfloat16 weights without ZeRO DeepSpeed has made a step already, with gradients of
        # zero. At rate 0 no weight decayed; but Adam counted it, and would take 0.7 of the first
        # real step.
        engine.optimizer.state.clear()
    return engine


def skip_shm_build() -> None:
    """Keep `init_distributed` from compiling an op: 68 s, and a crash without g++ or ninja.

    A private table of DeepSpeed, guarded by a test; gloo does the same work without it.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def skip_muon_compilation() -> None:
    """Import what DeepSpeed always imports, without torch's compiler: 1.4 s of each start.

    It decorates a function with torch.compile, which under this variable leaves it as it is.
    """
    asked = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if asked is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = asked


def backward(engine: Any, loss: torch.Tensor) -> None:
    """Accumulate the gradient of an already normalised loss.

    DeepSpeed divides by the number of micro-batches, with `scale_wrt_gas=False` as well where the
    loss is the module's own output (0.19.8: a hook on the output), so we multiply first.
    """
    engine.backward(loss * engine.gradient_accumulation_steps())


def step(engine: Any, learning_rate: float) -> float:
    """End a micro-batch; after the last update the weights and return the norm before clipping.

    NaN after the others. Where the norm is not finite, weights and optimizer stay as they were on
    every rank.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate * group["rate_scale"]
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return math.nan
    if engine.zero_optimization_stage() or engine.bfloat16_enabled():
        engine.step()
        return float(engine.get_global_grad_norm())
    # Plain float32 without ZeRO is the one case where DeepSpeed keeps no norm, and steps whatever
    # it is.
    norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    if not norm.isfinite():
        # A skipped step goes through engine.step as well, which counts micro-batches and clears
        # gradients. So the optimizer's own step is hidden for this one call, behind an attribute of
        # the instance.
        engine.optimizer.step = lambda: None
    engine.step()
    engine.optimizer.__dict__.pop("step", None)
    return float(norm)


def whole(parameters: Iterable[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
    """Return a context in which ZeRO-3's partitioned parameters are whole on every rank."""
    parted = [p for p in parameters if hasattr(p, "ds_id")]
    if not parted:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parted, modifier_rank=None)
