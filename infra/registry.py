"""MLflow's registry: models as it lists and ranks them, versions by name, and the alias `champion`
that the gate moves.

Everything here may be repeated: a model is found again by its tag `longreach.model`, a version by
its fingerprint. Others may move an alias at any time, so a move names the version that it expects
behind the alias, and is refused if another one took its place. MLFLOW_TRACKING_URI names the
server.

    python -c "from longreach.infra.registry import champion; print(champion('quickstart-longlora'))"
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import sqlite3
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from longreach.infra.choices import refuse_password
from longreach.infra.files import link_or_copy

RUN_TAG = "longreach.run"
ARTIFACTS = "mlartifacts"
"""The folder of an embedded store's files, beside its database."""
CHAMPION, PREVIOUS = "champion", "previous"
MODEL, FINGERPRINT = "longreach.model", "longreach.fingerprint"
BASE, DOCUMENTS, ROLLED_BACK = "longreach.base", "longreach.documents", "longreach.rolled_back"
"""Tags of a version: its model, its release, what that was made from (a model's source, a digest of
texts), and whether people took it back."""
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "60", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""MLflow's settings for this process, unless the user's own say otherwise; the mirror has its
own."""
NOT_IN_NAMES = re.compile(r"[^\w-]+")


class RegistryAway(ValueError):
    """The model registry cannot be asked now."""


class AliasMoved(RuntimeError):
    """Another model became champion while this one was measured against the former."""


def connect() -> Any:
    """Return an MlflowClient that gives up after a minute or two; MLflow's own default is many
    minutes."""
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # else it prints a line for each table that it creates
    client = MlflowClient()
    prepare_embedded(client.tracking_uri)
    return client


LOCATIONS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("storage_location", "source"),
}
"""Columns of MLflow's database that hold absolute places of files, by table."""


def prepare_embedded(uri: str) -> None:
    """Make an embedded store if there is none, and mend its places if it was moved or copied; a
    server needs neither.

    MLflow writes down where files are from the root of the disk on. After `mv` a champion would not
    be found, and new files would go to the folder's old place.
    """
    database = sqlite_path(uri)
    if database is None:
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    if not database.exists():
        _create(database)
        return
    now = (database.parent / ARTIFACTS).as_uri()
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables.issuperset(LOCATIONS):  # of an older MLflow, or not made yet
            return
        homes = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        for (home,) in homes:
            ours = home.startswith("file:///") and home.endswith(f"/{ARTIFACTS}")  # else of the user's own choice
            if ours and home != now:
                _move_places(connection, home, now)
                print(f"{database.parent} was moved: {home} is {now} in MLflow's records now", file=sys.stderr)


def _create(database: Path) -> None:
    """Make an empty MLflow database once, however many processes ask for it at the same time.

    MLflow itself makes it table by table: of two that do so at once, or one that is killed, remains
    what no later start can use. So it gets its name when it is whole.
    """
    from mlflow import MlflowClient

    with (database.parent / f"{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if database.exists():
            return
        draft = database.with_name(f"{database.name}.draft")
        draft.unlink(missing_ok=True)  # somebody's who was killed
        MlflowClient(f"sqlite:///{draft}").search_experiments(max_results=1)
        draft.rename(database)


def _move_places(connection: sqlite3.Connection, before: str, now: str) -> None:
    """Replace the beginning `before` of all places of files in MLflow's database."""
    size = len(before)
    for table, columns in LOCATIONS.items():
        for column in columns:
            ours = f"{column} = ? OR substr({column}, 1, ?) = ?"
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {ours}",
                (now, size + 1, before, size + 1, before + "/"),
            )


def default_uri(workdir: Path | str) -> str:
    """Return the URI of the embedded store: `{workdir}/mlflow.db`, with `mlartifacts` beside it; no
    server."""
    return f"sqlite:///{Path(workdir).absolute()}/mlflow.db"


def tracking_uri(chosen: str | None, workdir: Path | str) -> str:
    """Return the URI of MLflow: the recipe's, the environment's or the embedded one. ValueError: a
    password."""
    return check_tracking_uri(chosen or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(workdir))


