"""`make cluster`: it gets along with another Ray on the machine, and whatever ends it ends its nodes."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import local_cluster
import pytest
from mlflow_servers import wait_until


def test_a_node_asks_for_no_port_that_another_ray_has(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(local_cluster.subprocess, "Popen", lambda command, **_: started.append(command))
    local_cluster.LocalCluster(tmp_path, {}, "127.0.0.1:1", "", {}).start_node("head", "--head")
    (agent,) = [word for word in started[0] if word.startswith("--dashboard-agent-listen-port=")]
    assert not agent.endswith("=52365")


STANDS_IN = """
import contextlib, signal, subprocess, types
import local_cluster

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what goes on in the background without it

@contextlib.contextmanager
def nodes(*_):
    node = subprocess.Popen(["sleep", "300"], start_new_session=True)
    print("node", node.pid, flush=True)
    try:
        yield types.SimpleNamespace(env={"RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": ""}, address="", dashboard="")
    finally:
        node.kill()
        node.wait()

local_cluster.s3_server = lambda folder: contextlib.nullcontext({})
local_cluster.local_cluster = nodes
local_cluster.main()
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_its_nodes_end_with_it(signum):
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen([sys.executable, "-c", STANDS_IN], env=environment, stdout=subprocess.PIPE, text=True)
    node = int(process.stdout.readline().split()[1])
    try:
        process.stdout.readline()  # of what to export: from here on it waits
        process.send_signal(signum)
        process.wait(timeout=60)
        wait_until(lambda: not Path(f"/proc/{node}").exists())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(node, signal.SIGKILL)
