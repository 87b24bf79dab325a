"""The base of every recipe section and of Resources: frozen, strict about names, plain to serialise.

A section is identity: its JSON goes into the stage's fingerprint (pipelines/stage.py), so a value that has no
one JSON form is not allowed in one.
"""

from pydantic import BaseModel, ConfigDict


class Choices(BaseModel):
    """A frozen group of named choices; unknown names are errors, a docstring under a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
