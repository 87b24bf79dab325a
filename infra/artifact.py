"""Artifacts: the files that a stage publishes. Of several writers, exactly one can publish.

    {root}/{stage}/{fingerprint}/attempts/{id}/out/...    the attempt's output files; no other attempt writes here
    {root}/{stage}/{fingerprint}/attempts/{id}/work/...   its private state (checkpoints); deleted once it publishes
    {root}/{stage}/{fingerprint}/artifact.json            created last and exclusively; names the winning attempt

Two writers do occur: after `kill -9` of a stage, its training ranks keep writing for a while. Each
attempt has its own folder, and only one attempt can create `artifact.json`: on a disk by hard-linking
a finished file to that name (infra/files.py), on an object store by a conditional put
(If-None-Match). The loser's files are removed.

A power cut loses nothing: the files are synced first, then their folders, then the manifest, then
its folder. Only after that are the files removed that the artifact replaces.

`root` is any fsspec URL. With a remote root, an attempt works in the local folder `scratch`, and its
files are uploaded before the manifest. Inputs are downloaded into `scratch/cache` and verified by
hash. Several stores may use the same `scratch`:

    {scratch}/{stage}/{fingerprint}/attempts-{digest of the root}/{id}/...    attempts of this store
    {scratch}/cache/{stage}/{fingerprint}/attempts/{id}/out/...               inputs of all stores

    store = Store(".longreach"); attempt = store.new_attempt("pack", fingerprint); ...; store.publish(attempt, {...})
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import time
import uuid
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from longreach.infra.errors import CorruptArtifact
from longreach.infra.files import digest_of, draft_of, file_digest, publish_new, sync, sync_tree

MANIFEST = "artifact.json"
HASHING_THREADS = 4
"""Threads that hash an artifact's files. More threads do not help, since the disk is the limit."""
CONFLICT_PAUSES_S = (0.1, 0.3, 1.0, 3.0)


class AlreadyPublished(Exception):
    """Another attempt published this fingerprint first; `artifact` is the one it published."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(f"{artifact.stage}/{artifact.fingerprint} was published by attempt {artifact.attempt}")
        self.artifact = artifact


@dataclass(frozen=True)
class Artifact:
    """A published artifact. `path` is a local folder that holds exactly the manifest's files."""

    path: Path
    manifest: dict[str, Any]

    @property
    def stage(self) -> str:
        return self.manifest["stage"]

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def attempt(self) -> str:
        return self.manifest["attempt"]

    @property
    def summary(self) -> dict[str, Any]:
        return self.manifest["summary"]


@dataclass(frozen=True)
class Attempt:
    """One writer's folder. Only that writer writes into `out` and `work`."""

    stage: str
    fingerprint: str
    id: str
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def superseded_file(self) -> Path:
        """The file that tells this attempt's writer to stop: it exists once a newer attempt took over."""
        return self.folder.with_name(self.id + ".superseded")


