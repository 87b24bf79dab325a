"""Formats of a recipe's releases, and the push to the Hugging Face Hub.

A push is the last step of `longreach run`, after the gate if there is one; a model that is not the
gate's champion is not pushed. The push has the release's folder without MLflow's own files.
Problems are reported before anything runs: a model that cannot become GGUF, or a missing token.

    longreach push quickstart --dry-run
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import Field

from longreach.infra import registry
from longreach.infra.choices import Choices, Location, nearest
from longreach.infra.files import read_object
from longreach.training.to_gguf import BLOCK, SENTENCEPIECE, GgufType, gguf_name, problem_of

if TYPE_CHECKING:
    from longreach.pipelines.reader import Loaded
    from longreach.pipelines.recipe import Recipe

HUB = "hub:"
OF_MLFLOW = ("MLmodel", "components/*")
"""Files of a release that only MLflow reads."""
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
"""Names of a release's weights. A push deletes those of an earlier push, unless this release has them too."""


class Withheld(ValueError):
    """A release is not pushed, because it has a gate and is not the champion."""


class HandOverRecipe(Choices):
    """Formats of each arm's release, and the hub repository to push to."""

    formats: tuple[Literal["safetensors", "gguf"], ...] = ("safetensors",)
    """safetensors: a Hugging Face folder, always; gguf: also a file for llama.cpp (Llama with
    byte-level BPE only)."""
    gguf: tuple[GgufType, ...] = Field(default=("f16",), min_length=1)
    """Types of the GGUF files, one file each: f16, or q8_0 with half the size."""
    push: str | None = None
    """`hub:owner/name`: a Hugging Face Hub repository, to which a successful run pushes the
    release. A new repository is private. The token is HF_TOKEN or that of `hf auth login`."""
    push_arm: str | None = None
    """The trained arm to push; required if there are several."""

    def gguf_types(self) -> tuple[GgufType, ...]:
        """Return the types of the GGUF files to write; empty without that format."""
        return self.gguf if "gguf" in self.formats else ()

    def problems(self, recipe: Recipe) -> Iterator[tuple[Location, str]]:
        """Yield (field, message) for each contradiction with other sections."""
        if "safetensors" not in self.formats:
            yield ("release", "formats"), "a release always has safetensors: add it next to gguf"
        arms = released_arms(recipe)
        if self.gguf_types() and not arms:
            yield ("release", "formats"), "no arm is trained, so nothing is released: leave gguf out"
        if self.gguf_types():
            yield from _gguf_problems(recipe, self.gguf_types())
        if self.push is not None:
            yield from self._push_problems(arms)
        elif self.push_arm:
            yield ("release", "push_arm"), f"{self.push_arm} has no repository to be pushed to: set release.push"

    def _push_problems(self, arms: list[str]) -> Iterator[tuple[Location, str]]:
        if not re.fullmatch(rf"{HUB}[\w.-]+/[\w.-]+", self.push or ""):
            yield ("release", "push"), f"{self.push!r} is not a repository: write hub:owner/name"
        if self.push_arm is not None and self.push_arm not in arms:
            hint = nearest(self.push_arm, arms, "the trained arms are")
            yield ("release", "push_arm"), f"no trained arm {self.push_arm!r}{hint}"
        elif self.push_arm is None and len(arms) != 1:
            which = ", ".join(arms) or "none"
            yield ("release", "push"), f"pushes one arm, but {len(arms)} are trained ({which}): set release.push_arm"


def released_arms(recipe: Recipe) -> list[str]:
    """Return the names of the trained models, which are released."""
    return [*recipe.finetuned_arms(), *recipe.pretrained_arms()]


def _gguf_problems(recipe: Recipe, types: tuple[GgufType, ...]) -> Iterator[tuple[Location, str]]:
    """Yield why an arm's model cannot become a GGUF file, as far as the recipe shows it."""
    if recipe.finetune:
        for place, rope in recipe.finetune.ropes().items():
            if rope.type == "dynamic":
                message = "GGUF cannot store a 'dynamic' stretch: use another, or release only safetensors"
                yield ("finetune", *place, "type"), message
    if recipe.pretrain is None:
        return
    for name, arm in recipe.pretrain.arms.items():
        if arm.sink in ("zero", "logit"):
            message = f"sink {arm.sink!r} makes a GraniteSWAForCausalLM, which cannot be written as GGUF"
            yield ("pretrain", "arms", name, "sink"), f"{message}: release only safetensors, or use another sink"
    model = recipe.pretrain.model
    if model and "q8_0" in types and model.hidden % BLOCK:  # the width of the feed-forward layers always is one
        message = f"{model.hidden} must be a multiple of {BLOCK} for release.gguf 'q8_0': change it, or use f16"
        yield ("pretrain", "model", "hidden"), message


