"""Run ranks without Ray, as plain processes with gloo over a file, for tests that compare them with one rank."""

import importlib
import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

IMPORTED = ["longreach.training.loop", "deepspeed"]
"""Modules that the fork server imports once for the ranks of all tests; importing them takes 6 CPU seconds."""


def run_spawned(function: str, job: dict, *, world: int, folder: Path) -> list:
    """Call `function(job)` ("module:name", a module in tests/) in `world` new processes; return the results by rank."""
    folder.mkdir(exist_ok=True)  # without it the rendezvous waits forever
    mp.set_forkserver_preload(IMPORTED)  # takes effect when the first ranks are started
    mp.start_processes(_rank, (function, job, world, str(folder)), nprocs=world, start_method="forkserver")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


def _rank(rank: int, function: str, job: dict, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    import os

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    module, _, name = function.partition(":")
    result = getattr(importlib.import_module(module), name)(job)
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
