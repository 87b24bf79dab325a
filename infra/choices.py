"""The base of every recipe section and of Resources: frozen, strict about names, with one JSON
form.

A section's JSON goes into the fingerprint of its stage (pipelines/stage.py), so values whose JSON
is not unique (NaN, infinity) are refused. A choice that is new since results were published is
marked `New`: left at its default it stays out of the fingerprint, so that those results are found
again.

    weight: New[float] = 1.0
"""

import difflib
import os
import re
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
)

T = TypeVar("T")
_NEW = object()  # the mark itself
New = Annotated[T, _NEW]
"""A field's type with the mark of a later choice: at its default it is no part of identity."""


class Choices(BaseModel):
    """A frozen group of named choices; unknown names are errors, a docstring under a field is its
    description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def identity(self, include: set[str] | None = None) -> dict[str, Any]:
        """Return the JSON that a fingerprint is made of: all choices but `New` ones at their
        default."""
        return self.model_dump(mode="json", include=include, context=_NEW)

    @model_serializer(mode="wrap")
    def _leave_out_new_defaults(
        self, serialise: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        dumped: dict[str, Any] = serialise(self)
        if info.context is _NEW:
            for name, field in type(self).model_fields.items():
                if _NEW in field.metadata and getattr(self, name) == field.get_default(call_default_factory=True):
                    dumped.pop(name, None)
        return dumped


def refuse_password(url: str, advice: str) -> str:
    """Return a path or URL as it is. Raises ValueError: the URL holds a password. The message is
    `advice` with the URL's part before the password in place of `{user}` (`s3://key`); the password
    itself is never repeated."""
    if found := re.search(r"(\w+://[^:/]*):[^/]+@", url):
        raise ValueError(advice.format(user=found[1]))
    return url


def _without_password(place: str) -> str:
    """Return a recipe's path or URL, `~` as the home folder that it stands for; ValueError if it
    holds a password."""
    advice = "holds a password, which manifests and reports would show: put it into the environment"
    return os.path.expanduser(refuse_password(place, advice))


PathOrUrl = Annotated[str, AfterValidator(_without_password)]
"""A path or an fsspec URL."""


Location = tuple[str | int, ...]
"""Where a value stands in nested choices: ("corpus", "sources", 0)."""


def dotted(location: Location) -> str:
    """Write a location as users do: ("corpus", "sources", 0) -> "corpus.sources.0"."""
    return ".".join(str(part) for part in location)


def nearest(word: str, known: Iterable[str], introduction: str) -> str:
    """Return the end of a message about an unknown word: the closest known word, or else all."""
    words = list(known)
    close = difflib.get_close_matches(word, words, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; {introduction}: {', '.join(words) or 'none'}"
