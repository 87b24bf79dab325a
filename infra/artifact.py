"""Artifacts: what a stage publishes, and why two writers can never both win.

    {root}/{stage}/{fingerprint}/attempts/{id}/out/...    files, written by one attempt alone
    {root}/{stage}/{fingerprint}/attempts/{id}/work/...   its private state (checkpoints); gone once published
    {root}/{stage}/{fingerprint}/artifact.json            created last and exclusively: names the winning attempt

Two writers are real: after `kill -9` of a stage its training ranks go on writing for a while. Each
attempt has its own folder, and only one can create `artifact.json`: on a disk by linking a finished
file to that name (infra/files.py), on object stores by a conditional put (If-None-Match). The loser
is removed.

Nothing is lost in a power cut: files are synced first, then their folders, then the manifest, then
its folder; only after that is anything removed that the artifact replaces.

`root` is any fsspec URL. On a remote root an attempt works in the local folder `scratch`, its files
are uploaded before the manifest is; inputs are downloaded into `scratch/cache` and verified by
hash.

    store = Store(".longreach"); attempt = store.new_attempt("pack", fingerprint); ...; store.publish(attempt, {...})
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from longreach.infra.files import digest_of, draft_of, file_digest, publish_new, sync, sync_tree

MANIFEST = "artifact.json"
HASHING_THREADS = 4
"""Threads that hash an artifact's files; more do not help, since a disk is read."""


class AlreadyPublished(Exception):
    """Another attempt published this fingerprint first; `artifact` is the winner's."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(f"{artifact.stage}/{artifact.fingerprint} was published by attempt {artifact.attempt}")
        self.artifact = artifact


class CorruptArtifact(Exception):
    """A published artifact does not match its manifest."""


@dataclass(frozen=True)
class Artifact:
    """A published folder. `path` is local and holds exactly the manifest's files."""

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
    """One writer's folder. Only its holder writes into `out` and `work`."""

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
        """Exists once a newer attempt took over: a writer that sees it stops."""
        return self.folder.with_name(self.id + ".superseded")


