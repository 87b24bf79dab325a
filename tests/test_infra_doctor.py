"""What `longreach doctor` says about a machine."""

import json
import socket
import threading
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from longreach.infra.artifact import RemoteStore
from longreach.infra.doctor import check_requirements, doctor


def checks(root=".", port=5000):
    return {check.name: check for check in doctor(root, port)}


def test_doctor_is_content_with_the_machine_that_runs_the_tests(tmp_path):
    assert [check for check in doctor(tmp_path) if check.needed and not check.ok] == []


def test_packages_outside_of_their_ranges_are_named_with_both_versions():
    fine, *rest = check_requirements(["numpy>=1", "no-such-extra>=1; extra == 'gpu'"])
    assert fine.ok
    assert rest == []
    wrong = check_requirements(["numpy>=999", "no-such-package-at-all", "torch"])
    assert [(check.name, check.ok) for check in wrong] == [("numpy", False), ("no-such-package-at-all", False)]
    assert np.__version__ in wrong[0].detail
    assert ">=999" in wrong[0].detail


def test_unwritable_home_and_root_are_found(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("HOME", str(file))
    found = checks(file / "store")
    assert not found["home"].ok
    assert not found["root"].ok
    assert str(file) in found["root"].detail
    assert checks(tmp_path / "not" / "made" / "yet")["root"].ok


def test_a_full_disk_is_not_writable(tmp_path, monkeypatch):
    with Path("/dev/full").open("wb", buffering=0) as full:  # every write fails
        monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: nullcontext(full))
        found = checks(tmp_path)["root"]
    assert (found.ok, "is not writable: No space left on device" in found.detail) == (False, True)


def test_an_object_store_is_tried_with_an_object_which_is_deleted_again(s3_root, monkeypatch):
    import s3fs

    root = f"{s3_root}/tried"
    assert checks(root)["root"].ok
    fs = s3fs.S3FileSystem()
    assert fs.find("longreach/tried") == []
    missing = checks("s3://no-such-bucket-of-ours/tried")["root"]
    assert not missing.ok
    assert "no-such-bucket-of-ours" in missing.detail
    monkeypatch.setattr(RemoteStore, "create", lambda self, path, body: self.fs.pipe_file(path, body))
    assert "two runs could both publish" in checks(root)["root"].detail
    assert fs.find("longreach/tried") == []


def test_a_stale_ray_cluster_file_is_found_and_a_live_one_is_not_called_stale(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert checks()["ray"].ok
    file = tmp_path / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as cluster:
        file.write_text(f"127.0.0.1:{cluster.getsockname()[1]}")
        assert checks()["ray"].ok
    stale = checks()["ray"]
    assert not stale.ok
    assert str(file) in stale.fix


def test_the_port_of_the_ui_is_reported_in_use_only_when_it_is():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not checks(port=port)["port"].ok
    assert checks(port=port)["port"].ok


RAY = {"/api/version": {"version": "4", "ray_version": "2.60.0"}}
MLFLOW = {"/api/2.0/mlflow/experiments/search": {"experiments": []}}


@contextmanager
def listening(host, answers, status=200):
    """A server that answers these paths, and 404 elsewhere; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status if self.path in answers else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answers.get(self.path, "elsewhere")).encode())

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer((host, 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("answers", "name"), [(RAY, "Ray's dashboard"), (MLFLOW, "MLflow")])
def test_a_server_that_other_machines_reach_without_a_login_is_a_fault(answers, name, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://192.0.2.1:9")
    with listening("0.0.0.0", answers) as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://tracking.example.org:{port}")
        found = checks()["open"]
    assert not found.ok
    assert found.needed, "doctor ends with exit code 1"
    assert f"{name} at 0.0.0.0:{port}" in found.detail
    assert "127.0.0.1" in found.fix
    assert checks()["open"].ok


@pytest.mark.parametrize(
    ("host", "answers", "status"),
    [("127.0.0.1", RAY, 200), ("0.0.0.0", RAY, 401), ("0.0.0.0", MLFLOW, 401), ("0.0.0.0", {}, 200)],
    ids=["loopback", "token", "login", "another program"],
)
def test_loopback_logins_and_other_programs_are_no_fault(host, answers, status, monkeypatch):
    with listening(host, answers, status) as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://localhost:{port}")
        assert checks()["open"].ok


def test_what_does_not_speak_http_is_no_fault(monkeypatch):
    with socket.create_server(("0.0.0.0", 0)) as silent:
        port = silent.getsockname()[1]
        threading.Thread(target=lambda: silent.accept()[0].close(), daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://localhost:{port}")
        assert checks()["open"].ok
