"""The mirror, against a real MLflow server and the embedded store: nothing missing, nothing doubled, nobody waits."""

import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow_servers import PATIENCE_S, Server, free_port, refusing_port, wait_until

from longreach.infra import registry
from longreach.infra.mirror import (
    Mirror,
    MirrorProcess,
    _command,
    _environment,
    _follow,
    pending_points,
    start_mirror,
    stop_mirror,
    sync,
)
from longreach.infra.mlflow_store import default_uri
from longreach.infra.tracking import Spool


class Gate:
    """A TCP relay in front of a server: shut, nobody answers; told so, it loses the answer to one kind of request, or
    holds back the answers to uploaded files."""

    def __init__(self, target: int) -> None:
        self.target, self.port = target, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.lose: list[bytes] = []
        self.hold_s = 0.0
        self.puts: list[str] = []
        self.listener: socket.socket | None = None
        self.connections: list[socket.socket] = []

    def open(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def shut(self) -> None:
        if self.listener:
            for one in [self.listener, *self.connections]:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
        self.listener, self.connections = None, []

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # shut
            while True:
                client, _ = listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self.target))
                except ConnectionRefusedError:
                    client.close()
                    continue
                self.connections += [client, server]
                events = threading.Event(), threading.Event()
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._relay, args=(*pair, client, *events), daemon=True).start()

    def _relay(
        self, source: socket.socket, sink: socket.socket, client: socket.socket,
        lost: threading.Event, put: threading.Event,
    ) -> None:  # fmt: skip
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if source is client:
                    if data.startswith(b"PUT "):
                        self.puts.append(data.split()[1].decode().rpartition("/")[2])
                        put.set()
                    for kind in [kind for kind in self.lose if kind in data]:
                        self.lose.remove(kind)
                        lost.set()
                elif lost.is_set():  # the server has done it, and its client will never know
                    break
                elif put.is_set():
                    put.clear()
                    time.sleep(self.hold_s)
                sink.sendall(data)
            for one in (source, sink):
                one.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def store(empty_store, tmp_path):
    """The URI of an embedded store of this test's own."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return default_uri(tmp_path)


@pytest.fixture(scope="module")
def server(empty_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, folder / "mlflow.db")
    server = Server(folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def gate(server):
    gate = Gate(server.port)
    yield gate
    gate.shut()


@pytest.fixture
def spools(tmp_path):
    """Makes spools of runs in one folder, in an experiment of this test's own."""
    experiment = f"tests {uuid.uuid4().hex[:8]}"

    def make(name, kind="attempt", parent=None, **more):
        run = uuid.uuid4().hex
        spool = Spool.open(
            folder / f"{name}.jsonl", run=run, parent=parent, experiment=experiment, name=name, kind=kind, **more
        )
        return run, spool

    folder = tmp_path / "spool"
    make.folder, make.experiment = folder, experiment
    return make


def client_of(uri):
    from mlflow import MlflowClient

    return MlflowClient(uri)


