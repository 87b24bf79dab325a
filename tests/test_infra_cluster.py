"""A cluster of our own where the folder for temporary files is too long for the paths of sockets."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from longreach.infra import cluster as our_cluster
from longreach.infra.errors import ClusterNotStarted
from longreach.infra.forkserver import fork_server
from longreach.infra.machine import GIB


@pytest.fixture
def long_folder(tmp_path: Path, monkeypatch) -> Path:
    """As TMPDIR, as batch systems give it: of 120 characters and more."""
    folder = tmp_path / ("job-" + "0123456789" * 12)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)  # it is asked for once in a process
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    return folder


def test_sockets_go_into_a_short_folder_of_our_own_that_is_removed(long_folder: Path):
    with our_cluster._short_temporary_folder():
        folder = Path(os.environ["RAY_TMPDIR"])
        assert os.environ["TMPDIR"] == str(folder), "Ray's dashboard has sockets there"
        assert len(f"{folder}{our_cluster.RAYS_LONGEST_SOCKET}") <= our_cluster.SOCKET_PATH_BYTES
        assert folder.stat().st_mode & 0o777 == 0o700, "nobody else can look into it"
        with fork_server([]) as address:
            assert Path(address).is_relative_to(folder)
    assert not folder.exists()
    assert "RAY_TMPDIR" not in os.environ
    assert os.environ["TMPDIR"] == str(long_folder)


def test_a_short_folder_is_used_as_it_is(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    with our_cluster._short_temporary_folder():
        assert "RAY_TMPDIR" not in os.environ


def test_a_folder_that_the_user_chose_for_ray_is_refused_with_both_numbers(long_folder: Path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(long_folder))
    length = len(str(long_folder))
    with (
        pytest.raises(ValueError, match=rf"has {length} characters, .* room for 39: set RAY_TMPDIR to a shorter path"),
        our_cluster._short_temporary_folder(),
    ):
        pytest.fail("it was refused")


class SlowRay:
    """A Ray that does not start in time, a number of times."""

    __file__ = "/nowhere/ray/__init__.py"

    def __init__(self, timeouts: int, message: str = "The current node timed out during startup.") -> None:
        self.timeouts, self.message, self.calls = timeouts, message, []

    def init(self, *_: object, **__: object) -> None:
        self.calls.append("init")
        if self.calls.count("init") <= self.timeouts:
            raise Exception(self.message)

    def shutdown(self) -> None:
        self.calls.append("shutdown")


def test_a_start_that_a_busy_machine_made_too_slow_is_tried_again(capsys):
    ray = SlowRay(timeouts=2)
    our_cluster._start_or_join(ray, None, 2)
    assert ray.calls == ["init", "shutdown", "init", "shutdown", "init"]
    assert "retrying" in capsys.readouterr().err
    with pytest.raises(ClusterNotStarted, match="did not start within 30 s in 3 tries"):
        our_cluster._start_or_join(SlowRay(timeouts=3), None, 2)
    broken = SlowRay(timeouts=1, message="no room on the disk")
    with pytest.raises(Exception, match="no room"):
        our_cluster._start_or_join(broken, None, 2)
    assert broken.calls == ["init"]


def test_what_a_failed_start_left_running_is_killed_and_nothing_else(tmp_path):
    (tmp_path / "dashboard.py").write_text(
        "import subprocess, sys\nprint(subprocess.Popen(['sleep', '60']).pid, flush=True)\nsys.stdin.read()"
    )
    ray = SlowRay(timeouts=0)
    ray.__file__ = str(tmp_path / "__init__.py")
    a_head = [sys.executable, str(tmp_path / "dashboard.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(a_head, **pipes) as of_an_earlier_cluster, subprocess.Popen(["sleep", "60"]) as not_rays:
        earlier = psutil.Process().children()
        with subprocess.Popen(a_head, **pipes) as half_started:
            its_child = psutil.Process(int(half_started.stdout.readline()))
            our_cluster._kill_half_started(ray, earlier)
            assert not psutil.pid_exists(half_started.pid)
            assert not its_child.is_running()
        assert of_an_earlier_cluster.poll() is None
        assert not_rays.poll() is None
        psutil.Process(int(of_an_earlier_cluster.stdout.readline())).kill()
        of_an_earlier_cluster.kill()
        not_rays.kill()


@pytest.mark.slow
def test_ray_adds_no_more_to_its_folder_than_is_left_for_it(cluster):
    node = cluster._private.worker._global_node
    for socket in (node.plasma_store_socket_name, node.raylet_socket_name):
        added = socket[socket.index("/ray/session_") :]
        assert len(added) <= len(our_cluster.RAYS_LONGEST_SOCKET)


def test_the_current_folder_is_not_uploaded_where_uv_run_has_started_us(tmp_path: Path):
    code = tmp_path / "started.py"
    code.write_text(
        "from longreach.infra import cluster\n"
        "def init(ray, *_):\n"
        "    from ray._private import ray_constants\n"
        "    from ray._private.runtime_env.uv_runtime_env_hook import _get_uv_run_cmdline\n"
        "    print(bool(_get_uv_run_cmdline()), ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV)\n"
        "cluster._init = init\n"
        "with cluster.connected(None):\n    pass\n"
    )
    (tmp_path / "run").write_text(f"{sys.executable} {code}\ntrue\n")  # or bash would become this last command
    command = ["bash", "-c", "exec -a uv bash run"]  # its command line is `uv run`, which is what Ray looks for
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "False"], done.stderr


@pytest.mark.slow
@pytest.mark.drill
def test_a_stage_that_fills_the_memory_is_ended_and_not_tried_for_ever():
    """Memory counts as full from 1% on; without our choice Ray tries such a task again without end."""
    code = """if True:
        import time
        from longreach.infra.cluster import connected
        from longreach.pipelines.run import _reason
        with connected(None, cpus=1) as ray:
            def fill():
                kept = bytearray(300 << 20)
                time.sleep(60)
                return len(kept)
            try:
                ray.get(ray.remote(max_retries=2)(fill).remote(), timeout=120)
            except ray.exceptions.RayError as error:
                print(_reason(error))
    """
    full = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "250"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=os.environ | full,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    reason = done.stdout.strip().splitlines()[-1]
    assert reason.startswith("the machine ran out of memory, so Ray killed the task (largest process: "), done.stderr
    assert re.search(r", id \d+, \d+\.\d+ GB\): stop other processes", reason)


@pytest.mark.parametrize(
    ("nodes_gib", "gib", "at_once", "reserved_gib"),
    [
        ([14], 6, 2, 6),  # both ranks on one node
        ([8, 8], 6, 2, 6),  # a rank on each
        ([14], 8, 2, 7),  # more than there is: as much as there is, and nothing runs beside them
        ([14], 20, 1, 14),
        ([], 1, 1, 0),
        ([14], 0, 1, 0),
    ],
)
def test_memory_is_asked_for_that_some_node_has(monkeypatch, nodes_gib, gib, at_once, reserved_gib):
    nodes = [{"Alive": True, "Resources": {"memory": size * GIB}} for size in nodes_gib]
    dead = {"Alive": False, "Resources": {"memory": 1000 * GIB}}
    monkeypatch.setattr("ray.nodes", lambda: [*nodes, dead])
    assert our_cluster.reservable_bytes(gib, at_once) == reserved_gib * GIB


def test_what_ray_starts_lives_on_when_the_terminal_closes():
    ask = "import signal; print(signal.SIGHUP in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with our_cluster._hangup_blocked():
        child = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert child.stdout == "True\n"
    assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
