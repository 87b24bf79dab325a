"""The current content of a store: active runs, unfinished stages and published artifacts.

from longreach.pipelines.status import status
status(Store(".longreach")).published
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from longreach.infra.artifact import RemoteStore, Store
from longreach.infra.lease import Lease


@dataclass(frozen=True)
class Unfinished:
    """An attempt that is not published: still running, or left for the next run to resume from."""

    stage: str
    fingerprint: str
    attempt: str
    last_write: datetime


@dataclass(frozen=True)
class Status:
    """The content of a store; both lists start with the oldest entry."""

    holders: dict[str, str]  # lease name -> the run that holds it, or died holding it
    unfinished: list[Unfinished]
    published: list[dict[str, Any]]  # manifests of the published artifacts


def status(store: Store, only: Collection[str] | None = None, *, recipe: str | None = None) -> Status:
    """Read the store: all of it, or only what has one of the fingerprints in `only`, and the lease of
    the recipe with this name."""
    holders = {}
    for name in store.names(f"{store.base}/leases"):
        if recipe not in (None, name):
            continue
        with contextlib.suppress(PermissionError):  # a lease of another user, which may be unreadable
            if holder := Lease(store, name, "").current_holder():
                holders[name] = holder
    manifests = list(store.manifests())
    published = [one for one in manifests if only is None or one["fingerprint"] in only]
    done = {manifest["fingerprint"] for manifest in manifests}
    unfinished = []
    for attempt in _attempts(store, done):
        wanted = only is None or attempt.fingerprint in only
        if wanted and attempt.fingerprint not in done:
            unfinished.append(attempt)
    unfinished.sort(key=lambda attempt: attempt.last_write)
    return Status(holders, unfinished, sorted(published, key=lambda manifest: manifest["published_at"]))


def newest_report(
    store: Store, only: Collection[str] | None = None, *, recipe: str | None = None
) -> dict[str, Any] | None:
    """Return the manifest of the newest report, or None if there is none.

    Args:
        only: A recipe's fingerprints. Consider only reports on these stages, or on those of them
            that did not fail.
        recipe: The name of that recipe.
    """
    reports = []
    for manifest in store.manifests("report"):
        if only is None or _is_of(manifest, {*only}, recipe):
            reports.append(manifest)
    return max(reports, key=lambda manifest: manifest["published_at"], default=None)


def _is_of(report: dict[str, Any], fingerprints: set[str], recipe: str | None) -> bool:
    """Return whether a manifest is a report on these stages, or one of the recipe on those of them
    that did not fail."""
    if report["fingerprint"] in fingerprints:
        return True
    identity = report["identity"]
    of_recipe = identity["recipe"].get("failed") and identity["recipe"]["name"] == recipe
    return bool(of_recipe) and {*identity["inputs"].values()} <= fingerprints


def _attempts(store: Store, published: set[str]) -> list[Unfinished]:
    """Return all attempts whose files are on this machine, and the unpublished ones in an object store."""
    folders = store.attempts_folder("*", "*")
    top = folders.parents[2]
    written: dict[tuple[str, str, str], datetime] = {}
    for folder in top.glob(f"*/*/{folders.name}/[0-9]*-*"):
        written_s = max(_written_s(path) for path in [folder, *folder.rglob("*")])
        if folder.is_dir():
            written[folder.parts[-4], folder.parts[-3], folder.name] = datetime.fromtimestamp(written_s, UTC)
    if isinstance(store, RemoteStore):
        for stage, fingerprint, attempt, last_write in store.unpublished(published):
            key = stage, fingerprint, attempt
            written[key] = max(last_write, written.get(key, last_write))
    return [Unfinished(*key, last_write) for key, last_write in written.items()]


def _written_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # a running attempt moves its files
        return 0.0
