"""Held-out documents as token ids, and the first token that a model expects before any text.

python -c "from longreach.evaluation.documents import held_out; print([d.name for d in
held_out('held_out/documents')])"
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from longreach.infra.lazy import lazy_module

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase
else:
    np = lazy_module("numpy")

MARK = "\u2063text\u2063"
"""Placeholder for a text in a chat message, to find what a chat template puts around it. It is
enclosed in invisible separators."""


@dataclass(frozen=True)
class Document:
    """One held-out text."""

    name: str
    domain: str
    ids_T: np.ndarray
    """Token ids [tokens], int64, of the text only, without first and end token."""
    split: str = "test"
    """Split of the corpus: `test`, or `validation` for documents that only serve for choices and are
    never reported."""


def held_out(folder: Path | str) -> list[Document]:
    """Read the folder `documents/` of a HeldOutDocuments artifact (columns name, domain, split,
    input_ids), in order."""
    import datasets

    rows = datasets.load_from_disk(str(folder)).with_format("numpy")
    documents = []
    for row in rows:
        ids_T = row["input_ids"].astype(np.int64)
        documents.append(Document(str(row["name"]), str(row["domain"]), ids_T, str(row["split"])))
    return documents


def matching(documents: Iterable[Document], patterns: tuple[str, ...]) -> list[Document]:
    """Return the documents whose name matches one of the shell patterns; raise ValueError if none
    does."""
    documents = list(documents)
    matches = []
    for document in documents:
        if any(document.name == one or fnmatchcase(document.name, one) for one in patterns):
            matches.append(document)
    if not matches:
        names = ", ".join(document.name for document in documents) or "none"
        raise ValueError(f"no held-out document matches {list(patterns)}; there are: {names}")
    return matches


def named(documents: Iterable[Document], name: str) -> Document:
    """Return the document of a name, which is there."""
    return next(document for document in documents if document.name == name)


def check_names(names: list[str]) -> None:
    """Raise ValueError if two documents have the same name, because rows could not tell them apart."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"{len(repeated)} names belong to several held-out documents ({repeated[0]}): rename the files"
        )


def first_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id that the tokenizer puts before every text (BOS, or a trained sink token); None
    if there is none.

    Documents that were tokenized for another model lack this token, and a model that always
    saw it predicts badly without it.
    """
    whole = tokenizer("a").input_ids  # not an empty text, where an appended EOS would come first
    bare = tokenizer("a", add_special_tokens=False).input_ids
    return None if whole[:1] == bare[:1] else int(whole[0])


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, first: bool = True) -> list[int]:
    """Return the ids of a text to be continued, without an EOS at its end even if the tokenizer
    appends one.

    first: put the tokenizer's first token, if it has one, before the text.
    """
    ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int64)
    if first:
        ids = with_first(ids, first_token_id(tokenizer))
    return ids.tolist()


def with_first(ids_T: np.ndarray, first: int | None) -> np.ndarray:
    """Return ids_T with the model's first token before it, unless there is none or ids_T already
    begins with it."""
    if first is None or (len(ids_T) and ids_T[0] == first):
        return ids_T
    return np.concatenate([np.array([first], ids_T.dtype), ids_T])


def templated(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """Return messages formatted by the model's chat template, up to the beginning of its answer.

    Raises:
        ValueError: the template rejects the messages, as some do if there is no system message.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template may raise anything: jinja2's errors, TypeErrors
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the model's chat template refuses messages of {roles} ({type(error).__name__}: {error}): change its "
            f"chat_template.jinja, or remove it to work with plain text"
        ) from error


def chat_around(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, refusal: str) -> tuple[str, str]:
    """Return what the model's chat template puts before and after MARK, which one of the messages
    contains.

    Raises:
        ValueError: the template changes the messages, so its output lacks MARK; `refusal` is the
            error message.
    """
    before, mark, after = templated(tokenizer, messages).partition(MARK)
    if not mark:
        raise ValueError(refusal)
    return before, after
