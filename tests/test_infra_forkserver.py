"""Processes that are forked from a server which has imported for them, and start like any other."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from longreach.infra import forkserver
from longreach.infra.forkserver import ADDRESS, CONTEXT, fork_server

TELL = """
import os, signal, sys
imported = "wave" in sys.modules
print(sys.argv[1], os.environ["SAID"], os.getcwd(), imported, os.getpid() == os.getpgid(0))
print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])) == [signal.SIGUSR1], end=" ")
print(open("/proc/self/oom_score_adj").read().strip(), flush=True)
print("to stderr", file=sys.stderr)
if sys.argv[1] == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "tell.py"
    path.write_text(TELL)
    return path


def like_a_worker() -> None:
    """In a child, before it starts: what Ray sets for its workers."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGUSR1])
    Path("/proc/self/oom_score_adj").write_text("123")


def start(address: str, script: Path, word: str, python: str = sys.executable, **environment: str) -> list[str]:
    """Start the script as Ray starts a worker, and return the lines that it wrote."""
    context = {"env_vars": {"SAID": "said", **environment}, "py_executable": python, "java_jars": []}
    done = subprocess.run(
        [sys.executable, forkserver.__file__, str(script), word, CONTEXT + json.dumps(context), "--language=PYTHON"],
        cwd=script.parent,
        env={**os.environ, ADDRESS: address, "RAY_JOB_ID": "1"},
        preexec_fn=like_a_worker,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == "to stderr\n"
    return done.stdout.splitlines()


def test_a_fork_has_what_the_server_imported_and_all_else_from_who_asked_for_it(script):
    with fork_server(["wave"]) as address:
        assert start(address, script, "first") == [f"first said {script.parent} True True", "True 123"]
        assert start(address, script, "other", SAID="b")[0] == f"other b {script.parent} True True"


def test_a_fork_that_crashes_leaves_the_server_alone(script):
    with fork_server(["wave"]) as address:
        for word in ("crash", "next"):
            assert " True " in start(address, script, word)[0]


def test_a_runtime_environment_that_wants_more_than_variables_is_left_to_ray(script):
    with fork_server(["wave"]) as address:
        assert start(address, script, "first", python=f"{sys.executable} -B")[0].startswith(
            f"first said {script.parent} False"
        )


def test_variables_that_a_process_reads_only_at_its_start_are_left_to_ray(script):
    with fork_server(["wave"]) as address:
        answer = start(address, script, "first", MALLOC_MMAP_THRESHOLD_="4194304")[0]
    assert answer.startswith(f"first said {script.parent} False")


def test_who_has_other_settings_of_ray_starts_without_the_server_as_ray_reads_them_at_import(script):
    with fork_server(["wave"]) as address:
        assert start(address, script, "first")[0] == f"first said {script.parent} True True"
        assert (
            start(address, script, "train", RAY_TRAIN_X="1", RAY_ADDRESS="a")[0]
            == f"train said {script.parent} True True"
        )
        other = start(address, script, "other", RAY_JOB_ID="2")
    assert other[0].startswith(f"other said {script.parent} False")


def test_without_a_server_a_worker_starts_in_the_ordinary_way(script):
    with fork_server(["no_such_module"]) as address:
        assert start(address, script, "one")[0].startswith(f"one said {script.parent} False")
    assert start(address, script, "two")[0].startswith(f"two said {script.parent} False")


def test_a_ray_tmpdir_that_does_not_exist_yet_is_made_for_its_owner_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "new/ray"))
    with fork_server(["wave"]) as address:
        assert Path(address).is_relative_to(tmp_path / "new/ray")
    assert (tmp_path / "new/ray").stat().st_mode & 0o777 == 0o700


def test_the_server_ends_with_the_process_that_started_it():
    code = "import time; from longreach.infra.forkserver import fork_server\n"
    code += "with fork_server(['wave']):\n    print('up', flush=True); time.sleep(60)"
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"up\n"
    (server,) = psutil.Process(owner.pid).children()
    owner.kill()
    owner.communicate()
    server.wait(timeout=30)


@pytest.mark.slow
def test_rays_workers_are_forks_and_a_killed_one_takes_no_other_along(cluster):
    @cluster.remote(max_retries=0)
    def parent_of_worker(kill: bool = False) -> int:
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getppid()

    servers = [child.pid for child in psutil.Process().children() if "serve" in child.cmdline()]
    assert cluster.get(parent_of_worker.remote()) in servers
    with pytest.raises(cluster.exceptions.WorkerCrashedError):
        cluster.get(parent_of_worker.remote(kill=True))
    assert cluster.get(parent_of_worker.remote()) in servers


@pytest.mark.slow
def test_no_two_of_rays_workers_draw_the_same_ids(cluster):
    """Two trainings once shared a placement group: forks went on with the random numbers of their server."""

    class Worker:
        def draw(self) -> tuple[str, ...]:
            group = cluster.PlacementGroupID.of(cluster.JobID.from_int(1))
            return group.hex(), cluster.UniqueID.from_random().hex(), str(np.random.rand()), str(random.random())

    workers = [cluster.remote(num_cpus=0)(Worker).remote() for _ in range(3)]
    for drawn in zip(*cluster.get([worker.draw.remote() for worker in workers]), strict=True):
        assert len(set(drawn)) == 3


def test_ids_drawn_while_ray_is_imported_are_noticed():
    code = "import ray; from longreach.infra.forkserver import _no_random_ids\nwith _no_random_ids():\n    "
    define = [sys.executable, "-c", code + "ray.remote(type('A', (), {}))"]
    assert subprocess.run(define, capture_output=True, check=False).returncode == 0
    draw = subprocess.run([sys.executable, "-c", code + "ray.UniqueID.from_random()"], capture_output=True, check=False)
    assert b"RuntimeError: a module drew" in draw.stderr
