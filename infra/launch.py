"""Run a function as N ranks through Ray Train: one process a rank, process group up, dead ranks restarted.

The function is named, not passed ("longreach.training.loop:train"): only the ranks import it, and torch with it.

A rank that dies (kill, out of memory of the host) is restarted with all the others, up to `max_failures` times; the
function resumes from its own checkpoints. An error that a restart would only repeat (FINAL_ERRORS) is written down
instead and raised here, without waiting for restarts.

    run_ranks("longreach.training.loop:train", job, resources=Resources(workers=2), name="lora", storage="/tmp/ranks")
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs

from longreach.infra.errors import DiskFull, OutOfMemory, Stopped, Superseded
from longreach.infra.polling import polling
from longreach.infra.resources import Resources
from longreach.infra.share import Share

FINAL_ERRORS: dict[str, type[Exception]] = {
    e.__name__: e for e in (ValueError, FloatingPointError, Superseded, Stopped, OutOfMemory, DiskFull)
}
"""Raised by a rank, these end the run at once."""


def run_ranks(
    function: str,
    job: dict[str, Any],
    *,
    resources: Resources,
    name: str,
    storage: str | Path,
    share: Share | None = None,
) -> dict[str, Any]:
    """Calls `function(job)` ("module:name") on every rank and returns rank 0's result, a JSON-able dict.

    Ray must be connected. `storage` is a folder or fsspec URL that all ranks see; Ray Train keeps its own records
    there. With a share, each rank gets the job with its own node's paths, and finds the share's inputs fetched.
    ValueError if the cluster is too small; otherwise the ranks' own final error, or Ray's TrainingFailedError.
    """
    import ray
    from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    check_room(ray.cluster_resources(), resources)
    run_name = f"{name}-{uuid.uuid4().hex[:8]}"  # a name seen before would make Ray Train restore that run
    fs, place = fsspec.core.url_to_fs(str(storage))
    box = Box(str(storage), f"{place}/{run_name}/result")
    fs.makedirs(box.folder, exist_ok=True)
    local = "file" in fs.protocol
    trainer = TorchTrainer(
        _rank,
        train_loop_config={
            "function": function,
            "job": job,
            "box": box,
            "threads": resources.cpus_per_worker,
            "share": share,
        },
        torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker={"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker},
        ),
        run_config=RunConfig(
            name=run_name,
            storage_path=place,
            storage_filesystem=None if local else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)),
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
    )
    groups = AbandonedGroups()
    for failures_left in reversed(range(resources.max_failures + 1)):
        try:
            with _interrupt_handler_restored(), polling(groups.look, every_s=1.0, for_s=60.0, name="abandoned groups"):
                trainer.fit()  # ranks that wait for the room of such a group do so in the first minute
            break
        except ControllerError as ended:
            failure = ended.with_traceback(None)  # its frames hold the controller, and the controller its ranks
        for _ in range(3 * groups.LOOKS):
            if not groups.look():
                break
            time.sleep(1)
        if not failures_left or not isinstance(failure.controller_failure, ray.exceptions.RayActorError):
            raise failure
    if error := box.read("error.json"):
        raise FINAL_ERRORS[error["type"]](error["message"])
    result = box.read("result.json")
    assert result is not None, "rank 0 writes it before it ends"
    return result


@contextlib.contextmanager
def _interrupt_handler_restored() -> Iterator[None]:
    """Ray Train leaves its own handler of Ctrl-C behind: it swallows later ones, and keeps the controller alive."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)


