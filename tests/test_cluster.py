"""Two ranks on two Ray nodes that share no folder: artifacts, checkpoints and events go through the store and Ray."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from local_cluster import local_cluster, s3_server
from test_quickstart import RECIPE, make_project, wait_for

from longreach.infra.artifact import Store
from longreach.training.summary import TrainingSummary

pytestmark = [pytest.mark.slow, pytest.mark.drill]

SMALL = {
    "name": "small",
    **{key: RECIPE[key] for key in ("base", "corpus", "baselines")},
    "finetune": RECIPE["finetune"] | {"arms": {"longlora": RECIPE["finetune"]["arms"]["longlora"]}},
    "evaluate": {"perplexity": RECIPE["evaluate"]["perplexity"]},
    "resources": {"workers": 2, "checkpoint_every_steps": 2},
    "store": {"root": "s3://longreach/small", "workdir": "driver"},
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    with s3_server(folder) as s3, local_cluster(folder, 2, s3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def project(tmp_path_factory, cluster):
    recipe = json.loads(json.dumps(SMALL))
    folder = make_project(tmp_path_factory.mktemp("small"), recipe)
    recipe["base"]["source"] = str(folder / "base")
    recipe["corpus"]["sources"] = [{"files": "s3://longreach/documents/*.txt"}]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    put = "import s3fs, sys; s3fs.S3FileSystem().put(sys.argv[1] + '/', 'longreach/documents/', recursive=True)"
    subprocess.run([sys.executable, "-c", put, str(folder / "texts")], env=cluster.env, check=True, timeout=120)
    return folder


def command(cluster, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """What to start, and its environment: a driver that has no folder of a node."""
    env = dict(cluster.env)
    env.pop("LONGREACH_WORKDIR", None)
    return [sys.executable, "-m", "longreach.pipelines", *arguments], env


def longreach(cluster, project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    words, env = command(cluster, *arguments)
    return subprocess.run(words, cwd=project, env=env, capture_output=True, text=True, timeout=550, check=False)


def test_ranks_on_two_nodes_train_one_model_and_every_event_arrives(cluster, project):
    done = longreach(cluster, project, "run", "tiny.yaml", "--address", cluster.address)
    assert done.returncode == 0, done.stderr
    spools = list((project / "driver" / "spool").rglob("finetune-longlora@*.jsonl"))
    (events,) = [[json.loads(line) for line in path.read_text().splitlines()] for path in spools]
    losses = [e["step"] for e in events if e["event"] == "metrics" and "train/loss" in e["values"]]
    assert losses == [1, 2, 3, 4]
    assert events[-1]["event"] == "end"
    ranks = {path.parents[5].name for path in (cluster.folder).glob("worker*/scratch/finetune/*/attempts-*/*/work")}
    assert len(list(cluster.folder.glob("worker*/scratch/cache/convert/*/attempts/*/out/model.safetensors"))) == 2, (
        ranks
    )
    (spool,) = (project / "driver" / "spool").rglob("evaluate-longlora-perplexity@*.jsonl")
    told = [json.loads(line) for line in spool.read_text().splitlines()]
    (figure,) = [e["path"] for e in told if e["event"] == "artifact" and e["path"].endswith("png")]
    assert os.path.exists(figure), "the driver has fetched what the event names"
    again = longreach(cluster, project, "run", "tiny.yaml", "--address", cluster.address)
    assert "0 stages run" in again.stderr


def test_a_submitted_job_trains_across_the_nodes_and_submitting_it_again_finds_nothing_to_do(cluster, project):
    asked = ("submit", "tiny.yaml", "--address", cluster.dashboard, "--set", "seed=1", "--yes", "--follow")
    for said in ("finetune[longlora]: done", "0 stages run"):
        done = longreach(cluster, project, *asked)
        assert done.returncode == 0, done.stderr + done.stdout
        assert said in done.stdout, "the job's log comes here"
        job = done.stdout.split()[0]
        listed = longreach(cluster, project, "jobs", "--address", cluster.dashboard)
        assert re.search(rf"{job} +small +SUCCEEDED", listed.stdout)


# ---- a node goes away


def steps_told(workdir: Path) -> list[int]:
    """Steps of training in the order in which the driver heard of them."""
    paths = sorted(workdir.rglob("finetune-longlora@*.jsonl"), key=lambda p: p.name)
    events = [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.endswith("}")]
    return [e["step"] for e in events if e["event"] == "metrics" and "train/loss" in e["values"]]


def test_a_lost_node_costs_the_steps_since_the_newest_pushed_checkpoint(cluster, project, monkeypatch):
    recipe = yaml.safe_load((project / "tiny.yaml").read_text())
    recipe |= {"name": "lost", "resources": {"workers": 2, "checkpoint_every_steps": 20}}
    recipe["finetune"]["steps"] = 200
    recipe["store"]["workdir"] = "lost"
    del recipe["evaluate"]
    (project / "lost.yaml").write_text(yaml.safe_dump(recipe))
    words, env = command(cluster, "run", "lost.yaml", "--address", cluster.address)
    printed = project / "lost.log"
    with printed.open("w") as log:
        driver = subprocess.Popen(words, cwd=project, env=env, stdout=log, stderr=log)
        try:
            wait_for(lambda: max(steps_told(project / "lost"), default=0) > 45, "training", printed)
            machine = [psutil.Process(cluster.nodes["worker1"].pid)]
            machine += machine[0].children(recursive=True)
            cluster.kill_node("worker1")
            for process in machine:  # some lead process groups of their own
                if process.is_running():
                    process.kill()
            lost, before = time.monotonic(), len(steps_told(project / "lost"))
            cluster.start_worker(2)
            wait_for(lambda: len(steps_told(project / "lost")) > before + 5, "steps after the node was lost", printed)
            print(f"training again {time.monotonic() - lost:.0f} s after the node was lost")
            assert driver.wait(timeout=180) == 0, printed.read_text()
        finally:
            driver.kill()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, cluster.env[name])
    made = list(Store("s3://longreach/small", project / "scratch").manifests("finetune"))
    summaries = [TrainingSummary.model_validate(manifest["summary"]) for manifest in made]
    (summary,) = [summary for summary in summaries if summary.steps == 200]
    told = steps_told(project / "lost")
    assert sorted(set(told)) == list(range(1, 201))
    resumed = summary.resumed_from_step
    assert resumed >= 20
    assert resumed % 20 == 0
