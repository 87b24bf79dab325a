"""The base class of recipe sections and of Resources: frozen, strict about names, with a unique JSON
form.

A section's JSON is part of its stage's fingerprint (pipelines/stage.py), so values without a unique
JSON form (NaN, infinity) are rejected. A field that was added after results had been published is
marked `New`: at its default it is left out of the fingerprint, so that those results are still found.

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
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
)

T = TypeVar("T")
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""A seed that torch and numpy accept."""
_NEW = object()
New = Annotated[T, _NEW]
"""The type of a field that was added later: at its default, the field is not part of the identity."""


class Choices(BaseModel):
    """A frozen group of named choices. Unknown names are errors; the docstring under a field is its
    description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def identity(self, include: set[str] | None = None) -> dict[str, Any]:
        """Return the JSON that goes into a fingerprint: all choices except `New` ones at their
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


def refuse_repeats(choices: BaseModel, advice: str) -> None:
    """Raise ValueError, ending with `advice`, if a field that is a list has a value twice."""
    for name in type(choices).model_fields:
        values = getattr(choices, name)
        if isinstance(values, tuple) and len({*values}) < len(values):
            raise ValueError(f"{name} {list(values)} lists a value twice: {advice}")


def refuse_password(url: str, advice: str) -> str:
    """Return a path or URL unchanged. Raises ValueError if the URL holds a password.

    The message is `advice`, with `{user}` replaced by the URL's part before the password
    (`s3://key`). It never contains the password.
    """
    # A password may contain / (AWS's keys do). Digits up to the end of the host are a port: @ may follow in the path.
    if found := re.search(r"(\w+://[^:/[]*):(?!:|\d+(?:[/?#]|$)).+@", url):
        raise ValueError(advice.format(user=found[1]))
    return url


def _without_password(place: str) -> str:
    """Return a recipe's path or URL with `~` expanded. Raises ValueError if it holds a password."""
    advice = "holds a password, which manifests and reports would show: set it in the environment instead"
    return os.path.expanduser(refuse_password(place, advice))


PathOrUrl = Annotated[str, AfterValidator(_without_password)]
"""A path or an fsspec URL."""


Location = tuple[str | int, ...]
"""The position of a value in nested choices: ("corpus", "sources", 0)."""


def dotted(location: Location) -> str:
    """Return a location in the dotted form that users write: "corpus.sources.0"."""
    return ".".join(str(part) for part in location)


def nearest(word: str, known: Iterable[str], introduction: str) -> str:
    """Return the end of a message about an unknown word: the closest known word, or all known words."""
    words = list(known)
    close = difflib.get_close_matches(word, words, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; {introduction}: {', '.join(words) or 'none'}"
