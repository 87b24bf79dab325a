"""Functions that ranks run in the tests of infra/launch.py."""

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist


def count_ranks(job: dict) -> dict:
    """Sum the ranks' numbers. The first time, the last rank kills itself or sends itself another `signal`.

    The file `kill_marker` records that, with the rank's PID.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    marker = Path(job["kill_marker"])
    if rank == world - 1 and not marker.exists():
        marker.write_text(str(os.getpid()))
        os.kill(os.getpid(), job.get("signal", signal.SIGKILL))
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    return {
        "rank": rank,
        "world": world,
        "sum": int(total),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "pid": os.getpid(),
    }


def complain_on_one_rank(job: dict) -> dict:
    """Raise an error on rank 1 while rank 0 waits for it in a collective."""
    Path(job["lives"]).joinpath(f"{os.getpid()}").touch()
    if dist.get_rank() == 1:
        raise ValueError("seq_len 30 is not a multiple of 4")
    dist.all_reduce(torch.ones(1))
    return {}


def left_after_freeing(job: dict) -> dict:
    """Return the MiB that stay resident after 200 MiB of tensors were made and freed, twice."""

    def resident_mib() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20

    before = resident_mib()
    for _ in range(2):
        kept = []
        for _ in range(20):
            kept += [torch.ones(2_621_440), torch.ones(10)]  # a small one stays behind each large one
        kept = kept[1::2]
    return {"left": resident_mib() - before, "small": len(kept), "huge": os.environ.get("THP_MEM_ALLOC_ENABLE")}


def reserved(job: dict) -> dict:
    """Return the resources that Ray reserves for each rank of the group."""
    from ray.util import get_current_placement_group

    return {"bundles": get_current_placement_group().bundle_specs}
