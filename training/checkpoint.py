"""Checkpoints that resume bitwise while training runs, and the plain Hugging Face or peft folder that leaves it.

A checkpoint is DeepSpeed's own folder (weights that train, optimizer state, one file a rank) plus `checkpoint.json`:
size and xxh3 of each file, the step, and the identity of the run it belongs to. It is written beside and renamed, so a
kill leaves either a whole one or a draft that nobody reads. The newest whole one wins; a damaged one is passed over and
said. Frozen weights are not saved: resuming needs the same base loaded first, which the identity vouches for.
Only folders of our own root are read: DeepSpeed's files are pickles.

    {attempt}/work/checkpoints/step-00000050/{checkpoint.json, *_model_states.pt, *_optim_states.pt}

    pytest tests/test_training_checkpoint.py
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from longreach.infra.errors import DiskFull
from longreach.infra.files import file_digest
from longreach.infra.share import Share
from longreach.training.loss import causal_lm
from longreach.training.model import load_model
from longreach.training.recipe import RopeRecipe
from longreach.training.zero import whole

MANIFEST = "checkpoint.json"
ROOM = 64 * 2**20
"""A disk with less free bytes than that is full."""
MERGE_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest logit error of a merged model, over the largest logit: rounding of W + BA to the type, then of each layer.
Measured on SmolLM2 in float32: 4e-6."""


