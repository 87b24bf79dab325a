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
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from longreach.infra.choices import refuse_password
from longreach.infra.files import link_or_copy
from longreach.infra.lease import holder_name

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
CLAIM = "longreach.promoting"
"""Tag of a version whose promoter moves the aliases now, or is about to."""
CLAIM_S = 400.0
"""How long a claim that does not change is respected. A promoter needs three requests, each of them
tried twice for 60 s (PATIENCE); one that was killed leaves its claim behind."""
LOOK_AGAIN_S = 1.0
NOT_IN_NAMES = re.compile(r"[^\w-]+")


class RegistryAway(ValueError):
    """The model registry cannot be asked now."""


class ExperimentDeleted(ValueError):
    """An experiment was deleted in MLflow, and its runs with it."""


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
    server. ValueError: the folder's name means something else in a URI."""
    folder = str(Path(workdir).absolute())
    if "?" in folder or unquote(folder) != folder:
        raise ValueError(
            f"MLflow would look for its database elsewhere than in {folder}, since ? and %20 mean something else in "
            f"its address: give the folder another name, or set store.workdir or tracking.uri"
        )
    return f"sqlite:///{folder}/mlflow.db"


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
    """Return an experiment's id; it is made if it is missing. Raises ExperimentDeleted."""
    if experiment := client.get_experiment_by_name(name):
        if experiment.lifecycle_stage == "deleted":
            raise ExperimentDeleted(f"experiment {name!r} is deleted: restore it in MLflow, or choose another name")
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
        return f"{uri} does not answer ({type(error).__name__})"
    if answer.status_code in (401, 403):
        raise ValueError(
            f"MLflow at {uri} refuses {given} (HTTP {answer.status_code}): set MLFLOW_TRACKING_USERNAME and "
            f"MLFLOW_TRACKING_PASSWORD, or leave tracking.enabled false and send the metrics later with longreach sync"
        )
    return "" if answer.ok else f"{uri} answers HTTP {answer.status_code}"


def version_of(name: str) -> Any:
    """Return the version `name@alias` or `name/3`; ValueError if there is none, RegistryAway if MLflow
    cannot be asked."""
    model, _, alias = name.partition("@")
    client = connect()
    with _answers(client, f"models:/{name}"):
        if alias:
            return client.get_model_version_by_alias(model, alias)
        return client.get_model_version(*name.split("/"))


