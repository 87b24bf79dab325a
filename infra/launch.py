"""Run a function as N ranks through Ray Train: one process a rank, process group up, dead ranks
restarted.

The function is named, not passed ("longreach.training.loop:train"): only the ranks import it, and
torch with it.

How an error comes back: Ray Train restarts all ranks after any exception of one. So an error that a
restart would only repeat (FINAL_ERRORS) is not raised by its rank: `_rank` writes it down as
`error.json` and returns, the other ranks wake up from their collectives and return too, and
`run_ranks`, on the side of the stage, raises it again. Any other death of a rank restarts all of
them, and the function resumes from its own checkpoints; infra/resources.py counts the restarts.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow.fs

from longreach.infra.cluster import reservable_bytes
from longreach.infra.errors import DiskFull, OutOfMemory, Stopped, Superseded
from longreach.infra.polling import polling
from longreach.infra.resources import Resources
from longreach.infra.share import Share
from longreach.infra.versions import GIB

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

FINAL_ERRORS: dict[str, type[Exception]] = {
    e.__name__: e for e in (ValueError, FloatingPointError, Superseded, Stopped, OutOfMemory, DiskFull)
}
"""Errors of a rank that end the run at once, by the name under which `error.json` carries them."""

WAIT_S = 15
"""Seconds after which ranks that Ray has not placed are said to wait."""
HUNG_S = 180
"""Seconds without an answer after which a rank is taken for dead: stopped, or stuck in the kernel. Ray
Train's own 600 are long, and fewer would take a busy machine's ranks for dead."""


def run_ranks(
    function: str, job: dict[str, Any], *, resources: Resources, name: str, storage: str | Path,
    share: Share | None = None, memory_gib: float = 0, note: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Call `function(job)` ("module:name") on every rank and return rank 0's result, a JSON-able
    dict.

    Ray must be connected. `storage` is a folder or fsspec URL that all ranks see; Ray Train keeps
    its own records there. With a share, each rank gets the job with its own node's paths, and finds
    the share's inputs fetched. `memory_gib`: about what all ranks hold, which Ray keeps for them;
    of a GPU's memory it knows nothing. `note` is told if they have to wait for room. Raises
    ValueError: the cluster is too small. Exception: the ranks' own final error, or Ray Train's.
    """
    import ray

    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(HUNG_S))
    check_room(ray.cluster_resources(), resources)
    run_name = f"{name}-{uuid.uuid4().hex[:8]}"  # a name seen before would make Ray Train restore that run
    results = RankResults.create(str(storage), run_name)
    work = {"function": function, "job": job, "results": results, "resources": resources, "share": share}
    memory = 0
    if not resources.gpus_per_worker:
        memory = reservable_bytes(memory_gib / resources.workers, at_once=resources.workers)
    text = f"its ranks wait for other stages to free {_room(resources, memory)}"
    waiting = Waiting(results, note, text)
    _fit(_trainer(work, resources, run_name, str(storage), memory), resources.max_failures, waiting)
    return results.collect()


def _room(resources: Resources, memory_bytes: int) -> str:
    """Return what all ranks ask Ray for, in words; `memory_bytes` is of each."""
    ranks = resources.workers
    room = [f"{ranks * resources.cpus_per_worker} CPU{'s' * (ranks * resources.cpus_per_worker > 1)}"]
    if resources.gpus_per_worker:
        room.append(f"{ranks * resources.gpus_per_worker} GPU{'s' * (ranks * resources.gpus_per_worker > 1)}")
    if memory_bytes:
        room.append(f"{ranks * memory_bytes / GIB:.1f} GiB")
    return " and ".join(room)


