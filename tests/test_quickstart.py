"""The whole chain on a tiny model, through the command line: what `make run` promises, in a few minutes.

One project is run once; the tests look at it and poke it. The faults have a project of their own.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml
from toy_models import VOCAB, tiny_folder

from longreach.infra.artifact import Store
from longreach.infra.lease import Lease
from longreach.training.summary import TrainingSummary

pytestmark = pytest.mark.slow

RECIPE = {
    "name": "tiny",
    "base": {"source": "base"},
    "corpus": {"sources": [{"files": "texts/*.txt"}], "test": ["held*"]},
    "baselines": {"base": {}, "stretched": {"type": "linear", "factor": 2}},
    "finetune": {
        "rope": {"type": "linear", "factor": 2},
        "pack": {"seq_len": 32},
        "steps": 4,
        "global_batch_tokens": 64,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "arms": {
            "full": {"tune": "all"},
            "longlora": {
                "tune": "lora+embed+norm",
                "attention": {"pattern": "shifted_sparse", "group_tokens": 8},
            },
        },
    },
    "pretrain": {
        "model": {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "context_length": 32},
        "pack": {"seq_len": 32, "method": "concat", "first_token": "sink"},
        "steps": 3,
        "global_batch_tokens": 64,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "arms": {"no-sink": {"sink": "none"}, "sink-token": {"sink": "token"}},
    },
    "evaluate": {
        "perplexity": {"lengths": [32, 96], "last_tokens": 16},
        "gain": {"lengths": [8, 64], "score_tokens": 4, "models": ["base", "longlora"]},
        "streaming": {"document": "held1", "tokens": 64, "cache_tokens": 16, "models": ["base", "sink-token"]},
    },
    "resources": {"workers": 2, "checkpoint_every_steps": 2},
}


SECRETS = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "LONGREACH_NOTIFY_TOKEN", "MLFLOW_TRACKING_PASSWORD")
CANARIES = {name: f"planted-{name.lower()}-{os.getpid()}" for name in SECRETS}


def make_project(folder: Path, recipe: dict) -> Path:
    draw = random.Random(0)
    (folder / "texts").mkdir(parents=True)
    for name in [*(f"train{n}" for n in range(12)), "held1", "held2"]:
        words = " ".join(f"w{draw.randrange(2, VOCAB)}" for _ in range(draw.randrange(100, 140)))
        (folder / "texts" / f"{name}.txt").write_text(words)
    tiny_folder(folder / "base")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


def longreach(project: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longreach.pipelines", *arguments]
    return subprocess.run(
        command, cwd=project, capture_output=True, text=True, timeout=1100, env=os.environ | (env or {}), check=False
    )


def run(project: Path, *arguments: str) -> str:
    done = longreach(project, "run", "tiny.yaml", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def manifests(project: Path) -> dict[str, dict]:
    return {m["label"]: m for m in Store(str(project / ".longreach")).manifests()}


def ran(output: str) -> set[str]:
    """Labels of the stages that a run's output says were run."""
    return set(re.findall(r"\] (\S+): done", output))


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("quickstart"), RECIPE)
    done = longreach(folder, "run", "tiny.yaml", env=CANARIES)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "said.log").write_text(done.stdout + done.stderr)
    return folder


def test_no_secret_of_the_environment_is_written_anywhere(project: Path):
    since = (project / "tiny.yaml").stat().st_mtime
    logs = [folder for folder in Path("/tmp/ray").glob("session_*/logs") if folder.stat().st_mtime >= since]
    assert logs, "Ray has written logs"
    files = [path for folder in (project, *logs) for path in folder.rglob("*") if path.is_file()]
    assert {"said.log", "mlflow.db", "report.html"} <= {path.name for path in files}
    found = [path for path in files if any(value.encode() in path.read_bytes() for value in CANARIES.values())]
    assert not found


def test_every_stage_is_published_and_the_report_holds_every_model(project: Path):
    done = manifests(project)
    assert {"convert", "pack", "pack[sink]", "merge[longlora]", "pretrain[sink-token]", "report"} <= set(done)
    report = Store(str(project / ".longreach")).fetch("report", done["report"]["fingerprint"])
    page = (report.path / "report.html").read_text()
    for model in ("base", "stretched", "full", "longlora", "sink-token"):
        assert model in page


