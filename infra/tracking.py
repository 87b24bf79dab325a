"""Tracking: a run appends its events to a local file, the spool, which is uploaded to MLflow later.

Why a spool: a synchronous MLflow call blocks training for 245 s when the server is unreachable, and
MLflow's asynchronous mode drops what it cannot send. Appending a line takes microseconds, and the
line survives `kill -9` of every process. infra/mirror.py uploads the events from another process and
retries after an outage.

There is one JSONL file per run, `{workdir}/spool/{pipeline run}/{name}.jsonl`, with one event per
line, each with its `time_ms`:

    {"event":"start","run":"<uuid hex>","parent":"<uuid hex>"|null,"experiment":..,"name":..,
     "kind":"pipeline|stage|attempt","tags":{..},"params":{..}}                         the first line, once
    {"event":"metrics","values":{"train/loss":2.5},"step":10}                           not finite: "nan", "inf", "-inf"
    {"event":"progress","done":10,"total":50,"unit":"step","extra":{"tokens_per_s":900.0}}
    {"event":"tag"|"param","key":..,"value":..}       {"event":"dataset","name":..,"digest":..,"source":..}
    {"event":"artifact"|"table","path":"/absolute/path","artifact_path":".."}
    {"event":"model","name":..,"tags":{"longreach.model":..},"metrics":{..},"step":..,"path":..,"register":..}
    {"event":"output","key":..}                                            the longreach.model of another run's model
    {"event":"end","status":"FINISHED|FAILED|KILLED"}

    from longreach.infra.tracking import read_events
    print(read_events(".longreach/spool/RUN/pack.jsonl")[0])
"""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, SupportsFloat

