"""Find and remove artifacts that nothing needs any more: `longreach gc`.

It keeps the following artifacts and everything that they were made from:

- those published, or written to, within the last days;
- the newest reports of each recipe, and its newest ones on runs with failed stages;
- those that the given recipes would reuse;
- releases behind an alias of a registered model, such as the champion's, and releases of models
  that are kept for another reason.

It removes all other published artifacts and unfinished attempts, and what a killed publisher left of
the artifacts that are kept (checkpoints, other attempts). Models in MLflow are not removed,
even if they are hard links to a release's files.

    for candidate in find(Store(".longreach"), Keep(days=7, reports=3)): print(candidate.label)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from longreach.infra.artifact import MANIFEST, Store
from longreach.infra.lease import Lease, LeaseHeld, holder_name
from longreach.pipelines.status import status

MOST_DAYS = 36_500.0
"""A longer time means the same: older than any artifact, and still a date."""
Key = tuple[str, str]
"""Stage name and fingerprint, which identify an artifact."""


@dataclass(frozen=True)
class Keep:
    """What to keep, together with everything that it was made from."""

    days: float = 7.0
    """Keep everything published, or written to, within this many days."""
    reports: int = 3
    """Keep this many of the newest reports of each recipe, and as many on runs with failed stages."""
    fingerprints: Set[str] = field(default_factory=set)
    """Keep the artifacts with these fingerprints: stages of recipes, and releases behind
    aliases."""


@dataclass(frozen=True)
class Candidate:
    """An artifact, a stage's unfinished attempts, or what is left of an artifact's making, that
    nothing needs."""

    stage: str
    fingerprint: str
    label: str
    bytes: int
    last_write: datetime
    published: bool  # False: an attempt that was never finished
    leftovers: bool = False  # only what a killed publisher left; the artifact stays


def find(store: Store, keep: Keep) -> list[Candidate]:
    """Return what nothing needs, largest first."""
    now = status(store)
    recent = datetime.now(UTC) - timedelta(days=min(keep.days, MOST_DAYS))
    manifests = {(one["stage"], one["fingerprint"]): one for one in now.published}
    needed = _needed(manifests, keep, recent)
    candidates = []
    for key, manifest in manifests.items():
        if key not in needed:
            size = sum(file["size"] for file in manifest["files"])
            candidates.append(Candidate(*key, manifest["label"], size, _published_at(manifest), published=True))
        elif _published_at(manifest) < recent and (left := store.leftovers(*key, manifest["attempt"])):
            size = sum(left.values())
            candidates.append(Candidate(*key, manifest["label"], size, _published_at(manifest), True, leftovers=True))
    last_writes: dict[Key, datetime] = {}
    for attempt in now.unfinished:  # sorted, so the newest of a stage comes last
        last_writes[attempt.stage, attempt.fingerprint] = attempt.last_write
    for (stage, fingerprint), last_write in last_writes.items():
        if fingerprint not in keep.fingerprints and last_write < recent:
            size = store.size(stage, fingerprint)
            candidates.append(Candidate(stage, fingerprint, stage, size, last_write, published=False))
    return sorted(candidates, key=lambda candidate: -candidate.bytes)


def _needed(manifests: dict[Key, dict[str, Any]], keep: Keep, recent: datetime) -> set[Key]:
    """Return the artifacts to keep, with everything that they were made from."""
    wanted = []
    reports: dict[tuple[str, bool], list[Key]] = {}  # by recipe, those of failed runs apart: there may be many
    for key, manifest in sorted(manifests.items(), key=lambda item: _published_at(item[1]), reverse=True):
        if manifest["fingerprint"] in keep.fingerprints or _published_at(manifest) >= recent:
            wanted.append(key)
        if manifest["stage"] == "report":
            recipe = manifest["identity"]["recipe"]
            reports.setdefault((recipe["name"], bool(recipe.get("failed"))), []).append(key)
    for of_recipe in reports.values():
        wanted += of_recipe[: keep.reports]
    needed = set()
    while wanted:
        key = wanted.pop()
        if key not in needed and key in manifests:
            needed.add(key)
            wanted += _inputs(manifests[key])
    for key, manifest in manifests.items():
        if manifest["stage"] == "release" and needed.issuperset(_inputs(manifest)):
            needed.add(key)
    return needed


def _inputs(manifest: dict[str, Any]) -> list[Key]:
    """Return the keys of an artifact's inputs."""
    return [(made_from["stage"], made_from["fingerprint"]) for made_from in manifest["inputs"].values()]


def _published_at(manifest: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(manifest["published_at"])


@contextlib.contextmanager
def no_runs(store: Store) -> Iterator[None]:
    """Hold the leases of all recipes that ever ran in this store, so that their next runs wait.

    Raises:
        LeaseHeld: One of them is running.
    """
    held = []
    try:
        for name in store.names(f"{store.base}/leases"):
            if store.names(f"{store.base}/leases/{name}"):  # a file such as .DS_Store is no lease
                lease = Lease(store, name, f"{holder_name()}, longreach gc")
                held.append(lease.acquire(wait=False))
        yield
    finally:
        for lease in held:
            lease.release()


def remove(store: Store, candidate: Candidate) -> bool:
    """Remove a stage's artifact and attempts, or only its leftovers; return False without removing anything if a run is
    making it.

    The manifest is removed first, so that no reader finds an artifact with missing files. The
    stage's lease (a few bytes) stays, because its counter must never decrease.
    """
    stage, fingerprint = candidate.stage, candidate.fingerprint
    place = f"{stage}/{fingerprint}/lease"
    try:
        lease = Lease(store, candidate.label, f"{holder_name()}, longreach gc", place=place).acquire(wait=False)
    except LeaseHeld:
        return False
    try:
        artifact = store.find(stage, fingerprint)
        if candidate.leftovers and artifact:
            store.remove_leftovers(stage, fingerprint, artifact.attempt)
            return True
        if candidate.leftovers or (not candidate.published and artifact):  # withdrawn or published in the meantime
            return False
        folder = f"{store.base}/{stage}/{fingerprint}"
        for name in store.names(folder):
            if name.startswith(MANIFEST):
                store.fs.rm(f"{folder}/{name}")
        store.clear(stage, fingerprint)
    finally:
        lease.release()
    return True
