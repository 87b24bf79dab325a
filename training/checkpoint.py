"""Checkpoints from which training resumes bitwise.

A checkpoint is DeepSpeed's own folder (weights that train, optimizer state, one file a rank) plus
`checkpoint.json`: size and xxh3 of each file, the step, and the identity of its run; and each
rank's random states, so that dropout goes on as if nothing had happened. It is written as a draft,
synced and then renamed, so a kill leaves a whole one or a draft that nobody reads; older ones are
removed once it is on the disk, so a power cut leaves the newest finished one. The newest whole one
wins; a damaged one is passed over, with a note. Frozen weights are not saved: the same base is
loaded first, which the identity vouches for. Only folders of our own root are read: DeepSpeed's
files are pickles. On every disk one rank hashes, renames and deletes, whether nodes share it or
not: its disk leader.

    {attempt}/work/checkpoints/step-00000050/
        checkpoint.json  *_model_states.pt  *_optim_states.pt  random-*.pt
"""

from __future__ import annotations

import errno
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

from longreach.infra.errors import DiskFull
from longreach.infra.files import file_digest, sync, sync_tree
from longreach.infra.share import Share

MANIFEST = "checkpoint.json"
FULL_BELOW_BYTES = 64 * 2**20  # a disk or quota with less free space counts as full


class Checkpoints:
    """Checkpoints of one attempt, and earlier ones to begin from. Every rank calls every method."""

    def __init__(
        self, folder: Path, *, identity: str, earlier: Iterable[Path] = (), share: Share | None = None
    ) -> None:
        """
        Args:
            identity: of the run; checkpoints of another one are passed over.
            earlier: folders of earlier attempts, which are only read.
            share: where nodes that do not see this disk exchange checkpoints; then `earlier` is not
                read.
        """
        self.folder = folder
        self.identity = identity
        self.folders = [folder, *earlier]
        self.share = share
        self.is_disk_leader = elect_disk_leader(folder)

    def path_of(self, step: int) -> Path:
        """Return where the checkpoint after `step` steps stands or would stand."""
        return self.folder / f"step-{step:08d}"

    def newest(self) -> tuple[Path | None, list[str]]:
        """Return the newest valid checkpoint, and a line for each newer one passed over."""
        if self.share:
            return self._pull(self.share)
        decided: list[Any] = [None]
        if dist.get_rank() == 0:  # so that all ranks load the same one
            decided = [newest_valid(self.folders, identity=self.identity)]
        dist.broadcast_object_list(decided)
        return decided[0]

    def of_step(self, step: int) -> Path:
        """Return the checkpoint after `step` steps. RuntimeError if none is whole."""
        if self.share:
            path, _ = self._pull(self.share, step)
            if path:
                return path
        for folder in self.folders:
            path = folder / self.path_of(step).name
            if problem(path, identity=self.identity) is None:
                return path
        raise RuntimeError(
            f"the checkpoint after step {step}, which had the lowest validation loss, is gone or damaged"
        )

    def _pull(self, share: Share, step: int | None = None) -> tuple[Path | None, list[str]]:
        """Bring the newest checkpoint in the store (or that of a step) to every node.

        One that is damaged on any node is passed over by all.
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
        """Write the checkpoint after `step` steps; remove older ones beyond `keep_last`, and later ones.

        best: steps whose checkpoints stay. attach: files that go back in time with it.
        """
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
            shutil.rmtree(path, ignore_errors=True)  # a damaged one of the same step, passed over on resume
            os.replace(draft, path)
            sync(self.folder)
            if self.share:
                self.share.push(path, last=MANIFEST)
        dist.barrier()
        if self.share and dist.get_rank() == 0:
            self.share.seal(path / MANIFEST)
        if self.is_disk_leader:
            self._remove_others(step, keep_last, best)
        dist.barrier()
        return path

    def _write(self, engine: Any, draft: Path, step: int) -> None:
        # the version tells DeepSpeed that the checkpoint may be converted to another number of
        # ranks
        state = {"step": step, "universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
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
                f"quota): make room and run the same command again, which goes on from the checkpoint before"
            ) from error

    def _files_of_all_disks(self, draft: Path) -> dict[str, list[Any]]:
        """Return [size, xxh3] of the draft's files by name, on whichever node's disk they are."""
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
                    f"{draft}: several nodes hold files of one name: remove the attempt's folder on all of them"
                )
            files |= part
        return files

    def _remove_others(self, step: int, keep_last: int, best: Iterable[int]) -> None:
        """Remove older checkpoints beyond `keep_last`, and those of later steps, which were passed
        over on resume: they would take the place of whole ones."""
        checkpoints = sorted(self.folder.glob("step-*"))
        last = [path for path in checkpoints if path <= self.path_of(step)][-keep_last:]
        kept = {*last, *map(self.path_of, best)}
        for other in checkpoints:
            if other not in kept:
                shutil.rmtree(other)
                if self.share and dist.get_rank() == 0:
                    self.share.remove(other)

    def load(self, engine: Any, path: Path) -> int:
        """Load weights and optimizer state on every rank and return the number of steps done.

        Random states are restored too. A checkpoint of another number of ranks goes through
        DeepSpeed's universal format and leaves random states alone. Then the next step is not
        bitwise the same: sums over ranks are added in another order. ValueError if it was written
        with another ZeRO stage or dtype.
        """
        now = layout(engine)
        about = json.loads((path / MANIFEST).read_text())
        written = {key: about.get(key, now[key]) for key in now}  # earlier versions wrote no dtype
        for key in ("zero_stage", "dtype"):
            if written[key] != now[key]:
                raise ValueError(
                    f"resources.{key} is {now[key]}, the checkpoint {path} was written with {written[key]}: go on with "
                    f"that one, or remove the attempt's folder"
                )
        universal = written != now and written["zero_stage"] > 0  # without ZeRO every rank holds all of the state
        scratch = self.folder / ".universal"
        if universal:
            if self.is_disk_leader:
                _to_universal(path, scratch / path.name)
            dist.barrier()
            path = scratch / path.name
        step = _load(engine, path, universal)
        states = path / random_file()
        if written == now and states.exists():  # earlier versions wrote none
            _restore_random_states(engine, torch.load(states, weights_only=True))
        dist.barrier()
        if universal and self.is_disk_leader:
            shutil.rmtree(scratch)
        return step


def _load(engine: Any, path: Path, universal: bool) -> int:
    engine._config.load_universal_checkpoint = universal
    scales = [group["rate_scale"] for group in engine.optimizer.param_groups]
    trains_everything = all(p.requires_grad for p in engine.module.parameters())  # else frozen weights are missing
    loaded, state = engine.load_checkpoint(str(path.parent), tag=path.name, load_module_strict=trains_everything)
    engine._config.load_universal_checkpoint = False
    if loaded is None:
        raise RuntimeError(f"DeepSpeed did not load {path}")
    # ZeRO-3's universal loading (DeepSpeed 0.19) gives all groups the choices of the first, and one
    # step counter that all tensors share, so that each group would advance it.
    for group, scale in zip(engine.optimizer.param_groups, scales, strict=True):
        group["rate_scale"] = scale
    for tensors in engine.optimizer.state.values():
        tensors["step"] = tensors["step"].clone()
    return state["step"]


def random_file() -> str:
    """Return the name of this rank's file of random states in a checkpoint."""
    return f"random-{dist.get_rank():06d}.pt"


