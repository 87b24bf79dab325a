"""MLflow's model registry: logged models, versions of registered models, and the alias `champion`,
which the gate moves.

Every operation here may be repeated: a model is found again by its tag `longreach.model`, a version
by its model. Another process may move an alias at any time, so a move names the version that it
expects behind the alias, and fails if the alias names another one. MLFLOW_TRACKING_URI names the
server.

    python -c "from longreach.infra.registry import champion; print(champion('quickstart-longlora'))"
"""

import contextlib
import json
import logging
import os
import posixpath
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from longreach.infra.files import link_or_copy
from longreach.infra.lease import holder_name
from longreach.infra.mlflow_store import ARTIFACTS, prepare_embedded, sqlite_path

RUN_TAG = "longreach.run"
CHAMPION, PREVIOUS = "champion", "previous"
MODEL, FINGERPRINT = "longreach.model", "longreach.fingerprint"
BASE, DOCUMENTS, ROLLED_BACK = "longreach.base", "longreach.documents", "longreach.rolled_back"
"""Tags of a version: its model, its release, what the release was made from (the base model's source,
a digest of the documents), and whether a user rolled it back."""
CLIENT_SETTINGS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "60", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""MLflow settings for this process; the user's own environment takes precedence. The mirror has its
own."""
CLAIM = "longreach.promoting"
"""Tag of a version whose promoter is moving the aliases, or is about to."""
CLAIM_S = 400.0
"""Seconds for which a claim that does not change is respected. A promoter needs three requests, each
with two tries of 60 s (CLIENT_SETTINGS). A promoter that was killed leaves its claim behind."""
LOOK_AGAIN_S = 1.0
UPLOAD_S = 3600
"""Longest wait for the response to an uploaded file. A server may first pass the file on, for example
to S3."""
NOT_IN_NAMES = re.compile(r"[^\w-]+")


class RegistryAway(ValueError):
    """The model registry is unreachable."""


class ExperimentDeleted(ValueError):
    """An experiment was deleted in MLflow, and its runs with it."""


class AliasMoved(RuntimeError):
    """Another model became champion while this one was measured against the former champion."""


def connect() -> Any:
    """Return an MlflowClient that gives up after a minute or two. MLflow's default is many minutes."""
    for name, value in CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient, get_tracking_uri
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # otherwise it prints a line for each table that it creates
    prepare_embedded(get_tracking_uri())
    try:
        return MlflowClient()
    except MlflowException as error:  # a database that does not answer, or a scheme without a registry
        kind = RegistryAway if error.get_http_status_code() >= 500 else ValueError
        raise kind(f"cannot connect to MLflow at {os.environ.get('MLFLOW_TRACKING_URI')}: {error.message}") from error


def experiment_id(client: Any, name: str) -> str:
    """Return an experiment's id; the experiment is created if it is missing. Raises
    ExperimentDeleted if it was deleted."""
    if experiment := client.get_experiment_by_name(name):
        if experiment.lifecycle_stage == "deleted":
            raise ExperimentDeleted(f"experiment {name!r} is deleted: restore it in MLflow, or choose another name")
        return experiment.experiment_id
    database = sqlite_path(client.tracking_uri)
    artifacts = (database.parent / ARTIFACTS).as_uri() if database else None
    kind = {"mlflow.experimentKind": "custom_model_development"}  # otherwise its page shows prompts and traces
    return client.create_experiment(name, artifacts, tags=kind)


def run_of(client: Any, experiment_id: str, run: str) -> str | None:
    """Return MLflow's id of a spooled run, or None if it is not uploaded yet."""
    runs = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{run}'")
    return runs[0].info.run_id if runs else None


def version_of(name: str) -> Any:
    """Return the version that `name@alias` or `name/3` names. Raises ValueError if there is none,
    RegistryAway if MLflow is unreachable."""
    model, _, alias = name.partition("@")
    client = connect()
    with _errors_named(client, f"models:/{name}"):
        if alias:
            return client.get_model_version_by_alias(model, alias)
        return client.get_model_version(*name.split("/"))