def check_tracking_uri(uri: str) -> str:
    """Return the URI; ValueError if it holds a password."""
    return refuse_password(
        uri,
        "the tracking URI holds a password, which other users can read in the list of processes: put it into "
        "MLFLOW_TRACKING_PASSWORD, the user into MLFLOW_TRACKING_USERNAME (PGPASSWORD, PGUSER for PostgreSQL)",
    )


def sqlite_path(uri: str) -> Path | None:
    """Return the database file of an embedded store, None for a server."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def experiment_id(client: Any, name: str) -> str:
    """Return an experiment's id; it is made if it is missing. Raises ValueError: it was deleted."""
    if experiment := client.get_experiment_by_name(name):
        if experiment.lifecycle_stage == "deleted":
            raise ValueError(f"experiment {name!r} is deleted: restore it in MLflow, or choose another name")
        return experiment.experiment_id
    database = sqlite_path(client.tracking_uri)
    artifacts = (database.parent / ARTIFACTS).as_uri() if database else None
    kind = {"mlflow.experimentKind": "custom_model_development"}  # else its page shows prompts and traces
    return client.create_experiment(name, artifacts, tags=kind)


def run_of(client: Any, experiment_id: str, run: str) -> str | None:
    """Return MLflow's id of a spooled run; None if it is not uploaded yet."""
    runs = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{run}'")
    return runs[0].info.run_id if runs else None


def check_login(uri: str, timeout_s: float = 5.0) -> str:
    """Return why a tracking server cannot be asked, "" if it can. Raises ValueError: it refuses the
    login."""
    if not uri.startswith(("http://", "https://")):
        return ""
    import requests

    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    login = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None
    asked = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search"
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token and not login else {}
    try:
        answer = requests.post(asked, json={"max_results": 1}, auth=login, headers=headers, timeout=timeout_s)
    except requests.RequestException as error:
        return f"{uri} does not answer ({type(error).__name__})"
    if answer.status_code in (401, 403):
        given = f"user {user!r} with the password given" if user else "a request without user and password"
        raise ValueError(
            f"MLflow at {uri} refuses {given} (HTTP {answer.status_code}): set MLFLOW_TRACKING_USERNAME and "
            f"MLFLOW_TRACKING_PASSWORD, or leave tracking.enabled false and send the metrics later with longreach sync"
        )
    return "" if answer.ok else f"{uri} answers HTTP {answer.status_code}"


def version_of(name: str) -> Any:
    """Return the version `name@alias` or `name/3`; ValueError if there is none, or MLflow cannot be
    asked."""
    from mlflow.exceptions import MlflowException

    model, _, alias = name.partition("@")
    client = connect()
    try:
        if alias:
            return client.get_model_version_by_alias(model, alias)
        return client.get_model_version(*name.split("/"))
    except MlflowException as error:
        raise ValueError(f"models:/{name}: MLflow at {client.tracking_uri} says: {error.message}") from error


def champion(name: str) -> Any | None:
    """Return the champion's version, None if there is none; RegistryAway if the registry cannot be
    asked."""
    return aliased(connect(), name, CHAMPION)


