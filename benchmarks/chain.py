"""Measure the overhead of a run: from the command to the first optimizer step, and with nothing to do.

    python benchmarks/chain.py            # the quickstart's base and texts, two steps; a few minutes the first time

Before the first step, the command starts, then Ray, a stage task and Ray Train's ranks with their imports, and the
model is loaded. Converting and packing are done in a first run and not counted.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = ["quickstart", "--set", "pretrain=null", "--set", "evaluate={}", "--set", "finetune.steps=2"]
ARM = "finetune.arms={{full: {{tune: all, learning_rate: {rate}}}}}"


def run(folder: Path, rate: float) -> tuple[float, Path | None]:
    """Run one arm with this learning rate; return the seconds, and the spool folder if anything ran."""
    spools = folder / ".longreach/spool"
    before = set(spools.glob("*"))
    started = time.time()
    command = [sys.executable, "-m", "longreach.pipelines", "run", *RECIPE, "--set", ARM.format(rate=rate), "--quiet"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    new = set(spools.glob("*")) - before
    return time.time() - started, new.pop() if new else None


def first_step_s(spool: Path, started: float) -> dict[str, float]:
    """Return the seconds from `started` to the stage task, and to the end of the first optimizer step."""
    marks = {}
    for path in spool.glob("finetune-full@*.jsonl"):
        for line in path.read_text().splitlines():
            event = json.loads(line)
            after = event["time_ms"] / 1000 - started
            if event["event"] == "start":
                marks["stage task runs"] = after
            if event["event"] == "metrics" and "train/loss" in event["values"]:
                marks.setdefault("first step done", after)
    return marks


def main(rounds: int = 3) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(folder, 1e-5)  # converts and packs
        cold = []
        for n in range(rounds):
            started = time.time()
            _, spool = run(folder, 1e-5 * (n + 2))
            assert spool, "a new learning rate has something to run"
            cold.append(first_step_s(spool, started))
        warm = [run(folder, 1e-5)[0] for _ in range(5)]
    for mark in cold[0]:
        print(f"command -> {mark}: median {statistics.median(one[mark] for one in cold):.1f} s of {rounds}")
    print(f"run with nothing to do: median {statistics.median(warm):.2f} s of {len(warm)}")


if __name__ == "__main__":
    main()
