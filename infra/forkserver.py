"""Start Ray's workers in a tenth of a second: as forks of one process that has imported what they
use.

torch, transformers, peft, deepspeed and Ray Train take five CPU seconds to import, and a small run
has a dozen workers. So the driver starts a server that imports them once, while Ray itself starts.
Ray sets up its workers by this file instead of its own `setup_worker.py` (infra/cluster.py): it
asks the server for a fork and ends, and the fork becomes the worker. Where no server answers, and
where a runtime environment wants more than variables, Ray's own file goes on.

A fork is a process like any other: if it crashes or is killed, the server and the other workers
live on. The server ends with the process that started it, the workers end with Ray.

    with fork_server(["torch", "ray.train.torch"]) as address:
        os.environ[ADDRESS] = address

This file runs once for each worker, so it imports nothing that takes time: Ray's own takes 0.4 s.
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
"""The environment variable that tells workers the server's address: Ray passes no argument of ours
to them."""
CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="
"""Arguments that Ray means for its `setup_worker.py`."""
READ_IN_USE = ("RAY_ADDRESS", "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC")
"""Settings of Ray that stages and Ray Train give to their processes, and that Ray reads each
time."""
STREAMS = 3  # standard input, output and error
OOM_SCORE = Path("/proc/self/oom_score_adj")
"""Whom Linux kills first when memory is short: Ray gives its workers 1,000, so that drivers live
on."""
WAITING = 64  # workers that may ask while the server still imports


@contextlib.contextmanager
def fork_server(modules: Sequence[str]) -> Iterator[str]:
    """Start a server that imports `modules`, and give the block its address."""
    import subprocess
    import tempfile

    # RAY_TMPDIR: a short one where TMPDIR is too long for the path of a socket (infra/cluster.py)
    with tempfile.TemporaryDirectory(prefix="longreach-", dir=os.environ.get("RAY_TMPDIR")) as folder:
        address = os.path.join(folder, "fork")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(address)
            listening.listen(WAITING)
            server = subprocess.Popen(
                [sys.executable, "-P", os.path.abspath(__file__), "serve", str(listening.fileno()), *modules],
                # One thread, as Ray tells its workers. CUDA does not survive a fork: nothing may
                # look for a GPU here.
                env={"OMP_NUM_THREADS": "1", **os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
                pass_fds=[listening.fileno()],
                stdin=subprocess.PIPE,  # closed when this process ends in whatever way: then the server ends
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is meant for the driver
            )
        try:
            yield address
        finally:
            server.kill()
            server.communicate()


def serve(listening: socket.socket, modules: Sequence[str]) -> None:
    """Import the modules and fork for everybody who asks, until standard input is closed.

    Ray reads its settings (RAY_...) from the environment when it is imported, and among them is the
    job's number: so Ray's modules wait for the first who asks, and those with other settings get no
    fork.
    """
    import select

    rays = [module for module in modules if module.partition(".")[0] == "ray"]
    _import([module for module in modules if module not in rays])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks: the system removes them
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
    """Import modules by their names, one after the other."""
    import importlib

    for module in modules:
        importlib.import_module(module)


@contextlib.contextmanager
def _no_random_ids() -> Iterator[None]:
    """Let the block import modules of Ray without a draw from Ray's generator of random ids.

    Forks of a process that has drawn go on with the same numbers. Then two of Ray Train's
    controllers ask for placement groups under one id, share them, and the first to end takes the
    other's ranks along. Ray draws for each actor class that a module defines. Raises RuntimeError:
    a module drew all the same; then the server ends, and workers start in Ray's own way.
    """
    import unittest.mock

    import ray.actor

    own = ray.actor.ActorClassID

    class FromTheSystem:
        from_random = staticmethod(lambda: own(os.urandom(own.size())))

    with unittest.mock.patch.object(ray.actor, "ActorClassID", FromTheSystem):
        yield
    if _drawn_by_a_fork() == _drawn_by_a_fork():
        raise RuntimeError("a module drew from Ray's generator when it was imported: forks would draw the same ids")


def _drawn_by_a_fork() -> bytes:
    """Return an id as a fork of this process draws it."""
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
    """Return what Ray may read when it is imported; Ray Train and drivers read theirs when they are
    used."""
    settings = {}
    for name, value in environment.items():
        if name.startswith("RAY_") and name not in READ_IN_USE and not name.startswith("RAY_TRAIN_"):
            settings[name] = value
    return settings


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Read a request, which `ask` wrote, and the three streams that came with it."""
    size, streams, _, _ = socket.recv_fds(connection, 8, STREAMS)
    with connection.makefile("rb") as file:
        text = file.read(int.from_bytes(size, "big"))
    if len(streams) < STREAMS or not text.endswith(b"}"):
        raise ConnectionError("the process that asked has ended within its request")
    return json.loads(text), streams


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Turn this fork into the process that was asked for, and end it as that process ends."""
    import runpy

    import numpy as np

    code = 1
    try:
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
            os.close(stream)
        os.setpgid(0, 0)  # as Ray's workers: what is sent to the driver's group is not sent to them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked_signals"])
        if request["oom_score"]:
            OOM_SCORE.write_text(request["oom_score"])
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        np.random.seed()  # else all forks draw the same numbers; Python's own generator sees to it itself
        sys.argv = request["arguments"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else bool(ended.code)
    except BaseException:  # noqa: BLE001  whatever it is, it ends this process and not the server
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def set_up_worker(arguments: list[str]) -> None:
    """Do what Ray's `setup_worker.py` does with these arguments, by a fork if that is possible."""
    context: dict[str, Any] = {}
    kept = []
    for argument in arguments:
        if argument.startswith(CONTEXT):
            context = json.loads(argument.removeprefix(CONTEXT))
        elif not argument.startswith(LANGUAGE):
            kept.append(argument)
    variables = context.pop("env_vars", {})
    plain = context.pop("py_executable", sys.executable) == sys.executable and not any(context.values())
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
    """Have the server start Python with these arguments; False if it does not."""
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
        del sys.path[0]  # this folder, whose modules are not to be taken for others of their names
        set_up_worker(sys.argv[1:])
