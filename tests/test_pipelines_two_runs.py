"""Two runs that need the same artifact at once: one makes it, the other waits for it, and takes over if it dies."""

import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from toy_stages import ToyRecipe, calls, toy

from longreach.infra.artifact import Store
from longreach.infra.lease import Lease
from longreach.infra.resources import Resources
from longreach.infra.tracking import Spool, read_events
from longreach.pipelines import run, signals, worker
from longreach.pipelines.plan import open_store
from longreach.pipelines.reader import load
from longreach.pipelines.stage import Stage
from longreach.pipelines.stages import STAGES
from longreach.pipelines.worker import Task, execute
from longreach.training.convert import source_digest as model_digest


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setitem(STAGES, "toy", toy)
    monkeypatch.setattr(run, "LOOK_AGAIN_S", 0.1)
    monkeypatch.setattr("longreach.infra.cluster.reservable_bytes", lambda gib, at_once=1: 0)  # no Ray to ask
    monkeypatch.setattr(
        worker, "Lease", lambda store, name, holder, place: Lease(store, name, holder, beat_s=0.1, place=place)
    )


def task(folder: Path, stage: Stage, run_id: str = "1" * 32) -> Task:
    return Task(
        stage=stage,
        resources=Resources(),
        root=str(folder / "root"),
        scratch=str(folder / "scratch"),
        spool_folder=str(folder / run_id),
        run=run_id,
        experiment="e",
        command="c",
        version=str(worker.known_versions()["longreach"]),
    )


def one_stage(folder: Path, **choices) -> Stage:
    (folder / "log").mkdir(exist_ok=True)
    return Stage("toy", "toy[a]", ToyRecipe(text="made once", log=str(folder / "log"), **choices))


def test_a_stage_that_another_run_makes_is_left_to_it_and_its_result_taken(tmp_path: Path):
    stage = one_stage(tmp_path, seconds=2.0)
    maker = threading.Thread(target=execute, args=(task(tmp_path, stage),))
    maker.start()
    while not calls(tmp_path / "log", "toy*"):
        time.sleep(0.02)
    other = execute(task(tmp_path, stage, "2" * 32))
    assert "process" in other.made_by, "it says whose it is"
    attempts = tmp_path / "root/toy" / stage.fingerprint / "attempts"
    assert len(list(attempts.iterdir())) == 1, "nobody was told to stop"
    maker.join()
    assert execute(task(tmp_path, stage, "2" * 32)).made_by == ""
    assert calls(tmp_path / "log", "toy*") == 1


def test_the_seconds_for_which_a_stage_waited_for_others_are_not_its_own(tmp_path: Path):
    begun = time.monotonic()
    done = execute(task(tmp_path, one_stage(tmp_path, seconds=0.5, waits=0.45)))
    assert done.waited_s == 0.45
    assert done.seconds < time.monotonic() - begun - 0.44
    again = execute(task(tmp_path, one_stage(tmp_path, seconds=0.5, waits=0.45)))
    assert again.seconds == done.seconds, "what the next plan says that it takes"
    (spool,) = (tmp_path / ("1" * 32)).glob("*@*.jsonl")
    costs = {}
    for event in read_events(spool)[0]:
        if event["event"] == "metrics":
            costs |= event["values"]
    assert costs["cost/stage_s"] == done.seconds
    assert costs["cost/waited_s"] == 0.45


def test_an_error_of_a_stage_keeps_none_of_its_memory(tmp_path: Path, monkeypatch):
    held = []

    def fails(*_) -> None:
        tensor = np.ones(10)
        held.append(weakref.ref(tensor))
        raise ValueError("out of luck")

    monkeypatch.setattr(worker, "_call", fails)
    with pytest.raises(ValueError, match="out of luck") as caught:
        execute(task(tmp_path, one_stage(tmp_path)))
    assert held[0]() is None, caught


def test_a_stage_whose_maker_died_is_taken_over(tmp_path: Path):
    stage = one_stage(tmp_path)
    place = f"toy/{stage.fingerprint}/lease"
    died = Lease(Store(str(tmp_path / "root")), "toy[a]", "died:1", beat_s=0.1, place=place).acquire(wait=False)
    died._stop.set()
    assert execute(task(tmp_path, stage)).made_by == ""
    assert calls(tmp_path / "log", "toy*") == 1


def test_a_stage_that_fails_leaves_its_lease_free(tmp_path: Path):
    stage = one_stage(tmp_path, fail="not today")
    for _ in range(2):
        with pytest.raises(ValueError, match="not today"):
            execute(task(tmp_path, stage))


