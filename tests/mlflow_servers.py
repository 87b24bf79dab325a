"""MLflow servers and PostgreSQL for tests: real processes on the loopback interface."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from longreach.infra.mlflow_store import ui_command

PASSWORD = "a-long-password-of-tests"
PATIENCE_S = 60
"""Generous for what takes seconds, since the machine may be busy."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextlib.contextmanager
def refusing_port() -> Iterator[int]:
    """Give the block a port that refuses connections, and that no other process can get meanwhile."""
    with socket.socket() as bound:  # it does not listen
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


class Server:
    """The MLflow server that `longreach ui` starts; tests can kill it and start it again.

    database: a backend other than the embedded one. files: another location for artifacts, with its keys in `env`.
    login: require a user and a password (mlflow's basic-auth).
    """

    def __init__(
        self, workdir: Path, database: str = "", files: str = "", env: dict[str, str] | None = None, login: bool = False
    ) -> None:
        self.workdir, self.port, self.login, self.env = workdir, free_port(), login, env or {}
        self.instead = {"--backend-store-uri": database, "--artifacts-destination": files}
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = ui_command(self.workdir, port=self.port)
        for option, value in self.instead.items():
            if value:
                command[command.index(option) + 1] = value
        command[command.index("ui")] = "server"
        environment = os.environ | self.env
        if self.login:
            command += ["--app-name", "basic-auth"]
            ini = self.workdir / "auth.ini"
            ini.write_text(
                f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{self.workdir}/auth.db\n"
                f"admin_username = admin\nadmin_password = {PASSWORD}\n"
                f"authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            )
            environment |= {"MLFLOW_AUTH_CONFIG_PATH": str(ini), "MLFLOW_FLASK_SERVER_SECRET_KEY": "of-tests"}
        quiet = {"stdout": (self.workdir / "server.log").open("ab"), "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, start_new_session=True, cwd=self.workdir, env=environment, **quiet)
        wait_until(self.answers)

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """Run a PostgreSQL server on loopback; yields its SQLAlchemy URL. Skips the test if PostgreSQL is not installed."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        assert os.environ.get("CI") != "true", "postgresql is missing, which `make tools` installs"
        pytest.skip("PostgreSQL is not installed: make tools")
    folder, port = Path(tempfile.mkdtemp(prefix="longreach-postgres-")), free_port()
    as_user: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        as_user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")

    def program(name: str, *arguments: str) -> None:
        command = [*as_user, str(programs[-1] / name), "-D", str(folder / "data"), *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=folder, timeout=PATIENCE_S)

    program("initdb", "-U", "longreach", "--auth=trust", "--no-sync")
    options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
    program("pg_ctl", "start", "-w", "-o", options, "-l", str(folder / "log"))
    try:
        yield f"postgresql+psycopg://longreach@127.0.0.1:{port}/postgres"
    finally:
        program("pg_ctl", "stop", "-m", "immediate")
        shutil.rmtree(folder, ignore_errors=True)