class Store:
    """A store of artifacts below a folder that every writer can access.

    `Store(url)` returns the class that fits, as pathlib.Path does: a RemoteStore unless the URL is
    a local folder.
    """

    local = True
    """Whether the store is a folder of this machine's file system."""

    def __new__(cls, root: str, scratch: str | Path = "") -> Store:
        is_folder = "://" not in root or root.startswith(("file://", "local://"))
        return object.__new__(cls if is_folder else RemoteStore)

    def __init__(self, root: str, scratch: str | Path = ".longreach/scratch") -> None:
        """Describe a store without creating or contacting anything. `scratch`: the local folder
        where attempts are written and inputs are cached if the root is remote."""
        self.root = root
        import fsspec  # takes 80 ms, so commands that use no store skip it

        self.fs, self.base = fsspec.core.url_to_fs(root)
        self.scratch = Path(scratch).absolute()

    def checked(self) -> Store:
        """Return the store itself. Raises ValueError if the root is a file, or cannot be listed."""
        nearest = next(path for path in (Path(self.base), *Path(self.base).parents) if path.exists())
        if not nearest.is_dir():
            raise ValueError(f"store {self.root!r}: {nearest} is a file: choose a folder as store.root (or --root)")
        return self

    def _folder(self, stage: str, fingerprint: str) -> str:
        return f"{self.base}/{stage}/{fingerprint}"

    def attempts_folder(self, stage: str, fingerprint: str) -> Path:
        """Return the local folder that attempts are written to."""
        return Path(self.base, stage, fingerprint, "attempts")

    def _readable(self, stage: str, fingerprint: str, attempt_id: str) -> Path:
        """Return the local folder that a published attempt's files are read from."""
        return self.attempts_folder(stage, fingerprint) / attempt_id / "out"

    # ---- reading

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """Return the published artifact, or None. Raises CorruptArtifact if its manifest is
        damaged."""
        try:
            manifest = self._read_manifest(f"{self._folder(stage, fingerprint)}/{MANIFEST}")
        except FileNotFoundError:
            return None
        if (manifest["stage"], manifest["fingerprint"]) != (stage, fingerprint):
            raise CorruptArtifact(f"{stage}/{fingerprint}: the manifest belongs to another artifact")
        return Artifact(self._readable(stage, fingerprint, manifest["attempt"]), manifest)

    def _read_manifest(self, path: str) -> dict[str, Any]:
        text = self.fs.cat_file(path)
        try:
            manifest = json.loads(text)
            digest = manifest.pop("digest")
        except (ValueError, KeyError, AttributeError) as error:
            raise CorruptArtifact(f"{path}: not a manifest ({error})") from error
        if digest != digest_of(manifest):
            raise CorruptArtifact(f"{path}: damaged (its digest is {digest_of(manifest)}, but it records {digest})")
        for entry in manifest["files"]:
            parts = PurePosixPath(entry["path"])
            if parts.is_absolute() or ".." in parts.parts:
                raise CorruptArtifact(f"{path}: file name {entry['path']!r} points outside the folder")
        return manifest

    def problems(self, artifact: Artifact, *, hashes: bool = True) -> list[str]:
        """Return the differences from the manifest, one line per file; empty if the artifact is
        intact. `hashes`: hash every file; without it, only presence and size are compared."""
        return list(damaged_files(artifact, artifact.manifest["files"], hashes).values())

    def fetch(self, stage: str, fingerprint: str) -> Artifact:
        """Return the artifact with its files on this machine and verified. Raises CorruptArtifact
        if it is missing or damaged."""
        artifact = self.find(stage, fingerprint)
        if artifact is None:
            raise CorruptArtifact(f"{stage}/{fingerprint} is not published")
        if problems := self.problems(artifact):
            raise CorruptArtifact(f"{stage}/{fingerprint}: " + "; ".join(problems))
        return artifact

    def names(self, folder: str, ending: str = "") -> list[str]:
        """Return the sorted names in a folder of the store that end with `ending`; empty if there is
        no such folder. The path is taken literally: as a glob, `notes [2024]` would be misread."""
        try:
            return sorted(name for name in self._list(folder) if name.endswith(ending))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _list(self, folder: str) -> list[str]:
        return os.listdir(folder)

    def _inside(self, folder: str) -> list[str]:
        """Return the paths in a folder; empty if it may not be read, such as `lost+found` at the root of a disk."""
        with contextlib.suppress(PermissionError):
            return [f"{folder}/{name}" for name in self.names(folder)]
        return []

    def manifests(self, stage: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the manifests of all published artifacts (of one stage), except damaged ones."""
        for name in [stage] if stage else self.names(self.base):
            for folder in self._inside(f"{self.base}/{name}"):
                path = f"{folder}/{MANIFEST}"
                if path not in self._inside(folder):
                    continue
                # `find` reports a damaged manifest when the artifact is needed; `longreach gc` may be deleting this one
                with contextlib.suppress(CorruptArtifact, FileNotFoundError):
                    yield self._read_manifest(path)

    # ---- writing

    def new_attempt(self, stage: str, fingerprint: str) -> Attempt:
        """Create an attempt's folder, and tell the writers of all earlier unpublished attempts to
        stop."""
        attempts = self.attempts_folder(stage, fingerprint)
        attempts.mkdir(parents=True, exist_ok=True)
        earlier = self.earlier_attempts(stage, fingerprint)
        number = 1 + max((int(folder.name.split("-")[0]) for folder in earlier), default=0)
        for folder in earlier:
            folder.with_name(folder.name + ".superseded").touch()
        name = f"{number:04d}-{uuid.uuid4().hex[:8]}"
        attempt = Attempt(stage, fingerprint, name, attempts / name)
        attempt.out.mkdir(parents=True)
        attempt.work.mkdir()
        for folder in (attempt.folder, *list(attempt.folder.parents)[:5]):  # up to the one that holds the root
            if os.access(folder, os.R_OK):  # otherwise it existed before, and its entries are on the disk already
                sync(folder)
        return attempt

    def earlier_attempts(self, stage: str, fingerprint: str) -> list[Path]:
        """Return the folders of unpublished attempts, newest first. A new attempt may read their
        checkpoints."""
        folders = [path for path in self.attempts_folder(stage, fingerprint).glob("[0-9]*-*") if path.is_dir()]
        return sorted(folders, key=lambda folder: folder.name, reverse=True)

    def publish(self, attempt: Attempt, record: dict[str, Any]) -> Artifact:
        """Publish `attempt.out` as the artifact of its fingerprint, and remove the other attempts.

        `record`: what the manifest records besides the files: inputs, recipe, summary, seconds,
        versions and so on. Raises AlreadyPublished if another attempt was first; this one has then
        been removed.
        """
        try:
            files = _inventory(attempt)
            self._upload(attempt, [entry["path"] for entry in files])
        except FileNotFoundError:  # the winner has removed this attempt, or the stage wrote nothing
            self._refuse_if_published(attempt)
            raise
        named = {"stage": attempt.stage, "fingerprint": attempt.fingerprint, "attempt": attempt.id}
        manifest = json.loads(json.dumps({**record, **named, "files": files}))  # keys become strings, as when read
        body = json.dumps({**manifest, "digest": digest_of(manifest)}, indent=1, ensure_ascii=False).encode()
        try:
            self.create(f"{self._folder(attempt.stage, attempt.fingerprint)}/{MANIFEST}", body)
        except FileExistsError:
            if not self._refuse_if_published(attempt):
                raise
        shutil.rmtree(attempt.work, ignore_errors=True)
        for loser in self.earlier_attempts(attempt.stage, attempt.fingerprint):
            # Another run may have published again (`--force`) while this process was paused.
            if loser.name != attempt.id and self._published(attempt):
                loser.with_name(loser.name + ".superseded").touch()
                self._remove(attempt.stage, attempt.fingerprint, loser.name)
        artifact = self._published(attempt)
        if artifact is None:
            self._refuse_if_published(attempt)
            raise FileNotFoundError(
                f"{attempt.stage}/{attempt.fingerprint}: another run withdrew it (run --force) as soon as it was "
                "published; run again"
            )
        return artifact

    def _published(self, attempt: Attempt) -> Artifact | None:
        """Return the artifact that this attempt published, or None if it is not the current
        artifact of its fingerprint."""
        artifact = self.find(attempt.stage, attempt.fingerprint)
        return artifact if artifact and artifact.attempt == attempt.id else None

    def _refuse_if_published(self, attempt: Attempt) -> bool:
        """Return whether this attempt is published, since the store's response may have been lost.
        Raises AlreadyPublished if another attempt is published; this one has then been removed."""
        winner = self.find(attempt.stage, attempt.fingerprint)
        if winner and winner.attempt != attempt.id:
            self._remove(attempt.stage, attempt.fingerprint, attempt.id)
            raise AlreadyPublished(winner)
        return winner is not None

    def quarantine(self, stage: str, fingerprint: str) -> str | None:
        """Rename a damaged artifact's manifest, so that its stage runs again. Return the manifest's
        new name, or None if another run has repaired the artifact in the meantime."""
        manifest = f"{self._folder(stage, fingerprint)}/{MANIFEST}"
        looked_at = self.fs.cat_file(manifest)
        with contextlib.suppress(CorruptArtifact):
            artifact = self.find(stage, fingerprint)
            if artifact and not self.problems(artifact, hashes=self.local):
                return None
        aside = f"{manifest}.damaged-{uuid.uuid4().hex[:8]}"
        self.fs.mv(manifest, aside)
        moved = self.fs.cat_file(aside)
        if moved != looked_at:  # another run repaired it between our check and our rename: put it back
            with contextlib.suppress(FileExistsError):
                self.create(manifest, moved)
            self.fs.rm(aside)
            return None
        return aside

    def withdraw(self, stage: str, fingerprint: str) -> None:
        """Unpublish an artifact (`run --force`), so that its stage runs and publishes again."""
        self.fs.rm(f"{self._folder(stage, fingerprint)}/{MANIFEST}")

    def clear(self, stage: str, fingerprint: str) -> None:
        """Delete all attempts of a fingerprint that is no longer published."""
        shutil.rmtree(self.attempts_folder(stage, fingerprint), ignore_errors=True)

    def leftovers(self, stage: str, fingerprint: str, winner: str) -> dict[str, int]:
        """Return what a killed publisher left of a published fingerprint, each folder with its size in
        bytes: other attempts, and the winner's private state."""
        folders = [path for path in self.earlier_attempts(stage, fingerprint) if path.name != winner]
        work = self.attempts_folder(stage, fingerprint) / winner / "work"
        return {str(path): _size_on_disk(path) for path in [*folders, work] if path.is_dir()}

    def remove_leftovers(self, stage: str, fingerprint: str, winner: str) -> None:
        """Delete what `leftovers` returns."""
        for path in Store.leftovers(self, stage, fingerprint, winner):
            shutil.rmtree(path, ignore_errors=True)

    def size(self, stage: str, fingerprint: str) -> int:
        """Return the size in bytes of a fingerprint's attempts, published or not, on this machine
        and in the store."""
        return _size_on_disk(self.attempts_folder(stage, fingerprint))

    def create(self, path: str, body: bytes) -> None:
        """Create a file atomically. Raises FileExistsError if another writer was first."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft_of(target, publish=publish_new) as draft:
                draft.write_bytes(body)
            sync(target.parent)
        except OSError as error:
            if error.filename:
                raise
            raise OSError(error.errno, error.strerror, str(target)) from error  # the error of a full disk names no file

    def _upload(self, attempt: Attempt, names: list[str]) -> None:
        """Bring an attempt's files into the store. In a local store they are there already and only
        have to be synced to the disk."""
        sync_tree(attempt.out)

    def _remove(self, stage: str, fingerprint: str, attempt_id: str) -> None:
        """Delete an attempt's files. A process that still writes there fails, as intended."""
        shutil.rmtree(self.attempts_folder(stage, fingerprint) / attempt_id, ignore_errors=True)


class RemoteStore(Store):
    """A store of artifacts below a URL. Attempts are written in `scratch` and uploaded when they
    are published; artifacts are read from a local cache."""

    local = False

    def checked(self) -> Store:  # reports a missing bucket or key before anything is computed
        if glob.has_magic(self.base):  # fsspec would delete everything that the pattern matches
            raise ValueError(f"store {self.root!r}: * ? and [ are patterns in a URL; choose a store.root without them")
        bucket = self.base.partition("/")[0]
        try:
            if not (self._listed(self.base) or self._listed(bucket)):
                raise FileNotFoundError(f"there is no bucket {bucket}")
        except Exception as error:  # each file system raises its own types
            raise ValueError(
                f"store {self.root!r}: {error}. Correct store.root (or --root), or set the store's credentials in the "
                "environment (for S3 AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL). If only the "
                "cluster can reach it, use longreach submit --no-plan"
            ) from error
        self.fs.invalidate_cache()  # later listings must not be answered from this one
        return self

    def _listed(self, path: str) -> bool:
        """Return whether a path exists. A bucket that we may not list counts as existing, since we may
        still have access to our prefix in it."""
        try:
            self.fs.ls(path)
        except FileNotFoundError:
            return not path
        except PermissionError:
            if path == self.base:
                raise
        return True

    def _list(self, folder: str) -> list[str]:
        self.fs.invalidate_cache()  # other processes write there
        paths = [path.rstrip("/") for path in self.fs.ls(folder, detail=False)]
        return [path.rsplit("/", 1)[1] for path in paths if path != folder]  # some stores list the folder itself

    def attempts_folder(self, stage: str, fingerprint: str) -> Path:
        of_this_store = digest_of(self.fs.unstrip_protocol(self.base))[:8]  # other stores may share `scratch`
        return self.scratch / stage / fingerprint / f"attempts-{of_this_store}"

    def _readable(self, stage: str, fingerprint: str, attempt_id: str) -> Path:
        return self.scratch / "cache" / stage / fingerprint / "attempts" / attempt_id / "out"

    def _attempt(self, stage: str, fingerprint: str, attempt_id: str) -> str:
        """Return an attempt's folder in the store."""
        return f"{self._folder(stage, fingerprint)}/attempts/{attempt_id}"

    def problems(self, artifact: Artifact, *, hashes: bool = True) -> list[str]:
        """Return the differences from the manifest. With `hashes`, first download the files that are
        missing from the cache."""
        out = self._attempt(artifact.stage, artifact.fingerprint, artifact.attempt) + "/out"
        files = artifact.manifest["files"]
        if not hashes:
            sizes = {name[len(out) + 1 :]: info["size"] for name, info in self.fs.find(out, detail=True).items()}
            differing = []
            for entry in files:
                name, size = entry["path"], entry["size"]
                found = sizes.get(name, "no")
                if found != size:
                    differing.append(f"{name}: has {found} bytes, but {size} were published")
            return differing
        missing = damaged_files(artifact, files)  # not in this node's cache yet, or damaged there
        for name in missing:
            path = artifact.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError), draft_of(path) as draft:  # reported as missing below
                self.fs.get_file(f"{out}/{name}", str(draft))
        return list(damaged_files(artifact, [entry for entry in files if entry["path"] in missing]).values())

    def publish(self, attempt: Attempt, record: dict[str, Any]) -> Artifact:
        """Publish, and delete what attempts on any node left in the store: checkpoints, and the
        files of losing attempts."""
        artifact = super().publish(attempt, record)
        for path in self._left_in_store(attempt.stage, attempt.fingerprint, attempt.id):
            if self._published(attempt):
                with contextlib.suppress(FileNotFoundError):
                    self.fs.rm(path, recursive=True)
        return artifact

    def _left_in_store(self, stage: str, fingerprint: str, winner: str) -> list[str]:
        """Return the paths in the store of what `leftovers` describes."""
        attempts = f"{self._folder(stage, fingerprint)}/attempts"
        paths = [f"{attempts}/{name}" for name in self.names(attempts) if name != winner]
        return [*paths, *([f"{attempts}/{winner}/work"] if "work" in self.names(f"{attempts}/{winner}") else [])]

    def leftovers(self, stage: str, fingerprint: str, winner: str) -> dict[str, int]:
        in_store = self._left_in_store(stage, fingerprint, winner)
        return super().leftovers(stage, fingerprint, winner) | {path: int(self.fs.du(path)) for path in in_store}

    def remove_leftovers(self, stage: str, fingerprint: str, winner: str) -> None:
        super().remove_leftovers(stage, fingerprint, winner)
        for path in self._left_in_store(stage, fingerprint, winner):
            self.fs.rm(path, recursive=True)

    def unpublished(self, published: Container[str]) -> Iterator[tuple[str, str, str, datetime]]:
        """Yield (stage, fingerprint, attempt, last write) of the attempts in the store, such as trainings
        that left checkpoints, whose fingerprint has no manifest. Folders of fingerprints in
        `published` are not listed."""
        for stage in self.names(self.base):
            for folder in self._inside(f"{self.base}/{stage}"):
                if folder.rpartition("/")[2] in published:
                    continue
                inside = self._inside(folder)
                if f"{folder}/attempts" not in inside or f"{folder}/{MANIFEST}" in inside:
                    continue
                for path in self._inside(f"{folder}/attempts"):
                    written = []
                    for file in self.fs.find(path):
                        with contextlib.suppress(FileNotFoundError):  # a running attempt deletes its old checkpoints
                            written.append(self.fs.modified(file))
                    if written:
                        yield stage, folder.rpartition("/")[2], path.rpartition("/")[2], max(written)

    def clear(self, stage: str, fingerprint: str) -> None:
        super().clear(stage, fingerprint)
        attempts = f"{self._folder(stage, fingerprint)}/attempts"
        for name in self.names(attempts):  # other stores' attempts stay in the cache
            shutil.rmtree(self._readable(stage, fingerprint, name).parent, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):  # nothing was uploaded
            self.fs.rm(attempts, recursive=True)

    def size(self, stage: str, fingerprint: str) -> int:
        of_cache = _size_on_disk(self.scratch / "cache" / stage / fingerprint)
        return super().size(stage, fingerprint) + of_cache + int(self.fs.du(self._folder(stage, fingerprint)))

    def create(self, path: str, body: bytes) -> None:
        for pause_s in (*CONFLICT_PAUSES_S, None):
            try:
                self.fs.pipe_file(path, body, mode="create")  # S3: If-None-Match: *
                return
            except OSError as error:
                # S3's 409: another request for this name is in progress, so send this one again
                if pause_s is None or "ConditionalRequestConflict" not in str(error):
                    raise
            time.sleep(pause_s)

    def _upload(self, attempt: Attempt, names: list[str]) -> None:
        for name in names:
            if "?versionId=" in name or any(character < " " for character in name):
                raise ValueError(
                    f"{attempt.stage}: an object store cannot hold the file {name!r}: rename it, without control "
                    "characters and ?versionId="
                )
        out = self._attempt(attempt.stage, attempt.fingerprint, attempt.id) + "/out"
        # paths given as lists are taken literally, and several files are uploaded at a time
        self.fs.put([str(attempt.out / name) for name in names], [f"{out}/{name}" for name in names])

    def _remove(self, stage: str, fingerprint: str, attempt_id: str) -> None:
        super()._remove(stage, fingerprint, attempt_id)
        with contextlib.suppress(FileNotFoundError):  # nothing was uploaded yet, or another publisher removed it first
            self.fs.rm(self._attempt(stage, fingerprint, attempt_id), recursive=True)


