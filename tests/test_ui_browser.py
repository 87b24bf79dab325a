"""The address that `longreach ui` prints, opened in a browser: the models of the newest run, and no page for traces."""

import shutil
import subprocess

import pytest
from mlflow_servers import Server
from test_report_browser import FLAGS, pytestmark  # noqa: F401 (skipped without chromium)

from longreach.infra import mlflow_store, registry
from longreach.infra.mlflow_store import first_page


@pytest.fixture
def project(empty_store, tmp_path, monkeypatch):
    """A folder with an embedded store, and what has run in it: nothing yet."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store.default_uri(tmp_path))
    return tmp_path


def test_the_first_page_is_the_newest_experiments_models_then_its_runs_then_the_list(project):
    database = project / "mlflow.db"
    assert first_page(database) == "#/experiments?workflowType=machine_learning"
    client = registry.connect()
    older, newer = (registry.experiment_id(client, name) for name in ("older", "newer"))
    runs = [client.create_run(experiment, start_time=time).info.run_id for experiment, time in ((older, 1), (newer, 2))]
    assert first_page(database) == f"#/experiments/{newer}/runs?workflowType=machine_learning"
    registry.log_model(client, newer, runs[1], "longlora", {registry.MODEL: "m"})
    assert first_page(database) == f"#/experiments/{newer}/models?workflowType=machine_learning"
    client.delete_run(runs[1])
    assert first_page(database) == f"#/experiments/{older}/runs?workflowType=machine_learning"


@pytest.mark.long
def test_a_browser_shows_the_models_at_that_address(project, tmp_path):
    client = registry.connect()
    experiment = registry.experiment_id(client, "longreach")
    run = client.create_run(experiment).info.run_id
    registry.log_model(client, experiment, run, "quickstart-longlora", {registry.MODEL: "m"})
    server = Server(project)
    server.start()
    try:
        address = f"{server.uri}/{first_page(project / 'mlflow.db')}"
        patient = [flag.replace("=5000", "=20000") for flag in FLAGS]
        command = ["chromium", *patient, f"--user-data-dir={tmp_path / 'profile'}", address]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    finally:
        server.kill()
    assert "quickstart-longlora" in dom
    assert "Model training" in dom
    assert "Agent versions" not in dom, "the page is the one for prompts and traces"
