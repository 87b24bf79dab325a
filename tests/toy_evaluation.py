"""An evaluation that the product does not have, written as a file in evaluation/ would be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from longreach.evaluation.base import Background, Cell, DocumentNames, EvalChoices, Evaluation, Result
from longreach.evaluation.documents import matching
from longreach.evaluation.scores import EvalScores

if TYPE_CHECKING:
    from longreach.evaluation.blocks import Figure
    from longreach.evaluation.figures import Style


class DistinctTokens(Evaluation):
    """How many different tokens does a held-out document have?"""

    name = "distinct_tokens"
    title = "Distinct tokens"

    class Choices(EvalChoices):
        """Different tokens at the beginning of held-out documents."""

        first_tokens: int = Field(ge=1)
        """Number of tokens of each document that are read."""
        documents: DocumentNames = ("*",)
        """Names (shell patterns) of held-out documents."""

    choices: Choices

    def cells(self) -> list[Cell]:
        return [{"document": document.name} for document in matching(self.documents, self.choices.documents)]

    def measure(self, cell: Cell) -> Result:
        (document,) = matching(self.documents, (cell["document"],))
        return {"distinct": len(set(document.ids_T[: self.choices.first_tokens].tolist()))}

    @classmethod
    def scores(cls, choices: Choices, results: list[tuple[Cell, Result]]) -> EvalScores:
        rows = [{"kind": "document", **cell, **result} for cell, result in results]
        return EvalScores(
            eval=cls.name,
            protocol=f"different ids among the first {choices.first_tokens} tokens",
            recipe=choices.model_dump(mode="json"),
            rows=rows,
            summary={"distinct_tokens": sum(row["distinct"] for row in rows) / len(rows)},
        )

    @classmethod
    def figures(cls, models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
        from longreach.evaluation.figures import bars

        values = {name: scores.summary["distinct_tokens"] for name, scores in models.items()}
        return [bars("distinct_tokens.png", cls.title, "More is richer.", {"documents": values}, style)]
