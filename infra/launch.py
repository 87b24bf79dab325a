"""Run a function as N ranks through Ray Train: one process per rank, a process group, and restarts.

The function is given by name ("longreach.training.loop:train"), so that only the ranks import it and
torch.

How errors are reported: Ray Train restarts all ranks after an exception in any of them. So an error
that a restart would only repeat (FINAL_ERRORS) is not raised in its rank: `_rank` writes it to
`error.json` and returns, the other ranks' collectives fail and they return too, and `run_ranks`
raises it again in the stage's process. If a rank dies for any other reason, all ranks are restarted
and the function resumes from its own checkpoints. infra/resources.py sets how many restarts are
allowed.

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
from longreach.infra.machine import GIB
from longreach.infra.polling import polling
from longreach.infra.resources import Resources
from longreach.infra.share import Share

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

FINAL_ERRORS: dict[str, type[Exception]] = {
    e.__name__: e for e in (ValueError, FloatingPointError, Superseded, Stopped, OutOfMemory, DiskFull)
}
"""Errors of a rank that end the run without a restart, by their name in `error.json`."""

WAIT_S = 15
"""Seconds after which a message says that the ranks are still waiting for Ray to place them."""
HUNG_S = 180
"""Seconds without a response after which a rank counts as dead (stopped, or stuck in the kernel). Ray
Train's default of 600 is long; with fewer, slow ranks of a busy machine would count as dead."""


RETURNING_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**20), "THP_MEM_ALLOC_ENABLE": "1"}
"""Environment of CPU ranks with activation checkpointing and products in full precision. By default,
glibc keeps most of the memory that is freed. With these, blocks from 4 MiB go back to the system at
once, and torch gets them as huge pages: a third of the peak memory, for a tenth more time. With faster
products it would be half more time (RESULTS.md). A user's own values win."""


def run_ranks(
    function: str, job: dict[str, Any], *, resources: Resources, name: str, storage: str | Path,
    share: Share | None = None, memory_gib: float = 0, note: Callable[[str], None] = print,
    waited: Callable[[float], None] = lambda seconds: None,
) -> dict[str, Any]:  # fmt: skip
    """Call `function(job)` ("module:name") on every rank and return rank 0's result, a dict that
    JSON can hold.

    Ray must be connected. `storage` is a folder or fsspec URL that all ranks can access; Ray Train
    keeps its own records there too. With a share, each rank gets the job with the paths of its own
    node, and the share's inputs have been fetched. `memory_gib`: the approximate memory of all ranks
    together, which Ray reserves for them; Ray does not manage GPU memory. `note` receives a message
    if the ranks have to wait for resources, and `waited` how many seconds they did.

    Raises ValueError if the cluster is too small, else the final error of a rank, or Ray Train's own.
    """
    import ray

    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(HUNG_S))
    check_room(ray.cluster_resources(), resources)
    run_name = f"{name}-{uuid.uuid4().hex[:8]}"  # unique: for a known name Ray Train would restore that run
    results = RankResults.create(str(storage), run_name)
    work = {"function": function, "job": job, "results": results, "resources": resources, "share": share}
    memory = 0
    if not resources.gpus_per_worker:
        memory = reservable_bytes(memory_gib / resources.workers, at_once=resources.workers)
    text = f"its ranks wait for other stages to free {_room(resources, memory)}"
    waiting = Waiting(note, text)
    _fit(_trainer(work, resources, run_name, str(storage), memory), resources.max_failures, waiting)
    waited(waiting.seconds)
    return results.collect()