def runs_of(uri, experiment):
    client = client_of(uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert len({run.info.run_name for run in found}) == len(found), "a run is there twice"
    return {run.info.run_name: run for run in found}


def points(uri, run, key):
    """(step, value) of every stored point, in the order of steps; doubled ones would be there twice."""
    return sorted((m.step, m.value) for m in client_of(uri).get_metric_history(run.info.run_id, key))


def upload(folder, uri):
    """One pass in this process."""
    mirror = Mirror(folder, uri)
    assert mirror.upload(float("inf")) == ""
    return mirror


def test_an_outage_at_the_start_in_the_middle_and_at_the_end_costs_no_time_and_no_point(spools, server, gate):
    _, spool = spools("train")
    times = []

    def train(steps):
        for step in steps:
            started = time.perf_counter()
            spool.metrics({"train/loss": 1 / (step + 1), "train/lr": step}, step)
            times.append(time.perf_counter() - started)

    mirror = start_mirror(spools.folder, gate.uri)
    train(range(200))
    wait_until(lambda: "retrying" in (spools.folder / "mirror.log").read_text())
    assert pending_points(spools.folder) == 400
    gate.open()
    wait_until(lambda: pending_points(spools.folder) == 0)
    server.kill()
    train(range(200, 400))
    server.start()
    train(range(400, 500))
    wait_until(lambda: pending_points(spools.folder) == 0)
    gate.shut()
    train(range(500, 600))
    spool.end("FINISHED")
    started = time.monotonic()
    assert stop_mirror(mirror) == 200
    assert time.monotonic() - started < 60
    gate.open()
    report = sync(spools.folder, gate.uri, timeout_s=PATIENCE_S)
    assert (report.runs, report.points, report.pending, report.problem) == (1, 200, 0, "")
    run = runs_of(server.uri, spools.experiment)["train"]
    assert points(server.uri, run, "train/loss") == [(step, 1 / (step + 1)) for step in range(600)]
    assert points(server.uri, run, "train/lr") == [(step, step) for step in range(600)]
    assert run.info.status == "FINISHED"
    assert statistics.median(times) < 1e-3


def test_a_model_of_a_stage_is_shown_at_the_run_of_the_whole_pipeline_once(spools, store, tmp_path, caplog):
    run, pipeline = spools("=pipeline", "pipeline")
    pipeline.output("release-1")
    pipeline.output("release-of-another-server")
    pipeline.end("FINISHED")
    _, release = spools("release", parent=run)
    release.model("longlora", "release-1", {"eval/gain": 0.1})
    for _ in range(2):  # the second time from the start, as after a lost position
        assert Mirror(spools.folder, store).upload(time.monotonic() + PATIENCE_S) == ""
        for position in spools.folder.glob("*.offset"):
            position.unlink()
    client = client_of(store)
    (model,) = client.search_logged_models([registry.experiment_id(client, spools.experiment)])
    shown = runs_of(store, spools.experiment)["=pipeline"].outputs.model_outputs
    assert [one.model_id for one in shown] == [model.model_id]
    assert "its model release-of-another-server is not in MLflow" in caplog.text


def test_models_and_versions_whose_creation_got_no_answer_are_made_once(gate, tmp_path, monkeypatch):
    gate.open()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gate.uri)
    client, name = registry.connect(), f"books {uuid.uuid4().hex[:8]}"
    experiment = registry.experiment_id(client, name)
    run = client.create_run(experiment).info.run_id
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "weights").write_text("w")
    gate.lose = [b"POST /api/2.0/mlflow/logged-models ", b"registered-models/create", b"model-versions/create"]
    model = registry.log_model(client, experiment, run, "longlora", {registry.MODEL: name}, tmp_path / "release")
    version = registry.register(client, name, model, run, {registry.FINGERPRINT: "f"})
    assert gate.lose == []
    assert version.version == "1"
    assert len(client.search_model_versions(f"name = '{name}'")) == 1
    assert len(client.search_logged_models([experiment])) == 1
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] != "0", "the user's setting is as it was"


