"""Checkpoints from which training resumes with bitwise identical results.

A checkpoint is DeepSpeed's folder (trained weights, optimizer state, one file per rank) with two
additions. `checkpoint.json` has the size and xxh3 hash of each file, the step, and the identity of
the run. Each rank's random states let dropout continue as without an interruption.

A checkpoint is written as a draft, synced and then renamed, so a kill leaves a complete checkpoint
or a draft that is never read. Older checkpoints are removed only when the new one is on the disk,
so the newest complete one survives a power cut. The newest valid checkpoint is loaded; damaged ones
are passed over, with a note. Frozen weights are not saved: they come from the base, and the
identity guarantees that it is the same. Only folders under our own root are read, since DeepSpeed's
files are pickles. On every disk, shared between nodes or not, one rank hashes, renames and deletes
files: the disk leader. Without a shared disk, checkpoints are uploaded (upload.py).

    {attempt}/work/checkpoints/step-00000050/
        checkpoint.json  *_model_states.pt  *_optim_states.pt  random-*.pt
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longreach.infra.errors import NO_SPACE, DiskFull
from longreach.infra.files import file_digest, sync, sync_tree
from longreach.infra.share import Share
from longreach.training.upload import Uploads

MANIFEST = "checkpoint.json"
FULL_BELOW_BYTES = 64 * 2**20  # a disk or quota with less free space counts as full


class Checkpoints:
    """Checkpoints of one attempt, and earlier ones to resume from. Every rank calls every
    method."""

    def __init__(
        self, folder: Path, *, identity: str, earlier: Iterable[Path] = (), share: Share | None = None
    ) -> None:
        """
        Args:
            identity: identity of the run; checkpoints of another run are passed over.
            earlier: folders of earlier attempts, which are only read.
            share: how nodes without a shared disk exchange checkpoints. If given, `earlier` is not
                read.
        """
        self.folder = folder
        self.identity = identity
        self.folders = [folder, *earlier]
        self.share = share
        self.is_disk_leader = elect_disk_leader(folder)
        self.uploads = Uploads(share, MANIFEST, is_disk_leader=self.is_disk_leader) if share else None

    def path_of(self, step: int) -> Path:
        """Return the path of the checkpoint after `step` steps, whether it exists or not."""
        return self.folder / f"step-{step:08d}"

    def newest(self) -> tuple[Path | None, list[str]]:
        """Return the newest valid checkpoint, and a message for each newer one passed over."""
        self.finish_upload()
        if self.share:
            return self._pull(self.share)
        decided: list[Any] = [None]
        if dist.get_rank() == 0:  # one rank decides, so that all load the same one
            decided = [newest_valid(self.folders, identity=self.identity)]
        dist.broadcast_object_list(decided)
        return decided[0]

    def of_step(self, step: int) -> Path:
        """Return the checkpoint after `step` steps. RuntimeError if there is no valid one."""
        self.finish_upload()
        if self.share:
            path, _ = self._pull(self.share, step)
            if path:
                return path
        for folder in self.folders:
            path = folder / self.path_of(step).name
            if problem(path, identity=self.identity) is None:
                return path
        raise RuntimeError(
            f"the checkpoint after step {step}, which had the lowest validation loss, is missing or damaged"
        )

    def _pull(self, share: Share, step: int | None = None) -> tuple[Path | None, list[str]]:
        """Download the newest checkpoint in the store (or that of a step) to every node.

        If a checkpoint is damaged on any node, all nodes pass over it.
        """
        listed: list[Any] = [None]
        if dist.get_rank() == 0:
            listed = [share.sealed("work/checkpoints", MANIFEST)]
        dist.broadcast_object_list(listed)
        passed_over: list[str] = []
        for name, place in listed[0]:
            if step is not None and name != self.path_of(step).name:
                continue
            path, own_problem = self.folder / name, None
            if self.is_disk_leader and (own_problem := problem(path, identity=self.identity)):
                with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                    share.pull(path, place)
                own_problem = problem(path, identity=self.identity)
            problems: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(problems, own_problem)
            if not any(problems):
                return path, passed_over
            passed_over.append(f"{place} passed over: {next(filter(None, problems))}")
        return None, passed_over

    def save(
        self, engine: Any, step: int, *, keep_last: int, best: Iterable[int] = (), attach: Iterable[Path] = ()
    ) -> Path:
        """Write the checkpoint after `step` steps; remove older ones beyond `keep_last`, and later
        ones.

        best: steps whose checkpoints are kept. attach: files to store and restore with the
        checkpoint. If nodes share no disk, the upload goes on afterwards: see `finish_upload`.
        """
        self.finish_upload()
        path = self.path_of(step)
        draft = self.folder / f".draft-{path.name}"
        self._write(engine, draft, step)
        torch.save(_random_states(engine), draft / random_file())
        dist.barrier()
        if dist.get_rank() == 0:
            for file in attach:
                shutil.copyfile(file, draft / file.name)
        files = self._files_of_all_disks(draft)
        if self.is_disk_leader:
            about = {"step": step, "identity": self.identity, **layout(engine), "files": files}
            (draft / MANIFEST).write_text(json.dumps(about, indent=1))
            sync_tree(draft)
            shutil.rmtree(path, ignore_errors=True)  # a damaged checkpoint of the same step, if there is one
            os.replace(draft, path)
            sync(self.folder)
        dist.barrier()
        removed: list[Path] = []
        if self.is_disk_leader:
            removed = self._remove_others(step, keep_last, best)
        dist.barrier()
        if self.uploads:
            self.uploads.start(path, outdated=removed)
        return path

    def finish_upload(self) -> str:
        """Wait until the newest checkpoint is uploaded; return why that failed, or "". Returns "" at once
        if nodes share a disk."""
        return self.uploads.finish() if self.uploads else ""

    def abandon_upload(self) -> None:
        """Complete no further upload, because a newer attempt took over."""
        if self.uploads:
            self.uploads.abandon()

    def _write(self, engine: Any, draft: Path, step: int) -> None:
        # this version tells DeepSpeed that the checkpoint can be converted to another number of ranks
        state = {"step": step, "universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
        torch.serialization.set_crc32_options(False)  # the manifest has hashes, so a second checksum is not needed
        try:
            engine.save_checkpoint(
                str(self.folder), tag=draft.name, client_state=state, save_latest=False, exclude_frozen_parameters=True
            )
        except (OSError, RuntimeError) as error:  # torch's writer does not say that a disk is full
            if not _is_full(self.folder):
                raise
            free = shutil.disk_usage(self.folder).free >> 20
            raise DiskFull(
                f"{self.folder}: No space left for the checkpoint after step {step} ({free} MiB free, or less under a "
                f"quota): free disk space and run the same command again, which resumes from the previous checkpoint"
            ) from error

    def _files_of_all_disks(self, draft: Path) -> dict[str, list[Any]]:
        """Return [size, xxh3] of the draft's files by name, from the disks of all nodes."""
        own: dict[str, list[Any]] = {}
        if self.is_disk_leader:
            draft.mkdir(exist_ok=True)
            for file in sorted(draft.iterdir()):
                own[file.name] = [file.stat().st_size, file_digest(file)]
        by_rank: list[dict[str, list[Any]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(by_rank, own)
        files: dict[str, list[Any]] = {}
        for part in by_rank:
            if files.keys() & part.keys():
                raise RuntimeError(
                    f"{draft}: several nodes have files with the same name: remove the attempt's folder on all of them"
                )
            files |= part
        return files

    def _remove_others(self, step: int, keep_last: int, best: Iterable[int]) -> list[Path]:
        """Remove older checkpoints beyond `keep_last`, and those of later steps; return their paths. The
        latter were passed over on resume and would count towards `keep_last` instead of valid ones."""
        checkpoints = sorted(self.folder.glob("step-*"))
        last = [path for path in checkpoints if path <= self.path_of(step)][-keep_last:]
        kept = {*last, *map(self.path_of, best)}
        removed = [path for path in checkpoints if path not in kept]
        for path in removed:
            shutil.rmtree(path)
        return removed

    def load(self, engine: Any, path: Path) -> int:
        """Load weights and optimizer state on every rank and return the number of steps done.

        Random states are restored, too. A checkpoint from another number of ranks is converted
        through DeepSpeed's universal format, without random states. Then the next step is not
        bitwise identical, since sums over ranks are added in another order. ValueError if the
        checkpoint was written with another ZeRO stage or dtype.
        """
        now = layout(engine)
        about = json.loads((path / MANIFEST).read_text())
        written = {key: about.get(key, now[key]) for key in now}  # earlier versions wrote no dtype
        for key in ("zero_stage", "dtype"):
            if written[key] != now[key]:
                raise ValueError(
                    f"resources.{key} is {now[key]}, but the checkpoint {path} was written with {written[key]}: use "
                    f"that value, or remove the attempt's folder"
                )
        universal = written != now and written["zero_stage"] > 0  # without ZeRO every rank has the whole state
        scratch = self.folder / ".universal"
        if universal:
            if self.is_disk_leader:
                _to_universal(path, scratch / path.name)
            dist.barrier()
            path = scratch / path.name
        step = _load(engine, path, universal)
        states = path / random_file()
        if written == now and states.exists():  # earlier versions wrote no random states
            _restore_random_states(engine, torch.load(states, weights_only=True))
        dist.barrier()
        if universal and self.is_disk_leader:
            shutil.rmtree(scratch)
        return step


def _load(engine: Any, path: Path, universal: bool) -> int:
    engine._config.load_universal_checkpoint = universal
    scales = [group["rate_scale"] for group in engine.optimizer.param_groups]
    trains_everything = all(p.requires_grad for p in engine.module.parameters())  # otherwise frozen weights are missing
    loaded, state = engine.load_checkpoint(str(path.parent), tag=path.name, load_module_strict=trains_everything)
    engine._config.load_universal_checkpoint = False
    if loaded is None:
        raise RuntimeError(f"DeepSpeed did not load {path}")
    # ZeRO-3's universal loading (DeepSpeed 0.19) gives all groups the options of the first group. It
    # also makes all tensors share one step counter, which each group would then advance.
    for group, scale in zip(engine.optimizer.param_groups, scales, strict=True):
        group["rate_scale"] = scale
    for tensors in engine.optimizer.state.values():
        tensors["step"] = tensors["step"].clone()
    return state["step"]


def random_file() -> str:
    """Return the name of this rank's file with random states in a checkpoint."""
    return f"random-{dist.get_rank():06d}.pt"


def _random_states(engine: Any) -> dict[str, torch.Tensor]:
    """Return the states of the random generators that forward passes use."""
    states = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(engine.device)
    return states


def _restore_random_states(engine: Any, states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if engine.device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], engine.device)


def _is_full(folder: Path) -> bool:
    """Return whether a file of FULL_BELOW_BYTES cannot be written, because of the disk's space or a quota."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(FULL_BELOW_BYTES))
            file.flush()
            os.fsync(file)
    except OSError as error:
        return error.errno in NO_SPACE
    return False


def elect_disk_leader(folder: Path) -> bool:
    """Return whether this rank is the disk leader of `folder`: the lowest rank that sees the
    folder.

    Every rank calls it. Each rank writes a file there and checks whose files it sees, so it does
    not matter whether nodes share the disk. Drafts left by a killed process are removed.
    """
    mark = [uuid.uuid4().hex]
    dist.broadcast_object_list(mark)
    own = folder / f".rank-{mark[0]}-{dist.get_rank():06d}"
    folder.mkdir(parents=True, exist_ok=True)
    own.touch()
    dist.barrier()
    is_disk_leader = min(folder.glob(f".rank-{mark[0]}-*")) == own
    dist.barrier()
    own.unlink()
    if is_disk_leader:
        for draft in folder.glob(".draft-*"):
            shutil.rmtree(draft)
        sync(folder.parent)  # so that the folder itself survives a power cut
    dist.barrier()
    return is_disk_leader


def layout(engine: Any) -> dict[str, Any]:
    """Return how the optimizer state is split over files, and the dtype of the weights."""
    dtype = "bfloat16" if engine.bfloat16_enabled() else "float32"
    return {"world": dist.get_world_size(), "zero_stage": engine.zero_optimization_stage(), "dtype": dtype}


def problem(path: Path, *, identity: str) -> str | None:
    """Return why training cannot resume from a checkpoint, or None. Every byte is hashed."""
    try:
        about = json.loads((path / MANIFEST).read_text())
        if about["identity"] != identity:
            return "it belongs to another recipe"
        for name, (size, digest) in about["files"].items():
            if (path / name).stat().st_size != size or file_digest(path / name) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it is incomplete ({error})"
    return None


def newest_valid(folders: Iterable[Path], *, identity: str) -> tuple[Path | None, list[str]]:
    """Return the valid checkpoint of the highest step, and a message for each newer one passed
    over."""
    paths = [path for folder in folders for path in folder.glob("step-*")]
    passed_over: list[str] = []
    for path in sorted(paths, key=lambda p: p.name, reverse=True):  # stable: for equal steps the first folder's
        why = problem(path, identity=identity)
        if why is None:
            return path, passed_over
        passed_over.append(f"{path} passed over: {why}")
    return None, passed_over


def _to_universal(path: Path, out: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(out, ignore_errors=True)
    ds_to_universal.main(
        Namespace(
            input_folder=str(path), output_folder=str(out), num_extract_workers=1, num_merge_workers=1,
            keep_temp_folder=False, strict=True, inject_missing_state=False,
        )
    )  # fmt: skip
