"""The base of every recipe section and of Resources: frozen, strict about names, plain to serialise.

A section is identity: its JSON goes into the stage's fingerprint (pipelines/stage.py), so a value that has no
one JSON form is not allowed in one.
"""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict


class Choices(BaseModel):
    """A frozen group of named choices; unknown names are errors, a docstring under a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _without_password(place: str) -> str:
    if "://" in place and urlsplit(place).password:
        raise ValueError("holds a password, which manifests and reports would show: put it into the environment")
    return place


PathOrUrl = Annotated[str, AfterValidator(_without_password)]
"""A path or an fsspec URL."""
