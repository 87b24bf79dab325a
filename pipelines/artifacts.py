"""Artifact types that stages exchange, with named access to their summaries and files.

Documents -pack-> PackedCorpus -pretrain-> ModelCheckpoint
Documents -hold_out-> HeldOutDocuments
PackedCorpus + ModelCheckpoint -gains-> RowGains, which objective long_ce needs
PackedCorpus + ModelCheckpoint -finetune-> AdapterCheckpoint -merge-> ModelCheckpoint
ModelCheckpoint + HeldOutDocuments -evaluate-> Scores; all of them -report-> Report
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
"""Name of `finetune`'s input for arms with objective long_ce."""


class TokenizerFolder(Artifact):
    """A folder from which transformers loads a tokenizer."""


class ModelCheckpoint(TokenizerFolder):
    """A Hugging Face folder with a model and its tokenizer: the base, or an arm's model."""


class AdapterCheckpoint(Artifact):
    """A peft adapter with the record of its training (training.json)."""


class HeldOutDocuments(Artifact):
    """The held-out documents of a corpus as token ids, and their tokenizer (training/corpus.py)."""

    @property
    def source_digest(self) -> str:
        return self.manifest["identity"]["digests"]["documents"]

    def text_digests(self) -> dict[str, str]:
        """Return the digest of each held-out document's tokens, by document name."""
        import xxhash

        from longreach.evaluation.documents import held_out

        documents = held_out(self.path / "documents")
        return {document.name: xxhash.xxh3_128(document.ids_T.tobytes()).hexdigest() for document in documents}


class PackedCorpus(HeldOutDocuments):
    """Rows of token ids, the held-out documents, and their tokenizer (training/corpus.py)."""

    @property
    def packed(self) -> PackSummary:
        """How the documents became rows; the list of malformed entries is only in its own file."""
        return PackSummary.model_validate(self.summary)


class RowGains(Artifact):
    """How much a long context helps to predict each token of the rows that a training reads
    (training/long_ce.py)."""


class Scores(Artifact):
    """One evaluation of one model: scores.json, scores.parquet, cases.jsonl and figures."""

    def read(self) -> EvalScores:
        """Return the evaluation's scores: rows and summary."""
        from longreach.evaluation.scores import EvalScores

        return EvalScores.read(self.path)


class Costs(Artifact):
    """Step time and memory of each arm by row length: costs.json."""

    @property
    def measured(self) -> CostsSummary:
        """All measurements, and the ratios computed from them."""
        return CostsSummary.model_validate(self.summary)


class Release(Artifact):
    """An arm's model with a card: both a Hugging Face folder and an MLflow model."""

    @property
    def tags(self) -> dict[str, str]:
        """The tags that the registry stores with the model."""
        return self.summary["tags"]

    @property
    def metrics(self) -> dict[str, float]:
        """Scores and costs by MLflow metric name."""
        return self.summary["metrics"]

    @property
    def about(self) -> str:
        return self.summary["about"]


def verdict(refusals: Sequence[str]) -> str:
    """Return one line that says whether a challenger passed the gate, and if not, why."""
    if not refusals:
        return "passed"
    return f"refused: {'; '.join(refusals)}"


class Decision(Artifact):
    """A decision of the gate: gate.json and gate.md."""

    @property
    def refusals(self) -> list[str]:
        """The broken rules with the measured values; empty if the challenger passed."""
        return self.summary["refusals"]

    @property
    def verdict(self) -> str:
        """Whether the challenger passed, and if not, why: the tag `gate` in MLflow."""
        return verdict(self.refusals)

    @property
    def in_words(self) -> str:
        """The outcome for the challenger as a phrase."""
        name = self.summary["name"]
        if self.refusals:
            return f"refused for {name}: {'; '.join(self.refusals)}"
        return f"version {self.summary['version']} is champion of {name}"


class Report(Artifact):
    """The report of a whole run: report.html, report.md, measures.json and figures."""

    MEASURES = "measures.json"
    """The page's numbers: a row per measure, a column per model."""

    @property
    def headline(self) -> str:
        return self.summary.get("headline", "")

    @property
    def curves(self) -> dict[str, dict[int, float]]:
        """MLflow metric name -> gain by context length."""
        curves = self.summary.get("curves", {})
        return {name: {int(length): gain for length, gain in points.items()} for name, points in curves.items()}

    @property
    def table(self) -> str:
        """A short form of the main table, as Markdown."""
        return self.summary.get("table", "")
