"""Connect to Ray: a cluster of our own on this machine, or one that is already there.

with connected(None) as ray: ...
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import socket
import sys
import tempfile
import unittest.mock
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from longreach.infra import forkserver
from longreach.infra.forkserver import ADDRESS, fork_server
from longreach.infra.versions import GIB, usable_memory

if TYPE_CHECKING:
    import psutil


@contextlib.contextmanager
def connected(
    address: str | None, *, cpus: int | None = None, workers_import: Sequence[str] = ()
) -> Iterator[ModuleType]:
    """Connect to Ray, give the block its module, and in the end shut down every process that was
    started for it. `address`: a cluster's address; None starts one here, whatever a stale
    `current-cluster` file says. `cpus`: CPUs that a cluster of our own offers; all of the machine's
    if None. `workers_import`: modules that a cluster of our own imports once for all its workers
    (infra/forkserver.py). Raises ValueError: no cluster answers at `address`."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # else a training's end is seen 2 s late
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # else one more process at each start
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a task that asks for no GPU sees none
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_task_oom_retries", "0")  # else a stage that fills the memory is tried again for ever
    if address is None and "ray" not in sys.modules:  # Ray does so itself since 2.59; it is read when Ray is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if address is None:  # else Ray uploads the current folder, store and all, where `uv run` has started us
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if address is None:  # those that Ray starts before it needs them lack our settings, and would never be used
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # else it prints that tokens are on
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():  # a caller (a test session) owns the cluster
        yield sys.modules["ray"]
        return
    with contextlib.ExitStack() as stack:
        if address is None:
            stack.enter_context(_short_temporary_folder())
        if address is None and workers_import:
            os.environ[ADDRESS] = stack.enter_context(fork_server(workers_import))
            stack.callback(os.environ.pop, ADDRESS)
        import ray

        if address is None:
            stack.enter_context(_fewer_processes(forks=bool(workers_import)))
        _init(ray, address, cpus)
        stack.callback(ray.shutdown)
        yield ray


START_TRIES = 3
RESERVED_SHARE = 0.9
"""Share of this machine's memory that stages may reserve together: the rest is for Ray, MLflow and
the driver, and what is held is up to a tenth more than what is foreseen."""
SOCKET_PATH_BYTES = 107
"""The longest path of a Unix socket that Linux takes."""
RAYS_LONGEST_SOCKET = "/ray/session_2026-11-28_23-25-36_123456_1234567/sockets/plasma_store"
"""What Ray adds to its folder for temporary files."""


@contextlib.contextmanager
def _short_temporary_folder() -> Iterator[None]:
    """Let Ray keep its sockets in a folder of our own in /tmp where TMPDIR is too long for them.

    Batch systems give such ones. ValueError: the user's RAY_TMPDIR is too long, or /tmp cannot be
    written.
    """
    chosen = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    room = SOCKET_PATH_BYTES - len(RAYS_LONGEST_SOCKET)
    length = len(os.fsencode(chosen))
    if length <= room:
        yield
        return
    advice = f"the temporary folder {chosen} has {length} characters, of which Ray's sockets leave {room}"
    if "RAY_TMPDIR" in os.environ:
        raise ValueError(f"{advice}: set RAY_TMPDIR to a shorter one")
    try:
        folder = tempfile.TemporaryDirectory(prefix="longreach-", dir="/tmp", ignore_cleanup_errors=True)
    except OSError as error:
        raise ValueError(f"{advice}, nor can /tmp be used ({error.strerror}): set RAY_TMPDIR") from error
    # TMPDIR too: Ray's dashboard starts processes through Python's own fork server, which has a socket there.
    before = os.environ.get("TMPDIR")
    with folder:
        os.environ["RAY_TMPDIR"] = os.environ["TMPDIR"] = folder.name
        try:
            yield
        finally:
            del os.environ["RAY_TMPDIR"], os.environ["TMPDIR"]
            if before is not None:
                os.environ["TMPDIR"] = before


