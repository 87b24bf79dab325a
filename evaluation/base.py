"""Base class of all evaluations: takes one loaded model, returns scores.

An evaluation is one file with one subclass. The subclass defines its choices (a section of the
recipe), its cells, how one cell is measured, how the scores are computed from all results, and its
section of the report. A line in `longreach.evaluation.EVALS` registers it. A cell is the smallest
unit that is measured on its own (one prompt length, one document). Cells and results are plain
JSON, so they can be spread over tasks and survive an interrupted run.

Neither this file nor those of the evaluations import torch at the top, because `longreach plan` and
`--help` load them. Methods import torch and transformers where they need them.

    python -c "from longreach.evaluation import EVALS; print(EVALS['passkey'].Choices())"
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from longreach.infra.choices import Choices, Seed, refuse_repeats

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from longreach.evaluation.blocks import Block, Figure, Section
    from longreach.evaluation.documents import Document
    from longreach.evaluation.figures import Style
    from longreach.evaluation.scores import EvalScores

Cell = dict[str, Any]
"""The smallest unit of measurement, as plain JSON."""
Result = dict[str, Any]
"""The result of measuring one cell, as plain JSON."""

_DATA_FILE = "names a data file or folder"
_DOCUMENTS = "names held-out documents"

DataFile = Annotated[str | None, _DATA_FILE]
"""Type of a field that names a file or folder. Its content is part of the result's fingerprint."""
DocumentNames = Annotated[tuple[str, ...], _DOCUMENTS]
"""Type of a field that selects held-out documents by shell patterns of their names."""
DocumentName = Annotated[str, _DOCUMENTS]
"""Type of a field that selects one held-out document by a shell pattern of its name."""
Proportion = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""
Count = Annotated[int, Field(ge=1)]
"""An integer of at least 1."""


Selection = tuple[str, tuple[str, ...], tuple[str, ...]]
"""A field, its shell patterns, and the splits of the corpus: a document of these must match a pattern."""


class EvalChoices(Choices):
    """Choices that every evaluation has."""

    models: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of the models (baselines and arms) to evaluate. An arm's name stands for all of its
    seeds. Default: all models."""
    seed: Seed = 0
    """Seed of everything that the evaluation draws at random."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        """Reject a list with a repeated value: its cells would be measured and counted twice, and
        the intervals would be too narrow."""
        refuse_repeats(self, "list each value once")
        return self

    def data_files(self) -> dict[str, str]:
        """Return the chosen files and folders by field name."""
        files = {}
        for name in _fields_marked(type(self), _DATA_FILE):
            file = getattr(self, name)
            if file:
                files[name] = file
        return files

    @classmethod
    def document_fields(cls) -> list[str]:
        """Return the names of the fields that select held-out documents. Their defaults select any
        document."""
        return _fields_marked(cls, _DOCUMENTS)

    def selected(self) -> list[Selection]:
        """Return what the evaluation needs of the held-out documents; empty if it reads none."""
        selected: list[Selection] = []
        for name in self.document_fields():
            patterns = getattr(self, name)
            if patterns:
                selected.append((name, (patterns,) if isinstance(patterns, str) else patterns, ("test", "validation")))
        return selected

    def of_model(self, is_base: bool) -> Self:
        """Return the choices that concern one model.

        Only these enter the fingerprint of its scores, which do not depend on which other models
        are evaluated.
        """
        return self.model_copy(update={"models": None})

    def longest_input(self) -> int:
        """Return the largest number of tokens that the model reads at once, or 0 if it is not known
        beforehand."""
        return max(getattr(self, "lengths", ()), default=0)


def _fields_marked(choices: type[EvalChoices], mark: str) -> list[str]:
    """Return the names of the fields whose type has this annotation."""
    return [name for name, field in choices.model_fields.items() if mark in field.metadata]


@dataclass(frozen=True)
class Background:
    """What a report page knows about the models besides their scores."""

    trained_length: int | None = None
    """Context length in tokens to which the models' common base was trained."""
    related: frozenset[str] | None = None
    """Models of one base, whose losses on a token can be compared. None means all models."""
    base: str | None = None
    """The untrained base, unchanged."""
    stretches: tuple[str, ...] = ()
    """The untrained base with other position encodings."""
    arms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Trained arms and their variants, each with its models, which differ only by their seed."""

    def of_one_base(self, models: dict[str, EvalScores]) -> dict[str, EvalScores]:
        """Return the models whose losses can be compared."""
        if self.related is None:
            return models
        return {name: scores for name, scores in models.items() if name in self.related}

    def marks(self) -> dict[str, float]:
        """Return the vertical lines to draw in figures whose x axis counts tokens, by label."""
        return {} if self.trained_length is None else {"trained length": self.trained_length}


@dataclass(frozen=True)
class Column:
    """A column of the report's main table."""

    group: str
    """The heading that this column shares with its neighbours."""
    head: str
    cells: dict[str, tuple[float, str]]
    """The number and its text, by model."""