def times(spool: Path) -> dict[str, int]:
    """Return when a spool's run began and ended, in milliseconds."""
    return {event["event"]: event["time_ms"] for event in read_events(spool)[0]}


@pytest.mark.parametrize("fail", ["", "not today"])
def test_a_stages_run_lasts_as_long_as_its_work_and_not_as_long_as_it_was_queued(tmp_path: Path, fail: str):
    (tmp_path / "log").mkdir()
    places = [f"store.root={tmp_path}/root", f"store.workdir={tmp_path}/work"]
    stages = []
    for name in ("toy[a]", "toy[b]"):
        stages.append(Stage("toy", name, ToyRecipe(text=name, log=str(tmp_path / "log"), seconds=0.5, fail=fail)))
    loaded, stopping = load("quickstart", places), signals.Stopping()
    silent = SimpleNamespace(stage=lambda *_: None, note=lambda _: None)
    lease = SimpleNamespace(lost=threading.Event())
    this = run._Run(loaded, open_store(loaded), stages, {}, silent, lease, stopping, run.RunOutcome(), None)
    with ThreadPoolExecutor(max_workers=1) as pool:  # one after the other, as on a machine with one CPU

        def do(sent: Task) -> object:
            try:
                return execute(sent)
            except ValueError as error:
                raise RuntimeError(str(error)) from None

        remote = SimpleNamespace(
            options=lambda **_: SimpleNamespace(
                remote=lambda sent: SimpleNamespace(future=lambda: pool.submit(do, sent))
            )
        )
        run._Driver(SimpleNamespace(exceptions=SimpleNamespace(RayError=RuntimeError)), this, remote).follow()
    a, b = (times(this.spool_folder / f"toy-{name}.jsonl") for name in "ab")
    assert b["start"] >= a["start"] + 500, "it was queued meanwhile"
    (attempt,) = this.spool_folder.glob("toy-b@*.jsonl")
    assert 0 <= times(attempt)["start"] - b["start"] < 400, "it is all but its attempt's"
    assert read_events(attempt)[0][0]["parent"] == read_events(this.spool_folder / "toy-b.jsonl")[0][0]["run"]


def test_a_driver_waits_for_the_other_run_says_so_once_and_counts_the_stage_as_done(tmp_path: Path):
    stage, notes = one_stage(tmp_path), []
    place = f"toy/{stage.fingerprint}/lease"
    store = Store(str(tmp_path / "root"))
    other = Lease(store, "toy[a]", "ann@host, process 7", beat_s=0.05, place=place).acquire(wait=False)
    outcome = run.RunOutcome()

    def note(text: str) -> None:
        notes.append(text)
        threading.Timer(1.0, other.release).start()

    this = SimpleNamespace(
        stages=[stage],
        artifacts={},
        outcome=outcome,
        store=store,
        display=SimpleNamespace(stage=lambda *args: None, note=note),
        loaded=SimpleNamespace(recipe=SimpleNamespace(resources=Resources())),
        lease=SimpleNamespace(lost=threading.Event()),
        stopping=SimpleNamespace(until_s=None),
        task=lambda stage, run_id: task(tmp_path, stage, run_id),
        stage_spool=lambda stage, run_id: Spool.open(
            tmp_path / "s.jsonl", run=run_id, parent=None, experiment="e", name="n", kind="stage"
        ),
    )
    with ThreadPoolExecutor() as pool:
        remote = SimpleNamespace(
            options=lambda **_: SimpleNamespace(
                remote=lambda sent: SimpleNamespace(future=lambda: pool.submit(execute, sent))
            )
        )
        ray = SimpleNamespace(exceptions=SimpleNamespace(RayError=RuntimeError))
        run._Driver(ray, this, remote).follow()
    assert notes == ["toy[a] is being made by ann@host, process 7: waiting for its result"]
    assert (outcome.ran, outcome.failed) == (["toy[a]"], {})
    assert calls(tmp_path / "log", "toy*") == 1


def test_a_base_that_changed_since_the_plan_is_not_published_as_the_planned_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    digest = model_digest(str(tmp_path))
    worker._check_unchanged(str(tmp_path), digest)
    worker._check_unchanged("hub:owner/name", digest)
    (tmp_path / "config.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="changed during the run: run again to use the current model"):
        worker._check_unchanged(str(tmp_path), digest)