def test_files_may_take_longer_than_other_requests_and_are_uploaded_once(spools, gate, tmp_path, monkeypatch):
    """A server may hand a file on to S3 before it answers; a model of many files may need several tries."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder, name = tmp_path / "model", f"books {uuid.uuid4().hex[:8]}"
    (folder / "components").mkdir(parents=True)
    for file in ("weights-1", "weights-2", "components/tokenizer"):
        (folder / file).write_text(file)
    _, spool = spools("release")
    spool.artifact(folder / "weights-1", "figures")
    spool.model("longlora", name, {"gain": 1.0}, path=folder, register=name)
    gate.open()
    gate.hold_s, gate.lose = 1.5, [b"artifacts/weights-2"]
    mirror = Mirror(spools.folder, gate.uri)
    assert "release.jsonl" in mirror.upload(float("inf"))
    assert mirror.upload(float("inf")) == ""
    assert gate.puts == ["weights-1", "weights-1", "weights-2", "weights-1", "tokenizer"]  # the figure twice
    assert len(client_of(gate.uri).search_model_versions(f"name = '{name}'")) == 1
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"


def test_lost_answers_double_neither_runs_nor_points(spools, server, gate):
    _, spool = spools("train")
    for step in range(50):
        spool.metrics({"loss": step}, step)
    gate.open()
    gate.lose = [b"runs/create", b"runs/log-batch"]
    report = sync(spools.folder, gate.uri, timeout_s=PATIENCE_S)
    assert gate.lose == []
    assert (report.pending, report.problem) == (0, "")
    run = runs_of(server.uri, spools.experiment)["train"]
    assert points(server.uri, run, "loss") == [(step, step) for step in range(50)]


def test_a_mirror_killed_in_the_middle_goes_on_without_gaps_or_doubles(spools, server):
    _, spool = spools("train")
    for step in range(4000):
        spool.metrics({"loss": step, "lr": 1e-4}, step)
    spool.end("FINISHED")
    mirror = start_mirror(spools.folder, server.uri)
    wait_until(lambda: pending_points(spools.folder) < 8000)
    mirror.kill()
    mirror.wait()
    left = pending_points(spools.folder)
    assert 0 < left < 8000
    assert sync(spools.folder, server.uri, timeout_s=PATIENCE_S).points == left
    run = runs_of(server.uri, spools.experiment)["train"]
    everything = [(step, step) for step in range(4000)]
    assert points(server.uri, run, "loss") == everything
    position = spools.folder / "train.jsonl.offset"
    position.write_text(json.dumps(json.loads(position.read_text()) | {"offset": 0}))  # a crash before it was saved
    assert upload(spools.folder, server.uri).points == 8000
    assert points(server.uri, runs_of(server.uri, spools.experiment)["train"], "loss") == everything


def test_the_embedded_store_shows_nested_runs_with_all_that_they_said(spools, store, tmp_path):
    top, pipeline = spools("quickstart", "pipeline", tags={"recipe": "quickstart"})
    middle, stage = spools("finetune", "stage", parent=top)
    _, attempt = spools("a first attempt", parent=middle, params={f"p{i}": i for i in range(250)})
    attempt.metrics({"loss": 2.5, "ppl": float("inf")}, step=3)
    attempt.param("long", "x" * 7000)
    attempt.tag("mlflow.note.content", "**fine**")
    attempt.dataset("pack", "0123456789" * 4, "/data/rows")
    figure, cells = tmp_path / "loss.png", tmp_path / "scores.json"
    figure.write_bytes(b"png")
    cells.write_text('{"rows": [{"length": 512, "ppl": 20.5}, {"length": 1024, "ppl": NaN, "note": "short"}]}')
    attempt.artifact(figure, "figures")
    attempt.table(cells, "perplexity")
    for spool in (attempt, stage, pipeline):
        spool.end("FINISHED")
    for _ in range(2):  # the second time from the start
        mirror = upload(spools.folder, store)
        assert (mirror.points, mirror.skipped) == (1, 1)
        for position in spools.folder.glob("*.offset"):
            position.unlink()

    runs, client = runs_of(store, spools.experiment), client_of(store)
    run = runs["a first attempt"]
    assert run.data.tags["mlflow.parentRunId"] == runs["finetune"].info.run_id
    assert runs["finetune"].data.tags["mlflow.parentRunId"] == runs["quickstart"].info.run_id
    assert runs["quickstart"].data.tags["recipe"] == "quickstart"
    assert {r.info.status for r in runs.values()} == {"FINISHED"}
    assert len(run.data.params) == 251
    assert run.data.params["long"] == "x" * 6000
    assert run.data.metrics == {"loss": 2.5}
    assert run.data.tags["longreach.skipped_points"] == "1"
    assert run.data.tags["mlflow.note.content"] == "**fine**"
    (dataset,) = [one.dataset for one in run.inputs.dataset_inputs]
    assert (dataset.name, dataset.digest) == ("pack", "012345678901234567890123456789012345")
    assert [one.path for one in client.list_artifacts(run.info.run_id, "figures")] == ["figures/loss.png"]
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "perplexity/scores.json", "type": "table"}]
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "perplexity/scores.json")).read_text())
    assert table == {"columns": ["length", "ppl", "note"], "data": [[512, 20.5, None], [1024, "nan", "short"]]}
    assert (tmp_path / "mlartifacts").is_dir()


def test_what_mlflow_refuses_is_named_and_stops_nothing_else(spools, store, tmp_path, caplog):
    _, spool = spools("train", params={"lr": 1})
    spool.metrics({"good": 1, "bad?": 1})
    spool.artifact(tmp_path / "gone.png")
    upload(spools.folder, store)
    spool.param("lr", 2)
    spool.param("rows", 5)
    spool.metrics({"good": 2}, step=1)
    mirror = upload(spools.folder, store)
    run = runs_of(store, spools.experiment)["train"]
    assert points(store, run, "good") == [(0, 1), (1, 2)]
    assert run.data.params == {"lr": "1", "rows": "5"}
    assert run.data.tags["longreach.skipped_points"] == "1"
    assert (mirror.points, pending_points(spools.folder)) == (1, 0)
    for culprit in ("'bad?'", "gone.png", "'lr'"):
        assert sum(culprit in record.message for record in caplog.records) == 1


def test_a_run_that_mlflow_lost_comes_back_and_one_that_its_user_deleted_does_not(spools, store, tmp_path, empty_store):
    _, kept = spools("kept")
    _, deleted = spools("deleted")
    for spool in (kept, deleted):
        spool.metrics({"loss": 1})
    upload(spools.folder, store)
    client_of(store).delete_run(runs_of(store, spools.experiment)["deleted"].info.run_id)
    deleted.metrics({"loss": 2}, step=1)
    kept.metrics({"loss": 2}, step=1)
    assert Mirror(spools.folder, store).upload(float("inf"), everything=True) == ""
    runs = runs_of(store, spools.experiment)
    assert list(runs) == ["kept"]
    assert points(store, runs["kept"], "loss") == [(0, 1), (1, 2)]
    (tmp_path / "another").mkdir()
    shutil.copy(empty_store, tmp_path / "another" / "mlflow.db")  # as after a lost database, or on another server
    another = default_uri(tmp_path / "another")
    assert Mirror(spools.folder, another).upload(float("inf"), everything=True) == ""
    assert points(another, runs_of(another, spools.experiment)["kept"], "loss") == [(0, 1), (1, 2)]


def test_a_deleted_experiment_holds_up_no_other_and_comes_back_once_it_is_restored(spools, store, caplog):
    client, gone = client_of(store), f"{spools.experiment} gone"
    for name in ("a", "b"):  # in the order of their names, before the run of the other experiment
        path = spools.folder / f"{name}.jsonl"
        Spool.open(path, run=uuid.uuid4().hex, parent=None, experiment=gone, name=name, kind="attempt").end("FINISHED")
    client.delete_experiment(client.create_experiment(gone))
    _, kept = spools("kept")
    kept.metrics({"loss": 1})
    mirror = upload(spools.folder, store)
    assert list(runs_of(store, spools.experiment)) == ["kept"]
    assert pending_points(spools.folder) == 0
    assert sum(f"experiment {gone!r} is deleted: restore it" in record.message for record in caplog.records) == 1
    client.restore_experiment(client.get_experiment_by_name(gone).experiment_id)
    assert Mirror(spools.folder, store).upload(float("inf"), everything=True) == ""
    assert sorted(runs_of(store, gone)) == ["a", "b"]
    client.delete_experiment(client.get_experiment_by_name(spools.experiment).experiment_id)  # a mirror is at work
    _, late = spools("late")
    late.metrics({"loss": 1})
    mirror.upload(float("inf"))
    assert mirror.upload(float("inf")) == ""


def test_a_run_made_twice_by_a_slow_server_becomes_one(spools, store):
    run, spool = spools("train")
    client = client_of(store)
    experiment = client.create_experiment(spools.experiment)
    for _ in range(2):
        client.create_run(experiment, tags={"longreach.run": run}, run_name="train")
    spool.metrics({"loss": 1})
    upload(spools.folder, store)
    assert points(store, runs_of(store, spools.experiment)["train"], "loss") == [(0, 1)]


def test_of_two_mirrors_one_works_and_the_other_says_so(spools, store):
    _, spool = spools("train")
    spool.metrics({"loss": 1})
    first, second = Mirror(spools.folder, store), Mirror(spools.folder, store)
    said = []
    send = first._send
    first._send = lambda *batch: (said.append(second.upload(float("inf"))), send(*batch))
    assert first.upload(float("inf")) == ""
    assert said == [f"another process is uploading {spools.folder}"]
    assert second.upload(float("inf")) == ""
    assert second.points == 0


def test_a_mirror_outlives_its_killed_parent_only_to_finish_and_to_say_so(spools, store):
    _, spool = spools("train")
    for step in range(100):
        spool.metrics({"loss": step}, step)
    code = """if True:
        import os, signal, sys
        from longreach.infra.mirror import start_mirror
        print(start_mirror(sys.argv[1], sys.argv[2]).pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", code, str(spools.folder), store]
    driver = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert driver.returncode == -signal.SIGKILL
    wait_until(lambda: not Path(f"/proc/{int(driver.stdout)}").exists())
    run = runs_of(store, spools.experiment)["train"]
    assert points(store, run, "loss") == [(step, step) for step in range(100)]
    assert run.info.status == "KILLED"


@pytest.mark.parametrize(
    ("work", "works_s", "options", "finishes"),
    [
        ("events", 3, {"patience_s": 1.5}, True),  # a slow server: as long as something arrives it may go on
        ("one file", 3, {"patience_s": 1.5}, True),
        ("events", 0, {"patience_s": 1.5}, False),
        ("events", 3, {"at_most_s": 1}, False),
    ],
)
def test_a_mirror_is_waited_for_as_long_as_it_uploads(tmp_path, work, works_s, options, finishes):
    code = """if True:
        import pathlib, sys, time
        sys.stdin.read()  # until the parent wants it to end
        file = open("/dev/zero", "rb", buffering=0)
        for number in range(10 * int(sys.argv[2])):
            time.sleep(0.1)
            if sys.argv[3] == "events":
                pathlib.Path(sys.argv[1], "train.jsonl.offset").write_text(str(number))
            else:
                file.read(1000)
        if sys.argv[2] == "0":
            time.sleep(60)
    """
    command = [sys.executable, "-c", code, str(tmp_path), str(works_s), work]
    process = MirrorProcess(command, stdin=subprocess.PIPE)
    process.spool_dir = tmp_path
    stop_mirror(process, **options)
    assert (process.returncode == 0) == finishes


def test_a_mirror_without_a_parent_goes_on_as_long_as_it_uploads(monkeypatch, caplog):
    monkeypatch.setattr("longreach.infra.mirror._input_closed", lambda wait_s: True)
    for problems, ends in ((["time is up", "time is up", ""], True), (["time is up", "away"], False)):
        mirror = SimpleNamespace(points=0, batches=0, closed=False, left=list(problems))

        def upload(deadline_s, mirror=mirror):
            problem = mirror.left.pop(0)
            mirror.batches += problem == "time is up"
            return problem

        mirror.upload, mirror.close_runs = upload, lambda mirror=mirror: setattr(mirror, "closed", True)
        _follow(mirror)
        assert (mirror.closed, mirror.left) == (ends, [])
    assert "away; events stay in the spool" in caplog.text


def test_without_a_server_sync_says_why_within_its_time(spools):
    _, spool = spools("train")
    spool.metrics({"loss": 1, "lr": 2})
    started = time.monotonic()
    with refusing_port() as port:
        report = sync(spools.folder, f"http://127.0.0.1:{port}", timeout_s=3)
    assert (report.runs, report.points, report.pending) == (1, 0, 2)
    assert "refused" in report.problem
    assert time.monotonic() - started < 30


def test_the_mirror_does_not_inherit_the_registrys_patience_but_the_users(monkeypatch, tmp_path, empty_store):
    """A repeated "create run" would make two: in the mirror only its own loop repeats."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", default_uri(tmp_path))
    for name in registry.CLIENT_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    registry.connect()
    assert os.environ.items() >= registry.CLIENT_SETTINGS.items()
    assert not registry.CLIENT_SETTINGS.keys() & _environment().keys()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    assert _environment()["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"


def test_a_folder_of_the_users_called_infra_is_not_the_mirrors(tmp_path):
    (tmp_path / "infra").mkdir()
    (tmp_path / "infra/__init__.py").write_text("raise SystemExit('the users own')")
    command = [*_command(tmp_path, default_uri(tmp_path)), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_tracking_and_mirror_does_not_import_mlflow():
    code = "import sys, longreach.infra.tracking, longreach.infra.mirror; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("begin", [start_mirror, sync])
def test_a_password_in_the_uri_is_refused_and_not_repeated(begin, tmp_path):
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as refusal:
        begin(tmp_path, "https://me:hunter2@mlflow.example")
    assert "hunter2" not in str(refusal.value)
