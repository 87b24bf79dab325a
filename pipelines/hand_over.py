"""What leaves a recipe and where to: the forms of its releases, and the Hugging Face Hub.

A push is the last thing that `longreach run` does, after the gate if there is one; a model that is
not its champion stays here. What is pushed is the release's folder without MLflow's own files. What
cannot work is refused before anything runs: a model that is no GGUF, a token that is missing.

    longreach push quickstart --dry-run
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from longreach.infra import registry
from longreach.infra.choices import Choices, Location, nearest
from longreach.infra.files import read_object
from longreach.training.to_gguf import BLOCK, SENTENCEPIECE, GgufType, problem_of

if TYPE_CHECKING:
    from longreach.pipelines.reader import Loaded
    from longreach.pipelines.recipe import Recipe

HUB = "hub:"
OF_MLFLOW = ("MLmodel", "components/*")
"""Files of a release that MLflow alone reads."""


class Withheld(ValueError):
    """A release that has a gate is not the champion."""


class HandOverRecipe(Choices):
    """In which forms each arm's model leaves, and where it is pushed to."""

    formats: tuple[Literal["safetensors", "gguf"], ...] = ("safetensors",)
    """safetensors: a Hugging Face folder, always; gguf: also a file for llama.cpp (Llama with
    byte-level BPE only)."""
    gguf: tuple[GgufType, ...] = Field(default=("f16",), min_length=1)
    """Types of the GGUF files, a file each: f16, or q8_0 of half the size."""
    push: str | None = None
    """`hub:owner/name`: a repository of the Hugging Face Hub, to which a run that ended well pushes
    the release; a new one is private. The token is HF_TOKEN or the one of `hf auth login`."""
    push_arm: str | None = None
    """The trained arm that is pushed; needed where there are several."""

    def gguf_types(self) -> tuple[GgufType, ...]:
        """Return the types of the GGUF files that are to be written; none without that format."""
        return self.gguf if "gguf" in self.formats else ()

    def problems(self, recipe: Recipe) -> Iterator[tuple[Location, str]]:
        """Yield (field, what is wrong) where the section does not fit the others."""
        if "safetensors" not in self.formats:
            yield ("release", "formats"), "a release always has safetensors: add it, gguf comes beside it"
        arms = released_arms(recipe)
        if self.gguf_types() and not arms:
            yield ("release", "formats"), "no arm is trained, so nothing is released: leave gguf out"
        if self.gguf_types():
            yield from _gguf_problems(recipe, self.gguf_types())
        if self.push is not None:
            yield from self._push_problems(arms)
        elif self.push_arm:
            yield ("release", "push_arm"), f"{self.push_arm} is pushed nowhere: set push to hub:owner/name"

    def _push_problems(self, arms: list[str]) -> Iterator[tuple[Location, str]]:
        if not re.fullmatch(rf"{HUB}[\w.-]+/[\w.-]+", self.push or ""):
            yield ("release", "push"), f"{self.push!r} is no repository: write hub:owner/name"
        if self.push_arm is not None and self.push_arm not in arms:
            hint = nearest(self.push_arm, arms, "trained are")
            yield ("release", "push_arm"), f"no trained arm {self.push_arm!r}{hint}"
        elif self.push_arm is None and len(arms) != 1:
            which = ", ".join(arms) or "none"
            yield ("release", "push"), f"one arm is pushed, trained are {len(arms)} ({which}): name it in push_arm"


def released_arms(recipe: Recipe) -> list[str]:
    """Return the names of the models that are trained, and so released."""
    return [*recipe.finetuned_arms(), *recipe.pretrained_arms()]


def _gguf_problems(recipe: Recipe, types: tuple[GgufType, ...]) -> Iterator[tuple[Location, str]]:
    """Yield why some arm's model cannot become a GGUF file, as far as the recipe alone tells."""
    if recipe.finetune:
        for place, rope in recipe.finetune.ropes().items():
            if rope.type == "dynamic":
                message = "'dynamic' is a stretch that GGUF cannot carry: take another, or release safetensors alone"
                yield ("finetune", *place, "type"), message
    if recipe.pretrain is None:
        return
    for name, arm in recipe.pretrain.arms.items():
        if arm.sink in ("zero", "logit"):
            message = f"sink {arm.sink!r} makes a GraniteSWAForCausalLM, which cannot be written as GGUF"
            yield ("pretrain", "arms", name, "sink"), f"{message}: release safetensors alone, or take another sink"
    model = recipe.pretrain.model
    if model and "q8_0" in types:
        for field, width in (("hidden", model.hidden), ("hidden", model.intermediate)):
            if width % BLOCK:
                message = f"{width} is no multiple of {BLOCK}, as release.gguf 'q8_0' needs: change it, or take f16"
                yield ("pretrain", "model", field), message