def _room(resources: Resources, memory_bytes: int) -> str:
    """Return a text of the resources that all ranks together request; `memory_bytes` is per rank."""
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
    """Return Ray Train's description of the run: each rank's work and resources, and where records
    are kept."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    fs, place = fsspec.core.url_to_fs(storage)
    is_disk = "file" in fs.protocol
    filesystem = None if is_disk else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    gpus, failures = resources.gpus_per_worker, FailureConfig(max_failures=resources.max_failures)
    each = {"CPU": resources.cpus_per_worker, "GPU": gpus, "memory": memory_bytes}
    environment = {}
    if resources.activation_checkpointing and resources.matmul_precision == "highest" and not gpus:
        environment = {name: os.environ.get(name, value) for name, value in RETURNING_MEMORY.items()}
    return TorchTrainer(
        _rank, train_loop_config=work, torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=resources.workers, use_gpu=gpus > 0, resources_per_worker=each),
        run_config=RunConfig(
            name=run_name, storage_path=place, storage_filesystem=filesystem, failure_config=failures,
            worker_runtime_env={"env_vars": environment} if environment else None,  # type: ignore[call-arg]
        ),
    )  # fmt: skip


def _fit(trainer: TorchTrainer, max_failures: int, waiting: Waiting) -> None:
    """Run the ranks until they finish, and again if Ray Train gives up because a rank died while it
    was being started. Raises ControllerError if Ray Train failed for another reason, or if this
    happened more than `max_failures` times."""
    import ray
    from ray.train import ControllerError

    groups = AbandonedGroups()
    for failures_left in reversed(range(max_failures + 1)):
        try:
            # Ranks that wait for an abandoned group's resources do so in the first minute.
            with (
                _interrupt_handler_restored(),
                polling(groups.look, every_s=1.0, for_s=60.0, name="abandoned groups"),
                polling(waiting.look, every_s=1.0, name="waiting ranks"),
            ):
                trainer.fit()
            return
        except ControllerError as error:
            failure = error.with_traceback(None)  # its frames keep the controller alive, which keeps its ranks alive
        for _ in range(3 * groups.LOOKS):
            try:
                if not groups.look():
                    break
            except Exception as error:  # noqa: BLE001 (it must not replace the failure of the ranks)
                print(f"cannot look for abandoned placement groups ({error}): trying again", flush=True)
            time.sleep(1)
        if not failures_left or not isinstance(failure.controller_failure, ray.exceptions.RayActorError):
            raise failure


@contextlib.contextmanager
def _interrupt_handler_restored() -> Iterator[None]:
    """Restore the handler of Ctrl-C afterwards. Ray Train leaves its own installed, which swallows
    later interrupts and keeps the controller alive."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)


class Waiting:
    """Reports, once, that the ranks are not placed yet because others use the resources, and
    measures how long they wait."""

    def __init__(self, note: Callable[[str], None], text: str) -> None:
        self.note, self.text = note, text
        self.since_s: float | None = None  # when the ranks were first seen waiting
        self.said = self.placed = False
        self.seconds = 0.0  # how long they waited; 0 if it was too short to be reported

    def look(self) -> None:
        """Report it once this process's placement group has been pending for WAIT_S; then measure
        until it is placed."""
        if self.placed:
            return
        now_s = time.monotonic()
        groups = _own_placement_groups()
        if any(group.state == group.PENDING for group in groups):
            self.since_s = self.since_s or now_s
            if not self.said and now_s - self.since_s >= WAIT_S:
                self.said = True
                self.note(self.text)
        elif any(group.state == group.CREATED for group in groups):
            self.placed = True
        if self.said and self.since_s:
            self.seconds = now_s - self.since_s