@contextlib.contextmanager
def _errors_named(client: Any, asked: str) -> Iterator[None]:
    """Turn an MlflowException into RegistryAway if there is no connection or the server failed (5xx),
    else into ValueError, for example after a rejected login. `asked` says what was asked for."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        kind = RegistryAway if error.get_http_status_code() >= 500 else ValueError
        raise kind(f"{asked}: MLflow at {client.tracking_uri} says: {error.message}") from error


def champion(name: str) -> Any | None:
    """Return the champion's version, or None if there is none. Raises RegistryAway if the registry is
    unreachable, ValueError if it rejects the request."""
    return aliased(connect(), name, CHAMPION)


def aliased(client: Any, name: str, alias: str) -> Any | None:
    """Return the version behind an alias, or None if there is none. Raises RegistryAway if the
    registry is unreachable, ValueError if it rejects the request."""
    from mlflow.exceptions import MlflowException

    with _errors_named(client, f"cannot look up the alias {alias} of {name!r}"):
        try:
            return client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def log_model(
    client: Any, experiment_id: str, run_id: str | None, name: str, tags: Mapping[str, str], folder: Path | None = None
) -> Any:
    """Return the LoggedModel with this MODEL tag. If it is missing, it is created with the files of
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
    """Return what `find` finds, else what `make` creates. It is created only once, even if a response
    is lost.

    MLflow's client repeats a request that got no response. If the server did carry it out, the
    repetition creates a second object. So each try is a single request, and `find` is called again
    before the next try.
    """
    from mlflow.exceptions import MlflowException

    found = find()
    if found is not None:
        return found
    with mlflow_setting("MLFLOW_HTTP_REQUEST_MAX_RETRIES", 0):
        try:
            return make()
        except MlflowException as error:
            if error.get_http_status_code() < 500:  # the server has answered
                raise
        time.sleep(LOOK_AGAIN_S)
        found = find()
        return make() if found is None else found


@contextlib.contextmanager
def mlflow_setting(name: str, value: int) -> Iterator[None]:
    """Set one of MLflow's environment variables while a block runs, whatever the user's setting."""
    before = os.environ.get(name)
    os.environ[name] = str(value)
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _upload(client: Any, model: Any, folder: Path) -> None:
    """Upload a model's files, except those that the server already lists with the same size. If
    MLflow's artifacts are local files, hard-link the published files instead of copying them."""
    place = urlsplit(model.artifact_location)
    if place.scheme in ("", "file"):
        shutil.copytree(folder, unquote(place.path), copy_function=link_or_copy, dirs_exist_ok=True)
        return
    for top, _, names in os.walk(folder):
        inside = None if Path(top) == folder else Path(top).relative_to(folder).as_posix()
        listed = client.list_logged_model_artifacts(model.model_id, inside)
        there = {(posixpath.basename(file.path), file.file_size) for file in listed}
        for name in sorted(names):
            file = Path(top, name)
            if (name, file.stat().st_size) not in there:
                with mlflow_setting("MLFLOW_HTTP_REQUEST_TIMEOUT", UPLOAD_S):
                    client.log_model_artifact(model.model_id, str(file), inside)


def register(client: Any, name: str, model: Any, run_id: str | None, tags: Mapping[str, str], about: str = "") -> Any:
    """Return the version of `name` that refers to a LoggedModel; it is created if it is missing."""
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
    # A server writes this tag itself. In an embedded store, without it, the list of models would not
    # show which are registered.
    named = {"mlflow.modelVersions": json.dumps([{"name": name, "version": str(made.version)}])}
    client.set_logged_model_tags(model.model_id, named)
    return made