def check_base(recipe: Recipe) -> None:
    """Raise ValueError if models made from the base cannot become the requested GGUF files.

    This checks folders and hub repositories, whose config.json and tokenizer.json are downloaded. A
    base from the MLflow registry is checked only when its models are released.
    """
    types = recipe.release.gguf_types()
    makes_own = recipe.pretrain is not None and recipe.pretrain.model is not None and not recipe.finetune
    if not types or recipe.base.pretrained_arm or makes_own:
        return
    config, tokenizer = _file_of(recipe, "config.json"), _file_of(recipe, "tokenizer.json")
    if config is None:
        return
    if tokenizer is None:  # transformers writes one when the model is saved
        if _file_of(recipe, "tokenizer.model"):
            raise ValueError(f"release.formats: {recipe.base.source}: {SENTENCEPIECE}")
        return
    adds_sink = any(arm.sink == "token" for arm in recipe.pretrained_arms().values())
    if recipe.finetune and recipe.finetune.pack.first_token == "sink":
        adds_sink = True
    if problem := problem_of(read_object(config), read_object(tokenizer), types, adds_sink):
        raise ValueError(f"release.formats: {recipe.base.source}: {problem}")


def _file_of(recipe: Recipe, name: str) -> Path | None:
    """Return a file of the base; None if it has none, or if this is unknown before conversion."""
    source = recipe.base.source
    file = Path(source, name)
    if source.startswith(HUB):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            file = Path(hf_hub_download(source.removeprefix(HUB), name, revision=recipe.base.revision))
        except (HfHubHTTPError, LocalEntryNotFoundError):  # the stage `convert` reports the hub's error
            return None
    return file if file.is_file() else None


def check_token(recipe: Recipe) -> None:
    """Raise ValueError if the recipe pushes and there is no hub token."""
    from huggingface_hub import get_token

    if recipe.release.push and not get_token():
        raise ValueError(
            f"release.push {recipe.release.push}: there is no Hugging Face Hub token: set HF_TOKEN, or run "
            f"hf auth login"
        )


def pushed_files(folder: Path) -> list[str]:
    """Return the files of a release to push, as paths relative to its folder."""
    files = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(fnmatch(name, pattern) for pattern in OF_MLFLOW):
            files.append(name)
    return files


def published_release(loaded: Loaded) -> Path:
    """Return the folder of the release that the recipe pushes.

    Raises:
        ValueError: There is no such release yet, or the recipe has no release.push.
        Withheld: The gate refused it or has not decided, or it was rolled back.
    """
    from longreach.pipelines.graph import build
    from longreach.pipelines.plan import open_store, use_tracking

    recipe = loaded.recipe
    if recipe.release.push is None:
        raise ValueError("the recipe has no release.push: set it, e.g. --set release.push=hub:owner/name")
    arm = recipe.release.push_arm or released_arms(recipe)[0]
    gate = recipe.promote if recipe.promote and recipe.promote.model == arm else None
    store = open_store(loaded)
    with use_tracking(loaded):
        stages = build(recipe)
        champion = registry.champion(gate.name) if gate else None
    (stage,) = [stage for stage in stages if stage.label == f"release[{arm}]"]
    published = store.find(stage.name, stage.fingerprint)
    if published is None:
        raise ValueError(f"{stage.label} does not exist yet, so there is nothing to push: make it with longreach run")
    tag = registry.MODEL  # it names the attempt, because a release remade by --force has the same fingerprint
    if gate and not (champion and champion.tags.get(tag) == published.summary["tags"][tag]):
        who = f"version {champion.version}" if champion else "nobody"
        raise Withheld(
            f"{recipe.release.push} was not pushed: champion of {gate.name} is {who}, not {stage.label}, which the "
            f"gate refused or has not seen, or which was rolled back; to ask the gate again: {loaded.command} "
            f"--force promote; to undo a rollback: longreach rollback {gate.name}"
        )
    return store.fetch(stage.name, stage.fingerprint).path


def _gguf_names(recipe: Recipe) -> list[str]:
    """Return the names of all GGUF files that pushes of this recipe may have uploaded."""
    names = []
    for arm in released_arms(recipe):
        names += [gguf_name(recipe.name, arm, kind) for kind in get_args(GgufType)]
    return names


def push(recipe: Recipe, folder: Path) -> str:
    """Push a release's folder in one commit, and return the repository's URL.

    A missing repository is created as private. Exceptions of huggingface_hub are not caught.
    """
    from huggingface_hub import HfApi

    repository = (recipe.release.push or "").removeprefix(HUB)
    api = HfApi()
    url = api.create_repo(repository, private=True, exist_ok=True)
    api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        ignore_patterns=[*OF_MLFLOW],
        delete_patterns=[*WEIGHTS, *_gguf_names(recipe)],  # no file that users added
        commit_message=f"{recipe.name}, by longreach",
    )
    return str(url)
