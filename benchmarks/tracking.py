"""Measure what tracking costs a training step: the call itself, and the CPU time of the mirror that uploads metrics.

The goal is less than 1% of a step. The mirror has the lowest priority, so its CPU time is the most it can cost, if no
core is ever idle. CPU time can also be measured on a machine that does other work. The store is the embedded SQLite,
where the mirror also does the database's work. MLflow's own synchronous call is printed for comparison.

    python benchmarks/tracking.py --step-ms 500 --seconds 60
"""

import argparse
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

from longreach.infra.mirror import pending_points, start_mirror, stop_mirror
from longreach.infra.mlflow_store import default_uri
from longreach.infra.tracking import Spool

POINTS = {f"train/metric_{i}": 1.0 / (i + 3) for i in range(10)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--step-ms", type=float, default=500.0)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to measure the mirror")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        calls, curves = open_spool(Path(folder, "calls")), open_spool(Path(folder, "curves"))
        call_ms = milliseconds(lambda step: calls.metrics(POINTS, step), 20_000)
        share = 100 * call_ms / options.step_ms
        print(f"spool, {len(POINTS)} metrics per step   {call_ms:8.4f} ms per step {share:9.4f}%", flush=True)
        start_s, mirror_ms = mirror_cost(curves, default_uri(folder), options.step_ms, options.seconds)
        share = 100 * mirror_ms / (options.step_ms * (os.cpu_count() or 1))
        print(f"mirror, during the steps     {mirror_ms:8.4f} ms per step {share:9.4f}% of all cores")
        print(f"mirror, once (import, new database)   {start_s:.1f} s")
        print(f"MLflow's synchronous call    {milliseconds(synchronous(default_uri(folder)), 50):8.4f} ms per step")


def open_spool(folder: Path) -> Spool:
    run = uuid.uuid4().hex
    return Spool.open(folder / "a.jsonl", run=run, parent=None, experiment="benchmark", name="steps", kind="attempt")


def milliseconds(call: Callable[[int], None], count: int) -> float:
    """Return the median duration of `count` calls."""
    times = []
    for step in range(count):
        started = time.perf_counter()
        call(step)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def mirror_cost(spool: Spool, uri: str, step_ms: float, seconds: float) -> tuple[float, float]:
    """Return the mirror's CPU time: seconds at its start, and milliseconds for each step after it."""
    spool.metrics(POINTS)
    mirror = start_mirror(spool.path.parent, uri)
    process = psutil.Process(mirror.pid)
    while pending_points(spool.path.parent):
        time.sleep(0.5)
    once_s = sum(process.cpu_times()[:2])
    steps = round(seconds * 1000 / step_ms)
    for step in range(steps):
        spool.metrics(POINTS, step + 1)
        time.sleep(step_ms / 1000)
    steady_s = sum(process.cpu_times()[:2]) - once_s
    assert stop_mirror(mirror) == 0
    return once_s, 1000 * steady_s / steps


def synchronous(uri: str) -> Callable[[int], None]:
    """Return a function that logs the same metrics with MLflow's own client."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(uri)
    run = client.create_run("0").info.run_id
    return lambda step: client.log_batch(run, [Metric(name, value, step, step) for name, value in POINTS.items()])


if __name__ == "__main__":
    main()
