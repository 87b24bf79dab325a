"""A node of another version: of Ray, it does not get into the cluster; of longreach, its stages are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from local_cluster import local_cluster
from test_quickstart import RECIPE, make_project

pytestmark = [pytest.mark.slow, pytest.mark.drill]

OTHER_RAY = """
import sys
import ray
ray.__version__ = "2.54.0"
from ray.scripts.scripts import main
sys.argv = ["ray", "start", *sys.argv[1:]]
main()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head and a node, whose longreach says that it is version 0.0.9."""
    folder = tmp_path_factory.mktemp("versions")
    about = folder / "other" / "longreach-0.0.9.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: longreach\nVersion: 0.0.9\n")
    with local_cluster(folder, 1, {"PYTHONPATH": str(about.parent)}) as cluster:
        yield cluster


def test_a_node_of_another_ray_does_not_join(cluster):
    words = [sys.executable, "-c", OTHER_RAY, f"--address={cluster.address}", "--num-cpus=1", "--block"]
    done = subprocess.run(words, env=cluster.env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "Version mismatch" in done.stdout + done.stderr
    assert "2.54.0" in done.stdout + done.stderr


def test_a_stage_on_a_node_of_another_longreach_is_refused_with_both_versions(cluster, tmp_path: Path):
    recipe = {key: RECIPE[key] for key in ("name", "corpus", "finetune")}
    recipe["base"] = {"source": str(tmp_path / "project/base")}
    recipe["corpus"] = {"sources": [{"files": str(tmp_path / "project/texts/*.txt")}]}
    recipe["finetune"] = recipe["finetune"] | {"steps": 1, "arms": {"full": {"tune": "all"}}}
    project = make_project(tmp_path / "project", recipe | {"resources": {"workers": 1}})
    words = [sys.executable, "-m", "longreach.pipelines", "run", "tiny.yaml", "--address", cluster.address]
    done = subprocess.run(words, cwd=project, env=cluster.env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 1, done.stderr
    assert "convert failed" in done.stderr
    assert "0.0.9" in done.stderr