def reservable_bytes(gib: float, at_once: int = 1) -> int:
    """Return the memory that Ray is asked to keep for a process that holds `gib` GiB, so that two
    that do not fit together run one after the other.

    What no node has is not asked for, since Ray would wait for it for ever: then it is as much as
    the largest node can give to `at_once` such processes.
    """
    import ray

    wanted = int(gib * GIB)
    rooms = [int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]]
    if wanted and sum(room // wanted for room in rooms) < at_once:
        wanted = max(rooms, default=0) // at_once
    return wanted


def _init(ray: ModuleType, address: str | None, cpus: int | None) -> None:
    # The dashboard stays on although it costs seconds: else Ray Train cannot ask the state API for
    # a dead driver's placement group, which then keeps its CPUs for ever.
    try:
        host, colon, port = (address or "").rpartition(":")
        if colon and port.isdigit() and "://" not in host:  # Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        _start_or_join(ray, address, cpus)
    except OSError as error:  # Ray's ConnectionError too
        if address is None:
            raise
        raise ValueError(f"address {address!r}: no Ray cluster answers there ({error}): is it up?") from error


def _start_or_join(ray: ModuleType, address: str | None, cpus: int | None) -> None:
    """Call `ray.init`, and again if a cluster of our own was too slow: Ray gives up after 30 s,
    come what may."""
    import psutil

    for tries_left in reversed(range(START_TRIES)):
        earlier = psutil.Process().children()
        try:
            ray.init(
                address or "local", num_cpus=None if address else cpus, job_config=_job_config(),
                _memory=None if address else int(RESERVED_SHARE * usable_memory()),
                log_to_driver=False, logging_level=logging.WARNING, configure_logging=True,
            )  # fmt: skip
            return
        except Exception as error:  # Ray has no class of its own for it
            if "timed out during startup" not in str(error) or not tries_left:
                raise
            print("Ray did not start within 30 s, the machine is busy: trying again", file=sys.stderr)
            ray.shutdown()
            _kill_half_started(ray, earlier)


def _kill_half_started(ray: ModuleType, earlier: list[psutil.Process]) -> None:
    """Kill Ray's processes that are not among the `earlier` children of this one.

    A start that failed leaves its head behind (a dozen processes with the dashboard's), which Ray
    stops when this process ends and not before: they would take part in the load that made the
    start fail, all through the run.
    """
    import psutil

    program_folder = str(Path(str(ray.__file__)).parent)
    left = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child not in earlier and any(word.startswith(program_folder) for word in child.cmdline()):
                left += [child, *child.children(recursive=True)]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)


@contextlib.contextmanager
def _fewer_processes(*, forks: bool) -> Iterator[None]:
    """Let Ray start without what nobody uses here: the monitor that would add nodes, and the one
    that prints logs.

    With `forks`, workers are set up by infra/forkserver.py. Ray (2.55 to 2.60) offers none of it to
    callers of `ray.init`; a later Ray that has no such parameters starts in its own way.
    """
    from ray._private import parameter

    wanted: dict[str, Any] = {"include_log_monitor": False, "no_monitor": True}
    if forks:
        wanted["setup_worker_path"] = forkserver.__file__
    known = inspect.signature(parameter.RayParams).parameters
    params = functools.partial(parameter.RayParams, **{name: wanted[name] for name in wanted if name in known})
    with unittest.mock.patch.object(parameter, "RayParams", params):
        yield


def _job_config() -> Any:
    """Return a job's settings that keep the driver's current folder out of its workers' module
    path.

    Ray puts it first there unless the job has a `working_dir`, and a user's `datasets.py` would
    then replace the library. We have no `working_dir` either, since Ray would upload that folder;
    so Ray is told that there is one. That has one effect more: the folder of the driver's script
    stays out of the path as well. Ray (2.60) asks nowhere else; its uploads and agents read the
    runtime_env itself.
    """
    from ray.job_config import JobConfig

    class WithoutCurrentFolder(JobConfig):
        def _runtime_env_has_working_dir(self) -> bool:  # private in Ray 2.55 to 2.60; tests/test_wheel.py guards it
            return True

    return WithoutCurrentFolder()
