"""Submitting: what is sent and what is not, and a real Ray head on loopback that takes, follows and stops jobs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import s3fs
import yaml
from mlflow_servers import free_port, refusing_port, wait_until

from longreach.infra import jobs
from longreach.infra.jobs import Submission, check_address, pinned, token, whereabouts
from longreach.pipelines.cli import main

ROOT = Path(__file__).parent.parent
TOKEN = "a-token-of-tests-0123456789abcdef"
CANARIES = {
    "MLFLOW_TRACKING_PASSWORD": "canary-of-mlflow",
    "LONGREACH_NOTIFY_TOKEN": "canary-of-the-webhook",
    "AWS_SECRET_ACCESS_KEY": "canary-of-s3",
    "RAY_AUTH_TOKEN": TOKEN,
}
ELSEWHERE = "http://192.0.2.1:8265"
S3 = ("--set", "store.root=s3://bucket/prefix", "--no-plan")


def longreach(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command."""
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert exit_.value.code is None or isinstance(exit_.value.code, int)
    return exit_.value.code or 0, out, err


# ---- what is sent


def test_a_dry_run_says_what_would_be_sent_and_needs_no_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = longreach(
        capsys, "submit", "quickstart", "--address", ELSEWHERE, "--dry-run", *S3, "--set", "finetune.steps=3"
    )
    sent = json.loads(out)
    assert code == 0
    words = "exec python -m longreach.pipelines run recipe.yaml "
    words += "--set store.root=s3://bucket/prefix --set finetune.steps=3 "
    assert sent["entrypoint"].startswith(words)
    assert sent["entrypoint"].endswith("--address auto --no-wait")
    assert sent["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    assert "pip" not in sent["runtime_env"]
    package = {f"longreach/{path}" for path in ("__init__.py", "infra/jobs.py", "pipelines/recipes/quickstart.yaml")}
    assert {"recipe.yaml"} | package <= sent["files"].keys()
    assert sum(sent["files"].values()) < 5e6
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    installed = set()
    for package_name, globs in data.items():
        folder = ROOT.joinpath(*package_name.split(".")[1:])
        for path in (path for glob in globs for path in folder.glob(glob)):
            installed.add(f"longreach/{path.relative_to(ROOT)}")
    assert "longreach/pipelines/report/page.html.jinja" in installed
    assert installed <= sent["files"].keys(), "what a wheel carries beside code, a job carries too"
    unwanted = re.compile(r"(^|/)(\.|tests|__pycache__)")
    assert not [path for path in sent["files"] if unwanted.search(path)]


def test_a_dry_run_shows_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store = ("--set", f"store.root={tmp_path}", "--set", f"store.workdir={tmp_path}")
    code, out, err = longreach(capsys, "submit", "quickstart", "--address", "127.0.0.1:8265", "--dry-run", *store)
    stages = {row["stage"]: row["state"] for row in json.loads(out)["plan"]}
    assert code == 0
    assert stages["report"] == "run"
    assert "finetune[longlora]" in err
    assert "training ranks: 2" in err


def test_without_the_stores_keys_the_plan_is_one_clear_error_that_names_the_way_without_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.aws
    s3fs.S3FileSystem.clear_instance_cache()
    code, out, err = longreach(capsys, "submit", "quickstart", "--address", ELSEWHERE, "--dry-run", *S3[:2])
    assert (code, out) == (2, "")
    assert "store 's3://bucket/prefix': Unable to locate credentials" in err
    assert "submit --no-plan" in err


def test_no_secret_of_this_machine_is_sent_shown_or_rendered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    for arguments in (
        ("submit", "quickstart", "--address", ELSEWHERE, "--dry-run", "--install", *S3),
        ("submit", "quickstart", "--render", "k8s", *S3),
        ("schedule", "quickstart", "--cron", "0 3 * * 1", "--to", "cronjob", *S3[:2]),
        ("schedule", "quickstart", "--cron", "0 3 * * 1", "--to", "systemd"),
        ("config", "show", "quickstart"),
        ("config", "show", "quickstart", "--json"),
    ):
        code, out, err = longreach(capsys, *arguments)
        assert code == 0, err
        assert len(out) > 500
        assert not [name for name, value in CANARIES.items() if value in out + err], arguments
    sent = Submission("x", b"name: x", pip=pinned())
    assert "canary" not in json.dumps(sent.runtime_env("folder")) + sent.entrypoint + json.dumps(sent.metadata())


@pytest.mark.parametrize(
    ("recipe", "override"),
    [
        (b"tracking: {uri: 'https://ada:hunter2@mlflow'}", "seed=1"),
        (b"name: x", "tracking.uri=http://:hunter2@host"),
        (b"name: x", "tracking.uri=https://ada@lab.org:hunter2@host"),
    ],
)
def test_a_password_in_what_the_dashboard_shows_is_refused(recipe: bytes, override: str) -> None:
    with pytest.raises(ValueError, match="holds a password") as refused:
        Submission("x", recipe, (override,))
    assert "hunter2" not in str(refused.value)


def test_a_store_of_this_machine_is_refused_elsewhere() -> None:
    local = {"store.root": ".longreach", "store.workdir": ".longreach"}
    with pytest.raises(ValueError, match=r"'\.longreach' is on this machine.*store\.root=s3://"):
        whereabouts(ELSEWHERE, local, shared_disk=False)
    here = str(Path(".longreach").absolute())
    assert whereabouts(ELSEWHERE, local, shared_disk=True) == {"store.root": here, "store.workdir": here}
    assert whereabouts("http://127.0.0.1:8265", local, shared_disk=False)["store.root"] == here
    assert whereabouts(ELSEWHERE, local | {"store.root": "s3://b"}, shared_disk=False) == {
        "store.workdir": jobs.WORKDIR
    }


def test_texts_of_this_machine_are_refused_elsewhere_and_relative_ones_everywhere() -> None:
    texts = {"store.root": "s3://b", "corpus.sources.0.files": "texts/*.txt"}
    with pytest.raises(ValueError, match=r"files 'texts/\*\.txt' is on this machine"):
        whereabouts(ELSEWHERE, texts, shared_disk=False)
    with pytest.raises(ValueError, match="write the absolute path"):
        whereabouts("http://localhost:8265", texts, shared_disk=False)
    assert whereabouts(ELSEWHERE, texts | {"corpus.sources.0.files": "/data/*.txt"}, shared_disk=True) == {}


def test_addresses_of_other_kinds_are_refused_before_anything_is_sent() -> None:
    assert check_address("head") == "http://head:8265"
    assert check_address("https://ray.example.org/") == "https://ray.example.org"
    for wrong in ("auto", "ray://head:10001", "http://"):
        with pytest.raises(ValueError, match="give the dashboard's address"):
            check_address(wrong)


def test_what_is_installed_has_one_version_each_and_no_local_builds() -> None:
    pins = pinned()
    names = [pin.partition("==")[0] for pin in pins]
    assert {"torch", "ray", "aiohttp", "deepspeed"} <= {*names}, "aiohttp comes with ray[default] alone"
    assert len(names) == len({*names})
    assert not [pin for pin in pins if "+" in pin]
    assert "pytest" not in names


def test_a_rayjob_is_rendered_with_its_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = longreach(capsys, "submit", "quickstart", "--render", "k8s", *S3, "--image", "ours:1.2")
    recipe, job = yaml.safe_load_all(out)
    assert code == 0
    assert recipe["data"]["recipe.yaml"].startswith("# quickstart")
    assert "store.root=s3://bucket/prefix" in job["spec"]["entrypoint"]
    assert job["spec"]["entrypoint"].count("store.workdir") == 1
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert head["image"] == "ours:1.2"


def test_nobody_is_asked_who_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    code, _, err = longreach(capsys, "submit", "quickstart", "--address", ELSEWHERE, *S3)
    assert code == 2
    assert "--yes" in err


def test_the_token_is_looked_for_as_ray_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token()[0] is None
    default = tmp_path / ".ray" / "auth_token"
    default.parent.mkdir()
    default.write_text("of-home\n")
    assert token() == ("of-home", str(default))
    (tmp_path / "file").write_text("of-file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
    assert token()[0] == "of-file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-variable")
    assert token() == ("of-variable", "RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"RAY_AUTH_TOKEN_PATH .*gone"):
        token()


def test_no_code_of_a_downloaded_model_is_ever_run() -> None:
    products = [path for room in jobs.PACKAGES for path in (ROOT / room).rglob("*") if path.suffix in jobs.SUFFIXES]
    assert len(products) > 80
    trusting = re.compile(r"trust_remote_code['\"]?\s*[=:]\s*(True|true|yes|1)")
    assert not [str(path) for path in products if trusting.search(path.read_text(encoding="utf-8"))]


def test_nobody_answers_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        refusing_port() as port,
        pytest.raises(ValueError, match="no Ray dashboard responds"),
        jobs.job_client(f"http://127.0.0.1:{port}"),
    ):
        pass


def test_a_head_without_an_agent_is_one_line_that_names_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    def post(self: BaseHTTPRequestHandler) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(500)
        self.end_headers()
        self.wfile.write(
            b"Traceback (most recent call last):\nNo available agent to submit job, please try again later."
        )

    def get(self: BaseHTTPRequestHandler) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": "x"}).encode())

    dashboard = type("Dashboard", (BaseHTTPRequestHandler,), {"do_POST": post, "do_GET": get})
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with ThreadingHTTPServer(("127.0.0.1", 0), dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with (
            pytest.raises(ValueError, match=r"No available agent .* \(HTTP 500\).* port 52365 is taken"),
            jobs.job_client(f"http://127.0.0.1:{server.server_port}") as client,
        ):
            client.submit_job(entrypoint="true")
        server.shutdown()


# ---- a real cluster


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A head of its own: folder, ports and token; the dashboard's address."""
    folder = Path(tempfile.mkdtemp(prefix="lr-", dir="/tmp"))  # Ray's sockets need a short path
    (folder / "token").write_text(TOKEN)
    dashboard = free_port()
    options = {
        "port": free_port(), "dashboard-port": dashboard, "dashboard-host": "127.0.0.1", "node-ip-address": "127.0.0.1",
        "ray-client-server-port": free_port(), "dashboard-agent-listen-port": free_port(),
        "dashboard-agent-grpc-port": free_port(), "metrics-export-port": free_port(), "temp-dir": folder / "ray",
        "num-cpus": 1, "object-store-memory": 100_000_000,
    }  # fmt: skip
    bin_folder = Path(sys.executable).parent
    command = [bin_folder / "ray", "start", "--head", "--block", "--disable-usage-stats"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
    environment = clean | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in options.items())],
            env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_until(lambda: process.poll() is not None or status_of(address) == 401)
        assert process.poll() is None, (folder / "log").read_text()
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")  # of another cluster: what is said wins


def status_of(address: str, path: str = "/api/jobs/", **headers: str) -> int:
    try:
        return urllib.request.urlopen(urllib.request.Request(address + path, headers=headers), timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


class Trivial(Submission):
    """The same files, another command."""

    code: str

    def __init__(self, code: str) -> None:
        super().__init__("trivial", b"name: trivial\n")
        object.__setattr__(self, "code", code)

    @property
    def entrypoint(self) -> str:
        return f"exec python -c '{self.code}'"


@pytest.mark.slow
def test_without_the_token_nothing_is_answered(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert status_of(head) == 401
    assert status_of(head, Authorization=f"Bearer {TOKEN}") == 200
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-wrong-token-of-tests-0123456789")
    for mode in ("token", "disabled"):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        with (
            pytest.raises(ValueError, match=r"rejects.*RAY_AUTH_TOKEN to .*, or RAY_AUTH_TOKEN_PATH") as refused,
            jobs.job_client(head) as client,
        ):
            jobs.listed(client)
        assert "wrong-token" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.usefixtures("trusted")
def test_a_job_runs_the_code_and_recipe_that_came_along_and_its_exit_code_comes_back(
    head: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    code = (
        'import sys; from longreach.infra import jobs; print(jobs.__file__, open("recipe.yaml").read()); sys.exit(75)'
    )
    with jobs.job_client(head) as client:
        job = jobs.submit(client, Trivial(code))
        assert jobs.follow(client, job) == 75
        told = client.get_job_info(job)
    out, err = capfd.readouterr()
    assert re.search(r"working_dir_files/\S+/longreach/infra/jobs\.py name: trivial", out)
    assert "FAILED" in err
    assert not [name for name, value in CANARIES.items() if value in str(told)]


def test_a_log_whose_connection_closes_quietly_is_followed_on_until_the_job_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.job_submission import JobStatus

    # as behind a proxy that hangs up; each connection has the log from its start
    tails = [["step 1\n", "st"], ["step 1\nstep", " 2\n"], ["step 1\n"], ["step 1\nstep 2\n", "done\n"]]

    class Client:
        def get_address(self) -> str:
            return "http://head:8265"

        def get_job_status(self, job: str) -> JobStatus:
            return JobStatus.RUNNING if tails else JobStatus.SUCCEEDED

        async def tail_job_logs(self, job: str) -> Any:
            for text in tails.pop(0):
                if text == "lost":
                    raise RuntimeError("gone")
                yield text

        def get_job_info(self, job: str) -> Any:
            return SimpleNamespace(status=self.get_job_status(job))

    monkeypatch.setattr(jobs, "FOLLOW_AGAIN_S", 0)
    assert jobs.follow(Client(), "job") == 0
    assert capsys.readouterr().out == "step 1\nstep 2\ndone\n"
    tails[:] = [["lost"]]
    with pytest.raises(ValueError, match="keeps running: longreach logs job --address http://head:8265 --follow"):
        jobs.follow(Client(), "job")


@pytest.mark.slow
@pytest.mark.usefixtures("trusted")
def test_the_commands_list_a_job_print_its_log_and_stop_it_with_time_to_finish(
    head: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import signal, sys, time; "
        'end = lambda *_: (time.sleep(5), print("checkpoint written", flush=True), sys.exit(143)); '
        'signal.signal(signal.SIGTERM, end); print("training", flush=True); time.sleep(300)'
    )
    with jobs.job_client(head) as client:
        job = jobs.submit(client, Trivial(code))
        wait_until(lambda: "\ntraining" in client.get_job_logs(job))
        assert re.search(rf"{job} +trivial +RUNNING", longreach(capsys, "jobs", "--address", head)[1])
        assert "was asked to stop" in longreach(capsys, "stop", job, "--address", head)[1]
        wait_until(lambda: client.get_job_status(job).is_terminal())
        code_, out, _ = longreach(capsys, "logs", job, "--address", head)
        assert code_ == 0
        assert "\ncheckpoint written" in out, "killed before its 60 seconds were over"
        assert client.get_job_status(job).value == "STOPPED"
    code_, _, err = longreach(capsys, "logs", "no-such-job", "--address", head)
    assert code_ == 2
    assert "no-such-job" in err


@pytest.mark.slow
def test_a_cluster_that_we_start_asks_for_a_token(cluster: Any) -> None:
    dashboard = f"http://{cluster._private.worker.global_worker.node.webui_url}"
    assert "127.0.0.1" in dashboard
    assert status_of(dashboard) == 401
    assert status_of(dashboard, "/api/version") == 401


def test_time_is_left_for_checkpoints() -> None:
    from longreach.pipelines.signals import GRACE_S

    assert GRACE_S + 10 < jobs.PATIENCE_S