class AbandonedGroups:
    """Finds and removes placement groups of this Ray job whose controller is gone, or has created
    another one.

    Ray Train (2.60) leaks two kinds, and their CPUs stay reserved: the group of a rank that dies
    while it is being started, and the group of a controller whose stage task was killed, which may
    start its ranks once more. A group that is merely empty is not abandoned: on a busy machine its
    ranks start many seconds after it. Actors are listed a moment before groups, so a group must be
    empty in LOOKS looks in a row.
    """

    LOOKS = 3

    def __init__(self) -> None:
        self.looks_empty: dict[bytes, int] = {}
        """Placement group -> number of consecutive looks that found it without an actor."""

    def look(self) -> bool:
        """Count the empty groups and remove the abandoned ones. Return whether any group holds
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
            # The group's own record (creator_actor_dead) is set only if Ray knew the group when the actor died.
            creator_died = group.creator_actor_dead or group.creator_actor_id.hex() in dead
            if looks_empty[name] >= self.LOOKS and (creator_died or has_newer):
                print(f"removing placement group {name.hex()}, which was left behind", flush=True)
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(name)))
        self.looks_empty = looks_empty
        return bool(placed)


def _placement_groups(job: str) -> list[Any]:
    """Return a Ray job's placement groups that are not removed, as Ray's internal records: only these
    name the actor that created a group."""
    import ray
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]  # made by protoc

    groups = []
    for record in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(record)
        if group.creator_job_id.hex() == job and group.state != group.REMOVED:
            groups.append(group)
    return groups


def _own_placement_groups() -> list[Any]:
    """Return those of Ray Train's controllers that this process has started, in the same form."""
    import ray
    from ray.core.generated.gcs_pb2 import ActorTableData  # type: ignore[attr-defined]  # made by protoc

    context = ray.get_runtime_context()
    controllers = set()
    accessor = ray._private.state.state._connect_and_get_accessor()
    for record in accessor.get_actor_table(ray.JobID.from_hex(context.get_job_id()), "ALIVE"):
        actor = ActorTableData.FromString(record)
        if actor.owner_address.worker_id.hex() == context.get_worker_id():
            controllers.add(actor.actor_id)
    return [group for group in _placement_groups(context.get_job_id()) if group.creator_actor_id in controllers]


def check_room(cluster: dict[str, float], resources: Resources) -> None:
    """Raise ValueError if the ranks can never be placed. Ray itself would wait forever."""
    for kind, each in (("CPU", resources.cpus_per_worker), ("GPU", resources.gpus_per_worker)):
        needed = each * resources.workers
        if needed > cluster.get(kind, 0):
            raise ValueError(
                f"{resources.workers} ranks x {each} {kind} need {needed} {kind}s, but the cluster has "
                f"{cluster.get(kind, 0):g}: lower resources.workers or {kind.lower()}s_per_worker, or connect to a "
                "larger cluster"
            )


def _function(path: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Import the function that "module:name" names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _rank(work: dict[str, Any]) -> None:
    """Do one rank's work in the process that Ray Train started for it. A final error is written to
    `error.json` instead of raised."""
    import torch.distributed as dist

    resources = work["resources"]
    resources.prepare_torch(resources.cpus_per_worker)  # Ray gives a worker OMP_NUM_THREADS=1 whatever its CPUs
    job, results, share = work["job"], work["results"], work["share"]
    try:
        if share:
            share.bring()
            job = share.here(job)
        result = _function(work["function"])(job)
    except tuple(FINAL_ERRORS.values()) as error:
        kind = next(name for name, final in FINAL_ERRORS.items() if isinstance(error, final))
        results.write("error.json", {"type": kind, "message": str(error), "rank": dist.get_rank()})
        dist.destroy_process_group()  # collectives of other ranks that wait for this one now fail
        return
    except Exception:
        if results.read("error.json"):  # a collective failed because of the line above; the cause is recorded
            return
        raise
    if dist.get_rank() == 0:
        results.write("result.json", result)


@dataclass(frozen=True)
class RankResults:
    """The folder where ranks leave files for the stage, on a file system that all of them can access."""

    storage: str
    folder: str

    @classmethod
    def create(cls, storage: str, run_name: str) -> RankResults:
        """Create a run's folder below `storage`, a folder or fsspec URL."""
        fs, place = fsspec.core.url_to_fs(storage)
        fs.makedirs(f"{place}/{run_name}/result", exist_ok=True)
        return cls(storage, f"{place}/{run_name}/result")

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file atomically, on any file system. (infra/files.py does so on local ones.)"""
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
        """Return rank 0's result, or raise the final error that a rank recorded."""
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
    """Start a process group of this process alone. It is kept for the life of the process, since
    DeepSpeed holds on to the first group that it sees."""
    import torch.distributed as dist

    if dist.is_initialized():
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