def _trainer(
    work: dict[str, Any], resources: Resources, run_name: str, storage: str, memory_bytes: int
) -> TorchTrainer:
    """Return Ray Train's description of the run: what each rank does, what it may use, and where
    records are kept."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    fs, place = fsspec.core.url_to_fs(storage)
    is_disk = "file" in fs.protocol
    filesystem = None if is_disk else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    gpus, failures = resources.gpus_per_worker, FailureConfig(max_failures=resources.max_failures)
    each = {"CPU": resources.cpus_per_worker, "GPU": gpus, "memory": memory_bytes}
    return TorchTrainer(
        _rank, train_loop_config=work, torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=resources.workers, use_gpu=gpus > 0, resources_per_worker=each),
        run_config=RunConfig(
            name=run_name, storage_path=place, storage_filesystem=filesystem, failure_config=failures
        ),
    )  # fmt: skip


def _fit(trainer: TorchTrainer, max_failures: int, waiting: Waiting) -> None:
    """Run the ranks to their end, again if Ray Train gives up because one died while it was
    started. Raises ControllerError: Ray Train failed in another way, or `max_failures` times more
    in this one."""
    import ray
    from ray.train import ControllerError

    groups = AbandonedGroups()
    for failures_left in reversed(range(max_failures + 1)):
        try:
            # Ranks that wait for the room of an abandoned group do so in the first minute.
            with (
                _interrupt_handler_restored(),
                polling(groups.look, every_s=1.0, for_s=60.0, name="abandoned groups"),
                polling(waiting.look, every_s=1.0, for_s=WAIT_S + 5, name="waiting ranks"),
            ):
                trainer.fit()
            return
        except ControllerError as error:
            failure = error.with_traceback(None)  # its frames hold the controller, and the controller its ranks
        for _ in range(3 * groups.LOOKS):
            if not groups.look():
                break
            time.sleep(1)
        if not failures_left or not isinstance(failure.controller_failure, ray.exceptions.RayActorError):
            raise failure


@contextlib.contextmanager
def _interrupt_handler_restored() -> Iterator[None]:
    """Undo Ray Train's handler of Ctrl-C: it stays behind, swallows later ones and keeps the
    controller alive."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)


class Waiting:
    """Says, once, that ranks are not placed yet because others have the room."""

    def __init__(self, results: RankResults, note: Callable[[str], None], text: str) -> None:
        self.results, self.note, self.text = results, note, text
        self.since_s = time.monotonic()
        self.said = False

    def look(self) -> None:
        """Say it if WAIT_S are over, no rank has begun, and Ray has a group that is not placed."""
        import ray

        if self.said or time.monotonic() - self.since_s < WAIT_S or self.results.read("begun.json") is not None:
            return
        groups = _placement_groups(ray.get_runtime_context().get_job_id())
        if any(group.state == group.PENDING for group in groups):
            self.said = True
            self.note(self.text)


class AbandonedGroups:
    """Finds and removes placement groups of this Ray job whose controller is gone, or has made
    another.

    Ray Train (2.60) leaks two kinds, and their CPUs stay reserved: the group of a rank that dies
    while it is being started, and that of a controller whose stage task was killed, which may start
    its ranks once more. A group that is merely empty is not abandoned: on a busy machine its ranks
    come many seconds after it. Actors are listed a moment before groups, so LOOKS looks in a row
    must find it empty.
    """

    LOOKS = 3

    def __init__(self) -> None:
        self.looks_empty: dict[bytes, int] = {}
        """Placement group -> how many looks in a row have found it without an actor."""

    def look(self) -> bool:
        """Count empty groups and remove the abandoned ones; return whether any group holds
        resources."""
        import ray
        from ray.util import remove_placement_group
        from ray.util.placement_group import PlacementGroup
        from ray.util.state import list_actors

        context = ray.get_runtime_context()
        inhabited, dead = set(), set()
        for actor in list_actors(address=context.gcs_address, detail=True, limit=10_000):
            if actor.state == "DEAD":
                dead.add(actor.actor_id)
            else:
                inhabited.add(actor.placement_group_id)
        groups = _placement_groups(context.get_job_id())
        newest: dict[bytes, int] = {}
        for group in groups:
            asked = group.stats.creation_request_received_ns
            newest[group.creator_actor_id] = max(asked, newest.get(group.creator_actor_id, 0))
        placed = [group for group in groups if group.state == group.CREATED]
        looks_empty = {}
        for group in placed:
            name = group.placement_group_id
            if name.hex() in inhabited:
                continue
            looks_empty[name] = self.looks_empty.get(name, 0) + 1
            has_newer = group.stats.creation_request_received_ns < newest[group.creator_actor_id]
            # The group's own record says so only if Ray knew of the group when the actor died.
            creator_died = group.creator_actor_dead or group.creator_actor_id.hex() in dead
            if looks_empty[name] >= self.LOOKS and (creator_died or has_newer):
                print(f"placement group {name.hex()} was left behind and is removed", flush=True)
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(name)))
        self.looks_empty = looks_empty
        return bool(placed)