def test_a_second_run_does_nothing_and_starts_no_ray(project: Path, tmp_path: Path):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("raise ImportError('nothing is to be done: no Ray')")
    done = longreach(project, "run", "tiny.yaml", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("report.html")
    assert ran(done.stdout + done.stderr) == set()


def test_training_ran_on_two_ranks_and_moved_what_it_should(project: Path):
    summary = TrainingSummary.model_validate(manifests(project)["finetune[longlora]"]["summary"])
    assert summary.ranks == 2
    assert summary.pattern.startswith("shifted_sparse")
    assert summary.trainable.lora > 0
    assert summary.trainable.embed > 0
    assert summary.trainable.norm > 0


def test_both_arms_saw_the_same_rows_in_the_same_order(project: Path):
    store = Store(str(project / ".longreach"))
    rows = {}
    for arm in ("full", "longlora"):
        folder = store.fetch("finetune", manifests(project)[f"finetune[{arm}]"]["fingerprint"]).path
        rows[arm] = [json.loads(line)["rows"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows["full"]) == RECIPE["finetune"]["steps"]
    assert rows["full"] == rows["longlora"]


def test_plan_names_what_a_learning_rate_makes_stale_and_nothing_else(project: Path):
    plan = longreach(project, "plan", "tiny.yaml", "--set", "finetune.arms.longlora.learning_rate=0.5").stdout
    stale = {line.split()[0] for line in plan.splitlines() if " stale " in line}
    expected = {"finetune[longlora]", "merge[longlora]", "release[longlora]"}
    expected |= {"evaluate[longlora,perplexity]", "evaluate[longlora,gain]"}
    assert stale == expected | {"report"}
    assert "recipe.arm.learning_rate: None -> 0.5" in plan


def test_a_flipped_byte_in_a_shard_is_noticed_and_only_packing_runs_again(project: Path):
    store, fingerprint = Store(str(project / ".longreach")), manifests(project)["pack"]["fingerprint"]
    shard = next(store.fetch("pack", fingerprint).path.glob("rows/*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    output = run(project)
    assert ran(output) == {"pack"}
    assert "content changed" in output


def test_metrics_are_in_mlflow_under_pipeline_stage_and_attempt(project: Path):
    assert longreach(project, "sync").returncode == 0
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project}/.longreach/mlflow.db")
    experiment = client.get_experiment_by_name("longreach")
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id], max_results=1000)}
    attempt = runs["finetune[longlora] attempt 1"]
    history = client.get_metric_history(attempt.info.run_id, "train/loss")
    assert sorted(point.step for point in history) == [1, 2, 3, 4]
    stage_run = next(r for r in runs.values() if r.info.run_id == attempt.data.tags["mlflow.parentRunId"])
    assert stage_run.info.run_name == "finetune[longlora]"
    pipeline = client.get_run(stage_run.data.tags["mlflow.parentRunId"])
    curve = "compare/gain_over_base/longlora"
    assert {*pipeline.data.metrics} == {curve}, "single numbers are a table and no chart of one bar each"
    assert sorted(point.step for point in client.get_metric_history(pipeline.info.run_id, curve)) == [8, 64]
    assert {"path": "measures.json", "type": "table"} in json.loads(pipeline.data.tags["mlflow.loggedArtifacts"])
    table = json.loads(Path(client.download_artifacts(pipeline.info.run_id, "measures.json")).read_text())
    assert table["columns"][0] == "measure"
    assert {"base", "full", "longlora"} <= set(table["columns"])


# ---- faults: a stage task, a rank and the driver are killed in one run


def processes(tree: psutil.Process, *words: str) -> list[psutil.Process]:
    """Descendants whose title has one of the words."""
    found = []
    for process in tree.children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if any(word in title for word in words):
            found.append(process)
    return found


def steps_of(project: Path) -> list[list[int]]:
    """Steps that each attempt logged, in the order of the attempts."""
    paths = sorted((project / ".longreach/spool").glob("*/finetune-full@*.jsonl"), key=lambda p: p.name.split("@")[1])
    found = []
    for path in paths:
        events = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        found.append([e["step"] for e in events if e["event"] == "metrics" and "train/loss" in e["values"]])
    return found


def wait_for(condition, what: str, log: Path, seconds: float = 400) -> None:
    """Wait until something is so; if it never is, what the driver printed last is in the error."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"waited {seconds} s for {what}; the log ends {log.read_text()[-3000:]}"
        time.sleep(0.05)


def heed_interrupts() -> None:
    """In a child: tests in the background of a script ignore Ctrl-C, and it would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


COMMAND = [sys.executable, "-m", "longreach.pipelines", "run", "tiny.yaml"]


@contextmanager
def driver_of(project: Path, printed: Path) -> Iterator[subprocess.Popen]:
    """A run in the background, in a session of its own; it outlives no test, not even one that fails."""
    with printed.open("w") as log:
        driver = subprocess.Popen(
            COMMAND, cwd=project, stdout=log, stderr=log, start_new_session=True, preexec_fn=heed_interrupts
        )
    with ended(driver):
        yield driver


