"""The mirror: a separate process that uploads spooled events (infra/tracking.py) to MLflow.

Outages and killed processes neither lose nor duplicate data. The position up to which a file is
uploaded is written beside it (`<file>.offset`) only after the server has accepted the data. A
replay repeats the same key, value, step and timestamp, which MLflow stores once. A run is found
again by its tag `longreach.run`; if it is not found (another server, `mlflow gc`, a new database),
the file is uploaded from its start. Credentials come from MLFLOW_TRACKING_USERNAME and
MLFLOW_TRACKING_PASSWORD, never from a URI.

    python -m longreach.infra.mirror .longreach/spool --uri sqlite:///$PWD/.longreach/mlflow.db --once
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import math
import os
import posixpath
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from longreach.infra import registry
from longreach.infra.files import write_whole
from longreach.infra.mlflow_store import check_tracking_uri, prepare_embedded
from longreach.infra.tracking import iter_events

POLL_S = 5.0
BACKOFF_S = 20.0
"""Longest pause between two retries while the server is unreachable."""
DRAIN_S = 60.0
"""Seconds without progress, after its parent has ended, until a mirror is given up."""
METRICS_PER_BATCH, PARAMS_OR_TAGS_PER_BATCH = 1000, 100  # MLflow's limits
TRASH = "trash"
"""Replaces the run id if a user deleted the run or its experiment: its events are then skipped."""

ENVIRONMENT = {
    # Our own loop retries, after it has checked what arrived: a repeated "create run" would create
    # two runs. MLflow's defaults are 120 s and 7 retries.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""MLflow settings for the mirror; the user's own environment takes precedence. Uploads of files wait
longer (registry.UPLOAD_S)."""

log = logging.getLogger("longreach.mirror")


@dataclass(frozen=True)
class SyncReport:
    """The result of one synchronisation of a folder. A point is one value of one metric at one step."""

    runs: int
    points: int
    """Points that the server accepted this time; after a kill, some of them for the second time."""
    pending: int
    """Points that the server does not have yet."""
    skipped: int
    """NaN and infinite points, and points that the server rejects permanently (such as an invalid
    name)."""
    problem: str = ""
    """Why points are pending."""


