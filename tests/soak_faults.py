"""Kill (-9) a rank, a stage task or the driver of the tiny pipeline at random moments, and run the command again.

    python tests/soak_faults.py 9             # rounds, about a minute and a half each; the seed is printed

Each round is a new project. After the kill, the command is run again. Then fingerprints and weights must equal those of
an undisturbed run, and no attempt may repeat more than one checkpoint interval of the attempt before it.
"""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from test_quickstart import RECIPE, make_project, manifests, processes, run, steps_of

INTERVAL = 5
VICTIMS = {"rank": ("TrainWorker",), "stage task": ("ray::finetune[", "ray::_execute"), "driver": ()}


def project(folder: Path, steps: int = 200) -> Path:
    recipe = {key: RECIPE[key] for key in ("name", "base", "corpus", "finetune")}
    recipe["finetune"] = recipe["finetune"] | {"steps": steps, "arms": {"full": {"tune": "all"}}}
    recipe["resources"] = {"workers": 2, "checkpoint_every_steps": INTERVAL}
    return make_project(folder, recipe)


def outcome(folder: Path) -> dict[str, object]:
    """Return the fingerprints by stage, and the digests of the weights."""
    found = manifests(folder)
    weights = {f["path"]: f["xxh3"] for f in found["finetune[full]"]["files"] if f["path"].endswith(".safetensors")}
    return {label: m["fingerprint"] for label, m in found.items()} | weights


def kill(folder: Path, victim: str, after_s: float) -> str:
    """Start the pipeline, and kill the victim after `after_s` or once it exists; return what happened."""
    command = [sys.executable, "-m", "longreach.pipelines", "run", "tiny.yaml"]
    with (folder / "driver.log").open("w") as log:
        driver = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        tree, begun = psutil.Process(driver.pid), time.monotonic()
        time.sleep(after_s)
        while driver.poll() is None:
            found = processes(tree, *VICTIMS[victim]) if VICTIMS[victim] else [tree]
            if found:
                found[0].send_signal(signal.SIGKILL)
                moment = time.monotonic() - begun
                steps = [step for attempt in steps_of(folder) for step in attempt]
                code = driver.wait()
                done = max(steps, default=0)
                return f"{victim} killed after {moment:.1f} s and {done} steps; the run ended with {code}"
            time.sleep(0.1)
        return f"{victim}: the run ended with {driver.returncode} before"


def main(rounds: int) -> None:
    seed = time.time_ns() % 10**6
    print(f"seed {seed}")
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole = project(Path(scratch) / "whole")
        begun = time.monotonic()
        run(whole)
        lasts = time.monotonic() - begun
        expected = outcome(whole)
        for number, victim in zip(range(rounds), itertools.cycle(VICTIMS)):
            folder = project(Path(scratch) / f"round{number}")
            print(kill(folder, victim, draw.uniform(0, 0.9 * lasts)), flush=True)
            run(folder)
            assert outcome(folder) == expected, f"round {number} has a different result, see {folder}"
            for before, after in itertools.pairwise([s for s in steps_of(folder) if s]):
                again = max(before) - after[0] + 1
                assert again <= INTERVAL, f"round {number} trained {again} steps again"
            shutil.rmtree(folder)
    print(f"{rounds} rounds: the same fingerprints and weights as an undisturbed run of {lasts:.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 9)
