"""Two recipes that share an arm, started together, with kill -9 of a driver or a rank: one training, nothing lost.

    python tests/soak_two_runs.py 20          # rounds, about two minutes each; the seed is printed

Each round is a fresh project with two recipes that differ in their name and in one evaluation. Both start in the
same second; in three rounds of four something of one of them is killed at a random moment. Whoever did not finish
is started again. Then both have every stage, the weights are those of a run that nothing disturbed, and no step was
trained again but those since the last checkpoint.
"""

from __future__ import annotations

import copy
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
import yaml
from soak_faults import INTERVAL, outcome, project
from test_quickstart import longreach, processes, run, steps_of

VICTIMS = {"nothing": None, "driver": (), "rank": ("TrainWorker",), "stage task": ("ray::finetune[", "ray::_execute")}


def two_recipes(folder: Path) -> Path:
    """Make a project in which other.yaml wants all that tiny.yaml does, and one evaluation more."""
    project(folder)
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text())
    other = copy.deepcopy(recipe) | {"name": "other"}
    other["evaluate"] = {"perplexity": {"lengths": [32], "last_tokens": 8}}
    (folder / "other.yaml").write_text(yaml.safe_dump(other, sort_keys=False))
    return folder


def start_both(folder: Path, victim: str, draw: random.Random, lasts_s: float) -> str:
    """Start both recipes, kill something of one of them, wait for both; return what happened."""
    drivers = {}
    for name in ("tiny", "other"):
        log = (folder / f"{name}.log").open("w")
        command = [sys.executable, "-m", "longreach.pipelines", "run", f"{name}.yaml"]
        drivers[name] = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    what = "nothing killed"
    if VICTIMS[victim] is not None:
        time.sleep(draw.uniform(0, 0.9 * lasts_s))
        name = draw.choice(list(drivers))
        found = _processes_of(drivers[name], victim)
        if found:
            found[0].send_signal(signal.SIGKILL)
            what = f"{victim} of {name} killed"
        else:
            what = f"no {victim} of {name} at this moment"
    codes = {name: driver.wait() for name, driver in drivers.items()}
    return f"{what}; they ended with {codes}"


def _processes_of(driver: subprocess.Popen, victim: str) -> list[psutil.Process]:
    try:
        tree = psutil.Process(driver.pid)
        return processes(tree, *VICTIMS[victim]) if VICTIMS[victim] else [tree]
    except psutil.NoSuchProcess:  # it was done already
        return []


def main(rounds: int) -> None:
    seed = time.time_ns() % 10**6
    print(f"seed {seed}")
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole = two_recipes(Path(scratch) / "whole")
        begun = time.monotonic()
        run(whole)
        lasts_s = time.monotonic() - begun
        expected = {label: value for label, value in outcome(whole).items() if label != "report"}
        attempts_twice = 0
        for number, victim in zip(range(rounds), itertools.cycle(VICTIMS)):
            folder = two_recipes(Path(scratch) / f"round{number}")
            print(f"round {number}: {start_both(folder, victim, draw, lasts_s)}", flush=True)
            for name in ("tiny", "other"):
                again = longreach(folder, "run", f"{name}.yaml")
                assert again.returncode == 0, again.stdout + again.stderr
            found = outcome(folder)
            assert expected.items() <= found.items(), f"round {number} came to another result, see {folder}"
            trained = [steps for steps in steps_of(folder) if steps]
            attempts_twice += len(trained) > 1
            for before, after in itertools.pairwise(trained):
                assert max(before) - after[0] + 1 <= INTERVAL, f"round {number} trained steps again: {trained}"
            shutil.rmtree(folder)
    print(
        f"{rounds} rounds: always one training (in {attempts_twice} of them continued by a second attempt), the "
        f"weights of an undisturbed run of {lasts_s:.0f} s, nothing lost"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 20)
