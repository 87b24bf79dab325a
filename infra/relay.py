"""Events from other nodes: a spool there is an actor's call away from the file on the driver's node.

The mirror, the progress display and the stop file live on the driver's disk, which other nodes do not see. So a stage
(or rank 0 of its training) that finds itself elsewhere sends its lines to an actor beside the driver, in order and
without waiting; the answer says whether somebody asked to stop. Files and models that an event names are held back
until the driver has fetched the published artifact (`Relayed.held`).

    LONGREACH_DRIVER=<node id>:<actor> names the actor; without it, or on that node, spools are plain files.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from longreach.infra.tracking import Spool, encode

DRIVER = "LONGREACH_DRIVER"
NAMESPACE = "longreach"
WITH_FILES = ("artifact", "table", "model")


class Collector:
    """The actor: appends to the spool files of one pipeline run."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.files: dict[str, Spool] = {}

    def take(self, name: str, start: dict[str, Any] | None, line: bytes) -> bool:
        """One line of the file `name`; returns whether training was asked to stop."""
        if name not in self.files:
            path = self.folder / name
            self.files[name] = Spool.open(path, **start) if start else Spool(path)
        if line:
            self.files[name].append(line)
        return (self.folder / "stop").exists()


def start_collector(ray: Any, folder: Path) -> tuple[Any, str]:
    """The actor on this node, and what LONGREACH_DRIVER says of it; keep the actor, it ends with its last reference."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node, name = ray.get_runtime_context().get_node_id(), f"spools-{folder.name}"
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    options = {"num_cpus": 0, "name": name, "namespace": NAMESPACE, "scheduling_strategy": here}
    return ray.remote(Collector).options(**options).remote(str(folder)), f"{node}:{name}"


def spool(path: Path | str, **start: Any) -> Spool:
    """The spool at a path of the driver's; with `start` (what Spool.open takes) it is made if it is not there."""
    node, _, name = os.environ.get(DRIVER, "").partition(":")
    if node:
        import ray

        if ray.get_runtime_context().get_node_id() != node:
            return Relayed(path, ray.get_actor(name, namespace=NAMESPACE), start or None)
    return Spool.open(path, **start) if start else Spool(path)


def release(held: list[dict[str, Any]], spool: Spool, attempt: str, published: Path) -> None:
    """Write events that were held back, with the published files' paths instead of those of the attempt's folder."""
    for event in held:
        path = event["path"]
        path = str(published) + path[len(attempt) :] if path.startswith(attempt) else path
        spool.append(encode(event["event"], {**event, "path": path}))


class Relayed(Spool):
    """A spool whose file is on another node."""

    def __init__(self, path: Path | str, collector: Any, start: dict[str, Any] | None = None) -> None:
        self.path, self._collector = Path(path).absolute(), collector
        self.held: list[dict[str, Any]] = []
        """Events that name files of this node: for the driver, once it has the published ones."""
        self._answer = collector.take.remote(self.path.name, start, b"")

    def _write(self, event: str, **fields: Any) -> None:
        if event in WITH_FILES and fields["path"]:
            self.held.append({"event": event, **fields})
            return
        import ray

        if ray.wait([self._answer], timeout=0)[0]:
            self.stop_asked = ray.get(self._answer)
        self._answer = self._collector.take.remote(self.path.name, None, encode(event, fields))

    def flush(self) -> None:
        """Returns when all lines have arrived."""
        import ray

        ray.get(self._answer)

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return spool, (self.path,)
