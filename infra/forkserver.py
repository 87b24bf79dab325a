"""Start Ray's workers in a tenth of a second, as forks of a process that has imported their modules.

torch, transformers, peft, deepspeed and Ray Train take five CPU seconds to import, and a small run
has a dozen workers. So the driver starts a server that imports them once, while Ray itself starts.
Ray sets up its workers with this file instead of its own `setup_worker.py` (infra/cluster.py): the
file asks the server for a fork and ends, and the fork becomes the worker. If no server responds, or
if a runtime environment needs more than environment variables, or those that a process reads only at
its start (READ_AT_START), Ray's own file does the work.

A fork is an ordinary process: if it crashes or is killed, the server and the other workers are not
affected. The server ends with the process that started it, and the workers end with Ray.

    with fork_server(["torch", "ray.train.torch"]) as address:
        os.environ[ADDRESS] = address

This file runs once for each worker, so it imports nothing slow: Ray's own file takes 0.4 s.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ADDRESS = "LONGREACH_FORK_SERVER"
"""The environment variable with the server's address for workers. (Ray cannot pass them our own
arguments.)"""
CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="
"""Arguments that Ray passes to its `setup_worker.py`."""
READ_IN_USE = ("RAY_ADDRESS", "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC")
"""Ray settings that stages and Ray Train give to their processes. Ray reads them at each use, not at
import."""
READ_AT_START = ("MALLOC_MMAP_THRESHOLD_", "THP_MEM_ALLOC_ENABLE")
"""Variables that glibc and torch read only once, so a fork would not notice them."""
STREAMS = 3  # standard input, output and error
OOM_SCORE = Path("/proc/self/oom_score_adj")
"""The file that sets which process Linux kills first when memory is short. Ray sets 1,000 for its
workers, so that drivers survive."""
WAITING = 64  # workers that may connect while the server is still importing


@contextlib.contextmanager
def fork_server(modules: Sequence[str]) -> Iterator[str]:
    """Start a server that imports `modules`, and give the block its address."""
    import subprocess
    import tempfile

    # RAY_TMPDIR is set to a short path if TMPDIR is too long for a socket (infra/cluster.py)
    if chosen := os.environ.get("RAY_TMPDIR"):
        os.makedirs(chosen, mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="longreach-", dir=chosen) as folder:
        address = os.path.join(folder, "fork")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(address)
            listening.listen(WAITING)
            server = subprocess.Popen(
                [sys.executable, "-P", os.path.abspath(__file__), "serve", str(listening.fileno()), *modules],
                # One thread, as Ray sets for its workers. CUDA does not survive a fork, so nothing
                # may look for a GPU here.
                env={"OMP_NUM_THREADS": "1", **os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
                pass_fds=[listening.fileno()],
                stdin=subprocess.PIPE,  # closes when this process ends in any way, which ends the server
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,  # keeps Ctrl-C, which is meant for the driver, away from the server
            )
        try:
            yield address
        finally:
            server.kill()
            server.communicate()


def serve(listening: socket.socket, modules: Sequence[str]) -> None:
    """Import the modules and fork at each request, until standard input is closed.

    Ray reads its settings (RAY_...), which include the job's number, from the environment when it is
    imported. So Ray's modules are imported at the first request, with its settings, and requests
    with other settings get no fork.
    """
    import select

    rays = [module for module in modules if module.partition(".")[0] == "ray"]
    _import([module for module in modules if module not in rays])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps the forks, since nobody waits for them
    settings: dict[str, str] = {}
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listening.accept()
        with connection, contextlib.suppress(ConnectionError):
            request, streams = _receive(connection)
            asked = _settings_of_ray(request["environment"])
            if not settings:
                settings = asked
                os.environ.update(asked)
                with _no_random_ids() if rays else contextlib.nullcontext():
                    _import(rays)
            if asked == settings:
                if not os.fork():
                    listening.close()
                    _become(request, streams)
                connection.sendall(b"forked")
            for stream in streams:
                os.close(stream)


def _import(modules: Sequence[str]) -> None:
    """Import modules by name, one after the other."""
    import importlib

    for module in modules:
        importlib.import_module(module)


@contextlib.contextmanager
def _no_random_ids() -> Iterator[None]:
    """Let the block import Ray's modules without using Ray's generator of random ids.

    If a process uses the generator before it forks, all of its forks get the same ids. Two of Ray
    Train's controllers would then request placement groups under the same id and share them, and the
    first one to end would end the other's ranks too. Ray draws an id for each actor class that a
    module defines. Raises RuntimeError if a module used the generator anyway; the server then ends,
    and workers start in Ray's default way.
    """
    import unittest.mock

    import ray.actor

    own = ray.actor.ActorClassID

    class FromTheSystem:
        from_random = staticmethod(lambda: own(os.urandom(own.size())))

    with unittest.mock.patch.object(ray.actor, "ActorClassID", FromTheSystem):
        yield
    if _drawn_by_a_fork() == _drawn_by_a_fork():
        raise RuntimeError("a module drew from Ray's id generator when it was imported: forks would get the same ids")


def _drawn_by_a_fork() -> bytes:
    """Return the first id that a fork of this process draws."""
    reading, writing = os.pipe()
    if not os.fork():
        try:
            from ray import UniqueID

            os.write(writing, UniqueID.from_random().binary())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        return file.read()


def _settings_of_ray(environment: dict[str, str]) -> dict[str, str]:
    """Return the settings that Ray may read when it is imported. Those of Ray Train and of drivers
    are read at each use and left out."""
    settings = {}
    for name, value in environment.items():
        if name.startswith("RAY_") and name not in READ_IN_USE and not name.startswith("RAY_TRAIN_"):
            settings[name] = value
    return settings


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Read a request that `ask` wrote, and the three streams that came with it."""
    size, streams, _, _ = socket.recv_fds(connection, 8, STREAMS)
    with connection.makefile("rb") as file:
        text = file.read(int.from_bytes(size, "big"))
    if len(streams) < STREAMS or not text.endswith(b"}"):
        raise ConnectionError("the requesting process ended before it had sent its request")
    return json.loads(text), streams


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Turn this fork into the requested process, and exit with that process's exit code."""
    import runpy

    import numpy as np

    code = 1
    try:
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
            os.close(stream)
        os.setpgid(0, 0)  # as in Ray's own workers: signals to the driver's group do not reach them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked_signals"])
        if request["oom_score"]:
            OOM_SCORE.write_text(request["oom_score"])
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        np.random.seed()  # otherwise all forks draw the same numbers; Python's own generator reseeds itself
        sys.argv = request["arguments"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else bool(ended.code)
    except BaseException:  # noqa: BLE001  any error ends this process only, not the server
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def set_up_worker(arguments: list[str]) -> None:
    """Do what Ray's `setup_worker.py` does with these arguments, with a fork if possible."""
    context: dict[str, Any] = {}
    kept = []
    for argument in arguments:
        if argument.startswith(CONTEXT):
            context = json.loads(argument.removeprefix(CONTEXT))
        elif not argument.startswith(LANGUAGE):
            kept.append(argument)
    variables = context.pop("env_vars", {})
    plain = context.pop("py_executable", sys.executable) == sys.executable and not any(context.values())
    plain = plain and all(variables.get(name) == os.environ.get(name) for name in READ_AT_START if name in variables)
    if plain and kept[0].endswith(".py") and f"{LANGUAGE}PYTHON" in arguments:
        environment = dict(os.environ)
        for name, value in variables.items():
            environment[name] = os.path.expandvars(value)
        if ask(os.environ[ADDRESS], kept, environment):
            return
    from importlib.util import find_spec

    ray = find_spec("ray")
    assert ray
    assert ray.origin
    rays_own = os.path.join(os.path.dirname(ray.origin), "_private", "workers", "setup_worker.py")
    os.execv(sys.executable, [sys.executable, rays_own, *arguments])


def ask(address: str, arguments: list[str], environment: dict[str, str]) -> bool:
    """Ask the server to start Python with these arguments. Return whether it did."""
    request = {
        "arguments": arguments,
        "environment": environment,
        "folder": os.getcwd(),
        "blocked_signals": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        "oom_score": OOM_SCORE.read_text() if OOM_SCORE.exists() else "",
    }
    text = json.dumps(request).encode()
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [len(text).to_bytes(8, "big")], range(STREAMS))
        connection.sendall(text)
        return bool(connection.recv(8))
    return False


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])), sys.argv[3:])
    else:
        del sys.path[0]  # this folder: its modules must not hide others of the same name
        set_up_worker(sys.argv[1:])
