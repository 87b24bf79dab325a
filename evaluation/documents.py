"""Held-out documents as token ids, and the token that a model expects before any of them.

python -c "from longreach.evaluation.documents import held_out; print([d.name for d in held_out('corpus/documents')])"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
"""Called with (cells done, cells in all) while an evaluation runs."""


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Document:
    """One held-out text."""

    name: str
    domain: str
    ids_T: np.ndarray
    """Token ids [tokens], int64, of the text alone: no first token, no end token."""


def held_out(folder: Path | str) -> list[Document]:
    """The documents of a PackedCorpus' `documents/` folder (columns name, domain, split, input_ids), in its order."""
    import datasets

    rows = datasets.load_from_disk(str(folder)).with_format("numpy")
    return [Document(str(row["name"]), str(row["domain"]), row["input_ids"].astype(np.int64)) for row in rows]


def matching(documents: Iterable[Document], patterns: tuple[str, ...]) -> list[Document]:
    """Those whose name matches one of the shell patterns; ValueError if none does."""
    documents = list(documents)
    found = [d for d in documents if any(fnmatchcase(d.name, pattern) for pattern in patterns)]
    if not found:
        there = ", ".join(d.name for d in documents) or "none"
        raise ValueError(f"no held-out document matches {list(patterns)}; there are: {there}")
    return found


def first_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that the tokenizer puts before every text (BOS, or a trained sink token); None if it puts none.

    A corpus packed for another model's tokenizer lacks it, and a model that always saw it is lost without.
    """
    whole, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    return int(whole[0]) if whole[:1] != bare[:1] else None  # of "" an EOS that it appends would be the first


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, first: bool = True) -> list[int]:
    """Ids of a text that is to go on: after the tokenizer's first token, if it has one, and without an EOS that it
    appends."""
    ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int64)
    return with_first(ids, first_token_id(tokenizer) if first else None).tolist()


def with_first(ids_T: np.ndarray, first: int | None) -> np.ndarray:
    """ids_T, after the model's own first token if it has one and the ids do not begin with it already."""
    if first is None or (len(ids_T) and ids_T[0] == first):
        return ids_T
    return np.concatenate([np.array([first], ids_T.dtype), ids_T])
