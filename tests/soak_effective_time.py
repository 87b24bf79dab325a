"""Measure the effective-time ratio, useful step seconds / wall seconds, while processes are killed every few minutes.

    python tests/soak_effective_time.py                            # 30 minutes, a kill every 3; needs an idle machine
    python tests/soak_effective_time.py --minutes 6 --every 1.5    # a shorter one

The quickstart's LongLoRA arm trains on SmolLM2-135M. A rank, the stage's task and the driver get kill -9 in turn, and
the driver is restarted at once, as systemd or a Kubernetes Job would do. The clock starts with the command (after
converting and packing) and stops when SIGTERM ends the run with a checkpoint, so that every step is kept. A step counts
once, with the seconds of its first time; starts, checkpoints, restarts and repeated steps do not count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from soak_faults import VICTIMS
from test_quickstart import processes

ARM = (
    "{{longlora: {{tune: lora+embed+norm, embedding_learning_rate: 1e-4, learning_rate: {rate}, "
    "attention: {{pattern: shifted_sparse, group_tokens: 256, sink_tokens: 4}}}}}}"
)


def command(rate: float, steps: int, interval: int) -> list[str]:
    sets = [f"finetune.arms={ARM.format(rate=rate)}", f"finetune.steps={steps}", "pretrain=null", "evaluate={}"]
    sets += ["baselines={}", f"resources.checkpoint_every_steps={interval}"]
    return [
        sys.executable,
        "-m",
        "longreach.pipelines",
        "run",
        "quickstart",
        *itertools.chain(*(("--set", s) for s in sets)),
    ]


def steps_told(folder: Path) -> dict[int, tuple[float, float]]:
    """Return the first time of each step as (unix time of its end, seconds)."""
    found: dict[int, tuple[float, float]] = {}
    for path in (folder / ".longreach/spool").rglob("finetune-longlora@*.jsonl"):
        for line in path.read_text().splitlines():
            event = json.loads(line) if line.endswith("}") else {"event": "half written"}
            if event["event"] == "metrics" and "train/seconds" in event["values"]:
                mark = (event["time_ms"] / 1000, event["values"]["train/seconds"])
                found[event["step"]] = min(mark, found.get(event["step"], mark))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=3, help="minutes between kills")
    parser.add_argument("--interval", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--folder", type=Path, default=None, help="folder to use and keep; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "driver.log").open("w") as log:

            def start(rate: float, steps: int) -> subprocess.Popen[bytes]:
                return subprocess.Popen(command(rate, steps, options.interval), cwd=folder, stdout=log, stderr=log)

            assert start(1e-3, 1).wait() == 0, f"the preparation failed: {folder}/driver.log"
            before = set(steps_told(folder))
            assert before == {1}
            for path in (folder / ".longreach/spool").rglob("finetune-longlora@*.jsonl"):
                path.rename(path.with_suffix(".prepared"))
            begun = time.time()
            driver = start(2e-3, 100_000)
            kills: list[tuple[float, str, int]] = []
            victims = itertools.cycle(VICTIMS)
            while (due := begun + 60 * options.every * (len(kills) + 1)) < begun + 60 * options.minutes - 1:
                while time.time() < due:
                    assert driver.poll() is None, f"the run ended with {driver.returncode}: {folder}/driver.log"
                    time.sleep(0.2)
                victim, tree = next(victims), psutil.Process(driver.pid)
                names = VICTIMS[victim]
                (processes(tree, *names)[0] if names else tree).send_signal(signal.SIGKILL)
                kills.append((time.time(), victim, max(steps_told(folder), default=0)))
                if victim == "driver":
                    driver.wait()
                    driver = start(2e-3, 100_000)
            time.sleep(max(0.0, begun + 60 * options.minutes - time.time()))
            driver.send_signal(signal.SIGTERM)
            code = driver.wait(timeout=120)
            wall = time.time() - begun
        told = steps_told(folder)
        assert code == 143, f"the run ended with {code}: {folder}/driver.log"
        assert sorted(told) == list(range(1, len(told) + 1)), "a step was never trained"
        useful = sum(seconds for _, seconds in told.values())
        first = min(end - seconds for end, seconds in told.values()) - begun
        print(f"{len(told)} steps of {useful / len(told):.2f} s in {wall:.0f} s, {len(kills)} kills")
        print(f"effective-time ratio {useful / wall:.3f}; {first:.1f} s from the command to the first step's start")
        for moment, victim, reached in kills:
            end, seconds = told[reached + 1] if reached + 1 in told else (float("nan"), 0.0)
            lost = f"the next new step began {end - seconds - moment:.1f} s later"
            print(f"{victim:10} killed at {moment - begun:6.0f} s after step {reached}: {lost}")


if __name__ == "__main__":
    main()