class AbandonedGroups:
    """Placement groups of this Ray job in which nobody lives are removed; without it nobody would ever get their CPUs.

    Ray Train (2.60) forgets two: that of a rank that dies in the instant in which it is told to start, after which it
    gives up, whatever max_failures says; and that of a controller whose stage task was killed, which outlives it for
    five seconds and may start its ranks once more in them. The ranks of a run that just begins enter their group only
    moments after it was made, so a group goes when LOOKS looks in a row, a second apart, find nobody in it.
    """

    LOOKS = 3

    def __init__(self) -> None:
        self.seen_empty: dict[str, int] = {}

    def look(self) -> bool:
        """Count those that are empty, and remove those that were so often enough; False if there are none at all."""
        import ray
        from ray.util import remove_placement_group
        from ray.util.placement_group import PlacementGroup
        from ray.util.state import list_actors, list_placement_groups

        context = ray.get_runtime_context()
        asked: dict[str, Any] = {"address": context.gcs_address, "detail": True, "limit": 10_000}
        groups = list_placement_groups(**asked, filters=[("state", "=", "CREATED")])
        own = {group.placement_group_id for group in groups if group.creator_job_id == context.get_job_id()}
        inhabited = {actor.placement_group_id for actor in list_actors(**asked) if actor.state != "DEAD"}
        self.seen_empty = {group: self.seen_empty.get(group, 0) + 1 for group in own - inhabited}
        for group in [group for group, looks in self.seen_empty.items() if looks >= self.LOOKS]:
            print(f"placement group {group} was left behind and is removed", flush=True)
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))
            del self.seen_empty[group]
        return bool(own)


def check_room(cluster: dict[str, float], resources: Resources) -> None:
    """ValueError if the ranks can never be placed: Ray itself would wait for ever."""
    for kind, each in (("CPU", resources.cpus_per_worker), ("GPU", resources.gpus_per_worker)):
        asked, there = each * resources.workers, cluster.get(kind, 0)
        if asked > there:
            raise ValueError(
                f"{resources.workers} ranks x {each} {kind} need {asked} {kind}s, the cluster has {there:g}: "
                f"lower resources.workers or {kind.lower()}s_per_worker, or connect to a larger cluster"
            )


def _rank(config: dict[str, Any]) -> None:
    """What Ray Train runs on each rank."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(config["threads"])  # Ray gives a worker OMP_NUM_THREADS=1 whatever its CPUs
    box, job, share = config["box"], config["job"], config["share"]
    module, _, name = config["function"].partition(":")
    try:
        if share:
            share.bring()
            job = share.here(job)
        result = getattr(importlib.import_module(module), name)(job)
    except tuple(FINAL_ERRORS.values()) as error:
        kind = next(n for n, e in FINAL_ERRORS.items() if isinstance(error, e))
        box.write("error.json", {"type": kind, "message": str(error), "rank": dist.get_rank()})
        dist.destroy_process_group()  # ranks that wait for this one in a collective wake up with an error
        return
    except Exception:
        if box.read("error.json"):  # woken by the line above: the reason is already written down
            return
        raise
    if dist.get_rank() == 0:
        box.write("result.json", result)


@dataclass(frozen=True)
class Box:
    """Where ranks leave what the stage reads: a folder of a file system that all of them see."""

    storage: str
    folder: str

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Whole or not at all."""
        fs = fsspec.core.url_to_fs(self.storage)[0]
        draft = f"{self.folder}/{name}.{uuid.uuid4().hex[:8]}"
        fs.pipe_file(draft, json.dumps(value).encode())
        fs.mv(draft, f"{self.folder}/{name}")

    def read(self, name: str) -> dict[str, Any] | None:
        """What was written, if it was."""
        fs = fsspec.core.url_to_fs(self.storage)[0]
        fs.invalidate_cache()
        try:
            return json.loads(fs.cat_file(f"{self.folder}/{name}"))
        except FileNotFoundError:
            return None


def run_local(function: str, job: dict[str, Any]) -> dict[str, Any]:
    """The same function as one rank in this process, without Ray: for tests and debuggers."""
    import torch.distributed as dist

    if not dist.is_initialized():  # DeepSpeed keeps hold of the first process group, so it stays for the process's life
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        backend = "cpu:gloo,cuda:nccl" if job.get("resources", {}).get("gpus_per_worker") else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(job)
