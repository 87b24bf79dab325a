"""Recipe + resources -> a DeepSpeed engine. The only file that knows DeepSpeed's config keys and private corners.

AdamW is torch's own, handed in as a client optimizer: DeepSpeed's would compile C++ for minutes before the first step.
The loss is already divided by the targets of the whole global batch (training/loss.py), so DeepSpeed may average over
ranks but must not divide by the number of micro-batches: `backward` undoes that.
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
    """DeepSpeed's config dict. ValueError where the global batch does not divide over ranks and micro-batches."""
    world //= resources.sequence_parallel
    rows_at_once = resources.micro_batch_rows * world
    if global_batch_rows % rows_at_once:
        raise ValueError(
            f"a global batch of {global_batch_rows} rows does not divide into {world} ranks x micro_batch_rows "
            f"{resources.micro_batch_rows}: change workers or micro_batch_rows so that their product divides it, "
            f"or global_batch_tokens"
        )
    zero: dict[str, Any] = {"stage": resources.zero_stage}
    disk = {"nvme_path": resources.nvme_path} if resources.offload == "nvme" else {}
    if resources.offload_parameters:
        zero["offload_param"] = {"device": "nvme" if disk else "cpu", **disk}
    if resources.offload != "none":
        zero["offload_optimizer"] = {"device": resources.offload, **disk}
    return {
        "train_micro_batch_size_per_gpu": resources.micro_batch_rows,
        "gradient_accumulation_steps": global_batch_rows // rows_at_once,
        "gradient_clipping": recipe.clip_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # offload with torch's AdamW, not the compiled one
        "bf16": {"enabled": resources.dtype == "bfloat16", "check_grad_overflow": True},
        "steps_per_print": 1 << 30,  # the loop reports
    }


def check_nvme(resources: Resources) -> None:
    """ValueError where weights or optimizer state are to live on a disk and cannot; tried before a model is loaded."""
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
    learning_rate: float,
    rate_scales: Mapping[nn.Parameter, float] = MappingProxyType({}),
) -> Any:
    """The DeepSpeed engine around `module`, training what requires a gradient. The process group must be up.

    rate_scales: what the learning rate of some parameters is multiplied by.
    """
    if not resources.gpus_per_worker:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would take the first GPU that it sees, whatever was asked
    skip_shm_build()
    skip_muon_compilation()
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.init_distributed(dist_backend="nccl" if resources.gpus_per_worker else "gloo", verbose=False)
    world = torch.distributed.get_world_size()
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter requires a gradient: the arm would train nothing")
    scales = [rate_scales.get(p, 1.0) for p in trained]
    groups = [
        {"params": [p for p, s in zip(trained, scales, strict=True) if s == scale], "rate_scale": scale}
        for scale in sorted(set(scales))
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=learning_rate, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay, fused=True
    )
    config = deepspeed_config(recipe, resources, global_batch_rows=global_batch_rows, world=world)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]


def skip_shm_build() -> None:
    """Keeps `init_distributed` from compiling its shared-memory op: 68 s, and a crash where there is no g++ or ninja.

    A private table of DeepSpeed, guarded by a test; gloo does the same work without it.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def skip_muon_compilation() -> None:
    """Lets DeepSpeed import an optimizer that nobody asked for without importing torch's compiler: 1.4 s of each start.

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
    """Accumulates the gradient of an already normalised loss.

    DeepSpeed divides by the number of micro-batches. Its `scale_wrt_gas=False` does not stop that where the loss is
    the module's own output (0.19.8: a hook on the output divides all the same), so we multiply first.
    """
    engine.backward(loss * engine.gradient_accumulation_steps())


def step(engine: Any, learning_rate: float) -> float:
    """End a micro-batch. After a step's last one: update the weights and return the norm before clipping; else NaN.

    Where the norm is not finite, the weights and the optimizer's state stay as they were, on every rank.
    """
    last = engine.is_gradient_accumulation_boundary()
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate * group["rate_scale"]
    if not last:
        engine.step()
        return math.nan
    if engine.zero_optimization_stage() or engine.bfloat16_enabled():
        engine.step()
        return float(engine.get_global_grad_norm())
    # Plain float32 without ZeRO is the one case where DeepSpeed keeps no norm, and steps whatever it is.
    norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    if not norm.isfinite():
        # A skipped step still has to go through engine.step, which counts micro-batches and clears gradients. So the
        # optimizer's own step is hidden for this one call, behind an attribute of the instance, and shown again below.
        engine.optimizer.step = lambda: None
    engine.step()
    engine.optimizer.__dict__.pop("step", None)
    return float(norm)


def whole(parameters: Iterable[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
    """Inside it ZeRO-3's partitioned parameters are whole on every rank; for other parameters it does nothing."""
    parted = [p for p in parameters if hasattr(p, "ds_id")]
    if not parted:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parted, modifier_rank=None)
