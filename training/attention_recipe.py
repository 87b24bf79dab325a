"""An arm's `attention` section: one of attention.PATTERNS with its fields, and the annealing.

The section is a union over PATTERNS that is resolved when a recipe is read. A new pattern only
needs its line in PATTERNS; its fields are then checked, hashed and documented like any other
choice.

    AttentionRecipe.of(pattern="shifted_sparse", group_tokens=256).pattern_at(step=0, steps=100)
"""

import functools
import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    create_model,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from longreach.attention import PATTERNS
from longreach.attention.pattern import Pattern


class AttentionRecipe(Pattern):
    """Which keys a query may see during training. Evaluation always uses full causal attention
    (LongLoRA, section 3.2).

    A recipe's section is an instance of a subclass such as `section("grouped")`, which combines the
    fields of the pattern with those below.
    """

    anneal_to: Literal["causal"] | None = None
    """The pattern of the last steps (an ablation: the paper trains with one pattern)."""
    anneal_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the steps, at the end, that use `anneal_to`; at least one step."""

    @classmethod
    def of(cls, **choices: Any) -> "AttentionRecipe":
        """Return the section with these choices; without any, full causal attention."""
        return cls.model_validate(choices)

    @staticmethod
    def section(pattern: str) -> "type[AttentionRecipe]":
        """Return the pydantic model of a section with this pattern."""
        return _section_of(PATTERNS[pattern])

    @staticmethod
    def sections() -> "list[type[AttentionRecipe]]":
        """Return the pydantic models of all sections, in the order of PATTERNS."""
        return [_section_of(pattern) for pattern in PATTERNS.values()]

    def pattern_at(self, step: int, steps: int) -> Pattern:
        """Return the pattern of a step (counted from 0) in a training of `steps` steps."""
        annealed = max(1, round(self.anneal_fraction * steps))
        if self.anneal_to and step >= steps - annealed:
            return PATTERNS[self.anneal_to].model_validate({})
        return self.own_pattern()

    def own_pattern(self) -> Pattern:
        """Return the pattern of the steps before annealing, or of all steps if there is none."""
        kind = PATTERNS[self.pattern]
        return kind.model_validate(self.model_dump(include={*kind.model_fields}))

    def about(self) -> str:
        """Return the pattern's short description, and how the last steps differ."""
        own = super().about()
        return f"{own}, the last {100 * self.anneal_fraction:.3g}% of steps full attention" if self.anneal_to else own

    @model_validator(mode="after")
    def _anneals(self) -> Self:
        if (self.anneal_to is None) != (self.anneal_fraction == 0):
            raise ValueError(
                f"anneal_to {self.anneal_to} with anneal_fraction {self.anneal_fraction:g}: set both, or neither"
            )
        if self.anneal_to == self.pattern:
            raise ValueError(f"anneal_to {self.anneal_to!r} is the pattern itself: leave it out")
        return self

    def __reduce__(self) -> Any:
        return AttentionRecipe.model_validate, (self.model_dump(),)  # pickle cannot find classes created by `section`

    @staticmethod
    def _read(choices: Any, info: ValidationInfo) -> "AttentionRecipe":
        """Validate a section with the model of the pattern that it names, or of `causal`."""
        if isinstance(choices, AttentionRecipe):
            return choices
        section = AttentionRecipe.section("causal")
        if isinstance(choices, dict) and "pattern" in choices:
            section = AttentionRecipe.section(_Named.model_validate(choices).pattern)
        if info.mode == "json":  # a recipe file: strict about types, but a list may stand for a tuple
            return section.model_validate_json(json.dumps(choices), strict=True)
        return section.model_validate(choices)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if issubclass(cls, tuple(PATTERNS.values())):
            return handler(source)
        return core_schema.with_info_plain_validator_function(cls._read)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        if issubclass(cls, tuple(PATTERNS.values())):
            return handler(schema)
        return handler(core_schema.union_schema([section.__pydantic_core_schema__ for section in cls.sections()]))


@functools.cache
def _section_of(pattern: type[Pattern]) -> type[AttentionRecipe]:
    name = pattern.model_fields["pattern"]  # AttentionRecipe comes first, and its `pattern` accepts any name
    bases: Any = (AttentionRecipe, pattern)
    field: Any = (name.annotation, name)
    return create_model(pattern.__name__, __base__=bases, __doc__=pattern.__doc__, pattern=field)


def _known(pattern: str) -> str:
    if pattern not in PATTERNS:
        *others, last = map(repr, PATTERNS)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
    return pattern


class _PatternNames:
    """How pydantic validates and describes a string that is a key of PATTERNS."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(_known, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "enum": [*PATTERNS]}


PatternName = Annotated[str, _PatternNames()]
"""A key of PATTERNS."""


class _Named(BaseModel):
    pattern: PatternName