def aliased(client: Any, name: str, alias: str) -> Any | None:
    """Return the version behind an alias, None if there is none; RegistryAway if the registry
    cannot be asked."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise RegistryAway(
            f"who is {alias} of {name!r} cannot be asked of MLflow at {client.tracking_uri} ({error.message}): start "
            f"it, or run without the gate (--set promote=)"
        ) from error


def log_model(
    client: Any, experiment_id: str, run_id: str | None, name: str, tags: Mapping[str, str], folder: Path | None = None
) -> Any:
    """Return the LoggedModel with this MODEL tag; if it is missing it is made, with the files of
    `folder`."""
    models = client.search_logged_models([experiment_id], f"tags.`{MODEL}` = '{tags[MODEL]}'")
    if models:
        model = models[0]
    else:
        plain_name = NOT_IN_NAMES.sub("-", name).strip("-")
        model = client.create_logged_model(experiment_id, plain_name, run_id, dict(tags))
    if str(model.status) != "READY":
        if folder:
            _upload(client, model, folder)
        model = client.finalize_logged_model(model.model_id, "READY")
    return model


def _upload(client: Any, model: Any, folder: Path) -> None:
    """Upload a model's files; where MLflow's artifacts are local files, link the published ones: no
    second copy."""
    place = urlsplit(model.artifact_location)
    if place.scheme not in ("", "file"):
        client.log_model_artifacts(model.model_id, str(folder))
        return
    shutil.copytree(folder, unquote(place.path), copy_function=link_or_copy, dirs_exist_ok=True)


def register(client: Any, name: str, model: Any, run_id: str | None, tags: Mapping[str, str], about: str = "") -> Any:
    """Return the version of `name` that a LoggedModel is; it is made if it is missing."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"models:/{model.model_id}"
    versions = client.search_model_versions(f"name = '{name}'")
    if same := [v for v in versions if v.source == source]:
        return max(same, key=lambda v: int(v.version))
    made = client.create_model_version(name, source, run_id, dict(tags), description=about, model_id=model.model_id)
    # A server writes this itself; without one, the list of models would not say which are
    # registered.
    named = {"mlflow.modelVersions": json.dumps([{"name": name, "version": str(made.version)}])}
    client.set_logged_model_tags(model.model_id, named)
    return made


def aliased_fingerprints() -> set[str]:
    """Return the fingerprints of the releases that any alias of any model names; ValueError: MLflow
    cannot be asked."""
    database = sqlite_path(os.environ["MLFLOW_TRACKING_URI"])
    if database and not database.exists():  # to ask would create it
        return set()
    from mlflow.exceptions import MlflowException

    client, fingerprints = connect(), set()
    token: str | None = None
    try:
        while token != "":
            models = client.search_registered_models(page_token=token)
            for model in models:
                for version in set(model.aliases.values()):
                    fingerprints.add(client.get_model_version(model.name, version).tags.get(FINGERPRINT, ""))
            token = models.token or ""
    except MlflowException as error:
        raise ValueError(
            f"MLflow at {client.tracking_uri} cannot be asked which models have aliases ({error.message}): start it, "
            "or name the one that knows them in MLFLOW_TRACKING_URI"
        ) from error
    return fingerprints


def move(client: Any, name: str, version: str, expected: str | None) -> None:
    """Make a version champion; the one that was becomes `previous`. `expected`: the version that is
    champion, None if there is none. Raises AliasMoved: it is another one; nothing was changed."""
    now = aliased(client, name, CHAMPION)
    if now and str(now.version) == version:  # a repeated move
        return
    if (now and str(now.version)) != expected:
        raise AliasMoved(
            f"champion of {name} is version {now and now.version}, the challenger was measured against version "
            f"{expected}: run again, to measure it against the new one"
        )
    if now:
        client.set_registered_model_alias(name, PREVIOUS, now.version)
    client.set_registered_model_alias(name, CHAMPION, version)


def rolled_back(name: str, fingerprint: str) -> str | None:
    """Return the version of a release if people took it back, else None."""
    for version in connect().search_model_versions(f"name = '{name}'"):
        if version.tags.get(FINGERPRINT) == fingerprint and version.tags.get(ROLLED_BACK):
            return str(version.version)
    return None


def rollback(name: str) -> tuple[str, str]:
    """Swap champion and `previous`; return both versions, the former first. Raises ValueError: one
    is missing."""
    client = connect()
    now, before = aliased(client, name, CHAMPION), aliased(client, name, PREVIOUS)
    if not now or not before or now.version == before.version:
        raise ValueError(
            f"{name!r} has {'no champion' if not now else 'no previous champion'} in MLflow at {client.tracking_uri}: "
            f"nothing to go back to"
        )
    client.set_model_version_tag(name, now.version, ROLLED_BACK, "true")
    client.delete_model_version_tag(name, before.version, ROLLED_BACK)
    client.set_registered_model_alias(name, CHAMPION, before.version)
    client.set_registered_model_alias(name, PREVIOUS, now.version)
    return str(now.version), str(before.version)  # the embedded store gives numbers
