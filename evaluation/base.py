"""The class of all evaluations: one loaded model in, scores out.

An evaluation is one file with one subclass, which holds its choices (a recipe's section), its
cells, how one of them is measured, the scores made of all results, and the section of a report that
draws them. A line in `longreach.evaluation.EVALS` registers it. A cell is the smallest part that is
measured alone (one prompt length, one document): cells and results are plain JSON, so they can be
spread over tasks and kept on disk when a run stops.

No torch is imported here or in the files of the evaluations, because `longreach plan` and `--help`
read them: what needs torch or transformers is imported inside methods.

    python -c "from longreach.evaluation import EVALS; print(EVALS['passkey'].Choices())"
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from longreach.infra.choices import Choices

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from longreach.evaluation.blocks import Block, Figure, Section
    from longreach.evaluation.documents import Document
    from longreach.evaluation.figures import Style
    from longreach.evaluation.scores import EvalScores

Cell = dict[str, Any]
"""What is measured at once, as plain JSON."""
Result = dict[str, Any]
"""What a cell's measurement gave, as plain JSON."""

_DATA_FILE = "names a data file or folder"
_DOCUMENTS = "names held-out documents"

DataFile = Annotated[str | None, _DATA_FILE]
"""The type of a choice that names a file or folder: its bytes are part of a result's identity."""
DocumentNames = Annotated[tuple[str, ...], _DOCUMENTS]
"""The type of a choice of held-out documents, as shell patterns of their names."""
DocumentName = Annotated[str, _DOCUMENTS]
"""The type of a choice of one held-out document, as a shell pattern of its name."""
Proportion = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""
Count = Annotated[int, Field(ge=1)]
"""A whole number from 1."""


class EvalChoices(Choices):
    """Choices that every evaluation has."""

    models: tuple[str, ...] | None = None
    """Names of the models (baselines and arms) to evaluate; an arm's name means all of its seeds.
    Without it, all of them."""
    seed: int = Field(default=0, ge=0)
    """Seed of whatever the evaluation draws at random."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        """Refuse a list that names a value twice: its cells would be measured and counted twice,
        and intervals would be narrower than what was asked."""
        for name in type(self).model_fields:
            values = getattr(self, name)
            if isinstance(values, tuple) and len({*values}) < len(values):
                raise ValueError(f"{name} {list(values)}: each once")
        return self

    def data_files(self) -> dict[str, str]:
        """Return the files and folders that are chosen, by the name of their field."""
        files = {}
        for name in _fields_marked(type(self), _DATA_FILE):
            file = getattr(self, name)
            if file:
                files[name] = file
        return files

    @classmethod
    def document_fields(cls) -> list[str]:
        """Return the fields that choose held-out documents by name; their defaults choose any
        document."""
        return _fields_marked(cls, _DOCUMENTS)

    def of_model(self, is_base: bool) -> Self:
        """Return what of these choices concerns one model, which alone makes its scores'
        fingerprint: which other models are evaluated does not change them."""
        return self.model_copy(update={"models": None})

    def longest_input(self) -> int:
        """Return how many tokens the model reads at once at most; 0 where that is not known
        beforehand."""
        return max(getattr(self, "lengths", ()), default=0)


def _fields_marked(choices: type[EvalChoices], mark: str) -> list[str]:
    """Return the names of the fields whose type carries a mark."""
    return [name for name, field in choices.model_fields.items() if mark in field.metadata]


@dataclass(frozen=True)
class Background:
    """What a page knows of the models beside their scores."""

    trained_length: int | None = None
    """Tokens that the models' common base was trained to."""
    related: frozenset[str] | None = None
    """Models of one base, whose losses on a token compare; None: all of them."""
    base: str | None = None
    """The untrained base as it is."""
    stretches: tuple[str, ...] = ()
    """The untrained base under other positions."""
    arms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Trained arms and their variants, each with its models, which differ by their seed only."""

    def of_one_base(self, models: dict[str, EvalScores]) -> dict[str, EvalScores]:
        """Return the models whose losses compare."""
        if self.related is None:
            return models
        return {name: scores for name, scores in models.items() if name in self.related}

    def marks(self) -> dict[str, float]:
        """Return the vertical lines of figures along a text."""
        return {} if self.trained_length is None else {"trained length": self.trained_length}


@dataclass(frozen=True)
class Column:
    """A column of the report's main table."""

    group: str
    """The heading over this and its neighbours."""
    head: str
    cells: dict[str, tuple[float, str]]
    """Number and text by model."""