def _size_on_disk(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process still writes or deletes files there
            if path.is_file():
                size += path.stat().st_size
    return size


def damaged_files(artifact: Artifact, files: list[dict[str, Any]], hashes: bool = True) -> dict[str, str]:
    """Return the manifest's files whose local copies differ from what was published, each name with
    a message that says what is wrong."""

    def check(entry: dict[str, Any]) -> str | None:
        path = artifact.path / entry["path"]
        if not path.is_file():
            return f"{entry['path']}: missing"
        if (size := path.stat().st_size) != entry["size"]:
            return f"{entry['path']}: has {size} bytes, but {entry['size']} were published"
        if hashes and file_digest(path) != entry["xxh3"]:
            return f"{entry['path']}: its content changed since it was published"
        return None

    if len(files) == 1:  # saves starting threads for each of thousands of small stages
        lines = [check(files[0])]
    else:
        with ThreadPoolExecutor(min(HASHING_THREADS, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
            lines = list(pool.map(check, files))
    return {entry["path"]: line for entry, line in zip(files, lines, strict=True) if line}


def _inventory(attempt: Attempt) -> list[dict[str, Any]]:
    """Return name, size and hash of all files of an attempt, after giving each file at least the
    read and write permissions of its folder."""
    paths = sorted(path for path in attempt.out.rglob("*") if path.is_file())
    if not paths:
        raise FileNotFoundError(f"{attempt.stage}: the stage wrote no file into {attempt.out}")
    folder_mode = attempt.out.stat().st_mode & 0o666
    files = []
    for path in paths:
        if (mode := path.stat().st_mode) & folder_mode != folder_mode:  # safetensors lets only the owner read
            path.chmod(mode | folder_mode)
        name = path.relative_to(attempt.out).as_posix()
        files.append({"path": name, "size": path.stat().st_size, "xxh3": file_digest(path)})
    return sorted(files, key=lambda entry: entry["path"])
