"""What flows between stages, by type: an artifact of the store whose summary and files have names.

Documents -pack-> PackedCorpus -pretrain-> ModelCheckpoint
PackedCorpus + ModelCheckpoint -gains-> RowGains, which objective long_ce needs
PackedCorpus + ModelCheckpoint -finetune-> AdapterCheckpoint -merge-> ModelCheckpoint
ModelCheckpoint -evaluate-> Scores; all of them -report-> Report
ModelCheckpoint -release-> Release -promote-> Decision
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from longreach.infra.artifact import Artifact
from longreach.training.summary import CostsSummary, PackSummary

if TYPE_CHECKING:
    from longreach.evaluation.scores import EvalScores

GAINS = "gains"
"""The input of `finetune` that an arm with objective long_ce has."""


class TokenizerFolder(Artifact):
    """A folder that transformers loads a tokenizer from."""


class ModelCheckpoint(TokenizerFolder):
    """A Hugging Face folder with a model and its tokenizer: the base, or an arm's model."""


class AdapterCheckpoint(Artifact):
    """A peft adapter with the record of its training (training.json)."""


class PackedCorpus(Artifact):
    """Rows of token ids, the held-out documents, and their tokenizer (training/corpus.py)."""

    @property
    def packed(self) -> PackSummary:
        """How the documents became rows; the list of malformed entries is in its file alone."""
        return PackSummary.model_validate(self.summary)

    @property
    def source_digest(self) -> str:
        return self.manifest["identity"]["digests"]["documents"]

    def text_digests(self) -> dict[str, str]:
        """Return a digest of each held-out document's tokens, by the document's name."""
        import xxhash

        from longreach.evaluation.documents import held_out

        documents = held_out(self.path / "documents")
        return {document.name: xxhash.xxh3_128(document.ids_T.tobytes()).hexdigest() for document in documents}

    def check_rows(self) -> None:
        """Raise ValueError if there is no row to train on."""
        if not self.packed.rows:
            held_out = ", ".join(f"{split} {n}" for split, n in self.packed.documents.items() if n)
            raise ValueError(
                f"corpus.validation and corpus.test hold out all documents ({held_out}): nothing to train on"
            )


class RowGains(Artifact):
    """What a long context tells about each token of the rows that a training reads
    (training/long_ce.py)."""


class Scores(Artifact):
    """One evaluation of one model: scores.json, scores.parquet, cases.jsonl and figures."""

    def read(self) -> EvalScores:
        """The scores, rows and summary, as the evaluation wrote them."""
        from longreach.evaluation.scores import EvalScores

        return EvalScores.read(self.path)


class Costs(Artifact):
    """What steps of each arm cost by row length: costs.json."""

    @property
    def measured(self) -> CostsSummary:
        """Each measurement, and what follows from all of them."""
        return CostsSummary.model_validate(self.summary)


class Release(Artifact):
    """An arm's model with a card, at once a Hugging Face folder and an MLflow model."""

    @property
    def tags(self) -> dict[str, str]:
        """What the registry stores beside the model."""
        return self.summary["tags"]

    @property
    def metrics(self) -> dict[str, float]:
        """Scores and costs by the name that MLflow shows."""
        return self.summary["metrics"]

    @property
    def about(self) -> str:
        return self.summary["about"]


def verdict(refusals: Sequence[str]) -> str:
    """Return in a line whether a challenger passed its gate, and else why not."""
    if not refusals:
        return "passed"
    return f"refused: {'; '.join(refusals)}"


class Decision(Artifact):
    """What the gate decided: gate.json and gate.md."""

    @property
    def refusals(self) -> list[str]:
        """The rules that were broken, with what was measured; empty if the challenger passed."""
        return self.summary["refusals"]

    @property
    def verdict(self) -> str:
        """Whether the challenger passed, and else why not: the tag `gate` in MLflow."""
        return verdict(self.refusals)

    @property
    def in_words(self) -> str:
        """What became of the challenger."""
        name = self.summary["name"]
        if self.refusals:
            return f"refused for {name}: {'; '.join(self.refusals)}"
        return f"version {self.summary['version']} is champion of {name}"


class Report(Artifact):
    """The page on a whole run: report.html, report.md, measures.json and figures."""

    MEASURES = "measures.json"
    """The page's numbers: a row for each measure, a column for each model."""

    @property
    def headline(self) -> str:
        return self.summary.get("headline", "")

    @property
    def curves(self) -> dict[str, dict[int, float]]:
        """Gains by context length, by the name that MLflow shows."""
        curves = self.summary.get("curves", {})
        return {name: {int(length): gain for length, gain in points.items()} for name, points in curves.items()}

    @property
    def table(self) -> str:
        """The main table in short, as Markdown."""
        return self.summary.get("table", "")