def aliased_fingerprints() -> set[str]:
    """Return the fingerprints of the releases that any alias of any model names. Raises RegistryAway
    if MLflow is unreachable, ValueError if it rejects the request."""
    database = sqlite_path(os.environ["MLFLOW_TRACKING_URI"])
    if database and not database.exists():  # a request would create it
        return set()
    client, fingerprints = connect(), set()
    token: str | None = None
    with _errors_named(client, "cannot list the models with aliases (MLFLOW_TRACKING_URI may name another MLflow)"):
        while token != "":
            models = client.search_registered_models(page_token=token)
            for model in models:
                for version in set(model.aliases.values()):
                    fingerprints.add(client.get_model_version(model.name, version).tags.get(FINGERPRINT, ""))
            token = models.token or ""
    return fingerprints


def move(client: Any, name: str, version: str, expected: str | None) -> None:
    """Make a version the champion; the former champion becomes `previous`.

    `expected`: the version that is champion now, or None if there is none. Raises AliasMoved if
    another version is champion; nothing is changed then.
    """
    with _exclusive(client, name, version):
        now = aliased(client, name, CHAMPION)
        if now and str(now.version) == version:  # a repeated move
            return
        if (now and str(now.version)) != expected:
            champion = f"the champion of {name} is version {now.version}" if now else f"{name} has no champion"
            measured = f"against version {expected}" if expected else "when there was none"
            raise AliasMoved(
                f"{champion}, but the challenger was measured {measured}: run again to measure it against the new "
                "champion"
            )
        if now:
            client.set_registered_model_alias(name, PREVIOUS, now.version)
        client.set_registered_model_alias(name, CHAMPION, version)


@contextlib.contextmanager
def _exclusive(client: Any, name: str, version: str) -> Iterator[None]:
    """Let one process at a time read a model's aliases and move them.

    A registry cannot compare and set, only set. So this is the one-bit mutual exclusion algorithm of
    Burns and Lamport (1993), which needs only that. A version's bit is its tag CLAIM, and lower
    versions go first. A promoter that waits keeps rewriting its claim, so a claim that does not
    change belongs to a dead promoter.
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
        """Version of another promoter -> its claim, and when this claim was first seen."""

    def claim(self) -> None:
        self.written += 1
        self.client.set_model_version_tag(self.name, str(self.own), CLAIM, f"{holder_name()} {self.written}")

    def withdraw(self) -> None:
        self.client.delete_model_version_tag(self.name, str(self.own), CLAIM)

    def of_others(self, wanted: Callable[[int], bool]) -> list[int]:
        """Return the wanted versions that a live promoter claims. Claims of dead promoters are
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
    """Return the version of a release if a user rolled it back, else None."""
    for version in connect().search_model_versions(f"name = '{name}'"):
        if version.tags.get(FINGERPRINT) == fingerprint and version.tags.get(ROLLED_BACK):
            return str(version.version)
    return None


def rollback(name: str) -> tuple[str, str]:
    """Swap `champion` and `previous`. Return both versions, the former champion first. Raises
    ValueError if one is missing or MLflow rejects a request, RegistryAway if MLflow becomes
    unreachable."""
    client = connect()
    champion = aliased(client, name, CHAMPION)
    if champion is None:
        raise ValueError(f"{name!r} has no champion in MLflow at {client.tracking_uri}: nothing to roll back")
    with _errors_named(client, f"rollback of {name!r}"), _exclusive(client, name, str(champion.version)):
        now, before = aliased(client, name, CHAMPION), aliased(client, name, PREVIOUS)
        if not now or now.version != champion.version:
            raise ValueError(f"the champion of {name!r} was moved by another process: nothing was changed, check it")
        if not before or now.version == before.version:
            raise ValueError(
                f"{name!r} has no previous champion in MLflow at {client.tracking_uri}: nothing to roll back to"
            )
        client.set_model_version_tag(name, now.version, ROLLED_BACK, "true")
        client.delete_model_version_tag(name, before.version, ROLLED_BACK)
        client.set_registered_model_alias(name, CHAMPION, before.version)
        client.set_registered_model_alias(name, PREVIOUS, now.version)
    return str(now.version), str(before.version)  # the embedded store returns numbers
