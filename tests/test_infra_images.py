"""Images and the compose file: pinned, without root, without secrets; and MLflow's own command, started for real."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from mlflow_servers import free_port, postgresql, wait_until

ROOT = Path(__file__).parent.parent
DOCKERFILES = [
    ROOT / "infra/docker/Dockerfile",
    ROOT / "infra/docker/Dockerfile.cuda",
    ROOT / "infra/mlflow/Dockerfile",
]
COMPOSE = ROOT / "infra/mlflow/compose.yaml"
SECRET = re.compile(r"(?i)(password|passwd|token|secret|access_key|credential)")


def instructions(path: Path) -> list[tuple[str, str]]:
    """(INSTRUCTION, the rest) of a Dockerfile, continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found = [line.strip().partition(" ") for line in "\n".join(lines).replace("\\\n", " ").splitlines()]
    return [(word.upper(), rest.strip()) for word, _, rest in found]


def bases(path: Path) -> list[str]:
    """The images outside of the file that its stages start from."""
    args = dict(rest.split("=", 1) for word, rest in instructions(path) if word == "ARG" and "=" in rest)
    stages = {rest.split(" AS ")[1] for word, rest in instructions(path) if word == "FROM" and " AS " in rest}
    named = [rest.split(" AS ")[0] for word, rest in instructions(path) if word == "FROM"]
    named += [m[1] for word, rest in instructions(path) if word == "COPY" and (m := re.search(r"--from=(\S+)", rest))]
    images = [re.sub(r"\$\{(\w+)\}", lambda match: args[match[1]], name) for name in named]
    return [image for image in images if image not in stages]


def is_pinned(image: str) -> bool:
    """A version with at least two numbers, or a digest; `latest` and `3` move."""
    return bool(re.search(r"@sha256:[0-9a-f]{64}$|:v?\d+\.\d+[\w.-]*$", image))


def test_what_counts_as_pinned() -> None:
    assert is_pinned("python:3.11.14-slim-bookworm")
    assert is_pinned(f"python@sha256:{'0' * 64}")
    for image in ("python", "python:latest", "python:3", "python:slim"):
        assert not is_pinned(image), image


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_an_image_is_pinned_runs_as_a_user_has_a_health_check_and_no_secrets(path: Path) -> None:
    lines = instructions(path)
    assert bases(path)
    assert [image for image in bases(path) if not is_pinned(image)] == []
    final = lines[max(i for i, (word, _) in enumerate(lines) if word == "FROM") :]
    users = [rest for word, rest in final if word == "USER"]
    assert users == ["1000:1000"], "a number: Kubernetes' runAsNonRoot cannot read names"
    assert any(word == "HEALTHCHECK" and "CMD" in rest for word, rest in final)
    assert [rest for word, rest in lines if word == "ADD"] == [], "COPY says what it takes; ADD fetches and unpacks"
    variables = [name for word, rest in lines if word in ("ENV", "ARG") for name in re.findall(r"(\w+)(?:=|$)", rest)]
    assert [name for name in variables if SECRET.search(name)] == []
    for word, rest in lines:
        if word == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists" in rest
        if word == "RUN" and re.search(r"pip (install|wheel)", rest):
            assert "constraints.txt" in rest or "--no-deps" in rest, rest
        if word == "RUN":
            assert "://" not in rest, "nothing is fetched past the package managers and their pins"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_an_image_copies_is_there_and_not_ignored(path: Path) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().split("\n") if line and not line.startswith("#")]
    assert rules[0] == "*", "what is not named stays out"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    for word, rest in instructions(path):
        if word == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source.split("/")[0] in allowed, source


def test_secrets_checkouts_and_environments_stay_out_of_the_context_and_the_repository() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().split("\n") if line and not line.startswith("#")]
    for private in (".git", ".venv", ".longreach", "tests", "shared", ".env"):
        assert not any(fnmatch(private, rule[1:]) for rule in rules if rule.startswith("!")), private
    assert rules[-1] == "infra/mlflow/secrets"
    assert "secrets/" in (COMPOSE.parent / ".gitignore").read_text().split()


# ---- compose


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """As docker reads it where its plugin is installed, else as it stands."""
    if (
        shutil.which("docker")
        and subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
    ):
        command = ["docker", "compose", "--file", str(COMPOSE), "config", "--format", "json", "--no-path-resolution"]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    return yaml.safe_load(COMPOSE.read_text())