def save(
    engine: Any,
    folder: Path,
    *,
    step: int,
    identity: str,
    keep_last: int,
    best: Iterable[int] = (),
    attach: Iterable[Path] = (),
    share: Share | None = None,
    acts: bool | None = None,
) -> Path:
    """Called by every rank. Returns the published checkpoint; older ones beyond `keep_last` are removed.

    best: steps whose checkpoints stay however old they are. attach: files that are copied in, so that they go back in
    time with it. share: also upload it, for nodes that do not see this disk. acts: what
    `acts_for_disk` said; None: rank 0 alone does.
    """
    acts = dist.get_rank() == 0 if acts is None else acts
    name = path_of(folder, step).name
    draft = folder / f".draft-{name}"
    state = {"step": step, "universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}  # may be converted
    try:
        engine.save_checkpoint(
            str(folder), tag=draft.name, client_state=state, save_latest=False, exclude_frozen_parameters=True
        )
    except (OSError, RuntimeError) as error:  # torch's writer does not say that a disk is full
        if (free := shutil.disk_usage(folder).free) < ROOM:
            raise DiskFull(
                f"{folder}: No space left for the checkpoint after step {step} ({free >> 20} MiB free): make room "
                f"and run the same command again, which goes on from the checkpoint before"
            ) from error
        raise
    dist.barrier()
    if dist.get_rank() == 0:
        for path in attach:
            shutil.copyfile(path, draft / path.name)
    files: dict[str, list[Any]] = {}
    if acts:  # for what is on this rank's disk
        draft.mkdir(exist_ok=True)
        files = {p.name: [p.stat().st_size, file_digest(p)] for p in sorted(draft.iterdir())}
    nodes: list[dict[str, list[Any]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(nodes, files)
    if acts:
        whole_files = {name: about for part in nodes for name, about in sorted(part.items())}
        if sum(map(len, nodes)) != len(whole_files):
            raise RuntimeError(
                f"{draft}: several nodes hold files of one name: remove the attempt's folder on all of them"
            )
        about = {"step": step, "identity": identity, **layout(engine), "files": whole_files}
        (draft / MANIFEST).write_text(json.dumps(about, indent=1))
        shutil.rmtree(folder / name, ignore_errors=True)  # a damaged one of the same step, passed over on resume
        os.replace(draft, folder / name)
        if share:
            share.push(folder / name, last=MANIFEST)
    dist.barrier()
    if acts:
        if share and dist.get_rank() == 0:
            share.seal(folder / name / MANIFEST)
        kept = {path_of(folder, step) for step in best}
        for old in sorted(folder.glob("step-*"))[:-keep_last]:
            if old not in kept:
                shutil.rmtree(old)
                if share and dist.get_rank() == 0:
                    share.remove(old)
    dist.barrier()
    return folder / name


def pull(
    share: Share, folder: Path, *, identity: str, acts: bool, step: int | None = None
) -> tuple[Path | None, list[str]]:
    """Called by every rank: the newest whole checkpoint in the store (of a step) comes to every node's `folder`.

    Ranks agree on which: one that is damaged on any node is passed over by all. Returns it, and a line for each that
    was passed over.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        found = [share.sealed("work/checkpoints", MANIFEST)]
    dist.broadcast_object_list(found)
    passed_over: list[str] = []
    for name, place in found[0]:
        if step is not None and name != path_of(folder, step).name:
            continue
        wrong = None
        if acts and (wrong := problem(folder / name, identity=identity)):
            share.pull(folder / name, place)
            wrong = problem(folder / name, identity=identity)
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, wrong)
        if not any(answers):
            return folder / name, passed_over
        passed_over.append(f"{place} passed over: {next(filter(None, answers))}")
    return None, passed_over


def acts_for_disk(folder: Path) -> bool:
    """Called by every rank: whether this one acts for the disk that `folder` is on. The lowest rank of each disk does,
    whether nodes share it or not. Drafts that a kill left there are removed."""
    mark = [uuid.uuid4().hex]
    dist.broadcast_object_list(mark)
    own = folder / f".rank-{mark[0]}-{dist.get_rank():06d}"
    folder.mkdir(parents=True, exist_ok=True)
    own.touch()
    dist.barrier()
    acts = min(folder.glob(f".rank-{mark[0]}-*")) == own
    dist.barrier()
    own.unlink()
    if acts:
        for draft in folder.glob(".draft-*"):
            shutil.rmtree(draft)
    dist.barrier()
    return acts


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after so many steps stands."""
    return folder / f"step-{step:08d}"


def layout(engine: Any) -> dict[str, int]:
    """How the optimizer's state is spread over files."""
    return {"world": dist.get_world_size(), "zero_stage": engine.zero_optimization_stage()}


def problem(path: Path, *, identity: str) -> str | None:
    """Why a checkpoint cannot be resumed from, or None. Every byte is hashed."""
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
    """The checkpoint with the highest step in any of `folders`, and a line for each newer one that was passed over."""
    found = [p for folder in folders for p in folder.glob("step-*")]
    passed_over: list[str] = []
    for path in sorted(found, key=lambda p: p.name, reverse=True):  # stable: of equal steps the first folder's
        why = problem(path, identity=identity)
        if why is None:
            return path, passed_over
        passed_over.append(f"{path} passed over: {why}")
    return None, passed_over


def load(engine: Any, path: Path, scratch: Path, *, acts: bool | None = None) -> int:
    """Loads weights and optimizer state on every rank; returns the number of steps done. The base is loaded already.

    One that was written by another number of ranks goes through DeepSpeed's universal format, in `scratch`. Then the
    next step is no longer bitwise the same: sums over ranks are added in another order.
    """
    acts = dist.get_rank() == 0 if acts is None else acts
    written = {key: json.loads((path / MANIFEST).read_text())[key] for key in layout(engine)}
    if written["zero_stage"] != engine.zero_optimization_stage():
        raise ValueError(
            f"resources.zero_stage is {engine.zero_optimization_stage()}, the checkpoint {path} was written with "
            f"{written['zero_stage']}: go on with that one, or remove the attempt's folder"
        )
    universal = written != layout(engine) and bool(written["zero_stage"])  # without ZeRO all ranks hold the same
    if universal:
        if acts:
            _convert(path, scratch / path.name)
        dist.barrier()
        path = scratch / path.name
    engine._config.load_universal_checkpoint = universal
    scales = [group["rate_scale"] for group in engine.optimizer.param_groups]
    loaded, state = engine.load_checkpoint(
        str(path.parent), tag=path.name, load_module_strict=all(p.requires_grad for p in engine.module.parameters())
    )
    engine._config.load_universal_checkpoint = False
    # ZeRO-3's universal loading (0.19) gives all groups the first one's choices, and one step counter, which each
    # group would then advance.
    for group, scale in zip(engine.optimizer.param_groups, scales, strict=True):
        group["rate_scale"] = scale
    for tensors in engine.optimizer.state.values():
        tensors["step"] = tensors["step"].clone()
    if loaded is None:
        raise RuntimeError(f"DeepSpeed did not load {path}")
    dist.barrier()
    if universal and acts:
        shutil.rmtree(scratch)
    return state["step"]


def _convert(path: Path, out: Path) -> None:
    """DeepSpeed's checkpoint -> its universal one, in this process."""
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(out, ignore_errors=True)
    ds_to_universal.main(
        Namespace(
            input_folder=str(path), output_folder=str(out), num_extract_workers=1, num_merge_workers=1,
            keep_temp_folder=False, strict=True, inject_missing_state=False,
        )
    )  # fmt: skip


def tensor_digests(model: nn.Module) -> dict[str, str]:
    """xxh3 of each trainable tensor by name: what `export` compares the end with. ZeRO-3: before it partitions."""
    return {
        name: xxhash.xxh3_64(p.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data).hexdigest()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def export(model: Any, tokenizer: PreTrainedTokenizerBase, out: Path, *, start: dict[str, str], steps: int) -> None:
    """Called by every rank; rank 0 writes the model (plain Hugging Face) or its adapter (plain peft) into `out`.

    start: `tensor_digests` before training. RuntimeError if a trainable tensor is empty or as it was: then what
    trained and what is saved are not the same thing, or nothing trained. steps: how many were trained.
    """
    with whole(model.parameters()):
        if dist.get_rank() == 0:
            check_trained(model, start, steps)
            out.mkdir(parents=True, exist_ok=True)
            save_adapter(model, out) if isinstance(model, PeftModel) else model.save_pretrained(out)
            tokenizer.save_pretrained(out)
    dist.barrier()


def check_trained(model: nn.Module, start: dict[str, str], steps: int) -> None:
    """RuntimeError naming trainable tensors that are empty, no numbers, or unchanged after so many steps."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    empty = [name for name, p in trained.items() if not (p.numel() and p.isfinite().all())]
    end = tensor_digests(model)
    late = {name for name in end if steps == 1 and "lora_A" in name}  # A gets no gradient before B has left zero
    same = [name for name in end.keys() - late if end[name] == start[name]]
    if empty or same or not end:
        raise RuntimeError(
            f"of {len(end)} trainable tensors {len(empty)} are empty or not finite and {len(same)} unchanged since the "
            f"start ({', '.join((empty + same)[:3])}): the result would not be what was trained"
        )


def save_adapter(model: PeftModel, out: Path) -> None:
    """The trainable tensors under the names that plain peft gives them, embeddings and norms as `modules_to_save`."""
    tensors = {
        name.replace(".default.", "."): p.detach().cpu().contiguous()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    if config.ensure_weight_tying:  # peft wants a tied embedding's trained values under both of its names
        embed, head = (model.get_input_embeddings(), model.get_output_embeddings())
        names = {module: name for name, module in model.named_modules()}
        tensors[f"{names[head]}.weight"] = tensors[f"{names[embed]}.weight"].clone()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(str(out))


def merge_adapter(base_folder: Path, adapter_folder: Path, out: Path, *, rope: RopeRecipe | None) -> dict[str, Any]:
    """Base + adapter -> one plain Hugging Face folder that needs neither peft nor us, RoPE stretch in its config.

    The merged folder is loaded again by plain transformers and its logits on random tokens are compared with the
    adapter's. Returns {"merge_error": largest difference / largest logit}. RuntimeError above the tolerance of the
    base's type, or if tied embeddings came apart.
    """
    dtype = str(AutoConfig.from_pretrained(base_folder).dtype or torch.float32).removeprefix("torch.")
    base, tokenizer = load_model(base_folder, rope=rope)
    probe = torch.randint(0, base.config.vocab_size, (1, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model = PeftModel.from_pretrained(base, adapter_folder).eval()
        expected = model(probe, use_cache=False).logits
        merged = model.merge_and_unload()
        merged.to(getattr(torch, dtype)).save_pretrained(out)
        tokenizer.save_pretrained(out)
        again = AutoModelForCausalLM.from_pretrained(out, local_files_only=True).eval()
        error = float((again(probe, use_cache=False).logits - expected).abs().max() / expected.abs().max())
    tied = again.get_input_embeddings().weight is again.get_output_embeddings().weight
    if error > MERGE_TOLERANCE[dtype] or tied != base.config.tie_word_embeddings:
        raise RuntimeError(
            f"merging {adapter_folder}: logits differ by {error:.1e} of the largest one (allowed {dtype}: "
            f"{MERGE_TOLERANCE[dtype]:.0e}), embeddings tied {tied}, before {base.config.tie_word_embeddings}"
        )
    return {"merge_error": error, "dtype": dtype, "parameters": causal_lm(again).num_parameters()}
