"""Connect to Ray: start a cluster on this machine, or join a running one.

with connected(None) as ray: ...
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import signal
import socket
import sys
import tempfile
import unittest.mock
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from longreach.infra import forkserver
from longreach.infra.errors import ClusterNotStarted
from longreach.infra.forkserver import ADDRESS, fork_server
from longreach.infra.machine import GIB, usable_memory

if TYPE_CHECKING:
    import psutil


@contextlib.contextmanager
def connected(
    address: str | None, *, cpus: int | None = None, workers_import: Sequence[str] = ()
) -> Iterator[ModuleType]:
    """Connect to Ray and give the block the `ray` module; afterwards, shut down every process that
    was started.

    `address`: the address of a cluster; None starts one here, whatever a stale `current-cluster`
    file says. `cpus`: CPUs that the started cluster offers, by default all of the machine's.
    `workers_import`: modules that the started cluster imports once for all of its workers
    (infra/forkserver.py). Raises ValueError if no cluster responds at `address`.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # the default sees the end of training 2 s late
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # saves a process at each start
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # hides the GPUs from tasks that request none
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_task_oom_retries", "0")  # otherwise Ray retries a stage that fills the memory forever
    if address is None and "ray" not in sys.modules:  # the default since Ray 2.59; Ray reads it when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if address is None:  # otherwise, under `uv run`, Ray uploads the current folder with the store in it
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if address is None:  # workers that Ray starts in advance lack our settings and would never be used
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # hides a line that says tokens are on
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():  # a caller (a test session) owns the cluster
        yield sys.modules["ray"]
        return
    with contextlib.ExitStack() as stack:
        if address is None:
            stack.enter_context(_short_temporary_folder())
            if "PYTHONSAFEPATH" not in os.environ:  # Ray's dashboard would import a user's `queue.py` as Python's
                os.environ["PYTHONSAFEPATH"] = "1"
                stack.callback(os.environ.pop, "PYTHONSAFEPATH", None)
        if address is None and workers_import:
            os.environ[ADDRESS] = stack.enter_context(fork_server(workers_import))
            stack.callback(os.environ.pop, ADDRESS)
        import ray

        if address is None:
            stack.enter_context(_fewer_processes(forks=bool(workers_import)))
        with _hangup_blocked():
            _init(ray, address, cpus)
        stack.callback(ray.shutdown)
        yield ray


START_TRIES = 3
RESERVED_SHARE = 0.9
"""Fraction of this machine's memory that all stages together may reserve. The rest is for Ray, MLflow
and the driver, and for stages that use up to a tenth more memory than predicted."""
SOCKET_PATH_BYTES = 107
"""The longest path of a Unix socket on Linux."""
RAYS_LONGEST_SOCKET = "/ray/session_2026-11-28_23-25-36_123456_1234567/sockets/plasma_store"
"""The longest path that Ray appends to its temporary folder."""


