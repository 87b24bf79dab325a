"""Check that a model folder has all weights that its config describes, and that they are finite.

transformers fills a missing tensor with random numbers and ignores an unknown one, and reports this
only in its log. So a folder is compared with its config before it is published.

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
"""Config keys for the number of layers."""
LISTED = 3
"""Maximum number of tensors that an error names, as there may be thousands."""


def check_weights(folder: Path | str) -> None:
    """Raise ValueError unless the folder has every tensor of its model, with the config's sizes and
    finite values.

    Headers are checked first, so that a mismatch is found before layers are built or values are
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
    """Return the files that transformers loads. Other safetensors in the folder may be a second
    copy."""
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(shards_of(folder / INDEX))]
    if not (folder / SINGLE).is_file():
        raise ValueError(
            f"{folder} has neither {SINGLE} nor {INDEX}, where transformers expects the weights: "
            f"save it again with save_pretrained"
        )
    return [folder / SINGLE]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file. ValueError if it is none, or is truncated."""
    with file.open("rb") as start:
        if start.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{file} is a Git LFS pointer and not the weights: fetch them with `git lfs pull`")
    try:
        weights = safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or damaged ({error}): fetch or save it again") from error
    with weights as opened:
        yield opened


def _check_layers(folder: Path, tensors: int) -> None:
    """Raise ValueError if a config has more layers than the weights have tensors.

    Without this check, it would take minutes to build a hundred thousand layers that are missing.
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
                    f"{folder}: config.json says {name} {layers:,}, but the weights are {tensors:,} tensors, and every "
                    f"layer has at least one: config.json and weights are from different models"
                )


def _check_names_and_sizes(folder: Path) -> None:
    """Raise ValueError naming tensors that are missing, unknown, or of other sizes than in the
    config.

    transformers does the comparison, since it knows which names it converts, ties and ignores. On
    the meta device no values are read.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map={"": "meta"},
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # otherwise an error of another kind reports only the first
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # a model's code may raise anything for numbers such as 0 heads
        raise ValueError(
            f"{folder}: no model can be built from its config.json ({type(error).__name__}: {error}): correct it, "
            f"or fetch the folder again"
        ) from error
    found = loaded[1]
    sizes = []
    for name, stored, described in found["mismatched_keys"]:
        sizes.append(f"{name} {list(stored)}, in the config {list(described)}")
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
            f"{folder}: the weights do not match config.json: {'; '.join(wrong)}. They would be replaced by random "
            f"numbers or ignored: fetch or save the folder again, or correct config.json"
        )


def check_finite(file: Path) -> None:
    """Raise ValueError naming a tensor that contains NaN or infinity."""
    with _opened(file) as weights:
        for name in weights.keys():  # noqa: SIM118 (not a dictionary)
            tensor = weights.get_tensor(name)
            if tensor.element_size() == 1:
                tensor = tensor.float()  # torch does not compare 8-bit numbers with infinity
            if not tensor.isfinite().all():
                raise ValueError(f"{file}: {name} contains NaN or infinity: the model is damaged, use an earlier one")


def check_tokenizer(folder: Path) -> None:
    """Raise ValueError if a folder has no tokenizer, or one that cannot be read."""
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab.*")):
        raise ValueError(f"{folder} has no tokenizer: save the model's tokenizer there with save_pretrained")
    try:
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # several libraries may raise here, and tokenizers raises bare Exceptions
        raise ValueError(
            f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {error}): fetch or save it again; custom "
            f"code in a model folder is never run"
        ) from error