def check_base(recipe: Recipe) -> None:
    """Raise ValueError if models made from the base cannot become the GGUF files that are wanted.

    Known beforehand of a folder and of a hub's repository, whose config.json and tokenizer.json are
    fetched; what is registered in MLflow is looked at when it is released.
    """
    types = recipe.release.gguf_types()
    makes_own = recipe.pretrain is not None and recipe.pretrain.model is not None and not recipe.finetune
    if not types or recipe.base.pretrained_arm or makes_own:
        return
    config, tokenizer = _file_of(recipe, "config.json"), _file_of(recipe, "tokenizer.json")
    if config is None:
        return
    if tokenizer is None:  # transformers makes one when the model is saved
        if _file_of(recipe, "tokenizer.model"):
            raise ValueError(f"release.formats: {recipe.base.source}: {SENTENCEPIECE}")
        return
    sink = any(arm.sink == "token" for arm in recipe.pretrained_arms().values())
    if problem := problem_of(read_object(config), read_object(tokenizer), types, sink):
        raise ValueError(f"release.formats: {recipe.base.source}: {problem}")


def _file_of(recipe: Recipe, name: str) -> Path | None:
    """Return a file of the base; None if it has none, or that is not known before it is
    converted."""
    source = recipe.base.source
    file = Path(source, name)
    if source.startswith(HUB):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            file = Path(hf_hub_download(source.removeprefix(HUB), name, revision=recipe.base.revision))
        except (HfHubHTTPError, LocalEntryNotFoundError):  # `convert` says what is wrong with the hub
            return None
    return file if file.is_file() else None


def check_token(recipe: Recipe) -> None:
    """Raise ValueError if there is something to push and no token of the hub."""
    from huggingface_hub import get_token

    if recipe.release.push and not get_token():
        raise ValueError(
            f"release.push {recipe.release.push}: there is no token of the Hugging Face Hub; set HF_TOKEN, or run "
            f"hf auth login"
        )


def pushed_files(folder: Path) -> list[str]:
    """Return the files of a release that are pushed, as paths below its folder."""
    files = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(fnmatch(name, pattern) for pattern in OF_MLFLOW):
            files.append(name)
    return files


def published_release(loaded: Loaded) -> Path:
    """Return the folder of the release that the recipe pushes.

    ValueError: it is not made yet. Withheld: the gate refused it or has not decided, or people
    rolled it back.
    """
    from longreach.pipelines.graph import build
    from longreach.pipelines.plan import open_store, use_tracking

    recipe = loaded.recipe
    if recipe.release.push is None:
        raise ValueError("the recipe pushes nothing: give it release.push, e.g. --set release.push=hub:owner/name")
    arm = recipe.release.push_arm or released_arms(recipe)[0]
    gate = recipe.promote if recipe.promote and recipe.promote.model == arm else None
    store = open_store(loaded)
    with use_tracking(loaded):
        stages = build(recipe)
        champion = registry.champion(gate.name) if gate else None
    (stage,) = [stage for stage in stages if stage.label == f"release[{arm}]"]
    published = store.find(stage.name, stage.fingerprint)
    if published is None:
        raise ValueError(f"{stage.label} is not made yet, so there is nothing to push: longreach run makes it")
    tag = registry.MODEL  # names the attempt as well: after --force there is another of the same fingerprint
    if gate and not (champion and champion.tags.get(tag) == published.summary["tags"][tag]):
        who = f"version {champion.version}" if champion else "nobody"
        raise Withheld(
            f"{recipe.release.push} was not pushed: champion of {gate.name} is {who}, and not {stage.label}, which the "
            f"gate refused or has not seen, or which was rolled back: {loaded.command} --force promote asks the gate "
            f"again, longreach rollback {gate.name} undoes a rollback"
        )
    return store.fetch(stage.name, stage.fingerprint).path


def push(recipe: Recipe, folder: Path) -> str:
    """Push a release's folder in one commit and return the address of the repository.

    The repository is made if there is none, private. What the hub's library raises, travels.
    """
    from huggingface_hub import HfApi

    repository = (recipe.release.push or "").removeprefix(HUB)
    api = HfApi()
    url = api.create_repo(repository, private=True, exist_ok=True)
    api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        ignore_patterns=[*OF_MLFLOW],
        commit_message=f"{recipe.name}, by longreach",
    )
    return str(url)
