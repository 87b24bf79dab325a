"""Forward events from workers on other nodes to the driver's spool files, through a Ray actor on the
driver's node.

The mirror, the progress display and the stop file use the driver's disk. So a stage (or rank 0 of its
training) on another node sends its lines to that actor, in order and without waiting. The response
says whether training should stop. Events that name files or models are held back until the driver has
fetched the published artifact (`RemoteSpool.held`).

    LONGREACH_DRIVER=<node id>:<actor> names the actor. Without it, or on that node, spools are
    plain files.
"""

import os
import sys
from pathlib import Path
from typing import Any

from longreach.infra.tracking import RunStatus, Spool, encode, last_step

DRIVER = "LONGREACH_DRIVER"
NAMESPACE = "longreach"
WITH_FILES = ("artifact", "table", "model")


class Collector:
    """The actor on the driver's node: appends to the spool files of one pipeline run."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def take(self, name: str, start: dict[str, Any] | None, line: bytes) -> tuple[bool, str]:
        """Append a line to the file `name`, which is created if it is missing. Return whether training
        was asked to stop, and why the line could not be written ("" if it was)."""
        path, problem = self.folder / name, ""
        try:
            # opened for each line, since a run may have more files than a process may keep open
            file = Spool.open(path, **start) if start else Spool(path)
            if line:
                file.append(line)
        except OSError as error:
            problem = str(error)
        return (self.folder / "stop").exists(), problem

    def last_step(self, name: str, metric: str) -> int:
        """Return the greatest step of a metric in the file `name`; 0 for none."""
        return last_step(self.folder / name, metric)


def start_collector(ray: Any, folder: Path) -> tuple[Any, str]:
    """Start the actor on this node. Return it (it lives while referenced) and the value for
    LONGREACH_DRIVER."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node, name = ray.get_runtime_context().get_node_id(), f"spools-{folder.name}"
    on_this_node = NodeAffinitySchedulingStrategy(node, soft=False)
    options = {"num_cpus": 0, "name": name, "namespace": NAMESPACE, "scheduling_strategy": on_this_node}
    return ray.remote(Collector).options(**options).remote(str(folder)), f"{node}:{name}"


def spool(path: Path | str, **start: Any) -> Spool:
    """Return the spool at a path on the driver's node. With `start` (the arguments of Spool.open), it
    is created if it is missing."""
    node, _, name = os.environ.get(DRIVER, "").partition(":")
    if node:
        import ray

        if ray.get_runtime_context().get_node_id() != node:
            return RemoteSpool(path, ray.get_actor(name, namespace=NAMESPACE), start or None)
    return Spool.open(path, **start) if start else Spool(path)


def stop_asked(spool: Spool) -> bool:
    """Return whether the driver on another node has asked training to stop. (On its own node, the stop
    file does that.)"""
    return isinstance(spool, RemoteSpool) and spool.stop_asked


def release(held: list[dict[str, Any]], spool: Spool, attempt: str, published: Path) -> None:
    """Write events that were held back, with the paths of the published files instead of those in
    the attempt's folder."""
    for event in held:
        path = event["path"]
        if path.startswith(attempt):
            path = str(published) + path[len(attempt) :]
        spool.append(encode(event["event"], {**event, "path": path}))


class RemoteSpool(Spool):
    """A spool whose file is on the driver's node and whose writer is on another node."""

    def __init__(self, path: Path | str, collector: Any, start: dict[str, Any] | None = None) -> None:
        self.path, self._collector = Path(path).absolute(), collector
        self.held: list[dict[str, Any]] = []
        """Events that name files on this node. The driver writes them once it has the published files."""
        self.stop_asked = False
        """Whether the driver's last response said that the stop file exists."""
        self._failed = False
        self._answer = collector.take.remote(self.path.name, start, b"")

    def _write(self, event: str, **fields: Any) -> None:
        if event in WITH_FILES and fields["path"]:
            self.held.append({"event": event, **fields})
            return
        import ray

        if ray.wait([self._answer], timeout=0)[0]:
            self._read_answer()
        self._answer = self._collector.take.remote(self.path.name, None, encode(event, fields))

    def end(self, status: RunStatus | str) -> None:
        """Record how the run ended, and wait until all of its lines have arrived."""
        super().end(status)
        self._read_answer()

    def _read_answer(self) -> None:
        """Wait for the driver's last response. If the driver could not write (its disk is full), say so
        once: metrics are missing then, but training need not end."""
        import ray

        self.stop_asked, problem = ray.get(self._answer)
        if problem and not self._failed:
            text = f"{self.path.name}: the driver cannot write events, so MLflow will lack some ({problem})"
            print(f"{text}: check its disk", file=sys.stderr, flush=True)
            self._failed = True

    def last_step(self, metric: str) -> int:
        """Return the greatest step of a metric that has arrived at the driver; 0 for none."""
        import ray

        return ray.get(self._collector.last_step.remote(self.path.name, metric))

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return spool, (self.path,)
