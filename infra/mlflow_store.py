"""Where MLflow keeps what it knows: a server, or the embedded store, an SQLite database in the workdir
with a folder of files beside it.

    uri = tracking_uri(recipe.tracking.uri, recipe.store.workdir)  # the recipe's, else the environment's, else embedded
    if away := check_tracking(uri): print(f"MLflow: {away}")
"""

import contextlib
import fcntl
import os
import socket
import sqlite3
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import unquote, urlsplit

from longreach.infra.choices import refuse_password

ARTIFACTS = "mlartifacts"
"""The folder with an embedded store's files, beside its database."""
SCHEMES = ("http", "https", "file", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc")
"""Schemes of the tracking URIs that MLflow takes without a plugin; it also takes a folder's path."""
LOCATIONS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("storage_location", "source"),
}
"""Columns of MLflow's database that hold absolute file locations, by table."""
TRAINING = "?workflowType=machine_learning"
"""Part of the address of MLflow's pages. Without it they open in their view of prompts and traces,
which is empty."""


def prepare_embedded(uri: str) -> None:
    """Create an embedded store if there is none, and update its file locations if it was moved or
    copied. Does nothing for a server.

    MLflow records absolute locations. Without the update, after `mv` a champion would not be found,
    and new files would go to the old folder.
    """
    database = sqlite_path(uri)
    if database is None:
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    if not database.exists():
        _create(database)
        return
    now = (database.parent / ARTIFACTS).as_uri()
    with _opened(database) as connection, connection:
        tables = _tables(connection)
        if not tables.issuperset(LOCATIONS):  # written by an older MLflow, or not complete yet
            return
        homes = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        for (home,) in homes:
            ours = home.startswith("file:///") and home.endswith(f"/{ARTIFACTS}")  # otherwise the user chose it
            if ours and home != now:
                _move_places(connection, home, now)
                print(f"{database.parent} was moved: {home} is now {now} in MLflow's records", file=sys.stderr)


@contextlib.contextmanager
def _opened(database: Path, timeout_s: float = 60) -> Iterator[sqlite3.Connection]:
    """Open MLflow's database. ValueError if a query in the block finds it damaged."""
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=timeout_s)) as connection:
            yield connection
    except sqlite3.OperationalError:  # such as a lock, which is no damage
        raise
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"{database} is damaged ({error}): restore it from a backup, or move it away for an empty one to be made; "
            f"metrics that are not yet in it stay in the workdir's spool folder"
        ) from error


def _tables(connection: sqlite3.Connection) -> set[str]:
    """Return the names of the database's tables."""
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _create(database: Path) -> None:
    """Create an empty MLflow database once, however many processes ask for it at the same time.

    MLflow itself creates it table by table: if two processes do so at once, or one is killed, they
    leave a database that no later start can use. So it gets its name only when it is complete.
    """
    from mlflow import MlflowClient

    with (database.parent / f"{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if database.exists():
            return
        draft = database.with_name(f"{database.name}.draft")
        draft.unlink(missing_ok=True)  # left behind by a process that was killed
        MlflowClient(f"sqlite:///{draft}").search_experiments(max_results=1)
        draft.rename(database)


def _move_places(connection: sqlite3.Connection, before: str, now: str) -> None:
    """Replace the prefix `before` of all file locations in MLflow's database by `now`."""
    size = len(before)
    for table, columns in LOCATIONS.items():
        for column in columns:
            ours = f"{column} = ? OR substr({column}, 1, ?) = ?"
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {ours}",
                (now, size + 1, before, size + 1, before + "/"),
            )


def default_uri(workdir: Path | str) -> str:
    """Return the URI of the embedded store, which needs no server: `{workdir}/mlflow.db`, with
    `mlartifacts` beside it. Raises ValueError if the folder's name has another meaning in a URI."""
    folder = str(Path(workdir).absolute())
    if "?" in folder or unquote(folder) != folder:
        raise ValueError(
            f"MLflow would look for its database elsewhere than in {folder}, since ? and codes such as %20 have "
            f"another meaning in a URI: rename the folder, or set store.workdir or tracking.uri"
        )
    return f"sqlite:///{folder}/mlflow.db"