@contextlib.contextmanager
def _answers(client: Any, asked: str) -> Iterator[None]:
    """Raise an MlflowException as RegistryAway without a connection or after a fault of the server's
    own (5xx), else, such as after a refused login, as ValueError; `asked` says what was asked for."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        kind = RegistryAway if error.get_http_status_code() >= 500 else ValueError
        raise kind(f"{asked}: MLflow at {client.tracking_uri} says: {error.message}") from error


def champion(name: str) -> Any | None:
    """Return the champion's version, None if there is none; RegistryAway if the registry cannot be
    asked, ValueError if it refuses to answer."""
    return aliased(connect(), name, CHAMPION)


def aliased(client: Any, name: str, alias: str) -> Any | None:
    """Return the version behind an alias, None if there is none; RegistryAway if the registry
    cannot be asked, ValueError if it refuses to answer."""
    from mlflow.exceptions import MlflowException

    with _answers(client, f"who is {alias} of {name!r} cannot be asked"):
        try:
            return client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def log_model(
    client: Any, experiment_id: str, run_id: str | None, name: str, tags: Mapping[str, str], folder: Path | None = None
) -> Any:
    """Return the LoggedModel with this MODEL tag; if it is missing it is made, with the files of
    `folder`."""

    def find() -> Any | None:
        models = client.search_logged_models([experiment_id], f"tags.`{MODEL}` = '{tags[MODEL]}'")
        return models[0] if models else None

    plain_name = NOT_IN_NAMES.sub("-", name).strip("-")
    model = _made_once(find, lambda: client.create_logged_model(experiment_id, plain_name, run_id, dict(tags)))
    if str(model.status) != "READY":
        if folder:
            _upload(client, model, folder)
        model = client.finalize_logged_model(model.model_id, "READY")
    return model


def _made_once(find: Callable[[], Any | None], make: Callable[[], Any]) -> Any:
    """Return what `find` finds, or else what `make` makes; only once, though an answer may be lost.

    MLflow's client repeats a request that was not answered. The server may have carried it out, and
    then makes a second one: so each try is a single request, and before the next one comes a look.
    """
    from mlflow.exceptions import MlflowException

    found = find()
    if found is not None:
        return found
    with _single_requests():
        try:
            return make()
        except MlflowException as error:
            if error.get_http_status_code() < 500:  # the server has answered
                raise
        time.sleep(LOOK_AGAIN_S)
        found = find()
        return make() if found is None else found


@contextlib.contextmanager
def _single_requests() -> Iterator[None]:
    """Let MLflow's client repeat no request, whatever the user's own setting."""
    repetitions = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    before = os.environ.get(repetitions)
    os.environ[repetitions] = "0"
    try:
        yield
    finally:
        del os.environ[repetitions]
        if before is not None:
            os.environ[repetitions] = before


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

    def find() -> Any | None:
        versions = client.search_model_versions(f"name = '{name}'")
        same = [version for version in versions if version.source == source]
        return max(same, key=lambda version: int(version.version), default=None)

    def make() -> Any:
        return client.create_model_version(name, source, run_id, dict(tags), description=about, model_id=model.model_id)

    made = _made_once(find, make)
    # A server writes this itself; without one, the list of models would not say which are
    # registered.
    named = {"mlflow.modelVersions": json.dumps([{"name": name, "version": str(made.version)}])}
    client.set_logged_model_tags(model.model_id, named)
    return made


def aliased_fingerprints() -> set[str]:
    """Return the fingerprints of the releases that any alias of any model names; RegistryAway: MLflow
    cannot be asked; ValueError: it refuses to answer."""
    database = sqlite_path(os.environ["MLFLOW_TRACKING_URI"])
    if database and not database.exists():  # to ask would create it
        return set()
    client, fingerprints = connect(), set()
    token: str | None = None
    with _answers(client, "which models have aliases cannot be asked (MLFLOW_TRACKING_URI may name another MLflow)"):
        while token != "":
            models = client.search_registered_models(page_token=token)
            for model in models:
                for version in set(model.aliases.values()):
                    fingerprints.add(client.get_model_version(model.name, version).tags.get(FINGERPRINT, ""))
            token = models.token or ""
    return fingerprints


def move(client: Any, name: str, version: str, expected: str | None) -> None:
    """Make a version champion; the one that was becomes `previous`. `expected`: the version that is
    champion, None if there is none. Raises AliasMoved: it is another one; nothing was changed."""
    with _alone(client, name, version):
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


@contextlib.contextmanager
def _alone(client: Any, name: str, version: str) -> Iterator[None]:
    """Let one process at a time look at a model's aliases and move them.

    A registry cannot compare and set, only set. This is the one-bit algorithm of Burns and Lamport
    (1993), which needs no more; a version's bit is its tag CLAIM, and lower versions go first. A
    claim is written anew while its promoter waits, so one that stands still is a dead promoter's.
    """
    claims = _Claims(client, name, int(version))
    try:
        claims.claim()
        while claims.of_others(lambda other: other < claims.own):
            claims.withdraw()
            while claims.of_others(lambda other: other < claims.own):
                time.sleep(LOOK_AGAIN_S)
            claims.claim()
        while claims.of_others(lambda other: other > claims.own):
            time.sleep(LOOK_AGAIN_S)
            claims.claim()
        yield
    finally:
        claims.withdraw()


class _Claims:
    """The claims to move the aliases of one model."""

    def __init__(self, client: Any, name: str, own: int) -> None:
        self.client, self.name, self.own = client, name, own
        self.written = 0
        self.seen: dict[int, tuple[str, float]] = {}
        """Version of another promoter -> its claim, and when it was seen first."""

    def claim(self) -> None:
        self.written += 1
        self.client.set_model_version_tag(self.name, str(self.own), CLAIM, f"{holder_name()} {self.written}")

    def withdraw(self) -> None:
        self.client.delete_model_version_tag(self.name, str(self.own), CLAIM)

    def of_others(self, wanted: Callable[[int], bool]) -> list[int]:
        """Return the wanted versions whose promoters claim and live; claims of dead ones are
        removed."""
        found = []
        for version in self.client.search_model_versions(f"name = '{self.name}'"):
            number, claim = int(version.version), version.tags.get(CLAIM)
            if claim is None or number == self.own or not wanted(number):
                continue
            if number not in self.seen or self.seen[number][0] != claim:
                self.seen[number] = (claim, time.monotonic())
            if time.monotonic() - self.seen[number][1] > CLAIM_S:
                self.client.delete_model_version_tag(self.name, str(number), CLAIM)
            else:
                found.append(number)
        return found


def rolled_back(name: str, fingerprint: str) -> str | None:
    """Return the version of a release if people took it back, else None."""
    for version in connect().search_model_versions(f"name = '{name}'"):
        if version.tags.get(FINGERPRINT) == fingerprint and version.tags.get(ROLLED_BACK):
            return str(version.version)
    return None


def rollback(name: str) -> tuple[str, str]:
    """Swap champion and `previous`; return both versions, the former first. Raises ValueError: one
    is missing, or MLflow refuses; RegistryAway: it went away on the way."""
    client = connect()
    champion = aliased(client, name, CHAMPION)
    if champion is None:
        raise ValueError(f"{name!r} has no champion in MLflow at {client.tracking_uri}: nothing to go back to")
    with _answers(client, f"rollback of {name!r}"), _alone(client, name, str(champion.version)):
        now, before = aliased(client, name, CHAMPION), aliased(client, name, PREVIOUS)
        if not now or now.version != champion.version:
            raise ValueError(f"champion of {name!r} was moved at this very moment: nothing was changed, look at it")
        if not before or now.version == before.version:
            raise ValueError(
                f"{name!r} has no previous champion in MLflow at {client.tracking_uri}: nothing to go back to"
            )
        client.set_model_version_tag(name, now.version, ROLLED_BACK, "true")
        client.delete_model_version_tag(name, before.version, ROLLED_BACK)
        client.set_registered_model_alias(name, CHAMPION, before.version)
        client.set_registered_model_alias(name, PREVIOUS, now.version)
    return str(now.version), str(before.version)  # the embedded store gives numbers