def _placement_groups(job: str) -> list[Any]:
    """Return a Ray job's placement groups that are not removed, as Ray's own records: only these
    say who made them."""
    import ray
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]  # made by protoc

    groups = []
    for record in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(record)
        if group.creator_job_id.hex() == job and group.state != group.REMOVED:
            groups.append(group)
    return groups


def check_room(cluster: dict[str, float], resources: Resources) -> None:
    """Raise ValueError if the ranks can never be placed: Ray itself would wait for ever."""
    for kind, each in (("CPU", resources.cpus_per_worker), ("GPU", resources.gpus_per_worker)):
        needed = each * resources.workers
        if needed > cluster.get(kind, 0):
            raise ValueError(
                f"{resources.workers} ranks x {each} {kind} need {needed} {kind}s, the cluster has "
                f"{cluster.get(kind, 0):g}: lower resources.workers or {kind.lower()}s_per_worker, or connect to a "
                "larger cluster"
            )


def _function(path: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Import what "module:name" names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _rank(work: dict[str, Any]) -> None:
    """Do one rank's work, in the process that Ray Train started for it; a final error is written
    down, not raised."""
    import torch.distributed as dist

    resources = work["resources"]
    resources.prepare_torch(resources.cpus_per_worker)  # Ray gives a worker OMP_NUM_THREADS=1 whatever its CPUs
    job, results, share = work["job"], work["results"], work["share"]
    if dist.get_rank() == 0:
        results.write("begun.json", {})
    try:
        if share:
            share.bring()
            job = share.here(job)
        result = _function(work["function"])(job)
    except tuple(FINAL_ERRORS.values()) as error:
        kind = next(name for name, final in FINAL_ERRORS.items() if isinstance(error, final))
        results.write("error.json", {"type": kind, "message": str(error), "rank": dist.get_rank()})
        dist.destroy_process_group()  # ranks that wait for this one in a collective wake up with an error
        return
    except Exception:
        if results.read("error.json"):  # woken by the line above: the reason is already written down
            return
        raise
    if dist.get_rank() == 0:
        results.write("result.json", result)


@dataclass(frozen=True)
class RankResults:
    """Where ranks leave what the stage reads: a folder of a file system that all of them see."""

    storage: str
    folder: str

    @classmethod
    def create(cls, storage: str, run_name: str) -> RankResults:
        """Make the folder of a run below `storage`, a folder or fsspec URL."""
        fs, place = fsspec.core.url_to_fs(storage)
        fs.makedirs(f"{place}/{run_name}/result", exist_ok=True)
        return cls(storage, f"{place}/{run_name}/result")

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file whole or not at all, on any file system; infra/files.py does so on this
        machine's."""
        fs = fsspec.core.url_to_fs(self.storage)[0]
        draft = f"{self.folder}/{name}.{uuid.uuid4().hex[:8]}"
        fs.pipe_file(draft, json.dumps(value).encode())
        fs.mv(draft, f"{self.folder}/{name}")

    def read(self, name: str) -> dict[str, Any] | None:
        """Return a file's content, or None if no rank wrote it."""
        fs = fsspec.core.url_to_fs(self.storage)[0]
        fs.invalidate_cache()
        try:
            return json.loads(fs.cat_file(f"{self.folder}/{name}"))
        except FileNotFoundError:
            return None

    def collect(self) -> dict[str, Any]:
        """Return rank 0's result, or raise the final error that a rank wrote down."""
        if error := self.read("error.json"):
            raise FINAL_ERRORS[error["type"]](error["message"])
        result = self.read("result.json")
        assert result is not None, "rank 0 writes it before it ends"
        return result


def run_local(function: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run the function as one rank in this process, without Ray: for tests and debuggers."""
    be_the_only_rank(gpu=bool(job.get("resources", {}).get("gpus_per_worker")))
    return _function(function)(job)


def be_the_only_rank(*, gpu: bool) -> None:
    """Start a process group of this process alone; DeepSpeed keeps hold of the first one, so it
    stays for its life."""
    import torch.distributed as dist

    if dist.is_initialized():
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
