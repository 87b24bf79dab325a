"""Artifacts: what a stage publishes, and how two writers can never both win.

    {root}/{stage}/{fingerprint}/attempts/{id}/out/...    files, written by one attempt alone
    {root}/{stage}/{fingerprint}/attempts/{id}/work/...   its private state (checkpoints); gone once published
    {root}/{stage}/{fingerprint}/artifact.json            created last and exclusively: names the winning attempt

Why it is safe: after `kill -9` of a stage its training ranks go on writing for a while, so two writers are real. They
never share a file, since each attempt has its own folder, and only one can create `artifact.json`: locally by linking
a finished file to that name, on object stores by a conditional put (If-None-Match). The loser's publication is refused
and its attempt removed.

`root` is any fsspec URL. Stages read and write local folders: on a remote root an attempt works in `scratch` and its
files are uploaded before the manifest is; inputs are downloaded into `scratch/cache` and verified by hash.

    store = Store(".longreach"); attempt = store.new_attempt("pack", fingerprint); ...; store.publish(attempt, {...})
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from longreach.infra.files import digest_of, draft_of, file_digest

MANIFEST = "artifact.json"


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
    """Artifacts and leases under one fsspec root."""

    def __init__(self, root: str, scratch: str | Path = ".longreach/scratch") -> None:
        self.root = root
        import fsspec  # 80 ms, which commands without a store need not wait for

        self.fs, self.base = fsspec.core.url_to_fs(root)
        self.local = self.fs.protocol == "file" or "file" in self.fs.protocol
        self.scratch = Path(scratch).absolute()

    def checked(self) -> Store:
        """Itself, after a look at a remote root: a missing bucket or key is found before anything is computed.

        Raises:
            ValueError: the root cannot be listed.
        """
        bucket = self.base.partition("/")[0]
        try:
            if not (self.local or self._listed(self.base) or self._listed(bucket)):
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
        """Whether it is there; that we may not look at the whole bucket says nothing against our part of it."""
        try:
            self.fs.ls(path)
        except FileNotFoundError:
            return not path
        except PermissionError:
            if path == self.base:
                raise
        return True

    def _folder(self, stage: str, fingerprint: str) -> str:
        return f"{self.base}/{stage}/{fingerprint}"

    def _attempts(self, stage: str, fingerprint: str) -> Path:
        """Where attempts are written: in place on a local root, in scratch otherwise."""
        top = Path(self.base) if self.local else self.scratch
        return top / stage / fingerprint / "attempts"

    # ---- reading

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The published artifact, or None. Its manifest is checked, its files are not (see `problems`).

        Raises:
            CorruptArtifact: the manifest itself is damaged.
        """
        try:
            manifest = self._read_manifest(f"{self._folder(stage, fingerprint)}/{MANIFEST}")
        except FileNotFoundError:
            return None
        if (manifest["stage"], manifest["fingerprint"]) != (stage, fingerprint):
            raise CorruptArtifact(f"{stage}/{fingerprint}: the manifest is that of another artifact")
        attempts = Path(self.base) if self.local else self.scratch / "cache"
        return Artifact(attempts / stage / fingerprint / "attempts" / manifest["attempt"] / "out", manifest)

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
        """What differs from the manifest, a line each; empty if the artifact is whole.

        Args:
            hashes: read every byte; without it only presence and size are compared.
        """

        if not self.local and not hashes:
            return self._remote_problems(artifact)
        wrong = self._wrong(artifact, artifact.manifest["files"], hashes)
        if wrong and not self.local:  # not yet in this node's cache, or damaged there
            self._download(artifact, [entry for entry, _ in wrong])
            wrong = self._wrong(artifact, [entry for entry, _ in wrong], hashes)
        return [line for _, line in wrong]

    @staticmethod
    def _wrong(artifact: Artifact, files: list[dict[str, Any]], hashes: bool) -> list[tuple[dict[str, Any], str]]:
        """The entries whose local file is not as published, and what is wrong with it."""

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
            return [(files[0], line)] if (line := check(files[0])) else []
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
            return [(entry, line) for entry, line in zip(files, pool.map(check, files), strict=True) if line]

    def _remote_out(self, artifact: Artifact) -> str:
        return f"{self._folder(artifact.stage, artifact.fingerprint)}/attempts/{artifact.attempt}/out"

    def _remote_problems(self, artifact: Artifact) -> list[str]:
        out = self._remote_out(artifact)
        sizes = {name[len(out) + 1 :]: info["size"] for name, info in self.fs.find(out, detail=True).items()}
        return [
            f"{entry['path']}: {sizes.get(entry['path'], 'no')} bytes, {entry['size']} were published"
            for entry in artifact.manifest["files"]
            if sizes.get(entry["path"]) != entry["size"]
        ]

    def _download(self, artifact: Artifact, files: list[dict[str, Any]]) -> None:
        """Bring files of a remote artifact into the cache."""
        for entry in files:
            path = artifact.path / entry["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft_of(path) as draft:
                self.fs.get_file(f"{self._remote_out(artifact)}/{entry['path']}", str(draft))

    def fetch(self, stage: str, fingerprint: str) -> Artifact:
        """The artifact, every byte verified, its files local.

        Raises:
            CorruptArtifact: it is missing or does not match its manifest.
        """
        artifact = self.find(stage, fingerprint)
        if artifact is None:
            raise CorruptArtifact(f"{stage}/{fingerprint} is not published")
        if problems := self.problems(artifact):
            raise CorruptArtifact(f"{stage}/{fingerprint}: " + "; ".join(problems))
        return artifact

    def manifests(self, stage: str | None = None) -> Iterator[dict[str, Any]]:
        """Manifests of everything published (of one stage), damaged ones left out."""
        for path in self.fs.glob(f"{self.base}/{stage or '*'}/*/{MANIFEST}"):
            try:
                yield self._read_manifest(path)
            except CorruptArtifact:
                continue  # `find` reports it when the artifact is wanted

    # ---- writing

    def new_attempt(self, stage: str, fingerprint: str) -> Attempt:
        """A folder of one's own; every earlier unpublished attempt is told to stop."""
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
        return attempt

    def earlier_attempts(self, stage: str, fingerprint: str) -> list[Path]:
        """Folders of unpublished attempts, newest first: a new attempt may read their checkpoints."""
        attempts = self._attempts(stage, fingerprint)
        found = [p for p in attempts.glob("[0-9]*-*") if p.is_dir()] if attempts.is_dir() else []
        return sorted(found, key=lambda p: p.name, reverse=True)

    def publish(self, attempt: Attempt, record: dict[str, Any]) -> Artifact:
        """Make `attempt.out` the artifact of its fingerprint; other attempts of it are removed.

        Args:
            record: inputs, recipe, summary, seconds, versions...: what the manifest says beside the files.

        Raises:
            AlreadyPublished: another attempt was first; this one has been removed.
        """
        try:
            files = self._inventory(attempt)
        except FileNotFoundError:  # removed under our hands by a winner, or the stage wrote nothing
            self._refuse_if_published(attempt)
            raise
        manifest = {
            **record,
            "stage": attempt.stage,
            "fingerprint": attempt.fingerprint,
            "attempt": attempt.id,
            "files": files,
        }
        body = json.dumps({**manifest, "digest": digest_of(manifest)}, indent=1, ensure_ascii=False).encode()
        folder = self._folder(attempt.stage, attempt.fingerprint)
        if not self.local:
            self.fs.put(str(attempt.out) + "/", f"{folder}/attempts/{attempt.id}/out/", recursive=True)
        try:
            self.create(f"{folder}/{MANIFEST}", body)
        except FileExistsError:
            if not self._refuse_if_published(attempt):
                raise
        shutil.rmtree(attempt.work, ignore_errors=True)
        for loser in self.earlier_attempts(attempt.stage, attempt.fingerprint):
            if loser.name != attempt.id:
                loser.with_name(loser.name + ".superseded").touch()
                self._remove(attempt.stage, attempt.fingerprint, loser.name)
        if not self.local:
            self._tidy(folder, attempt.id)
        artifact = self.find(attempt.stage, attempt.fingerprint)
        assert artifact is not None, "just published"
        return artifact

    def _tidy(self, folder: str, winner: str) -> None:
        """Remove what attempts on any node left in the store: checkpoints, and all of the losers."""
        self.fs.invalidate_cache()
        for path in self.fs.ls(f"{folder}/attempts", detail=False):
            if not path.rsplit("/", 1)[1]:  # some stores list the folder itself
                continue
            gone = path if path.rsplit("/", 1)[1] != winner else f"{path}/work"
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm(gone, recursive=True)

    def _inventory(self, attempt: Attempt) -> list[dict[str, Any]]:
        names = sorted(p.relative_to(attempt.out).as_posix() for p in attempt.out.rglob("*") if p.is_file())
        if not names:
            raise FileNotFoundError(f"{attempt.stage}: the stage wrote no file into {attempt.out}")
        paths = [attempt.out / name for name in names]
        open_to = attempt.out.stat().st_mode & 0o666  # safetensors writes for its owner alone
        for path in paths:
            if (mode := path.stat().st_mode) & open_to != open_to:
                path.chmod(mode | open_to)
        return [
            {"path": name, "size": path.stat().st_size, "xxh3": file_digest(path)}
            for name, path in zip(names, paths, strict=True)
        ]

    def _refuse_if_published(self, attempt: Attempt) -> bool:
        """Raises AlreadyPublished if another attempt is; says whether this one is, as after an answer that was lost."""
        winner = self.find(attempt.stage, attempt.fingerprint)
        if winner and winner.attempt != attempt.id:
            self._remove(attempt.stage, attempt.fingerprint, attempt.id)
            raise AlreadyPublished(winner)
        return winner is not None

    def _remove(self, stage: str, fingerprint: str, attempt_id: str) -> None:
        """An attempt's files; a writer that is still alive in it fails, which is meant."""
        shutil.rmtree(self._attempts(stage, fingerprint) / attempt_id, ignore_errors=True)
        if not self.local:
            with contextlib.suppress(FileNotFoundError):  # nothing was uploaded yet, or another publisher was faster
                self.fs.rm(f"{self._folder(stage, fingerprint)}/attempts/{attempt_id}", recursive=True)

    def quarantine(self, stage: str, fingerprint: str) -> str:
        """Take a damaged artifact's manifest away, so that its stage runs again; returns the manifest's new name."""
        manifest = f"{self._folder(stage, fingerprint)}/{MANIFEST}"
        aside = f"{manifest}.damaged-{uuid.uuid4().hex[:8]}"
        self.fs.mv(manifest, aside)
        return aside

    def withdraw(self, stage: str, fingerprint: str) -> None:
        """Unpublish (`run --force`): the stage runs again and publishes anew."""
        self.fs.rm(f"{self._folder(stage, fingerprint)}/{MANIFEST}")

    def create(self, path: str, body: bytes) -> None:
        """Create a file whole and only if it does not exist.

        Raises:
            FileExistsError: somebody was first.
        """
        if not self.local:
            self.fs.pipe_file(path, body, mode="create")  # S3: If-None-Match: *
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Unlike a rename, a link fails if the target exists.
            with draft_of(target, publish=os.link) as draft, draft.open("wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.filename:
                raise
            raise OSError(error.errno, error.strerror, str(target)) from error  # a full disk's error names no file