@contextlib.contextmanager
def _short_temporary_folder() -> Iterator[None]:
    """If TMPDIR is too long for the paths of Ray's sockets, give Ray a temporary folder in /tmp.

    Batch systems set such long paths. Raises ValueError if the user's RAY_TMPDIR is too long, or if
    /tmp cannot be written.
    """
    chosen = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    room = SOCKET_PATH_BYTES - len(RAYS_LONGEST_SOCKET)
    length = len(os.fsencode(chosen))
    if length <= room:
        yield
        return
    advice = f"the temporary folder {chosen} has {length} characters, but Ray's sockets leave room for {room}"
    if "RAY_TMPDIR" in os.environ:
        raise ValueError(f"{advice}: set RAY_TMPDIR to a shorter path")
    try:
        folder = tempfile.TemporaryDirectory(prefix="longreach-", dir="/tmp", ignore_cleanup_errors=True)
    except OSError as error:
        raise ValueError(f"{advice}, and /tmp cannot be used ({error.strerror}): set RAY_TMPDIR") from error
    # TMPDIR is set too: Ray's dashboard uses Python's own fork server, which has its socket there.
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
    """Return the bytes of memory to reserve in Ray for a process that needs `gib` GiB, so that two
    processes that do not fit together run one after the other.

    If the nodes cannot hold `at_once` such processes, Ray would wait forever. Then the reservation is
    1 / `at_once` of the memory of the largest node.
    """
    import ray

    wanted = int(gib * GIB)
    rooms = [int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]]
    if wanted and sum(room // wanted for room in rooms) < at_once:
        wanted = max(rooms, default=0) // at_once
    return wanted


def _init(ray: ModuleType, address: str | None, cpus: int | None) -> None:
    # The dashboard stays on although it costs seconds: without it, Ray Train cannot ask the state API
    # for a dead driver's placement group, which would keep its CPUs reserved forever.
    try:
        host, colon, port = (address or "").rpartition(":")
        if colon and port.isdigit() and "://" not in host:  # Ray itself would retry for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        _start_or_join(ray, address, cpus)
    except OSError as error:  # Ray's ConnectionError too
        if address is None:
            raise
        raise ValueError(f"address {address!r}: no Ray cluster responds there ({error}): is it up?") from error


def _start_or_join(ray: ModuleType, address: str | None, cpus: int | None) -> None:
    """Call `ray.init`, and retry if the cluster was too slow to start: Ray's own limit is a fixed
    30 s."""
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
        except Exception as error:  # Ray has no exception type for this
            if "timed out during startup" not in str(error):
                raise
            if not tries_left:
                message = f"Ray did not start within 30 s in {START_TRIES} tries, as the machine is busy"
                raise ClusterNotStarted(f"{message}: stop other work on it, or try again later") from error
            print("Ray did not start within 30 s, as the machine is busy: retrying", file=sys.stderr)
            ray.shutdown()
            _kill_half_started(ray, earlier)


def _kill_half_started(ray: ModuleType, earlier: list[psutil.Process]) -> None:
    """Kill Ray's processes that are not among the `earlier` children of this one.

    A failed start leaves its head behind (a dozen processes, with the dashboard's), which Ray stops
    only when this process ends. Until then they would add to the load that made the start fail.
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
    """Make Ray start without two processes that are not used here: the autoscaler's monitor and the
    log monitor.

    With `forks`, workers are set up by infra/forkserver.py. In Ray 2.55 to 2.60, `ray.init` has no
    arguments for any of this. A later Ray without these parameters starts in its default way.
    """
    from ray._private import parameter

    wanted: dict[str, Any] = {"include_log_monitor": False, "no_monitor": True}
    if forks:
        wanted["setup_worker_path"] = forkserver.__file__
    known = inspect.signature(parameter.RayParams).parameters
    params = functools.partial(parameter.RayParams, **{name: wanted[name] for name in wanted if name in known})
    with unittest.mock.patch.object(parameter, "RayParams", params):
        yield


@contextlib.contextmanager
def _hangup_blocked() -> Iterator[None]:
    """Block SIGHUP for the processes that are started in the block. Their children inherit this.

    When a terminal closes, Linux sends SIGHUP to the driver and to all that it has started. Only the
    driver must react, because training needs Ray to save its state.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _job_config() -> Any:
    """Return a job configuration that keeps the driver's current folder out of the workers' module
    path.

    Ray puts that folder first unless the job has a `working_dir`, and a user's `datasets.py` would
    then hide the library of that name. A real `working_dir` would be uploaded, so this class only
    tells Ray that there is one. As a side effect, the folder of the driver's script stays out of the
    path as well. Ray (2.60) calls this method nowhere else; its uploads and agents read the
    runtime_env itself.
    """
    from ray.job_config import JobConfig

    class WithoutCurrentFolder(JobConfig):
        def _runtime_env_has_working_dir(self) -> bool:  # private in Ray 2.55 to 2.60; tests/test_wheel.py guards it
            return True

    return WithoutCurrentFolder()
