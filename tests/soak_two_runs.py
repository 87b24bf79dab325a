"""Start two recipes that share an arm, kill (-9) a driver or a rank, and check that they trained once and lost nothing.

    python tests/soak_two_runs.py --rounds 20              # about two minutes each; the seed is printed
    python tests/soak_two_runs.py --rounds 3 --steps 60    # a short training: under a minute each on an idle machine

Each round is a new project with two recipes that differ in their name and in one evaluation. Both start in the same
second. In three of four rounds, a process of one of them is killed: the driver at a random moment, or a rank or the
stage's task at a random moment after it began. Then both are run again. Both must have every stage, the weights must
equal those of an undisturbed run, and only steps since the last checkpoint may have been repeated.
"""

from __future__ import annotations

import argparse
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
from test_quickstart import longreach, manifests, processes, run, steps_of

VICTIMS = {"nothing": None, "driver": (), "rank": ("TrainWorker",), "stage task": ("ray::finetune[", "ray::_execute")}


def two_recipes(folder: Path, steps: int) -> Path:
    """Create a project in which other.yaml has everything that tiny.yaml has, and one more evaluation."""
    project(folder, steps)
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text())
    other = copy.deepcopy(recipe) | {"name": "other"}
    other["evaluate"] = {"perplexity": {"lengths": [32], "last_tokens": 8}}
    (folder / "other.yaml").write_text(yaml.safe_dump(other, sort_keys=False))
    return folder


def start_both(folder: Path, victim: str, draw: random.Random, lasts_s: float, training_s: float) -> str:
    """Start both recipes, kill a process of one of them, wait for both, and return what happened."""
    drivers = {}
    for name in ("tiny", "other"):
        log = (folder / f"{name}.log").open("w")
        command = [sys.executable, "-m", "longreach.pipelines", "run", f"{name}.yaml"]
        drivers[name] = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    what = "nothing killed"
    if VICTIMS[victim] is not None:
        begun, name = time.monotonic(), draw.choice(list(drivers))
        wait_s = draw.uniform(0, lasts_s if victim == "driver" else training_s)
        what = f"{name} had no {victim}"
        while drivers[name].poll() is None:
            if _processes_of(drivers[name], victim):
                time.sleep(wait_s)
                if found := _processes_of(drivers[name], victim):
                    found[0].send_signal(signal.SIGKILL)
                    what = f"{victim} of {name} killed after {time.monotonic() - begun:.0f} s"
                else:
                    what = f"{victim} of {name} had ended"
                break
            time.sleep(0.1)
    codes = {name: driver.wait() for name, driver in drivers.items()}
    return f"{what}; they ended with {codes}"


def _processes_of(driver: subprocess.Popen, victim: str) -> list[psutil.Process]:
    try:
        tree = psutil.Process(driver.pid)
        return processes(tree, *VICTIMS[victim]) if VICTIMS[victim] else [tree]
    except psutil.NoSuchProcess:  # it has ended already
        return []


def main(rounds: int, steps: int, seed: int) -> None:
    print(f"seed {seed}", flush=True)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole = two_recipes(Path(scratch) / "whole", steps)
        begun = time.monotonic()
        run(whole)
        lasts_s = time.monotonic() - begun
        training_s = manifests(whole)["finetune[full]"]["seconds"]
        print(f"undisturbed: {lasts_s:.0f} s, of which training {training_s:.0f}", flush=True)
        shared = {*outcome(whole)} - {"report", "release[full]"}  # these two depend on each recipe's own evaluations
        expected = {label: value for label, value in outcome(whole).items() if label in shared}
        continued = 0
        for number, victim in zip(range(rounds), itertools.cycle(reversed(VICTIMS))):
            folder = two_recipes(Path(scratch) / f"round{number}", steps)
            print(f"round {number}: {start_both(folder, victim, draw, lasts_s, training_s)}", flush=True)
            for name in ("tiny", "other"):
                again = longreach(folder, "run", f"{name}.yaml")
                logs = [(folder / f"{of}.log").read_text() for of in ("tiny", "other")]
                assert again.returncode == 0, "\n".join([*logs, again.stdout, again.stderr])
            found = outcome(folder)
            assert expected.items() <= found.items(), f"round {number} has a different result: {expected}, {found}"
            trained = [attempt for attempt in steps_of(folder) if attempt]
            continued += len(trained) > 1
            for before, after in itertools.pairwise(trained):
                assert max(before) - after[0] + 1 <= INTERVAL, f"round {number} trained steps again: {trained}"
            shutil.rmtree(folder)
    print(
        f"{rounds} rounds: always one training (in {continued} of them continued by a second attempt), the "
        f"weights of an undisturbed run of {lasts_s:.0f} s, nothing lost"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of the shared training")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    options = parser.parse_args()
    main(options.rounds, options.steps, options.seed)