Kind = Literal["pipeline", "stage", "attempt"]
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class Spool:
    """Appends one run's events to its file. Any number of processes may append to the same file at
    the same time.

    An event is one write() to a descriptor opened with O_APPEND, so lines of different writers never
    mix, and a killed writer leaves at most one torn line, which readers skip. A pickled spool is only
    its path, and the copy appends to the same file.
    """

    def __init__(self, path: Path | str, _start: dict[str, Any] | None = None) -> None:
        """Open the file that `Spool.open` created, for appending."""
        self.path = Path(path).absolute()
        self._file = io.FileIO(os.open(self.path, os.O_RDWR | os.O_APPEND), "r+")
        if _start:
            self._begin(_start)
        size = os.fstat(self._file.fileno()).st_size
        if os.pread(self._file.fileno(), 1, size - 1) != b"\n":  # torn by a kill; at worst this adds an empty line
            self._file.write(b"\n")

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        run: str,
        parent: str | None,
        experiment: str,
        name: str,
        kind: Kind | str,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Spool:
        """Return the spool of one run. An existing file of the same run is continued. Raises
        ValueError if the file belongs to another run.

        Args:
            run: uuid hex, made by the caller, since MLflow's own id may not be known yet.
            parent: the `run` of the run that this one is nested in; its file is in the same folder.
            tags: shown by MLflow; values are written as str.
            params: shown by MLflow; values are written as str.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        texts = {"tags": _texts(tags or {}), "params": _texts(params or {})}
        return cls(path, {"run": run, "parent": parent, "experiment": experiment, "name": name, "kind": kind} | texts)

    def _begin(self, start: dict[str, Any]) -> None:
        """Write the start line of a new file, or check the start line of an existing one."""
        fcntl.flock(self._file, fcntl.LOCK_EX)  # of two simultaneous first openers, one writes the start line
        try:
            with self.path.open("rb") as file:
                first = file.readline()
            if not first.endswith(b"\n"):  # a new file, or its writer died within the first line
                self._file.truncate(0)
                self._write("start", **start)
            else:
                owner = (_parse(first) or {}).get("run")
                if owner != start["run"]:
                    raise ValueError(f"{self.path} belongs to run {owner}, not to {start['run']}: open another file")
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def metrics(self, values: Mapping[str, SupportsFloat], step: int = 0) -> None:
        """Add points to metric curves. A prefix with `/` groups charts: `train/loss`. NaN and
        infinities are not uploaded."""
        self._write("metrics", values=_numbers(values), step=int(step))

    def progress(self, done: int, total: int, unit: str = "step", **extra: SupportsFloat) -> None:
        """Record the run's progress, for progress bars; it is not uploaded."""
        self._write("progress", done=int(done), total=int(total), unit=unit, extra=_numbers(extra))

    def tag(self, key: str, value: object) -> None:
        """Set or replace a tag; `mlflow.note.content` is the run's description, in Markdown."""
        self._write("tag", key=key, value=str(value))

    def param(self, key: str, value: object) -> None:
        """Set a parameter; MLflow keeps the first value of each."""
        self._write("param", key=key, value=str(value))

    def artifact(self, path: Path | str, artifact_path: str = "") -> None:
        """Upload a file or folder to the folder `artifact_path` in MLflow. It must exist until it is
        uploaded."""
        self._write("artifact", path=os.path.abspath(path), artifact_path=artifact_path)

    def table(self, path: Path | str, artifact_path: str = "") -> None:
        """Show a JSON file as a table. It holds a list of row dicts, or an object whose `rows` is such
        a list (scores.json)."""
        self._write("table", path=os.path.abspath(path), artifact_path=artifact_path)

    def dataset(self, name: str, digest: str, source: str) -> None:
        """Record an input. `source` is its path or URL, `digest` its fingerprint (MLflow keeps 36
        characters)."""
        self._write("dataset", name=name, digest=digest, source=str(source))

    def model(
        self,
        name: str,
        key: str,
        metrics: Mapping[str, SupportsFloat],
        *,
        step: int = 0,
        tags: Mapping[str, Any] | None = None,
        path: Path | str = "",
        register: str = "",
    ) -> None:
        """Record a model that the run made. MLflow lists models and ranks them by their metrics.

        Args:
            key: identifies the model permanently, whatever its `name`.
            path: the model's folder, if MLflow should store its files too.
            register: the registered model that this model becomes a version of; needs `path`.
        """
        about = {"tags": _texts({"longreach.model": key, **(tags or {})}), "metrics": _numbers(metrics), "step": step}
        self._write("model", name=name, **about, path=str(path and os.path.abspath(path)), register=register)

    def output(self, key: str) -> None:
        """Record a model of another run, given by its key, as a result of this run too."""
        self._write("output", key=key)

    def end(self, status: RunStatus | str) -> None:
        """Record how the run ended; events may still follow."""
        self._write("end", status=status)

    def _write(self, event: str, **fields: Any) -> None:
        self.append(encode(event, fields))

    def append(self, line: bytes) -> None:
        """Append a complete line from `encode`."""
        written = self._file.write(line)
        if written != len(line):
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes were written: is the disk full?")

    def last_step(self, metric: str) -> int:
        """Return the greatest step of a metric in the file; 0 for none."""
        return last_step(self.path, metric)

    def __reduce__(self) -> tuple[type[Spool], tuple[Path]]:
        return Spool, (self.path,)


def metric_part(name: str) -> str:
    """Return a name in which plus is written out, so that `lora+` is not `lora`, and other characters
    that MLflow does not allow in metric names, such as brackets, are replaced by spaces."""
    return re.sub(r"[^a-z0-9._-]+", " ", name.replace("+", " plus ")).strip()


def encode(event: str, fields: Mapping[str, Any]) -> bytes:
    """Return an event's line, with the current time."""
    return _encode({"event": event, **fields, "time_ms": time.time_ns() // 1_000_000}).encode() + b"\n"


def read_events(path: Path | str, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Return the events in the complete lines from byte `offset` on, and the offset behind them. Torn
    lines are skipped."""
    events = []
    for event, end in iter_events(path, offset):
        offset = end
        if event:
            events.append(event)
    return events, offset


def last_step(path: Path, metric: str) -> int:
    """Return the greatest step of a metric in a spool file; 0 for none."""
    events = (event for event, _ in iter_events(path) if event)
    return max((event["step"] for event in events if metric in event.get("values", ())), default=0)


def iter_events(path: Path | str, offset: int = 0) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """Yield (event, offset behind its line) for each complete line from byte `offset` on. The event
    of a torn line is None."""
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):  # still being written, or torn and not repaired yet
                return
            offset += len(line)
            yield _parse(line), offset


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _numbers(values: Mapping[str, SupportsFloat]) -> dict[str, float | str]:
    numbers = {name: float(value) for name, value in values.items()}
    return {name: number if math.isfinite(number) else str(number) for name, number in numbers.items()}


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items()}
