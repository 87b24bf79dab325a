"""What training ranks would do in a second on this machine, from about two seconds of work: for
forecasts where nothing has trained yet.

As many processes as the ranks would have threads work at once, on the matrices, attention and
elementwise operations of the model that is to be trained. They alone import torch. They have one
thread each, since threads that wait for each other seem to be slow where other work keeps one of
them from its core; a rank of several is taken to be as much faster.

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

from longreach.infra.resources import Resources
from longreach.infra.versions import usable_cores
from longreach.training.cost import CALIBRATION_TOKENS, PROCESS_GIB, Machine, Shape, rates

PER_THREAD = ("matmul", "attention", "attention_backward", "bytes")  # rates that grow with a rank's threads
SPAN = 1024  # tokens of the attention that is timed
LAYER_FLOPS = 2e10
"""FLOPs of a layer's products that are timed at once: a fraction of a second on two cores."""
LEAST_TOKENS, MOST_TOKENS = 64, 512  # tokens whose products are timed, on a CPU
MOST_PROCESSES = 8  # that work at once; each imports torch


def probe(shape: Shape, resources: Resources) -> Machine | None:
    """Return the speed of the slowest of such ranks; None if this machine has no room for them.

    Raises:
        RuntimeError: the work failed, with the last line that it said.
    """
    threads = resources.workers * resources.cpus_per_worker
    if resources.gpus_per_worker:
        threads = 1  # GPUs do not slow each other
        if not shutil.which("nvidia-smi"):  # comes with the driver: no need to import torch and ask it
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
    """Return what this process does in a second; None if there are not as many GPUs as asked for."""
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
