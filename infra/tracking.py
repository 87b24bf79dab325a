"""Tracking: what a run says about itself while it runs, as lines in a local file. MLflow reads them
later.

Why a spool: a synchronous MLflow call blocks training for 245 s when the server is away, and
MLflow's asynchronous mode drops what it cannot send. Appending a line costs microseconds and
survives `kill -9` of everybody; infra/mirror.py uploads from another process and replays what an
outage held back.

One JSONL file per run, `{workdir}/spool/{pipeline run}/{name}.jsonl`, one event a line, each with
its `time_ms`:

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
    """Appends one run's events to its file; any number of processes may append to the same file at
    once.

    An event is one write() to a descriptor opened with O_APPEND: lines of different writers never
    mix, and a killed writer leaves at most one torn line, which readers skip. Pickled, a spool is
    its path: the copy appends as well.
    """

    def __init__(self, path: Path | str, _start: dict[str, Any] | None = None) -> None:
        """Append to the file that `Spool.open` made."""
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
        """Return the spool of one run; an existing file of the same run is continued. Raises
        ValueError: the file is another run's.

        Args:
            run: uuid hex, made by the caller: MLflow's own id is not known yet, and may never be.
            parent: the `run` of the run that this one is nested in; its file lies in the same
                folder. tags, params: shown by MLflow; values are written as str.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        texts = {"tags": _texts(tags or {}), "params": _texts(params or {})}
        return cls(path, {"run": run, "parent": parent, "experiment": experiment, "name": name, "kind": kind} | texts)

    def _begin(self, start: dict[str, Any]) -> None:
        """Write the start line of a new file; check that of an existing one."""
        fcntl.flock(self._file, fcntl.LOCK_EX)  # two first openers: one writes the start line
        try:
            with self.path.open("rb") as file:
                first = file.readline()
            if not first.endswith(b"\n"):  # a new file, or its writer died within the first line
                self._file.truncate(0)
                self._write("start", **start)
            else:
                owner = (_parse(first) or {}).get("run")
                if owner != start["run"]:
                    raise ValueError(
                        f"{self.path} is the file of run {owner}, not of {start['run']}: open another file"
                    )
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def metrics(self, values: Mapping[str, SupportsFloat], step: int = 0) -> None:
        """Add points to curves; names with `/` group charts: `train/loss`. NaN and infinities stay
        in the file."""
        self._write("metrics", values=_numbers(values), step=int(step))

    def progress(self, done: int, total: int, unit: str = "step", **extra: SupportsFloat) -> None:
        """Say how far the run is, for progress bars; not uploaded."""
        self._write("progress", done=int(done), total=int(total), unit=unit, extra=_numbers(extra))

    def tag(self, key: str, value: object) -> None:
        """Set or replace a tag; `mlflow.note.content` is the run's description, in Markdown."""
        self._write("tag", key=key, value=str(value))

    def param(self, key: str, value: object) -> None:
        """Set a parameter; MLflow keeps the first value of each."""
        self._write("param", key=key, value=str(value))

    def artifact(self, path: Path | str, artifact_path: str = "") -> None:
        """Show a file or folder, in the folder `artifact_path` of MLflow; it must stay until it is
        uploaded."""
        self._write("artifact", path=os.path.abspath(path), artifact_path=artifact_path)

    def table(self, path: Path | str, artifact_path: str = "") -> None:
        """Show a JSON file as a table: a list of row dicts, or an object whose `rows` is one
        (scores.json)."""
        self._write("table", path=os.path.abspath(path), artifact_path=artifact_path)

    def dataset(self, name: str, digest: str, source: str) -> None:
        """Name an input: `source` is its path or URL, `digest` its fingerprint (MLflow keeps 36
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
        """Name a model that the run made, which MLflow lists and ranks by its metrics.

        Args:
            key: identifies the model for good, whatever `name` says.
            path: its folder, if MLflow is to keep its files too.
            register: the registered model that it becomes a version of; needs `path`.
        """
        about = {"tags": _texts({"longreach.model": key, **(tags or {})}), "metrics": _numbers(metrics), "step": step}
        self._write("model", name=name, **about, path=str(path and os.path.abspath(path)), register=register)

    def output(self, key: str) -> None:
        """Name a model of another run, by its key, as a result of this one too."""
        self._write("output", key=key)

    def end(self, status: RunStatus | str) -> None:
        """Say how the run ended; events may still follow."""
        self._write("end", status=status)

    def _write(self, event: str, **fields: Any) -> None:
        self.append(encode(event, fields))

    def append(self, line: bytes) -> None:
        """Append a whole line, as `encode` makes it."""
        written = self._file.write(line)
        if written != len(line):
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes were written: is the disk full?")

    def __reduce__(self) -> tuple[type[Spool], tuple[Path]]:
        return Spool, (self.path,)


def metric_part(name: str) -> str:
    """Return a name without the characters that MLflow's metric names do not allow, such as plus
    and brackets."""
    return re.sub(r"[^a-z0-9._-]+", " ", name).strip()


def encode(event: str, fields: Mapping[str, Any]) -> bytes:
    """Return an event's line, stamped with the time."""
    return _encode({"event": event, **fields, "time_ms": time.time_ns() // 1_000_000}).encode() + b"\n"


def read_events(path: Path | str, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Return the events in the whole lines from byte `offset` on, and the offset behind them,
    without torn lines."""
    events = []
    for event, end in iter_events(path, offset):
        offset = end
        if event:
            events.append(event)
    return events, offset


def iter_events(path: Path | str, offset: int = 0) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """Yield (event, offset behind its line) for each whole line from byte `offset` on; the event is
    None if torn."""
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):  # being written right now, or torn and not yet repaired
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
