"""Does a model folder hold the weights that its config describes, all of them, and finite?

transformers fills a tensor that it does not find with random numbers and leaves out one that it does
not know; its log alone says so. So a folder is held against its config before it is published.

    python -c "from longreach.training.weights import check_weights; check_weights('path/to/model')"
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from longreach.infra.files import read_object
from longreach.training.convert import shards_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LFS_POINTER = b"version https://git-lfs"
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""The names by which configs say how many layers a model has."""
LISTED = 3
"""Tensors that an error names; there may be thousands."""


def check_weights(folder: Path | str) -> None:
    """Raise ValueError unless the folder has every tensor of its model, of the config's sizes, finite.

    The weights' headers come first: what disagrees is found before a layer is built or a number is
    read.
    """
    folder = Path(folder)
    files = weight_files(folder)
    tensors = 0
    for file in files:
        with _opened(file) as weights:
            tensors += len(weights.keys())
    _check_layers(folder, tensors)
    _check_names_and_sizes(folder)
    for file in files:
        check_finite(file)


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers loads; other safetensors beside them may be a second copy."""
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(shards_of(folder / INDEX))]
    if not (folder / SINGLE).is_file():
        raise ValueError(
            f"{folder} has neither {SINGLE} nor {INDEX}, the names by which weights are found: "
            f"save it again with save_pretrained"
        )
    return [folder / SINGLE]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file; ValueError where it is none, or is cut short."""
    with file.open("rb") as start:
        if start.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{file} is a pointer of Git LFS and not the weights: fetch them with `git lfs pull`")
    try:
        weights = safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is cut short or damaged ({error}): fetch or save it again") from error
    with weights as opened:
        yield opened


def _check_layers(folder: Path, tensors: int) -> None:
    """Raise ValueError where a config has more layers than the weights have tensors.

    To build a hundred thousand layers only to find that they are missing takes minutes.
    """
    config = read_object(folder / "config.json")
    parts = [config]
    for value in config.values():
        if isinstance(value, dict):  # text_config and the like
            parts.append(value)
    for part in parts:
        for name in LAYERS:
            layers = part.get(name)
            if isinstance(layers, int) and layers > tensors:
                raise ValueError(
                    f"{folder}: config.json says {name} {layers:,}, the weights are {tensors:,} tensors, and each "
                    f"layer has some: one of the two is another model's"
                )


def _check_names_and_sizes(folder: Path) -> None:
    """Raise ValueError naming tensors that are missing, unknown, or of other sizes than the config's.

    transformers itself compares, for it knows which names it converts, ties and ignores; on the meta
    device no number is read.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map={"": "meta"},
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else only the first is told, by an error of another kind
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # whatever a model's code makes of a config's numbers, such as 0 heads
        raise ValueError(
            f"{folder}: no model can be built from its config.json ({type(error).__name__}: {error}): mend it, "
            f"or fetch the folder again"
        ) from error
    found = loaded[1]
    sizes = []
    for name, stored, described in found["mismatched_keys"]:
        sizes.append(f"{name} {list(stored)}, by the config {list(described)}")
    wrong = []
    for what, names in (
        ("missing", found["missing_keys"]),
        ("unknown to the model", found["unexpected_keys"]),
        ("of another size", sizes),
        ("not converted", found["error_msgs"]),
    ):
        if names:
            listed = ", ".join(sorted(names)[:LISTED])
            if len(names) > LISTED:
                listed += ", ..."
            wrong.append(f"{len(names)} tensors are {what} ({listed})")
    if wrong:
        raise ValueError(
            f"{folder}: the weights are not those that config.json describes: {'; '.join(wrong)}. They would be "
            f"replaced by random numbers or left out: fetch or save the folder again, or mend config.json"
        )


def check_finite(file: Path) -> None:
    """Raise ValueError naming a tensor that holds NaN or infinity."""
    with _opened(file) as weights:
        for name in weights.keys():  # noqa: SIM118 (it is no dictionary)
            tensor = weights.get_tensor(name)
            if tensor.element_size() == 1:
                tensor = tensor.float()  # torch compares no numbers of 8 bits with infinity
            if not tensor.isfinite().all():
                raise ValueError(f"{file}: {name} holds NaN or infinity: the model was damaged, take an earlier one")


def check_tokenizer(folder: Path) -> None:
    """Raise ValueError where a folder's tokenizer cannot be read; a folder without one passes."""
    if not (folder / "tokenizer_config.json").is_file():
        return
    try:
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of whichever library: tokenizers raises bare ones
        raise ValueError(
            f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {error}): fetch or save it again; code "
            f"that a model brings along is never run"
        ) from error
