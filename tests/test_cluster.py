"""Two ranks on two Ray nodes that share no folder: artifacts, checkpoints and events go through the store and Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from local_cluster import local_cluster, s3_server
from test_quickstart import RECIPE, make_project

pytestmark = pytest.mark.slow

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


def longreach(cluster, project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines", *arguments]
    env = cluster.env | {"PYTHONPATH": str(Path(__file__).parents[1])}
    env.pop("LONGREACH_WORKDIR", None)
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=550, check=False)


def test_ranks_on_two_nodes_train_one_model_and_every_event_arrives(cluster, project):
    done = longreach(cluster, project, "run", "tiny.yaml", "--address", cluster.address)
    assert done.returncode == 0, done.stderr
    spools = list((project / "driver" / "spool").rglob("finetune-longlora--*.jsonl"))
    (events,) = [[json.loads(line) for line in path.read_text().splitlines()] for path in spools]
    losses = [e["step"] for e in events if e["event"] == "metrics" and "train/loss" in e["values"]]
    assert losses == [1, 2, 3, 4]
    assert events[-1]["event"] == "end"
    ranks = {path.parents[5].name for path in (cluster.folder).glob("worker*/scratch/finetune/*/attempts/*/work")}
    assert len(list(cluster.folder.glob("worker*/scratch/cache/convert/*/attempts/*/out/model.safetensors"))) == 2, (
        ranks
    )
    (spool,) = (project / "driver" / "spool").rglob("evaluate-longlora-perplexity--*.jsonl")
    told = [json.loads(line) for line in spool.read_text().splitlines()]
    (figure,) = [e["path"] for e in told if e["event"] == "artifact" and e["path"].endswith("png")]
    assert os.path.exists(figure), "the driver has fetched what the event names"
    again = longreach(cluster, project, "run", "tiny.yaml", "--address", cluster.address)
    assert "0 stages run" in again.stderr
