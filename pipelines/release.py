"""Stage `release`: an arm's model as it leaves the house, with a card that says what it can do and what it cannot.

The folder is at once a plain Hugging Face model (`AutoModelForCausalLM.from_pretrained(folder)`) and an MLflow model of
the flavour `transformers`, with a signature. On a local store its weights are links to the merged model's.

    longreach run quickstart && ls .longreach/release/*/attempts/*/out
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longreach.infra.choices import Choices
from longreach.infra.files import link_or_copy
from longreach.infra.registry import BASE, DOCUMENTS, FINGERPRINT, MODEL
from longreach.pipelines.artifacts import ModelCheckpoint, PackedCorpus, Release, Scores, TokenizerFolder
from longreach.pipelines.kind import StageRun, stage
from longreach.pipelines.report.findings import about_arm
from longreach.training.convert import kept_files
from longreach.training.summary import TrainingSummary

if TYPE_CHECKING:
    from longreach.evaluation.scores import EvalScores

TOKENIZER = Path("components", "tokenizer")
"""Where MLflow's flavour looks for it."""


class ReleaseRecipe(Choices):
    """An arm's model as it leaves the pipeline."""

    name: str
    """The recipe's name."""
    arm: str
    """The arm's name."""
    register_as: str = ""
    """MLflow's registered model; empty where the gate registers it."""


@stage(makes=Release, revision=1, cpus=lambda resources: 1)
def release(
    model: ModelCheckpoint,
    corpus: PackedCorpus,
    base: TokenizerFolder,
    scores: Mapping[str, Scores],
    *,
    recipe: ReleaseRecipe,
    resources: object,
    out: Path,
    run: StageRun,
) -> dict[str, Any]:
    """The model's files, README.md and MLmodel; the summary holds what MLflow is told: tags and metrics."""
    for file in kept_files(model.path):
        if file.name != "README.md":
            link_or_copy(str(file), str(out / file.name))
            if file.suffix != ".safetensors" and file.name.startswith(("tokenizer", "chat_template", "special_tokens")):
                (out / TOKENIZER).mkdir(parents=True, exist_ok=True)
                link_or_copy(str(file), str(out / TOKENIZER / file.name))
    card = Card(recipe, model, corpus, base, {name: one.read() for name, one in scores.items()})
    (out / "README.md").write_text(card.text(), encoding="utf-8")
    _mlmodel(out, card)
    tags = {
        MODEL: f"release-{run.attempt.fingerprint}-{run.attempt.id}",
        FINGERPRINT: run.attempt.fingerprint,
        BASE: base.manifest["identity"]["recipe"].get("source", "from scratch"),
        DOCUMENTS: corpus.source_digest,
        "longreach.recipe": recipe.name,
        "longreach.arm": recipe.arm,
        "longreach.corpus": corpus.fingerprint,
        "longreach.licence": card.licence,
        "longreach.claimed_context": str(card.claimed),
        "longreach.effective_context": str(card.effective if card.effective is not None else "not measured"),
    }
    metrics = {f"eval/{k}": v for name, s in card.own().items() for k, v in s.summary.items()}
    trained = card.training
    metrics |= {
        "cost/wall_s": trained.wall_s,
        "cost/tokens_per_s": trained.tokens_per_s,
        "cost/peak_gib": trained.peak_gib,
    }
    if recipe.register_as:
        run.spool.model(recipe.register_as, tags[MODEL], metrics, tags=tags, path=out, register=recipe.register_as)
    run.spool.artifact(out / "README.md")
    run.spool.dataset(corpus.manifest["label"], corpus.fingerprint, str(corpus.path))
    return {"tags": tags, "metrics": metrics, "about": card.about}