class Evaluation:
    """One evaluation of one model. Subclasses define the attributes and methods below."""

    name: ClassVar[str]
    """Its name in EVALS, in recipes and in scores."""
    title: ClassVar[str]
    """The heading of its report section."""
    gate: ClassVar[tuple[str, ...]] = ()
    """Field names of the rules in the recipe's section `promote` that use these scores."""
    revision: ClassVar[int] = 0
    """Increase it when the same choices give other scores than before: fingerprints do not cover
    code."""
    folds_answers: ClassVar[bool] = True
    """Whether the section ends with a collapsed sample of the answers, if the cases have any."""
    Choices: ClassVar[type[EvalChoices]]
    """The type of its section in a recipe."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        choices: Any,
        documents: Iterable[Document] = (),
    ) -> None:
        """Keep a loaded model, its tokenizer, the evaluation's choices and the held-out
        documents."""
        self.model = model
        self.tokenizer = tokenizer
        self.choices = choices
        self.documents = list(documents)

    def cells(self) -> list[Cell]:
        """Check the choices and return the cells, without measuring anything.

        Raises:
            ValueError: the choices do not fit the model or the documents.
        """
        raise NotImplementedError

    def check_reach(self, read: int | str, more: int = 0) -> None:
        """Raise ValueError if the model has a table of position embeddings that is too short for the input.

        Args:
            read: number of tokens, or a text, which is tokenized only if there is such a table.
            more: number of tokens that are read after these.
        """
        from longreach.evaluation.documents import text_ids
        from longreach.evaluation.likelihood import check_reach, position_table

        if isinstance(read, str):
            read = len(text_ids(self.tokenizer, read)) if position_table(self.model) else 0
        check_reach(self.model, read + more, self.name)

    def measure(self, cell: Cell) -> Result:
        """Measure one cell. The result does not depend on where, or in which order, cells are
        measured.

        Raises:
            FloatingPointError: the model's logits are not finite.
        """
        raise NotImplementedError

    @classmethod
    def scores(cls, choices: Any, results: list[tuple[Cell, Result]]) -> EvalScores:
        """Return the scores computed from the results of all cells. This needs no model."""
        raise NotImplementedError

    @classmethod
    def columns(cls, models: dict[str, EvalScores]) -> list[Column]:
        """Return the columns that these scores add to the report's main table; usually none."""
        return []

    @classmethod
    def section(cls, models: dict[str, EvalScores], style: Style, background: Background) -> Section:
        """Return the section of a page on the scores of one model, or on those of several, compared.
        It ends with a collapsed sample of the answers.

        Args:
            models: the scores of this evaluation by model name, at least one.
            style: how each model is drawn in all figures.
            background: what is known about the models besides their scores.
        """
        from longreach.evaluation.blocks import Section
        from longreach.evaluation.sections import raw_answers

        blocks = cls.words_and_tables(models, background)
        figures = cls.figures(models, style, background)
        if figures:
            blocks.append(figures)
        if cls.folds_answers:
            blocks += raw_answers(models)
        return Section(cls.title, blocks)

    @classmethod
    def question(cls) -> str:
        """Return the question that the evaluation answers: its class docstring, in one line."""
        return " ".join((cls.__doc__ or "").split())

    @classmethod
    def words_and_tables(cls, models: dict[str, EvalScores], background: Background) -> list[Block]:
        """Return the blocks above the section's figures: question, protocol and summaries."""
        from longreach.evaluation.sections import summary_table

        first = next(iter(models.values()))
        text = f"{cls.question()} Protocol: {first.protocol}. {first.note}"
        return [text.strip(), summary_table("Summary", models)]

    @classmethod
    def figures(cls, models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
        """Return the figures of the section. Most evaluations override only this part."""
        return []