@dataclass
class Position:
    """How much of a file is uploaded: the content of `<file>.offset`."""

    offset: int = 0
    run_id: str = ""
    """The MLflow run that holds the bytes before `offset`."""
    skipped: int = 0
    ended: bool = False
    """Whether the run's end is uploaded."""

    @classmethod
    def of(cls, path: Path) -> Position:
        """Read a file's position. If it is lost or unreadable, the file is uploaded from its start."""
        try:
            return cls(**json.loads(_position_path(path).read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return cls()

    def save(self, path: Path) -> None:
        write_whole(_position_path(path), json.dumps(asdict(self)))


def _position_path(path: Path) -> Path:
    return path.with_name(path.name + ".offset")


def pending_points(spool_dir: Path | str) -> int:
    """Count the finite metric points in a folder's spool files that are not uploaded yet, without
    contacting the server."""
    points = 0
    for path in Path(spool_dir).rglob("*.jsonl"):
        for event, _ in iter_events(path, Position.of(path).offset):
            if event:
                points += len(_finite(event.get("values", {})))
    return points


def _finite(values: dict[str, Any]) -> dict[str, float]:
    """Return the values without NaN and infinities, which spools hold as strings."""
    return {name: value for name, value in values.items() if not isinstance(value, str)}


class Pause(Exception):
    """Nothing more can be uploaded now, for example because time is up. The spool keeps the rest."""


@dataclass
class _Tail:
    """One spool file and its run."""

    path: Path
    start: dict[str, Any]
    run_id: str = ""
    """The id of its MLflow run; empty until this process has looked it up."""
    offset: int = 0
    """Bytes that this process has uploaded, or has found to be uploaded."""


@dataclass
class _Batch:
    """Events of one run that are sent together."""

    metrics: list[Any] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    end: dict[str, Any] | None = None
    skipped: int = 0


class Mirror:
    """Uploads the spool files under a folder. A lock lets only one mirror at a time work in each
    folder, across processes."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder, self.uri = folder, uri
        self.tails: dict[str, _Tail] = {}
        self.points = self.skipped = self.batches = 0
        self._experiments: dict[str, str] = {}
        self._warned: set[str] = set()

    @cached_property
    def client(self) -> Any:
        """An mlflow.MlflowClient, created when there is something to send: the import takes 2 s, a
        new database longer."""
        from mlflow import MlflowClient

        prepare_embedded(self.uri)
        return MlflowClient(tracking_uri=self.uri)

    def upload(self, deadline_s: float, *, everything: bool = False) -> str:
        """Upload all files once. Return why this did not finish, or "" if it did.

        `deadline_s`: as time.monotonic() counts. `everything`: also check whether runs without new
        events still exist.
        """
        self._discover()
        # pipeline runs come last: they refer to models that their stages create
        tails = sorted(self.tails.items(), key=lambda item: item[1].start["kind"] == "pipeline")
        for run, tail in tails:
            if not everything and tail.path.stat().st_size <= tail.offset:
                continue
            if time.monotonic() > deadline_s:
                return "time is up"
            try:
                with _locked(tail.path.parent):
                    self._drain(tail, deadline_s)
            except Pause as pause:
                return str(pause)
            except Exception as error:  # any error of MLflow or its stores is reported and retried
                log.debug("while uploading %s", tail.path, exc_info=True)
                self.tails[run] = self.tails.pop(run)  # goes last in the next pass, so as not to block the others
                tail.run_id = ""
                self._experiments.clear()  # an experiment may have been deleted, and its runs are then skipped
                return f"{tail.path.name}: {type(error).__name__}: {error}"
        return ""

    def _discover(self) -> None:
        known = {tail.path for tail in self.tails.values()}
        for path in sorted(self.folder.rglob("*.jsonl")):
            if path in known:
                continue
            start = next((event for event, _ in iter_events(path)), None)
            if start and start["event"] == "start":
                self.tails[start["run"]] = _Tail(path, start)
            elif path.stat().st_size:  # an empty file is about to get its first line
                self._warn(f"{path} does not begin with a start event and is skipped")

    def _drain(self, tail: _Tail, deadline_s: float) -> None:
        """Send a file's events from its position onwards."""
        position = self._locate(tail)
        batch = _Batch()
        for event, end in iter_events(tail.path, position.offset):
            if event and len(batch.metrics) + len(event.get("values", ())) > METRICS_PER_BATCH:
                self._send(tail, batch, position)
                batch = _Batch()
                if time.monotonic() > deadline_s:
                    raise Pause("time is up")
            if event and tail.run_id != TRASH:
                self._add_to_batch(tail, event, batch)
            position.offset = end
        self._send(tail, batch, position)

    def _locate(self, tail: _Tail) -> Position:
        """Find or create a file's MLflow run. Return the position where its upload continues."""
        position = Position.of(tail.path)
        if not tail.run_id:
            tail.run_id = self._find(tail.start, position.run_id) or self._create(tail.start)
        if position.run_id != tail.run_id:
            position = Position(run_id=tail.run_id)
            position.save(tail.path)
        return position

    def _find(self, start: dict[str, Any], known: str = "") -> str:
        """Return the id of the MLflow run with this run's tag, "" if there is none, TRASH if a user
        deleted it or its experiment. Of several runs, the known one is chosen."""
        from mlflow.entities import ViewType

        try:
            experiment = self._experiment(start["experiment"])
        except registry.ExperimentDeleted as error:
            self._warn(f"{error}; its runs are skipped, and longreach sync uploads them once it is restored")
            return TRASH
        query = f"tags.`{registry.RUN_TAG}` = '{start['run']}'"
        found = self.client.search_runs([experiment], query, ViewType.ALL)
        runs = {run.info.run_id: run for run in found}
        live = [run_id for run_id, run in runs.items() if run.info.lifecycle_stage == "active"]
        if runs and not live:
            return TRASH
        chosen = known if known in live else min(live, default="")
        for twin in live:  # the response to a "create run" was lost, and the run was created a second time
            if twin != chosen and not runs[twin].data.metrics and not runs[twin].data.params:
                self.client.delete_run(twin)
        return chosen

    def _create(self, start: dict[str, Any]) -> str:
        tags = {registry.RUN_TAG: start["run"], "longreach.kind": start["kind"]}
        if parent := start["parent"]:
            if parent in self.tails:
                parent_id = self._locate(self.tails[parent]).run_id
            else:
                parent_id = self._find({**start, "run": parent})
            if parent_id in ("", TRASH):
                self._warn(f"the parent {parent} of {start['name']} is neither spooled nor in MLflow: shown without it")
            else:
                tags["mlflow.parentRunId"] = parent_id
        experiment = self._experiment(start["experiment"])
        run = self.client.create_run(experiment, start_time=start["time_ms"], tags=tags, run_name=start["name"])
        return run.info.run_id

    def _experiment(self, name: str) -> str:
        if name not in self._experiments:
            self._experiments[name] = registry.experiment_id(self.client, name)
        return self._experiments[name]

    def _add_to_batch(self, tail: _Tail, event: dict[str, Any], batch: _Batch) -> None:
        """Add an event to the batch. Files, datasets and models are sent at once, since sending them
        again changes nothing."""
        from mlflow.entities import Metric

        match event["event"]:
            case "metrics":
                finite, at = _finite(event["values"]), (event["time_ms"], event["step"])
                batch.metrics += [Metric(name, value, *at) for name, value in finite.items()]
                batch.skipped += len(event["values"]) - len(finite)
            case "start":
                batch.params |= event["params"]
                batch.tags |= event["tags"]
            case "param":
                batch.params.setdefault(event["key"], event["value"])
            case "tag":
                batch.tags[event["key"]] = event["value"]
            case "artifact" | "table":
                with registry.mlflow_setting("MLFLOW_HTTP_REQUEST_TIMEOUT", registry.UPLOAD_S):
                    self._file(tail, event)
                _position_path(tail.path).touch()  # shows progress to stop_mirror, which may be waiting
            case "dataset":
                log_dataset(self.client, tail.run_id, event)
            case "model":
                self._model(tail, event)
                _position_path(tail.path).touch()
            case "output":
                self._output(tail, event["key"])
            case "end":
                batch.end = event

    def _send(self, tail: _Tail, batch: _Batch, position: Position) -> None:
        """Send a batch. Once all of it is accepted, save `position`, which lies behind its last event."""
        from mlflow.entities import Param, RunTag
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH

        params = [Param(key, value[:MAX_PARAM_VAL_LENGTH]) for key, value in batch.params.items()]
        self._log(tail, "params", params)
        refused = self._log(tail, "metrics", batch.metrics)
        self.points += len(batch.metrics) - refused
        self.skipped += batch.skipped + refused
        position.skipped += batch.skipped + refused
        if batch.skipped + refused:
            batch.tags["longreach.skipped_points"] = str(position.skipped)
        self._log(tail, "tags", [RunTag(key, value[:MAX_TAG_VAL_LENGTH]) for key, value in batch.tags.items()])
        if batch.end:
            self.client.set_terminated(tail.run_id, batch.end["status"], batch.end["time_ms"])
            position.ended = True
        position.save(tail.path)
        tail.offset = position.offset
        self.batches += 1

    def _log(self, tail: _Tail, kind: str, items: list[Any]) -> int:
        """Send metrics, params or tags. Return how many MLflow rejected permanently; a warning names
        each one."""
        from mlflow.exceptions import MlflowException

        limit = METRICS_PER_BATCH if kind == "metrics" else PARAMS_OR_TAGS_PER_BATCH
        if len(items) > limit:
            return self._log(tail, kind, items[:limit]) + self._log(tail, kind, items[limit:])
        if not items:
            return 0
        try:
            self.client.log_batch(tail.run_id, **{kind: items})
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if self.client.get_run(tail.run_id).info.lifecycle_stage == "deleted":
                tail.run_id = ""
                raise Pause(f"{tail.start['name']} was deleted in MLflow") from None
            if len(items) == 1:
                self._warn(f"{tail.start['name']}: MLflow rejects {kind[:-1]} {items[0].key!r}: {error.message}")
                return 1
            half = len(items) // 2
            return self._log(tail, kind, items[:half]) + self._log(tail, kind, items[half:])
        return 0

    def _file(self, tail: _Tail, event: dict[str, Any]) -> None:
        path, folder = Path(event["path"]), event["artifact_path"]
        if not os.access(path, os.R_OK):
            self._warn(f"{tail.start['name']}: {path} can no longer be read and is not uploaded")
        elif event["event"] == "table":
            log_table(self.client, tail.run_id, json.loads(path.read_text()), posixpath.join(folder, path.name))
        elif path.is_dir():
            self.client.log_artifacts(tail.run_id, str(path), folder or None)
        else:
            self.client.log_artifact(tail.run_id, str(path), folder or None)

    def _model(self, tail: _Tail, event: dict[str, Any]) -> None:
        """Log a model with its metrics, and register it as a version if the event says so."""
        from mlflow.entities import Metric

        folder = Path(event["path"]) if event["path"] else None
        if folder and not folder.is_dir():
            self._warn(f"{tail.start['name']}: {folder} is gone and is not uploaded")
            return
        experiment = self._experiment(tail.start["experiment"])
        model = registry.log_model(self.client, experiment, tail.run_id, event["name"], event["tags"], folder)
        at, ids = (event["time_ms"], event["step"]), {"model_id": model.model_id, "run_id": tail.run_id}
        finite = _finite(event["metrics"])
        self._log(tail, "metrics", [Metric(name, value, *at, **ids) for name, value in finite.items()])
        if event["register"]:
            registry.register(self.client, event["register"], model, tail.run_id, event["tags"])

    def _output(self, tail: _Tail, key: str) -> None:
        """Link a model of another run to this run, once. Raises LookupError if the model is not in
        MLflow yet, but may still be uploaded."""
        from mlflow.entities import LoggedModelOutput

        experiment = self._experiment(tail.start["experiment"])
        models = self.client.search_logged_models([experiment], f"tags.`{registry.MODEL}` = '{key}'")
        if not models:
            for other in self.tails.values():
                if other is not tail and other.path.stat().st_size > other.offset:
                    raise LookupError(f"its model {key} is not uploaded yet")
            self._warn(f"{tail.start['name']}: its model {key} is not in MLflow")
            return
        outputs = self.client.get_run(tail.run_id).outputs
        known = {one.model_id for one in outputs.model_outputs} if outputs else set()
        if models[0].model_id not in known:
            self.client.log_outputs(tail.run_id, [LoggedModelOutput(models[0].model_id, 0)])

    def close_runs(self) -> None:
        """End the runs that have no end event, since they were killed."""
        for tail in self.tails.values():
            if tail.run_id not in ("", TRASH) and not Position.of(tail.path).ended:
                self.client.set_terminated(tail.run_id, "KILLED")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning(message)


def log_table(client: Any, run_id: str, content: Any, name: str) -> None:
    """Log rows as MlflowClient.log_table does, but replace them: log_table would append them again at
    every replay."""
    rows = content["rows"] if isinstance(content, dict) else content
    columns = list(dict.fromkeys(chain.from_iterable(rows)))
    data = []
    for row in rows:
        cells = []
        for column in columns:
            cell = row.get(column)
            if isinstance(cell, float) and not math.isfinite(cell):
                cell = str(cell)
            cells.append(cell)
        data.append(cells)
    client.log_dict(run_id, {"columns": columns, "data": data}, name)
    tables = json.loads(client.get_run(run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
    entry = {"path": name, "type": "table"}
    if entry not in tables:
        client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([*tables, entry]))


def log_dataset(client: Any, run_id: str, event: dict[str, Any]) -> None:
    """Log the dataset that an event names as an input of a run."""
    from mlflow.entities import Dataset, DatasetInput
    from mlflow.utils.validation import MAX_DATASET_DIGEST_SIZE

    digest, source = event["digest"][:MAX_DATASET_DIGEST_SIZE], json.dumps({"uri": event["source"]})
    dataset = Dataset(name=event["name"], digest=digest, source_type="local", source=source)
    client.log_inputs(run_id, datasets=[DatasetInput(dataset)])


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock. The kernel releases it when its holder dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Pause(f"another process is uploading {folder}") from None
        yield
    finally:
        os.close(descriptor)


def _follow(mirror: Mirror) -> None:
    """Upload new events until standard input closes, which happens when the parent process ends;
    then upload the rest."""
    # Stopping a job sends SIGTERM to its children too, and a closed terminal may send SIGHUP. This process has to
    # outlive its parent.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    pause_s, trouble = POLL_S, ""
    while not _input_closed(pause_s):
        before = mirror.points
        problem = mirror.upload(float("inf"))
        if problem and not trouble:
            log.warning("%s; events stay in the spool, retrying", problem)
        elif trouble and not problem:
            log.warning("MLflow responds again")
        pause_s = min(2 * pause_s, BACKOFF_S)
        if not problem or mirror.points != before:
            pause_s = POLL_S
        trouble = problem
    batches = -1
    while (problem := mirror.upload(time.monotonic() + DRAIN_S)) and mirror.batches > batches:
        batches = mirror.batches
    if problem:
        log.warning("%s; events stay in the spool: longreach sync uploads them", problem)
    else:
        mirror.close_runs()


def _input_closed(wait_s: float) -> bool:
    return bool(select.select([0], [], [], wait_s)[0]) and not os.read(0, 1024)


def _sync_once(mirror: Mirror, timeout_s: float) -> SyncReport:
    deadline_s, pause_s = time.monotonic() + timeout_s, 1.0
    while (problem := mirror.upload(deadline_s, everything=True)) and time.monotonic() + pause_s < deadline_s:
        mirror._warn(f"{problem}; retrying for up to {timeout_s:.0f} s")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, BACKOFF_S)
    return SyncReport(len(mirror.tails), mirror.points, pending_points(mirror.folder), mirror.skipped, problem)


class MirrorProcess(subprocess.Popen[bytes]):
    """A running mirror, and the folder that it watches."""

    spool_dir: Path


def start_mirror(spool_dir: Path | str, uri: str) -> MirrorProcess:
    """Start uploading a folder's spool files in the background, at the lowest priority. Messages go
    to `<spool_dir>/mirror.log`.

    When this process ends, however it ends, the mirror uploads the rest and ends by itself. Raises
    ValueError if the URI holds a password.
    """
    spool_dir = Path(spool_dir).absolute()
    spool_dir.mkdir(parents=True, exist_ok=True)
    with (spool_dir / "mirror.log").open("ab") as output:
        # The mirror gets its own process group, so that Ctrl-C does not reach it. It gets no session
        # of its own: Linux shares the CPU among sessions (autogroups), so its low priority would have
        # no effect there.
        process = MirrorProcess(
            _command(spool_dir, uri), env=_environment(), process_group=0,
            stdin=subprocess.PIPE, stdout=output, stderr=output,
        )  # fmt: skip
    process.spool_dir = spool_dir
    return process


def stop_mirror(process: MirrorProcess, patience_s: float = DRAIN_S, at_most_s: float = math.inf) -> int:
    """Let a mirror finish. Return the number of points that are still missing from MLflow.

    The mirror is killed once it has uploaded nothing for `patience_s`, or after `at_most_s` in all.
    """
    assert process.stdin
    process.stdin.close()
    began_s = moved_s = time.monotonic()
    before = _progress(process)
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(1.0, patience_s, at_most_s))
        now_s, now = time.monotonic(), _progress(process)
        if now != before:
            before, moved_s = now, now_s
        if now_s - moved_s > patience_s or now_s - began_s > at_most_s:
            process.kill()
    return pending_points(process.spool_dir)


def _progress(process: MirrorProcess) -> list[Any]:
    """Return values that change while a mirror uploads: when the files' positions were last written, and
    on Linux the bytes that it has read. It reads a file only as fast as the server accepts it."""
    progress: list[Any] = [(path, path.stat().st_mtime_ns) for path in process.spool_dir.rglob("*.offset")]
    with contextlib.suppress(OSError):  # another system, or the process has just ended
        progress += Path(f"/proc/{process.pid}/io").read_text().splitlines()[:1]
    return progress


def sync(spool_dir: Path | str, uri: str, timeout_s: float = 60.0) -> SyncReport:
    """Upload everything in a folder's spool files that is missing from MLflow, with retries for up to
    `timeout_s`. Raises ValueError if the URI holds a password, RuntimeError if the mirror failed; the
    reason is then on stderr."""
    spool_dir = Path(spool_dir).absolute()
    command = [*_command(spool_dir, uri), "--once", "--timeout-s", str(timeout_s)]
    try:
        done = subprocess.run(
            command, env=_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=timeout_s + 30
        )
    except subprocess.TimeoutExpired:
        runs, pending = len(list(spool_dir.rglob("*.jsonl"))), pending_points(spool_dir)
        return SyncReport(runs, 0, pending, 0, f"{uri} did not answer within {timeout_s:.0f} s")
    if done.returncode:
        raise RuntimeError(f"the mirror of {spool_dir} ended with exit code {done.returncode}")
    return SyncReport(**json.loads(done.stdout.splitlines()[-1]))


def _command(spool_dir: Path, uri: str) -> list[str]:
    check_tracking_uri(uri)
    return [sys.executable, "-P", "-m", "longreach.infra.mirror", str(spool_dir), "--uri", uri]


def _environment() -> dict[str, str]:
    """Return the mirror's environment: this process's, without the registry's timeouts, since the
    mirror has its own."""
    return {name: value for name, value in os.environ.items() if registry.CLIENT_SETTINGS.get(name) != value}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m longreach.infra.mirror", description=__doc__.partition("\n\n")[0])
    parser.add_argument("spool_dir", type=Path, help="a run's folder of spool files, or a folder of such folders")
    parser.add_argument("--uri", required=True, help="URI of MLflow: http://..., or sqlite:////absolute/path")
    parser.add_argument("--once", action="store_true", help="upload what is there, print a report as JSON, and exit")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="seconds for which --once retries")
    options = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    mirror = Mirror(options.spool_dir.absolute(), options.uri)
    if options.once:
        print(json.dumps(asdict(_sync_once(mirror, options.timeout_s))))
    else:
        os.nice(19)
        _follow(mirror)


if __name__ == "__main__":
    main()