class Store:
    """Artifacts below a folder that every writer sees. As with pathlib, `Store(url)` makes the
    class that fits: a RemoteStore where the URL is not a folder."""

    local = True

    def __new__(cls, root: str, scratch: str | Path = "") -> Store:
        is_folder = "://" not in root or root.startswith(("file://", "local://"))
        return object.__new__(cls if is_folder else RemoteStore)

    def __init__(self, root: str, scratch: str | Path = ".longreach/scratch") -> None:
        """Name a store; nothing is created or asked yet. `scratch`: the folder of this machine
        where attempts on a remote root are written and inputs are cached."""
        self.root = root
        import fsspec  # 80 ms, which commands without a store need not wait for

        self.fs, self.base = fsspec.core.url_to_fs(root)
        self.scratch = Path(scratch).absolute()

    def checked(self) -> Store:
        """Return the store itself; ValueError if a remote root cannot be listed."""
        return self

    def _folder(self, stage: str, fingerprint: str) -> str:
        return f"{self.base}/{stage}/{fingerprint}"

    def _attempts(self, stage: str, fingerprint: str) -> Path:
        """Return the local folder in which attempts are written."""
        return Path(self.base, stage, fingerprint, "attempts")

    def _readable(self, stage: str, fingerprint: str, attempt_id: str) -> Path:
        """Return the local folder in which a published attempt's files are read."""
        return self._attempts(stage, fingerprint) / attempt_id / "out"

    # ---- reading

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """Return the published artifact, or None. Raises CorruptArtifact: its manifest is
        damaged."""
        try:
            manifest = self._read_manifest(f"{self._folder(stage, fingerprint)}/{MANIFEST}")
        except FileNotFoundError:
            return None
        if (manifest["stage"], manifest["fingerprint"]) != (stage, fingerprint):
            raise CorruptArtifact(f"{stage}/{fingerprint}: the manifest is that of another artifact")
        return Artifact(self._readable(stage, fingerprint, manifest["attempt"]), manifest)

    def _read_manifest(self, path: str) -> dict[str, Any]:
        text = self.fs.cat_file(path)
        try:
            manifest = json.loads(text)
            digest = manifest.pop("digest")
        except (ValueError, KeyError, AttributeError) as error:
            raise CorruptArtifact(f"{path}: not a manifest ({error})") from error
        if digest != digest_of(manifest):
            raise CorruptArtifact(f"{path}: damaged (its digest is {digest_of(manifest)}, it says {digest})")
        for entry in manifest["files"]:
            parts = PurePosixPath(entry["path"])
            if parts.is_absolute() or ".." in parts.parts:
                raise CorruptArtifact(f"{path}: file name {entry['path']!r} leaves its folder")
        return manifest

    def problems(self, artifact: Artifact, *, hashes: bool = True) -> list[str]:
        """Return what differs from the manifest, a line for each file; empty if the artifact is
        whole. `hashes`: read every byte; without it only presence and size are compared."""
        return list(damaged_files(artifact, artifact.manifest["files"], hashes).values())

    def fetch(self, stage: str, fingerprint: str) -> Artifact:
        """Return the artifact, files local and verified. Raises CorruptArtifact: it is missing or
        damaged."""
        artifact = self.find(stage, fingerprint)
        if artifact is None:
            raise CorruptArtifact(f"{stage}/{fingerprint} is not published")
        if problems := self.problems(artifact):
            raise CorruptArtifact(f"{stage}/{fingerprint}: " + "; ".join(problems))
        return artifact

    def names(self, folder: str, ending: str = "") -> list[str]:
        """Return the sorted names of what is in a folder of the store now and ends so; none if it is not
        there. The path is taken literally, where a pattern would misread `notes [2024]`."""
        try:
            return sorted(name for name in self._list(folder) if name.endswith(ending))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _list(self, folder: str) -> list[str]:
        return os.listdir(folder)

    def _inside(self, folder: str) -> list[str]:
        """Return the paths in a folder; none if it may not be read, as `lost+found` of a whole disk."""
        with contextlib.suppress(PermissionError):
            return [f"{folder}/{name}" for name in self.names(folder)]
        return []

    def manifests(self, stage: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the manifests of everything published (of one stage), without damaged ones."""
        for name in [stage] if stage else self.names(self.base):
            for folder in self._inside(f"{self.base}/{name}"):
                path = f"{folder}/{MANIFEST}"
                if path not in self._inside(folder):
                    continue
                # `find` reports a damaged one when the artifact is wanted; `longreach gc` may just remove one
                with contextlib.suppress(CorruptArtifact, FileNotFoundError):
                    yield self._read_manifest(path)

    # ---- writing

    def new_attempt(self, stage: str, fingerprint: str) -> Attempt:
        """Create a folder for one writer, and tell the writers of all earlier unpublished attempts
        to stop."""
        attempts = self._attempts(stage, fingerprint)
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
            if os.access(folder, os.R_OK):  # else it was there before us, and its names are on the disk
                sync(folder)
        return attempt

    def earlier_attempts(self, stage: str, fingerprint: str) -> list[Path]:
        """Return the folders of unpublished attempts, newest first: a new one may read their
        checkpoints."""
        folders = [path for path in self._attempts(stage, fingerprint).glob("[0-9]*-*") if path.is_dir()]
        return sorted(folders, key=lambda folder: folder.name, reverse=True)

    def publish(self, attempt: Attempt, record: dict[str, Any]) -> Artifact:
        """Make `attempt.out` the artifact of its fingerprint; other attempts of it are removed.
        `record`: inputs, recipe, summary, seconds, versions...: what the manifest says beside the
        files. Raises AlreadyPublished: another attempt was first; this one has been removed."""
        try:
            files = _inventory(attempt)
            self._upload(attempt, [entry["path"] for entry in files])
        except FileNotFoundError:  # a winner removed this attempt meanwhile, or the stage wrote nothing
            self._refuse_if_published(attempt)
            raise
        named = {"stage": attempt.stage, "fingerprint": attempt.fingerprint, "attempt": attempt.id}
        manifest = json.loads(json.dumps({**record, **named, "files": files}))  # keys are texts, as it will be read
        body = json.dumps({**manifest, "digest": digest_of(manifest)}, indent=1, ensure_ascii=False).encode()
        try:
            self.create(f"{self._folder(attempt.stage, attempt.fingerprint)}/{MANIFEST}", body)
        except FileExistsError:
            if not self._refuse_if_published(attempt):
                raise
        shutil.rmtree(attempt.work, ignore_errors=True)
        for loser in self.earlier_attempts(attempt.stage, attempt.fingerprint):
            # This process may have been paused, and another run have published anew (`--force`) meanwhile.
            if loser.name != attempt.id and self._published(attempt):
                loser.with_name(loser.name + ".superseded").touch()
                self._remove(attempt.stage, attempt.fingerprint, loser.name)
        artifact = self._published(attempt)
        if artifact is None:
            self._refuse_if_published(attempt)
            raise FileNotFoundError(
                f"{attempt.stage}/{attempt.fingerprint}: another run took it back (run --force) as soon as it was "
                "published: run again"
            )
        return artifact

    def _published(self, attempt: Attempt) -> Artifact | None:
        """Return the artifact that an attempt has become, as long as it is that of the
        fingerprint."""
        artifact = self.find(attempt.stage, attempt.fingerprint)
        return artifact if artifact and artifact.attempt == attempt.id else None

    def _refuse_if_published(self, attempt: Attempt) -> bool:
        """Return whether this attempt is published: the store's answer may have been lost. Raises
        AlreadyPublished: another attempt is; this one has been removed."""
        winner = self.find(attempt.stage, attempt.fingerprint)
        if winner and winner.attempt != attempt.id:
            self._remove(attempt.stage, attempt.fingerprint, attempt.id)
            raise AlreadyPublished(winner)
        return winner is not None

    def quarantine(self, stage: str, fingerprint: str) -> str | None:
        """Rename a damaged artifact's manifest, so that its stage runs again, and return the
        manifest's new name; None where another run has repaired the artifact meanwhile."""
        manifest = f"{self._folder(stage, fingerprint)}/{MANIFEST}"
        looked_at = self.fs.cat_file(manifest)
        with contextlib.suppress(CorruptArtifact):
            artifact = self.find(stage, fingerprint)
            if artifact and not self.problems(artifact, hashes=self.local):
                return None
        aside = f"{manifest}.damaged-{uuid.uuid4().hex[:8]}"
        self.fs.mv(manifest, aside)
        moved = self.fs.cat_file(aside)
        if moved != looked_at:  # repaired between the look and the renaming: it belongs back
            with contextlib.suppress(FileExistsError):
                self.create(manifest, moved)
            self.fs.rm(aside)
            return None
        return aside

    def withdraw(self, stage: str, fingerprint: str) -> None:
        """Unpublish an artifact (`run --force`): the stage runs again and publishes anew."""
        self.fs.rm(f"{self._folder(stage, fingerprint)}/{MANIFEST}")

    def clear(self, stage: str, fingerprint: str) -> None:
        """Delete all attempts of a fingerprint that is not published any more."""
        shutil.rmtree(self._attempts(stage, fingerprint), ignore_errors=True)

    def size(self, stage: str, fingerprint: str) -> int:
        """Return the bytes of a fingerprint's attempts, published or not, on this machine and in the
        store."""
        return _size_on_disk(self._attempts(stage, fingerprint))

    def create(self, path: str, body: bytes) -> None:
        """Create a file whole. Raises FileExistsError: another writer was first."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft_of(target, publish=publish_new) as draft:
                draft.write_bytes(body)
            sync(target.parent)
        except OSError as error:
            if error.filename:
                raise
            raise OSError(error.errno, error.strerror, str(target)) from error  # a full disk's error names no file

    def _upload(self, attempt: Attempt, names: list[str]) -> None:
        """Bring an attempt's files into the store: onto the disk, where that is the store
        itself."""
        sync_tree(attempt.out)

    def _remove(self, stage: str, fingerprint: str, attempt_id: str) -> None:
        """Delete an attempt's files. A process that still writes there is supposed to fail."""
        shutil.rmtree(self._attempts(stage, fingerprint) / attempt_id, ignore_errors=True)


class RemoteStore(Store):
    """Artifacts below a URL: attempts are written in `scratch`, uploaded to be published, and read
    from a cache."""

    local = False

    def checked(self) -> Store:  # a missing bucket or key is found before anything is computed
        if glob.has_magic(self.base):  # fsspec would delete what it matches
            raise ValueError(f"store {self.root!r}: * ? and [ are patterns in a URL: choose a store.root without them")
        bucket = self.base.partition("/")[0]
        try:
            if not (self._listed(self.base) or self._listed(bucket)):
                raise FileNotFoundError(f"there is no {bucket}")
        except Exception as error:  # every file system has its own
            raise ValueError(
                f"store {self.root!r}: {error}: correct store.root (or --root), or put the store's keys into the "
                "environment (for S3 AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL); where only the "
                "cluster reaches it: longreach submit --no-plan"
            ) from error
        self.fs.invalidate_cache()  # what was there now must not be the answer later
        return self

    def _listed(self, path: str) -> bool:
        """Whether a path exists. A bucket that we may not list counts: our part of it may still be
        ours."""
        try:
            self.fs.ls(path)
        except FileNotFoundError:
            return not path
        except PermissionError:
            if path == self.base:
                raise
        return True

    def _list(self, folder: str) -> list[str]:
        self.fs.invalidate_cache()  # others write there
        paths = [path.rstrip("/") for path in self.fs.ls(folder, detail=False)]
        return [path.rsplit("/", 1)[1] for path in paths if path != folder]  # some stores list the folder itself

    def _attempts(self, stage: str, fingerprint: str) -> Path:
        return self.scratch / stage / fingerprint / "attempts"

    def _readable(self, stage: str, fingerprint: str, attempt_id: str) -> Path:
        return self.scratch / "cache" / stage / fingerprint / "attempts" / attempt_id / "out"

    def _attempt(self, stage: str, fingerprint: str, attempt_id: str) -> str:
        """Return an attempt's folder in the store."""
        return f"{self._folder(stage, fingerprint)}/attempts/{attempt_id}"

    def problems(self, artifact: Artifact, *, hashes: bool = True) -> list[str]:
        """Return what differs from the manifest; with `hashes` after files were downloaded that the
        cache lacks."""
        out = self._attempt(artifact.stage, artifact.fingerprint, artifact.attempt) + "/out"
        files = artifact.manifest["files"]
        if not hashes:
            sizes = {name[len(out) + 1 :]: info["size"] for name, info in self.fs.find(out, detail=True).items()}
            differing = []
            for entry in files:
                name, size = entry["path"], entry["size"]
                found = sizes.get(name, "no")
                if found != size:
                    differing.append(f"{name}: {found} bytes, {size} were published")
            return differing
        missing = damaged_files(artifact, files)  # not yet in this node's cache, or damaged there
        for name in missing:
            path = artifact.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft_of(path) as draft:
                self.fs.get_file(f"{out}/{name}", str(draft))
        return list(damaged_files(artifact, [entry for entry in files if entry["path"] in missing]).values())

    def publish(self, attempt: Attempt, record: dict[str, Any]) -> Artifact:
        """Publish, and delete what attempts of any node left in the store: checkpoints, and the
        files of the losers."""
        artifact = super().publish(attempt, record)
        attempts = f"{self._folder(attempt.stage, attempt.fingerprint)}/attempts"
        for name in self.names(attempts):
            if self._published(attempt):
                with contextlib.suppress(FileNotFoundError):
                    path = f"{attempts}/{name}"
                    self.fs.rm(f"{path}/work" if name == attempt.id else path, recursive=True)
        return artifact

    def clear(self, stage: str, fingerprint: str) -> None:
        super().clear(stage, fingerprint)
        shutil.rmtree(self.scratch / "cache" / stage / fingerprint, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):  # nothing was uploaded
            self.fs.rm(f"{self._folder(stage, fingerprint)}/attempts", recursive=True)

    def size(self, stage: str, fingerprint: str) -> int:
        of_cache = _size_on_disk(self.scratch / "cache" / stage / fingerprint)
        return super().size(stage, fingerprint) + of_cache + int(self.fs.du(self._folder(stage, fingerprint)))

    def create(self, path: str, body: bytes) -> None:
        self.fs.pipe_file(path, body, mode="create")  # S3: If-None-Match: *

    def _upload(self, attempt: Attempt, names: list[str]) -> None:
        out = self._attempt(attempt.stage, attempt.fingerprint, attempt.id) + "/out"
        # lists are taken literally, and uploaded several files at a time
        self.fs.put([str(attempt.out / name) for name in names], [f"{out}/{name}" for name in names])

    def _remove(self, stage: str, fingerprint: str, attempt_id: str) -> None:
        super()._remove(stage, fingerprint, attempt_id)
        with contextlib.suppress(FileNotFoundError):  # nothing was uploaded yet, or another publisher was faster
            self.fs.rm(self._attempt(stage, fingerprint, attempt_id), recursive=True)


def _size_on_disk(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # somebody still writes there, or removes it
            if path.is_file():
                size += path.stat().st_size
    return size


def damaged_files(artifact: Artifact, files: list[dict[str, Any]], hashes: bool = True) -> dict[str, str]:
    """Return the names of a manifest's files that are not as published on this disk, with what is
    wrong with each."""

    def check(entry: dict[str, Any]) -> str | None:
        path = artifact.path / entry["path"]
        if not path.is_file():
            return f"{entry['path']}: missing"
        if (size := path.stat().st_size) != entry["size"]:
            return f"{entry['path']}: {size} bytes, {entry['size']} were published"
        if hashes and file_digest(path) != entry["xxh3"]:
            return f"{entry['path']}: its content changed since it was published"
        return None

    if len(files) == 1:  # thousands of small stages need no threads
        lines = [check(files[0])]
    else:
        with ThreadPoolExecutor(min(HASHING_THREADS, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
            lines = list(pool.map(check, files))
    return {entry["path"]: line for entry, line in zip(files, lines, strict=True) if line}


def _inventory(attempt: Attempt) -> list[dict[str, Any]]:
    """Return name, size and hash of all files of an attempt, after making each as readable as their
    folder."""
    paths = sorted(path for path in attempt.out.rglob("*") if path.is_file())
    if not paths:
        raise FileNotFoundError(f"{attempt.stage}: the stage wrote no file into {attempt.out}")
    folder_mode = attempt.out.stat().st_mode & 0o666
    files = []
    for path in paths:
        if (mode := path.stat().st_mode) & folder_mode != folder_mode:  # safetensors writes for its owner alone
            path.chmod(mode | folder_mode)
        name = path.relative_to(attempt.out).as_posix()
        files.append({"path": name, "size": path.stat().st_size, "xxh3": file_digest(path)})
    return sorted(files, key=lambda entry: entry["path"])
