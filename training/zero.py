"""Create the DeepSpeed engine for a recipe and resources.

All of DeepSpeed's config keys and private APIs are used only here. AdamW is torch's own, passed as
a client optimizer, because DeepSpeed's would first compile C++ for minutes. The loss is already
divided by the targets of the whole global batch (training/loss.py). So DeepSpeed may average over
ranks, but must not divide by the number of micro-batches; `backward` undoes that.
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
    """Return DeepSpeed's config. ValueError if the global batch is not divisible."""
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
        "steps_per_print": 1 << 30,  # never, since the training loop reports
    }


def check_nvme(resources: Resources) -> None:
    """Raise ValueError if weights or optimizer state shall be offloaded to a disk and cannot be."""
    if resources.offload != "nvme":
        return
    assert resources.nvme_path is not None
    if not os.access(resources.nvme_path, os.W_OK):
        raise ValueError(f"resources.nvme_path {resources.nvme_path} is not a folder that this rank can write to")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise ValueError(
            "resources.offload nvme: DeepSpeed's async_io cannot be built here, because libaio's headers are missing: "
            "install them (Debian: libaio-dev), or set resources.offload to cpu"
        )


def start_engine(
    module: nn.Module,
    recipe: OptimRecipe,
    resources: Resources,
    *,
    global_batch_rows: int,
    rate_scales: Mapping[nn.Parameter, float] = MappingProxyType({}),
) -> Any:
    """Return the DeepSpeed engine around `module`, which trains the parameters that require a
    gradient.

    rate_scales: factors of the learning rate for some parameters; `step` sets the rate.
    """
    if not resources.gpus_per_worker:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed takes the first GPU that it sees
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
        # With bfloat16 weights and no ZeRO, DeepSpeed has already made one step with zero gradients.
        # At learning rate 0 no weight decayed, but Adam counted the step, which would shrink the
        # first real step to 0.7 of its size.
        engine.optimizer.state.clear()
    return engine


def skip_shm_build() -> None:
    """Keep `init_distributed` from compiling an op, which takes 68 s and crashes without g++ or
    ninja.

    This changes a private table of DeepSpeed, which a test guards. gloo works without the op.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def skip_muon_compilation() -> None:
    """Import a module that DeepSpeed always imports, without torch's compiler, which saves 1.4 s of
    each start.

    The module decorates a function with torch.compile, which does nothing under this variable.
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
    """Accumulate the gradient of a loss that is already normalized.

    DeepSpeed divides by the number of micro-batches, so we multiply first. It does so even with
    `scale_wrt_gas=False` if the loss is the module's own output (0.19.8: a hook on the output).
    """
    engine.backward(loss * engine.gradient_accumulation_steps())


def step(engine: Any, learning_rate: float) -> float:
    """End a micro-batch; after the last one update the weights and return the gradient norm before
    clipping.

    After the other micro-batches it returns NaN. If the norm is not finite, weights and optimizer
    do not change on any rank.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate * group["rate_scale"]
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return math.nan
    if engine.zero_optimization_stage() or engine.bfloat16_enabled():
        engine.step()
        return float(engine.get_global_grad_norm())
    # Plain float32 without ZeRO is the only case in which DeepSpeed keeps no norm and always makes a
    # step.
    norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    if not norm.isfinite():
        # A skipped step must also call engine.step, which counts micro-batches and clears gradients.
        # So an attribute of the instance hides the optimizer's own step for this one call.
        engine.optimizer.step = lambda: None
    engine.step()
    engine.optimizer.__dict__.pop("step", None)
    return float(norm)


def whole(parameters: Iterable[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
    """Return a context in which ZeRO-3's partitioned parameters are gathered on every rank."""
    parted = [p for p in parameters if hasattr(p, "ds_id")]
    if not parted:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parted, modifier_rank=None)