class Card:
    """What a model card says, from artifacts alone."""

    def __init__(
        self,
        recipe: ReleaseRecipe,
        model: ModelCheckpoint,
        corpus: PackedCorpus,
        base: TokenizerFolder,
        scores: dict[str, EvalScores],
    ) -> None:
        from longreach.evaluation.scores import PASSKEY_BAR, effective_length

        self.recipe, self.corpus, self.scores = recipe, corpus, scores
        self.training = TrainingSummary.read(model.path)
        self.config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
        self.origin: dict[str, Any] = base.summary.get("origin", {})
        self.scratch = self.training.kind == "pretrain" and self.training.model is not None
        self.licence = "unknown" if self.scratch else str(self.origin.get("licence") or "unknown")
        self.trained = base.summary.get("context_length")
        self.claimed: int = self.config["max_position_embeddings"]
        self.about = about_arm(self.training)
        passkey = [row for row in self._rows("own_passkey") if row["kind"] == "length"]
        self.effective = effective_length(passkey, PASSKEY_BAR) if passkey else None
        self.asked = max((row["length"] for row in passkey), default=0)

    def own(self) -> dict[str, EvalScores]:
        """By evaluation."""
        return {name.removeprefix("own_"): s for name, s in self.scores.items() if name.startswith("own_")}

    def _rows(self, name: str) -> list[dict[str, Any]]:
        return self.scores[name].rows if name in self.scores else []

    def text(self) -> str:
        """The README."""
        from huggingface_hub import ModelCardData

        source = self.origin.get("source", "")
        hub = source.removeprefix("hub:") if source.startswith("hub:") else None
        known = self.licence.lower().replace(" ", "-")
        data = ModelCardData(
            license=known if known in ("apache-2.0", "mit") else "other",
            license_name=None if known in ("apache-2.0", "mit") else self.licence,
            base_model=None if self.scratch else hub,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=[
                "longreach",
                "long-context",
                *(["longlora"] if "+" in self.training.arm.tune else []),
            ],
        )
        parts = [
            f"---\n{data.to_yaml()}\n---",
            f"# {self.recipe.name}: {self.recipe.arm}",
            self._what(),
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```',
            "## Context",
            self._context(),
            "## How it was made",
            self._made(),
            "## Evaluation",
            *self._evaluation(),
            "## Limits",
            self._limits(),
            "## Licence",
            f"Weights: {self.licence}{'' if self.scratch else ', that of the base'}. The training texts have licences "
            "of their own; the report of the run names them.",
        ]
        return "\n\n".join(parts) + "\n"

    def _what(self) -> str:
        start = "A model trained from scratch" if self.scratch else f"`{self.origin.get('source')}`, trained further"
        return f"{start} ({self.about}) by longreach. Plain transformers loads it; attention is full and causal."

    def _context(self) -> str:
        from longreach.evaluation.scores import PASSKEY_BAR

        said = [f"- Claimed: {self.claimed:,} tokens (`max_position_embeddings`)."]
        if self.trained and not self.scratch:
            said.append(f"- The base was trained to {self.trained:,} tokens.")
        if self.effective is None:
            said.append("- Effective: not measured (no pass-key evaluation).")
        else:
            reach = f"{self.effective:,} tokens" if self.effective else "less than the shortest length asked"
            said.append(
                f"- Effective: {reach}, the greatest length up to which at least {PASSKEY_BAR:.0%} of pass keys were "
                f"found; the longest that was asked is {self.asked:,}."
            )
        return "\n".join(said)

    def _made(self) -> str:
        packed, trained = self.corpus.packed, self.training
        sources = self.corpus.manifest["identity"]["recipe"]["corpus"]["sources"]
        names = ", ".join(str(s.get("package") or s.get("files") or s.get("dataset")) for s in sources)
        return "\n".join([
            f"- Data: {names}: {packed.documents['train']:,} documents for training, "
            f"{packed.rows:,} rows of {packed.seq_len:,} tokens ({packed.method}).",
            f"- Training: {trained.steps:,} optimizer steps, {trained.tokens:,} tokens, "
            f"loss {trained.loss_first:.3f} to {trained.loss_last:.3f}; attention {trained.pattern}.",
            f"- Cost: {trained.wall_s:,.0f} s on {trained.ranks} ranks, "
            f"peak {trained.peak_gib:.2f} GiB on all of them.",
        ])  # fmt: skip

    def _evaluation(self) -> list[str]:
        """A table of all summaries, the untrained base's beside them where it was asked the same."""
        if not (own := self.own()):
            return ["Not measured."]
        lines = ["| measure | this model | the base |", "|---|---:|---:|"]
        for name, scores in own.items():
            theirs = self.scores.get(f"base_{name}")
            for key, value in scores.summary.items():
                other = theirs.summary.get(key) if theirs else None
                lines.append(f"| {key} | {value:.4g} | {'–' if other is None else f'{other:.4g}'} |")
        return ["\n".join(lines), *(f"{name}: {scores.protocol}." for name, scores in own.items())]

    def _limits(self) -> str:
        said = ["- Perplexity on a long text says that it stays predictable, not that what stands far back is used."]
        if texts := sorted({row["document"] for row in self._rows("own_perplexity") if row["kind"] == "document"}):
            few = ", ".join(texts[:5]) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")
            said.append(f"- Perplexity was measured on {few}; other languages and domains were not asked.")
        if self.training.tokens < 100_000_000:
            said.append(f"- {self.training.tokens:,} tokens are few: take it as a demonstration, not as a product.")
        if self.effective is not None and self.effective < self.claimed:
            said.append("- Between the effective and the claimed context nothing is promised.")
        return "\n".join(said)


def _mlmodel(out: Path, card: Card) -> None:
    """The file that makes the folder an MLflow model: `mlflow.transformers.load_model`, `mlflow.pyfunc.load_model`."""
    import mlflow
    import transformers
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    text = Schema([ColSpec(DataType.string)])
    model = Model(signature=ModelSignature(inputs=text, outputs=text))
    model.add_flavor(
        "transformers",
        transformers_version=transformers.__version__,
        task="text-generation",
        instance_type="TextGenerationPipeline",
        framework="pt",
        pipeline_model_type=card.config["architectures"][0],
        source_model_name=card.origin.get("source", ""),
        model_binary=".",
        components=["tokenizer"],
        tokenizer_type=json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"],
        code=None,
    )
    mlflow.pyfunc.add_to_model(model, loader_module="mlflow.transformers", model_path=".")
    model.save(str(out / "MLmodel"))