class Evaluation:
    """One evaluation of one model; subclasses define what stands below."""

    name: ClassVar[str]
    """Its name in EVALS, in recipes and in scores."""
    title: ClassVar[str]
    """The heading of its section."""
    gate: ClassVar[tuple[str, ...]] = ()
    """Rules of the recipe's section `promote` that are decided by these scores, by field name."""
    revision: ClassVar[int] = 0
    """Raised when the same choices would now give other scores, since code is not fingerprinted."""
    folds_answers: ClassVar[bool] = True
    """Whether a sample of the answers, if cases have any, is folded in at the end of its section."""
    Choices: ClassVar[type[EvalChoices]]
    """The type of its section in a recipe."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        choices: Any,
        documents: Iterable[Document] = (),
    ) -> None:
        """Hold a loaded model, its tokenizer, the evaluation's choices and the held-out
        documents."""
        self.model = model
        self.tokenizer = tokenizer
        self.choices = choices
        self.documents = list(documents)

    def cells(self) -> list[Cell]:
        """Check everything, measure nothing, and return the cells.

        Raises:
            ValueError: the choices do not fit the model or the documents.
        """
        raise NotImplementedError

    def check_reach(self, read: int | str, more: int = 0) -> None:
        """Raise ValueError where the model's table of positions, if it has one, ends before what is read at once.

        Args:
            read: tokens, or a text, which is made into tokens only where there is a table.
            more: tokens that are read after these.
        """
        from longreach.evaluation.documents import text_ids
        from longreach.evaluation.likelihood import check_reach, position_table

        if isinstance(read, str):
            read = len(text_ids(self.tokenizer, read)) if position_table(self.model) else 0
        check_reach(self.model, read + more, self.name)

    def measure(self, cell: Cell) -> Result:
        """Measure one cell; the result is the same wherever and in whichever order cells are
        measured.

        Raises:
            FloatingPointError: the model's logits are not finite.
        """
        raise NotImplementedError

    @classmethod
    def scores(cls, choices: Any, results: list[tuple[Cell, Result]]) -> EvalScores:
        """Return the scores that all cells' results make together; no model is needed any more."""
        raise NotImplementedError

    @classmethod
    def columns(cls, models: dict[str, EvalScores]) -> list[Column]:
        """Return what the report's main table shows of these scores; usually nothing."""
        return []

    @classmethod
    def section(cls, models: dict[str, EvalScores], style: Style, background: Background) -> Section:
        """Return the section of a page on one model's scores or on those of many, compared; what was
        answered is folded in at its end.

        Args:
            models: the scores of this evaluation by the model's name, at least one.
            style: how each model is drawn in all figures.
            background: what is known beside the scores.
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
        """Return what the evaluation asks: its class's docstring, in one line."""
        return " ".join((cls.__doc__ or "").split())

    @classmethod
    def words_and_tables(cls, models: dict[str, EvalScores], background: Background) -> list[Block]:
        """Return what stands above the section's figures: the question, the protocol and the
        summaries."""
        from longreach.evaluation.sections import summary_table

        first = next(iter(models.values()))
        text = f"{cls.question()} Protocol: {first.protocol}. {first.note}"
        return [text.strip(), summary_table("Summary", models)]

    @classmethod
    def figures(cls, models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
        """Return the figures of the section; usually all that differs from evaluation to
        evaluation."""
        return []