@contextmanager
def driver_in_a_terminal(project: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """A run in a terminal of its own, and the descriptor that closes the terminal.

    Nobody reads what it prints, and a full terminal would block it, so it runs with --quiet.
    """
    ours, its = os.openpty()

    def take_the_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also if the tests run under nohup
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    driver = subprocess.Popen(
        [*COMMAND, "--quiet"], cwd=project, stdin=its, stdout=its, stderr=its,
        start_new_session=True, preexec_fn=take_the_terminal,
    )  # fmt: skip
    os.close(its)
    with ended(driver):
        yield driver, ours


@contextmanager
def ended(driver: subprocess.Popen) -> Iterator[None]:
    """Kill the driver at the end of the block, also if a test fails."""
    try:
        yield
    finally:
        driver.kill()
        driver.wait()


def test_kill_9_of_a_rank_a_stage_task_and_the_driver_costs_at_most_one_checkpoint_interval(tmp_path: Path):
    recipe = {key: RECIPE[key] for key in ("name", "base", "corpus", "finetune")}
    recipe["finetune"] = recipe["finetune"] | {"steps": 240, "arms": {"full": {"tune": "all"}}}
    recipe["resources"] = {"workers": 2, "checkpoint_every_steps": 5}
    project = make_project(tmp_path / "faults", recipe)
    whole = make_project(tmp_path / "whole", recipe)
    printed = tmp_path / "driver.log"
    with driver_of(project, printed) as driver:
        tree = psutil.Process(driver.pid)

        def steps() -> list[int]:
            return [step for attempt in steps_of(project) for step in attempt]

        wait_for(lambda: len(steps()) > 20, "the first steps", printed)
        reached = max(steps())
        processes(tree, "TrainWorker")[0].send_signal(signal.SIGKILL)
        wait_for(lambda: max(steps()) > reached + 20, "steps after a rank was killed", printed)
        reached, attempts = max(steps()), len(steps_of(project))
        processes(tree, "ray::finetune[full]", "ray::_execute")[0].send_signal(signal.SIGKILL)
        wait_for(lambda: len(steps_of(project)) > attempts and steps_of(project)[-1], "a new attempt", printed)
        wait_for(lambda: max(steps()) > reached + 20, "steps after the stage task was killed", printed)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    run(project)
    attempts_steps = steps_of(project)
    assert len(attempts_steps) == 3
    for before, after in itertools.pairwise(attempts_steps):
        assert max(before) - after[0] + 1 <= 5, "more than a checkpoint interval was repeated"
    run(whole)
    ours, theirs = manifests(project), manifests(whole)
    assert {k: m["fingerprint"] for k, m in ours.items()} == {k: m["fingerprint"] for k, m in theirs.items()}

    def files(found: dict[str, dict]) -> dict[str, str]:
        return {f["path"]: f["xxh3"] for f in found["finetune[full]"]["files"] if f["path"].endswith(".safetensors")}

    assert files(ours) == files(theirs), "the weights differ from those of a run that nothing disturbed"


def test_sigterm_ctrl_c_and_a_closed_terminal_leave_a_checkpoint_a_free_lease_and_no_step_to_repeat(tmp_path: Path):
    recipe = {key: RECIPE[key] for key in ("name", "base", "corpus", "finetune")}
    recipe["finetune"] = recipe["finetune"] | {"steps": 120, "arms": {"full": {"tune": "all"}}}
    project = make_project(tmp_path / "project", recipe | {"resources": {"workers": 2, "checkpoint_every_steps": 1000}})
    printed = tmp_path / "driver.log"
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        done = sum(map(len, steps_of(project)))
        with driver_of(project, printed) as driver:
            wait_for(lambda done=done: sum(map(len, steps_of(project))) > done + 20, "more steps", printed)
            family = psutil.Process(driver.pid).children(recursive=True)
            asked = time.monotonic()
            if signum == signal.SIGINT:
                os.killpg(driver.pid, signum)  # as a terminal does: to all that the command started
            else:
                driver.send_signal(signum)
            assert driver.wait(timeout=120) == code, printed.read_text()
        print(f"{signum.name}: ended after {time.monotonic() - asked:.1f} s")
        assert "stopped after step" in printed.read_text()
        assert Lease(Store(str(project / ".longreach")), "tiny", "test").current_holder() is None
        assert not psutil.wait_procs(family, timeout=60)[1], "Ray's processes live on"
    done = sum(map(len, steps_of(project)))
    with driver_in_a_terminal(project) as (driver, terminal):
        wait_for(lambda: sum(map(len, steps_of(project))) > done + 20, "more steps", printed)
        family = psutil.Process(driver.pid).children(recursive=True)
        os.close(terminal)
        assert driver.wait(timeout=120) == 128 + signal.SIGHUP
    assert not psutil.wait_procs(family, timeout=60)[1], "Ray's processes live on"
    run(project)
    attempts = steps_of(project)
    assert all(attempts)
    assert [step for attempt in attempts for step in attempt] == list(range(1, 121))
