"""Estimate the rates of training ranks on this machine in about two seconds, before any training.

As many processes as the ranks would have threads run at the same time, with the matrices, attention
and elementwise operations of the model to train. Only these processes import torch. Each has one
thread, because threads that wait for each other appear slow if other work takes the core of one of
them. A rank with several threads is assumed to be faster by their number.

    probe(Shape.of(config), Resources()).matmul     # FLOP/s of a rank
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

from longreach.infra.machine import usable_cores
from longreach.infra.resources import Resources
from longreach.training.cost import CALIBRATION_TOKENS, PROCESS_GIB, Machine, Shape, rates

PER_THREAD = ("matmul", "attention", "attention_backward", "bytes")  # rates that grow with a rank's threads
SPAN = 1024  # tokens of the attention that is timed
LAYER_FLOPS = 2e10
"""FLOPs of a layer's matrix products in one timed run: a fraction of a second on two cores."""
LEAST_TOKENS, MOST_TOKENS = 64, 512  # limits of the tokens in the timed matrix products on a CPU
MOST_PROCESSES = 8  # concurrent processes; each imports torch


def probe(shape: Shape, resources: Resources) -> Machine | None:
    """Return the rates of the slowest rank, or None if this machine lacks the cores or GPUs.

    Raises:
        RuntimeError: a process failed; the message contains the last line of its error output.
    """
    threads = resources.workers * resources.cpus_per_worker
    if resources.gpus_per_worker:
        threads = 1  # GPUs do not slow each other
        if not shutil.which("nvidia-smi"):  # it comes with the driver, and checking it does not import torch
            return None
    if threads > usable_cores():
        return None
    asked = json.dumps({"shape": asdict(shape), "resources": resources.model_dump(mode="json")})
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "longreach.training.probe", asked]
    ranks = []
    for _ in range(min(threads, MOST_PROCESSES)):
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    found: list[dict[str, Any] | None] = []
    for rank in ranks:
        out, err = rank.communicate()
        if rank.returncode:
            raise RuntimeError(f"timing this machine failed: {(err.strip() or str(rank.returncode)).splitlines()[-1]}")
        found.append(json.loads(out))
    machines = [Machine(**one) for one in found if one]
    if not machines:
        return None
    slowest = min(machines, key=lambda machine: machine.matmul)
    if resources.gpus_per_worker:
        return slowest
    scaled = {name: resources.cpus_per_worker * getattr(slowest, name) for name in PER_THREAD}
    return replace(slowest, **scaled)


def measured(shape: Shape, resources: Resources) -> Machine | None:
    """Return the rates of this process; None if there are fewer GPUs than workers."""
    import torch

    resources.prepare_torch(threads=1)
    dtype = torch.bfloat16 if resources.dtype == "bfloat16" else torch.float32
    if resources.gpus_per_worker:
        if torch.cuda.device_count() < resources.workers:
            return None
        device, tokens = torch.device("cuda"), CALIBRATION_TOKENS["cuda"]
    else:
        per_token = 6 * shape.layer_parameters / shape.layers
        device, tokens = torch.device("cpu"), int(LAYER_FLOPS / per_token)
        tokens = max(LEAST_TOKENS, min(MOST_TOKENS, tokens))
    return rates(shape, tokens=tokens, span=SPAN, process_gib=PROCESS_GIB, device=device, dtype=dtype)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    machine = measured(Shape(**asked["shape"]), Resources.model_validate(asked["resources"]))
    print(json.dumps(machine and asdict(machine)))
