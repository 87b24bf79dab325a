"""A tracking server that asks for a login: wrong ones are told before anything starts, right ones serve everybody."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import uuid
from pathlib import Path

import mlflow
import pytest
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, UNAUTHENTICATED
from mlflow_servers import PASSWORD, Server, refusing_port

from longreach.infra import mlflow_store, registry
from longreach.infra.mirror import sync
from longreach.infra.mlflow_store import check_tracking, check_tracking_uri
from longreach.infra.tracking import Spool
from longreach.pipelines.cli import main


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("login"), login=True)
    server.start()
    yield server
    server.kill()


def login(monkeypatch, user: str | None, password: str = "") -> None:
    for name, value in (("MLFLOW_TRACKING_USERNAME", user), ("MLFLOW_TRACKING_PASSWORD", password)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)


def test_a_wrong_login_is_refused_and_named_without_its_password(server, monkeypatch):
    login(monkeypatch, None)
    with pytest.raises(ValueError, match="rejects a request without user and password"):
        check_tracking(server.uri)
    login(monkeypatch, "admin", "planted-canary")
    with pytest.raises(ValueError, match=r"rejects user 'admin' .*HTTP 401.*MLFLOW_TRACKING_PASSWORD") as error:
        check_tracking(server.uri)
    assert "planted-canary" not in str(error.value)
    login(monkeypatch, "admin", PASSWORD)
    assert check_tracking(server.uri) == ""


def test_the_spool_is_uploaded_with_the_right_login_and_kept_with_a_wrong_one(server, monkeypatch, tmp_path):
    run = uuid.uuid4().hex
    path = tmp_path / "spool" / "a.jsonl"
    spool = Spool.open(path, run=run, parent=None, experiment="login", name="a", kind="pipeline")
    spool.metrics({"train/loss": 1.0}, step=1)
    spool.end("FINISHED")
    login(monkeypatch, "admin", "wrong")
    assert sync(tmp_path / "spool", server.uri, timeout_s=4).pending == 1
    login(monkeypatch, "admin", PASSWORD)
    assert sync(tmp_path / "spool", server.uri).pending == 0


def test_a_run_with_a_wrong_password_does_nothing(server, tmp_path):
    env = os.environ | {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "planted-canary"}
    command = [sys.executable, "-m", "longreach.pipelines", "run", "quickstart", "--set", f"tracking.uri={server.uri}"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "rejects user 'admin'" in done.stderr
    assert "planted-canary" not in done.stdout + done.stderr
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_a_server_that_is_away_is_said_and_stops_nothing(monkeypatch):
    with refusing_port() as port:
        uri = f"http://127.0.0.1:{port}"
        assert check_tracking(uri) == f"{uri} does not respond (ConnectionError)"
    assert check_tracking("sqlite:///x.db") == ""


def test_an_embedded_store_that_another_process_locks_is_away_and_no_error(empty_store, tmp_path: Path):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        away = check_tracking(mlflow_store.default_uri(tmp_path), timeout_s=0.1)
    assert away == f"{tmp_path}/mlflow.db does not answer (database is locked)"


def test_releases_behind_any_alias_are_found_and_asking_creates_no_store(empty_store, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store.default_uri(tmp_path))
    assert registry.aliased_fingerprints() == set()
    assert not (tmp_path / "mlflow.db").exists()
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    client = registry.connect()
    client.create_registered_model("books")
    for number in (1, 2, 3):
        client.create_model_version("books", f"file:///m{number}", tags={registry.FINGERPRINT: f"release-{number}"})
    client.set_registered_model_alias("books", "champion", "3")
    client.set_registered_model_alias("books", "mine", "1")
    assert registry.aliased_fingerprints() == {"release-1", "release-3"}


def test_an_embedded_store_that_is_moved_takes_its_models_along(empty_store, tmp_path: Path, monkeypatch, capsys):
    before, after = tmp_path / "before", tmp_path / "a.ter_"  # as a pattern, its name would fit others
    before.mkdir()
    shutil.copy(empty_store, before / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store.default_uri(before))
    client = registry.connect()
    experiment = registry.experiment_id(client, "books")
    elsewhere = client.create_experiment("elsewhere", (tmp_path / "own-choice").as_uri())
    release = tmp_path / "release"
    release.mkdir()
    (release / "weights").write_text("w")
    run = client.create_run(experiment).info.run_id
    model = registry.log_model(client, experiment, run, "longlora", {registry.MODEL: "m"}, release)
    version = registry.register(client, "books", model, run, {registry.FINGERPRINT: "f"})
    client.set_registered_model_alias("books", registry.CHAMPION, version.version)
    before.rename(after)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store.default_uri(after))
    client = registry.connect()
    assert "was moved" in capsys.readouterr().err
    assert Path(mlflow.artifacts.download_artifacts("models:/books@champion")).is_relative_to(after)
    assert client.get_run(run).info.artifact_uri.startswith(after.as_uri())
    client.log_text(run, "new", "note.txt")
    assert not before.exists(), "nothing is written to the old place"
    assert client.get_experiment(elsewhere).artifact_location == (tmp_path / "own-choice").as_uri()
    registry.connect()
    assert "was moved" not in capsys.readouterr().err, "said once"


@pytest.mark.parametrize("name", ["100% [1]", "a#b", "für uns"])
def test_an_embedded_store_lives_in_a_folder_of_almost_any_name(name, empty_store, tmp_path: Path, monkeypatch):
    (workdir := tmp_path / name).mkdir()
    shutil.copy(empty_store, workdir / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store.default_uri(workdir))
    client = registry.connect()
    run = client.create_run(registry.experiment_id(client, "books")).info.run_id
    client.log_text(run, "new", "note.txt")
    (note,) = workdir.rglob("note.txt")
    assert note.read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {name}, "nothing beside it"


@pytest.mark.parametrize("name", ["what?x=1&y", "50%20off"])
def test_a_folder_whose_name_means_something_else_in_an_address_is_refused_before_anything_starts(
    name, tmp_path: Path, monkeypatch, capsys
):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["run", "quickstart"])
    assert ended.value.code == 2
    assert f"elsewhere than in {tmp_path / name}/.longreach" in capsys.readouterr().err
    assert not list((tmp_path / name).iterdir())


@pytest.mark.parametrize(("code", "kind"), [(INTERNAL_ERROR, registry.RegistryAway), (UNAUTHENTICATED, ValueError)])
def test_an_answer_that_fails_half_way_through_a_rollback_is_one_sentence(
    code, kind, empty_store, tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store.default_uri(tmp_path))
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    client = registry.connect()
    client.create_registered_model("books")
    for alias in (registry.PREVIOUS, registry.CHAMPION):
        version = client.create_model_version("books", f"file:///{alias}")
        client.set_registered_model_alias("books", alias, version.version)

    def fails(*arguments):
        raise mlflow.MlflowException("no such luck", error_code=code)

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "set_registered_model_alias", fails)
        with pytest.raises(ValueError, match=r"rollback of 'books': MLflow at .* says: no such luck") as raised:
            registry.rollback("books")
    assert raised.type is kind
    assert registry.rollback("books") == ("2", "1"), "the same call goes on"


def test_a_refused_login_is_no_server_that_is_away(empty_store, tmp_path: Path, monkeypatch):
    def refuses(*arguments):
        raise mlflow.MlflowException("who are you", error_code=UNAUTHENTICATED)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store.default_uri(tmp_path))
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setattr(mlflow.MlflowClient, "get_model_version_by_alias", refuses)
    with pytest.raises(ValueError, match=r"cannot look up the alias champion of 'books': .* who are you") as raised:
        registry.champion("books")
    assert raised.type is ValueError


@pytest.mark.long
def test_several_who_start_at_once_make_one_store_even_where_another_was_killed_while_it_made_it(tmp_path):
    (tmp_path / "mlflow.db.draft").write_text("half a database")
    code = "import sys; from longreach.infra.mlflow_store import prepare_embedded; prepare_embedded(sys.argv[1])"
    command = [sys.executable, "-P", "-c", code, mlflow_store.default_uri(tmp_path)]
    starters = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [starter.communicate()[1] for starter in starters]
    assert [starter.returncode for starter in starters] == [0, 0, 0], said
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlflow.db.lock"}
    assert mlflow.MlflowClient(mlflow_store.default_uri(tmp_path)).create_experiment("works")


@pytest.mark.parametrize("uri", ["localhost:5000", "sqlite://x.db", "bob:secret@host:5000", "htp://host:5000"])
def test_an_address_that_mlflow_cannot_take_is_refused_with_the_recipe(uri):
    with pytest.raises(ValueError, match="the tracking URI") as refusal:
        check_tracking_uri(uri)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:5000",
        "HTTP://host:5000",
        "sqlite:////tmp/x.db",
        "postgresql+psycopg2://host/db",
        "databricks",
        "mlruns",
        "/data/run:1/mlruns",
        "file:/x",
    ],
)
def test_every_kind_of_address_that_mlflow_takes_is_taken(uri):
    assert check_tracking_uri(uri) == uri