def tracking_uri(chosen: str | None, workdir: Path | str) -> str:
    """Return the URI of MLflow: the recipe's, else the environment's, else the embedded store's.
    Raises ValueError if it holds a password."""
    return check_tracking_uri(chosen or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(workdir))


def check_tracking_uri(uri: str) -> str:
    """Return the URI. Raises ValueError if it holds a password, or if MLflow has no store for its
    scheme."""
    refuse_password(
        uri,
        "the tracking URI holds a password, which other users can read in the list of processes: set "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead (PGUSER and PGPASSWORD for PostgreSQL)",
    )
    scheme = urlsplit(uri).scheme  # in lower case; empty for a folder's path
    rest = uri.partition(":")[2]
    known = scheme.partition("+")[0] in SCHEMES or entry_points(group="mlflow.tracking_store", name=scheme)
    if scheme and not known:
        place = uri.rpartition("@")[2]  # without a user and password before it
        raise ValueError(
            f"the tracking URI {place!r} begins with none of MLflow's schemes ({', '.join(SCHEMES)}): write the "
            f"address of a server as http://{place.rpartition('://')[2]}"
        )
    if scheme == "sqlite" and not rest.startswith("///"):
        raise ValueError(f"the tracking URI {uri!r} names no file: write three slashes, e.g. sqlite:///mlflow.db")
    return uri


def sqlite_path(uri: str) -> Path | None:
    """Return the database file of an embedded store, or None for a server."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def check_tracking(uri: str, timeout_s: float = 5.0) -> str:
    """Return why MLflow cannot be used now, or "" if it can. Raises ValueError if a server rejects
    the credentials, or the embedded store is damaged."""
    database = sqlite_path(uri)
    if database is not None and database.exists():
        try:
            with _opened(database, timeout_s) as connection:
                _tables(connection)
        except sqlite3.OperationalError as error:  # locked, or not to be opened
            return f"{database} does not answer ({error})"
    if not uri.startswith(("http://", "https://")):
        return ""
    import requests

    asked = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search"
    login, headers, given = None, {}, "a request without user and password"
    if user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        login = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
        given = f"user {user!r} with the password given"
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    try:
        answer = requests.post(asked, json={"max_results": 1}, auth=login, headers=headers, timeout=timeout_s)
    except requests.RequestException as error:
        return f"{uri} does not respond ({type(error).__name__})"
    if answer.status_code in (401, 403):
        raise ValueError(
            f"MLflow at {uri} rejects {given} (HTTP {answer.status_code}): set MLFLOW_TRACKING_USERNAME and "
            f"MLFLOW_TRACKING_PASSWORD, or set tracking.enabled=false and upload the metrics later with longreach sync"
        )
    return "" if answer.ok else f"{uri} responds with HTTP {answer.status_code}"


def first_page(database: Path) -> str:
    """Return the start page, as the last part of an address: the models of the latest experiment, its
    runs if it has no models, or the list of experiments if nothing has run."""
    newest = "SELECT experiment_id FROM runs WHERE lifecycle_stage = 'active' ORDER BY start_time DESC LIMIT 1"
    with _opened(database) as connection:
        found = connection.execute(newest).fetchone()
        if found is None:
            return f"#/experiments{TRAINING}"
        models = "SELECT 1 FROM logged_models WHERE experiment_id = ? AND lifecycle_stage = 'active' LIMIT 1"
        page = "models" if connection.execute(models, found).fetchone() else "runs"
    return f"#/experiments/{found[0]}/{page}{TRAINING}"


def check_port(port: int) -> None:
    """Raise ValueError if a server cannot listen on a port of this machine. MLflow itself would exit
    as if nothing had failed."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        raise ValueError(f"port {port}: {os.strerror(error.errno or 0)}: choose another one with --port") from None


def ui_command(workdir: Path | str, port: int = 5000) -> list[str]:
    """Return the command that shows the embedded store in a browser on this machine. It listens on
    127.0.0.1 only, since MLflow asks for no password."""
    artifacts = Path(workdir).absolute() / ARTIFACTS
    return [
        *("env", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", "MLFLOW_DISABLE_TELEMETRY=true"),  # saves 7 processes
        "PYTHONSAFEPATH=1",  # keeps MLflow's processes from importing a user's `evaluation.py` as their own module
        *(sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", default_uri(workdir)),
        *("--artifacts-destination", artifacts.as_uri()),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
    ]
