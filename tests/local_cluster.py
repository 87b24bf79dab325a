"""A Ray cluster of nodes on this machine that share no folder, and an S3 server.

The driver runs on a head without CPUs. Each worker has one CPU, so that two ranks are on two nodes.

    make cluster        # prints what to export, and runs until Ctrl-C
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RAY = str(Path(sys.executable).with_name("ray"))
PATIENCE_S = 120


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@dataclass
class LocalCluster:
    """The cluster's processes and the environment variables that they need."""

    folder: Path
    env: dict[str, str]
    address: str
    dashboard: str
    nodes: dict[str, subprocess.Popen]

    def start_node(self, name: str, *arguments: str) -> None:
        """Start a Ray node whose LONGREACH_WORKDIR is a folder of its own."""
        env = self.env | {"LONGREACH_WORKDIR": str(self.folder / name)}
        command = [
            RAY,
            "start",
            "--block",
            "--node-ip-address=127.0.0.1",
            "--object-store-memory=200000000",
            f"--dashboard-agent-listen-port={free_port()}",  # any other Ray here uses the default, 52365
            *arguments,
        ]
        log = (self.folder / f"{name}.log").open("ab")
        self.nodes[name] = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)

    def start_worker(self, number: int) -> None:
        """Start a node with one CPU and its own IP address, by which Ray Train counts the ranks of a node."""
        own = f"--node-ip-address=127.0.0.{number + 2}"
        self.start_node(f"worker{number}", f"--address={self.address}", "--num-cpus=1", own)

    def kill_node(self, name: str) -> None:
        """Kill all processes of a node at once, as when a machine fails."""
        process = self.nodes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def wait_for(self, cpus: float) -> None:
        """Wait until the cluster has that many CPUs."""
        ask = "import ray; ray.init('auto', log_to_driver=False); print(ray.cluster_resources().get('CPU', 0))"
        deadline = time.monotonic() + PATIENCE_S
        while True:
            env = self.env | {"RAY_ADDRESS": self.address}
            done = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, check=False)
            if done.stdout.strip() and float(done.stdout.split()[-1]) >= cpus:
                return
            assert time.monotonic() < deadline, f"the cluster did not start: {done.stderr[-500:]}"
            time.sleep(1)


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Run moto in its own process with a bucket `longreach`; yields the environment variables for its clients."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    log = (folder / "s3.log").open("ab")
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    env = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    env |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_S3_ADDRESSING_STYLE": "path"}
    try:
        deadline = time.monotonic() + PATIENCE_S
        make = "import s3fs; s3fs.S3FileSystem().mkdir('longreach')"
        while subprocess.run([sys.executable, "-c", make], env=os.environ | env, capture_output=True).returncode:
            assert time.monotonic() < deadline, "the S3 server did not start"
            time.sleep(0.5)
        yield env
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def local_cluster(folder: Path, workers: int = 2, extra: dict[str, str] | None = None) -> Iterator[LocalCluster]:
    """Run a head and workers with token authentication; `extra` is added to the environment of all of them."""
    port, dashboard = free_port(), free_port()
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    env["PATH"] = f"{Path(RAY).parent}{os.pathsep}{env['PATH']}"  # so that a job's `python` is this one
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", **(extra or {})}
    temp = tempfile.mkdtemp(prefix="lr")  # the paths of sockets must be short
    cluster = LocalCluster(folder, env, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", {})
    try:
        cluster.start_node(
            "head", "--head", f"--port={port}", "--num-cpus=0", f"--temp-dir={temp}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
        )  # fmt: skip
        cluster.wait_for(0)
        for number in range(workers):  # one after the other: two that start together may time out
            cluster.start_worker(number)
            cluster.wait_for(number + 1)
        yield cluster
    finally:
        for name in list(cluster.nodes):
            cluster.kill_node(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    for signum in (signal.SIGTERM, signal.SIGHUP):  # otherwise they end only this process, and its nodes remain
        signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))
    folder = Path(tempfile.mkdtemp(prefix="longreach-cluster-"))
    with s3_server(folder) as s3, local_cluster(folder, options.workers, s3) as cluster:
        for name, value in (s3 | {k: cluster.env[k] for k in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}).items():
            print(f"export {name}={value}")
        store = "--set store.root=s3://longreach/mine"
        print(f"# longreach run RECIPE --address {cluster.address} {store}")
        print(f"# longreach submit RECIPE --address {cluster.dashboard} {store} --follow", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