def test_every_service_is_pinned_watched_and_started_again(compose: dict[str, Any]) -> None:
    assert compose["services"].keys() == {"postgres", "s3", "mlflow"}
    for name, service in compose["services"].items():
        assert is_pinned(service["image"]), name
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert service["restart"] == "unless-stopped", name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not service.get("privileged"), name


def test_ports_are_loopbacks_and_data_is_in_named_volumes(compose: dict[str, Any]) -> None:
    published = {}
    for name, service in compose["services"].items():
        for port in service.get("ports", []):
            host = port["host_ip"] if isinstance(port, dict) else port.rpartition(":")[0].rpartition(":")[0]
            assert host == "127.0.0.1", (name, port)
            published[name] = port
        for volume in service.get("volumes", []):
            source = volume["source"] if isinstance(volume, dict) else volume.partition(":")[0]
            assert source in compose["volumes"], (name, volume)
    assert published.keys() == {"s3", "mlflow"}, "nobody but MLflow talks to Postgres"


def test_secrets_come_from_files_and_stand_nowhere(compose: dict[str, Any]) -> None:
    for secret in compose["secrets"].values():
        assert "secrets/" in secret["file"]
    for name, service in compose["services"].items():
        for variable, value in service.get("environment", {}).items():
            hidden = SECRET.search(variable) and variable != "AWS_ACCESS_KEY_ID"  # a name, not a key
            assert not hidden or value.startswith("/run/secrets/"), (name, variable)
        used = [secret["source"] if isinstance(secret, dict) else secret for secret in service["secrets"]]
        text = json.dumps(service)
        for secret in compose["secrets"]:
            assert (f"/run/secrets/{secret}" in text) == (secret in used), (name, secret)


def test_mlflow_asks_for_a_login_and_knows_its_hosts(compose: dict[str, Any]) -> None:
    mlflow = compose["services"]["mlflow"]
    words = mlflow["command"][0]
    assert "--app-name=basic-auth" in words
    hosts = re.search(r"--allowed-hosts=(\S+)", words)
    assert hosts
    assert "*" not in hosts[1]
    assert {one["condition"] for one in mlflow["depends_on"].values()} == {"service_healthy"}


@pytest.mark.slow
def test_mlflows_command_works_against_a_postgres_and_an_s3_server(compose: dict[str, Any], tmp_path: Path) -> None:
    """The script of the compose file, with other addresses: nobody gets in without a login, and files lie in S3."""
    import boto3
    from moto.server import ThreadedMotoServer

    service, port = compose["services"]["mlflow"], free_port()
    for name in compose["secrets"]:
        (tmp_path / name).write_text(f"a-secret-for-{name}\n")
    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    s3.start()
    endpoint = "http://{}:{}".format(*s3.get_host_and_port())
    client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id="longreach", aws_secret_access_key="x",
                          region_name="us-east-1")  # fmt: skip
    client.create_bucket(Bucket="mlflow")
    with postgresql() as database:
        places = {
            "$$": "$", "/run/secrets": str(tmp_path), "postgresql+psycopg://mlflow@postgres:5432/mlflow": database,
            "0.0.0.0 --port=5000": f"127.0.0.1 --port={port}", "127.0.0.1:5000": f"127.0.0.1:{port}",
        }  # fmt: skip
        script, ini = service["command"][0], (COMPOSE.parent / "auth.ini").read_text()
        for old, new in places.items():
            assert old in script, old
            script, ini = script.replace(old, new), ini.replace(old, new)
        (tmp_path / "auth.ini").write_text(ini)
        environment = os.environ | service["environment"]
        environment |= {"MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "auth.ini"), "MLFLOW_S3_ENDPOINT_URL": endpoint}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with (tmp_path / "log").open("wb") as log:
            command = [*service["entrypoint"], script]
            server = subprocess.Popen(
                command, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
            )
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until(lambda: server.poll() is not None or status(url + "/health") == 200)
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            search, login = (
                f"{url}/api/2.0/mlflow/experiments/search?max_results=1",
                ("admin", "a-secret-for-admin_password"),
            )
            assert status(search) == 401
            assert status(search, auth=("admin", "wrong")) == 401
            assert status(search, auth=login) == 200
            assert status(search, auth=login, headers={"Host": "evil.example.org"}) == 403
            file = f"{url}/api/2.0/mlflow-artifacts/artifacts/x.txt"
            assert requests.put(file, data=b"of the run", auth=login, timeout=30).status_code == 200
            assert client.get_object(Bucket="mlflow", Key="x.txt")["Body"].read() == b"of the run"
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            s3.stop()


def status(url: str, **options: Any) -> int:
    try:
        return requests.get(url, timeout=30, **options).status_code
    except requests.RequestException:
        return 0
