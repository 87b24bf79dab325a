"""What a stage costs the runner does not grow with their number: time, open files, what travels, what is read twice."""

import io
import os
import pickle
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from toy_stages import ToyRecipe, calls, toy

from longreach.infra.artifact import Store
from longreach.infra.tracking import Spool
from longreach.pipelines import plan, run
from longreach.pipelines.display import Display
from longreach.pipelines.reader import load
from longreach.pipelines.stage import Stage
from longreach.pipelines.stages import STAGES

COUNT = 300
WALL_MS, CPU_MS, FILES = 300, 40, 100
"""A stage takes 18 ms and 4 of the driver's CPU on two idle cores (benchmarks/runner.py); tests share theirs. Ray's
own 35 files are among those that a run opens."""


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setitem(STAGES, "toy", toy)


def chains(log: Path, text: str, count: int = COUNT) -> list[Stage]:
    """Chains of three stages."""
    stages: list[Stage] = []
    for n in range(count):
        inputs = {"before": stages[-1]} if n % 3 else {}
        stages.append(Stage("toy", f"toy[{n},x]", ToyRecipe(text=f"{text}{n}", log=str(log)), inputs))
    return stages


def most_files(stop: threading.Event, found: list[int]) -> None:
    while not stop.wait(0.02):
        found.append(len(os.listdir("/proc/self/fd")))


def test_hundreds_of_stages_cost_little_each_and_no_open_files(cluster, tmp_path, monkeypatch):
    log = tmp_path / "log"
    log.mkdir()
    monkeypatch.setattr(run, "build", lambda recipe, **options: chains(log, "first"))
    places = [f"store.root={tmp_path}/root", f"store.workdir={tmp_path}/work", "tracking.enabled=false"]
    loaded, stop, files = load("quickstart", places), threading.Event(), [len(os.listdir("/proc/self/fd"))]
    watch = threading.Thread(target=most_files, args=(stop, files))
    watch.start()
    cpu = time.process_time()
    with Display(console=Console(file=io.StringIO())) as display:
        outcome = run.run(loaded, display=display)
    cpu = time.process_time() - cpu
    stop.set()
    watch.join()
    assert (outcome.failed, len(outcome.ran), calls(log, "toy*")) == ({}, COUNT, COUNT)
    assert outcome.seconds / COUNT * 1000 < WALL_MS
    assert cpu / COUNT * 1000 < CPU_MS
    assert max(files) - files[0] < FILES

    read = Counter()
    whole = Store.manifests
    monkeypatch.setattr(Store, "manifests", lambda self, name=None: read.update([name]) or whole(self, name))
    monkeypatch.setattr(plan, "build", lambda recipe, **options: chains(log, "second"))
    rows = plan.plan(loaded)
    assert {row.state for row in rows} == {"stale"}
    assert rows[1].why == "recipe.text: first1 -> second1; its input toy[0,x] changes"
    assert read["toy"] == 1, "what there is is read once, not for each stage"


def test_a_stage_travels_without_those_before_it(tmp_path):
    chain = [Stage("toy", "0", ToyRecipe())]
    for n in range(1, 3000):
        chain.append(Stage("toy", str(n), ToyRecipe(), {"before": chain[-1]}, after=(chain[-1],)))
        assert chain[-1].fingerprint  # in the order of the graph, as plan and run do: no recursion
    sent = pickle.dumps(chain[-1])
    assert len(sent) < 2000
    arrived = pickle.loads(sent)
    assert (arrived.fingerprint, arrived.identity) == (chain[-1].fingerprint, chain[-1].identity)
    (before,) = arrived.inputs.values()
    assert (before.name, before.fingerprint) == ("toy", chain[-2].fingerprint)


def test_an_attempt_that_ended_is_not_read_again(tmp_path, monkeypatch):
    stages = [Stage("toy", name, ToyRecipe()) for name in ("dead", "alive")]
    for name in ("dead", "alive"):
        path = tmp_path / f"{name}@0001-x.jsonl"
        spool = Spool.open(path, run="0" * 32, parent=None, experiment="e", name=name, kind="attempt")
        if name == "dead":
            spool.end("FINISHED")
    seen, told = Counter(), []
    whole = run.read_events
    monkeypatch.setattr(run, "read_events", lambda path, offset: seen.update([path.name]) or whole(path, offset))
    display = SimpleNamespace(event=lambda label, event: told.append((label, event["event"])))
    with run._shown_events(SimpleNamespace(spool_folder=tmp_path, stages=stages, display=display)):
        deadline = time.monotonic() + 30
        while seen["alive@0001-x.jsonl"] < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert seen["alive@0001-x.jsonl"] >= 3
    assert seen["dead@0001-x.jsonl"] == 1
    assert sorted(told) == [("alive", "start"), ("dead", "end"), ("dead", "start")]