def _random_states(engine: Any) -> dict[str, torch.Tensor]:
    """Return the states of the generators that forward passes draw from."""
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
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return False


def elect_disk_leader(folder: Path) -> bool:
    """Return whether this rank is the disk leader of `folder`: the lowest of those that see it.

    Every rank calls it. Each leaves a file there and looks whose files it sees, so it does not
    matter whether nodes share the disk. Drafts that a kill left are removed.
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
        sync(folder.parent)  # so that the folder itself outlives a power cut
    dist.barrier()
    return is_disk_leader


def layout(engine: Any) -> dict[str, Any]:
    """Return how the optimizer's state is spread over files, and of which type the weights are."""
    dtype = "bfloat16" if engine.bfloat16_enabled() else "float32"
    return {"world": dist.get_world_size(), "zero_stage": engine.zero_optimization_stage(), "dtype": dtype}


def problem(path: Path, *, identity: str) -> str | None:
    """Return why a checkpoint cannot be resumed from, or None. Every byte is hashed."""
    try:
        about = json.loads((path / MANIFEST).read_text())
        if about["identity"] != identity:
            return "it belongs to another recipe"
        for name, (size, digest) in about["files"].items():
            if (path / name).stat().st_size != size or file_digest(path / name) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it is not whole ({error})"
    return None


def newest_valid(folders: Iterable[Path], *, identity: str) -> tuple[Path | None, list[str]]:
    """Return the checkpoint of the highest step, and a line for each newer one passed over."""
    paths = [path for folder in folders for path in folder.glob("step-*")]
    passed_over: list[str] = []
    for path in sorted(paths, key=lambda p: p.name, reverse=True):  # stable: of equal steps the first folder's
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
