"""What a store holds right now: who runs, what is half done, what is published.

from longreach.pipelines.status import status
status(Store(".longreach")).published
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from longreach.infra.artifact import Store
from longreach.infra.lease import Lease


@dataclass(frozen=True)
class Unfinished:
    """An attempt that was not published: alive, or left for the next run to resume from."""

    stage: str
    fingerprint: str
    attempt: str
    last_write: datetime


@dataclass(frozen=True)
class Status:
    """Oldest first."""

    holders: dict[str, str]
    """Lease name -> who runs it, or died running it."""
    unfinished: list[Unfinished]
    published: list[dict[str, Any]]
    """Manifests."""


def status(store: Store, only: Collection[str] | None = None) -> Status:
    """Read the store.

    Args:
        only: fingerprints to look at; everything without it.
    """
    names = sorted(Path(folder).name for folder in store.fs.glob(f"{store.base}/leases/*"))
    holders = {name: holder for name in names if (holder := Lease(store, name, "").current_holder())}
    published = [manifest for manifest in store.manifests() if only is None or manifest["fingerprint"] in only]
    done = {manifest["fingerprint"] for manifest in published}
    unfinished = [
        one for one in _attempts(store) if one.fingerprint not in done and (only is None or one.fingerprint in only)
    ]
    return Status(
        holders,
        sorted(unfinished, key=lambda one: one.last_write),
        sorted(published, key=lambda manifest: manifest["published_at"]),
    )


def newest_report(store: Store, only: Collection[str] | None = None) -> dict[str, Any] | None:
    """Return the manifest of the newest report, if there is one.

    Args:
        only: fingerprints of a recipe's stages: then it is the report of these, or of those among them that did not
            fail; any report without it.
    """
    reports = [manifest for manifest in store.manifests("report") if only is None or _is_of(manifest, {*only})]
    return max(reports, key=lambda manifest: manifest["published_at"], default=None)


def _is_of(report: dict[str, Any], fingerprints: set[str]) -> bool:
    """Whether a manifest is the report of these stages, or of those among them that did not fail."""
    if report["fingerprint"] in fingerprints:
        return True
    identity = report["identity"]
    return bool(identity["recipe"].get("failed")) and {*identity["inputs"].values()} <= fingerprints


def _attempts(store: Store) -> list[Unfinished]:
    top = Path(store.base) if store.local else store.scratch
    found = []
    for folder in top.glob("*/*/attempts/[0-9]*-*"):
        written = [_written_s(path) for path in [folder, *folder.rglob("*")]]
        if folder.is_dir():
            stage, fingerprint = folder.parts[-4], folder.parts[-3]
            found.append(Unfinished(stage, fingerprint, folder.name, datetime.fromtimestamp(max(written), UTC)))
    return found


def _written_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # a live attempt moves its files
        return 0.0
