"""Stage `release`: an arm's model for use outside the pipeline, with a card on its abilities and
limits.

The folder is both a plain Hugging Face model (`AutoModelForCausalLM.from_pretrained(folder)`) and
an MLflow model of the flavour `transformers`, with a signature. In a local store its weights are
hard links to the merged model's. The template of the card is model_card.md.tmpl.

    longreach run quickstart && ls .longreach/release/*/attempts/*/out
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longreach.evaluation.lm_eval_files import HARNESS
from longreach.infra.choices import Choices, New
from longreach.infra.files import link_or_copy
from longreach.infra.registry import BASE, DOCUMENTS, FINGERPRINT, MODEL
from longreach.pipelines.artifacts import ModelCheckpoint, PackedCorpus, Release, Scores, TokenizerFolder
from longreach.pipelines.gate import MEASURED_BY
from longreach.pipelines.kind import StageRun, stage
from longreach.pipelines.report.findings import about_arm
from longreach.training.convert import kept_files
from longreach.training.corpus_recipe import SourceRecipe
from longreach.training.summary import TrainingSummary
from longreach.training.to_gguf import Facts, GgufType, gguf_name, write_gguf

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from longreach.evaluation.scores import EvalScores

TEMPLATE = Path(__file__).with_name("model_card.md.tmpl")
SOFTMAX_SINKS = ("granite_swa", "gpt_oss")
"""transformers' model_types with a learned logit for each head in each softmax."""
TOKENIZER = Path("components", "tokenizer")  # where MLflow's flavour looks for the tokenizer


class ReleaseRecipe(Choices):
    """The release of an arm's model."""

    name: str
    """Name of the recipe, for the card."""
    arm: str
    """Name of the arm."""
    register_as: str = ""
    """Name of the registered model in MLflow; empty if the gate registers it."""
    gguf: New[tuple[GgufType, ...]] = ()
    """Types of the GGUF files to write in addition to safetensors."""


@stage(makes=Release, revision=1, cpus=lambda resources: 1)
def release(
    model: ModelCheckpoint,
    corpus: PackedCorpus,
    base: TokenizerFolder,
    scores: Mapping[str, Scores],
    *,
    recipe: ReleaseRecipe,
    out: Path,
    run: StageRun,
) -> dict[str, Any]:
    """Write the model's files, README.md and MLmodel; return the tags and metrics for MLflow."""
    written = _write_in_the_bases_type(model.path, base.path, out)
    for file in kept_files(model.path):
        if file.name == "README.md" or file.name in written:
            continue
        link_or_copy(str(file), str(out / file.name))
        if file.suffix != ".safetensors" and file.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            (out / TOKENIZER).mkdir(parents=True, exist_ok=True)
            link_or_copy(str(file), str(out / TOKENIZER / file.name))
    read = {name: artifact.read() for name, artifact in scores.items()}
    card = Card(recipe, model, corpus, base, read, out)
    facts = Facts(f"{recipe.name} {recipe.arm}", card.licence, card.keep)
    for kind, file_name in card.gguf.items():
        write_gguf(out, out / file_name, kind, facts=facts)
    (out / "README.md").write_text(card.text(), encoding="utf-8")
    _write_mlmodel(out, card)
    effective = "not measured" if card.effective is None else str(card.effective)
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
        "longreach.effective_context": effective,
    }
    metrics = {f"eval/{measure}": value for measure, value, _ in card.measures()}
    metrics["cost/wall_s"] = card.training.wall_s
    metrics["cost/tokens_per_s"] = card.training.tokens_per_s
    metrics["cost/peak_gib"] = card.training.peak_gib
    if recipe.register_as:
        run.spool.model(recipe.register_as, tags[MODEL], metrics, tags=tags, path=out, register=recipe.register_as)
    run.spool.artifact(out / "README.md")
    run.spool.dataset(corpus.manifest["label"], corpus.fingerprint, str(corpus.path))
    return {"tags": tags, "metrics": metrics, "about": card.about}


def _write_in_the_bases_type(model: Path, base: Path, out: Path) -> set[str]:
    """Convert config and weights to the base's dtype if the model has another one, as after tuning
    all weights of a bfloat16 base in float32; return the names of files that must not be copied."""
    types = []
    for folder in (model, base):
        file = folder / "config.json"  # missing if the base is only a new tokenizer
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        types.append(config.get("dtype") or config.get("torch_dtype"))
    own, wanted = types
    if wanted is None or own in (None, wanted):
        return set()
    from longreach.training.export import save_in_type

    save_in_type(model, out, wanted)
    weights = {file.name for file in kept_files(model) if ".safetensors" in file.name}
    return {file.name for file in out.iterdir()} | weights


class Card:
    """The facts of a model card, read only from artifacts."""

    def __init__(
        self,
        recipe: ReleaseRecipe,
        model: ModelCheckpoint,
        corpus: PackedCorpus,
        base: TokenizerFolder,
        scores: dict[str, EvalScores],
        released: Path,
    ) -> None:
        """Collect the facts.

        Args:
            scores: The model's as `own_EVALUATION` and the base's as `base_EVALUATION`.
            released: The folder with the released weights.
        """
        from longreach.evaluation.scores import PASSKEY_BAR, effective_length

        self.recipe = recipe
        self.packed = corpus.packed
        self.training = TrainingSummary.read(model.path)
        self.config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
        self.dtype = json.loads((released / "config.json").read_text(encoding="utf-8")).get("dtype")
        self.rounded = self.dtype != self.config.get("dtype")
        """Whether training and evaluations used weights of another dtype than the released ones."""
        self.gguf = {kind: gguf_name(recipe.name, recipe.arm, kind) for kind in recipe.gguf}
        self.about = about_arm(self.training)
        self.claimed: int = self.config["max_position_embeddings"]
        self.origin: dict[str, Any] = base.summary.get("origin", {})
        self.base_context = base.summary.get("context_length")
        self.scratch = self.training.kind == "pretrain" and self.training.model is not None
        self.licence = "unknown"
        if not self.scratch:
            self.licence = str(self.origin.get("licence") or "unknown")
        self.sources: list[str] = []
        for source in corpus.manifest["identity"]["recipe"]["corpus"]["sources"]:
            self.sources += SourceRecipe.model_validate(source).places()

        self.own: dict[str, EvalScores] = {}
        """The model's scores by evaluation."""
        self.of_base: dict[str, EvalScores] = {}
        """The untrained base's scores by evaluation."""
        for name, one in scores.items():
            whose, _, evaluation = name.partition("_")
            if whose == "own":
                self.own[evaluation] = one
            else:
                self.of_base[evaluation] = one
        keys = self._rows(MEASURED_BY["effective_length"], "length")
        self.threshold = PASSKEY_BAR
        self.effective = effective_length(keys, PASSKEY_BAR) if keys else None
        """Tokens up to which at least `threshold` of the keys were found; None if not measured."""
        self.longest_asked = max((row["length"] for row in keys), default=0)
        documents = self._rows(MEASURED_BY["perplexity_ratio"], "document")
        self.documents = sorted({row["document"] for row in documents})
        self._note_sink(model.path)

    def _note_sink(self, folder: Path) -> None:
        """Record the model's attention sink, and the tokens that a fixed-size cache must keep for
        it."""
        from transformers import AutoTokenizer

        from longreach.evaluation.streaming import name_of
        from longreach.training.sink_token import SINK_TOKEN, sink_token_id

        self.sink_token = SINK_TOKEN
        self.sink_id = sink_token_id(AutoTokenizer.from_pretrained(folder, local_files_only=True))
        self.sink: str = self.training.sink
        """none, zero, token or logit, including a sink that the starting model already had."""
        if self.sink == "none" and self.sink_id is not None:
            self.sink = "token"
        elif self.sink == "none" and self.config["model_type"] in SOFTMAX_SINKS:
            self.sink = "logit"
        self.keep = 1 if self.sink == "token" else 4
        """First tokens that a cache always keeps; 4 without a sink token (StreamingLLM)."""
        self.window = min(1024, self.claimed) - self.keep - 1
        """Recent tokens that a cache keeps in the card's example."""
        self.kept: list[dict[str, Any]] = []
        """Rows of perplexity with the first 0, 1, 2, ... tokens kept; empty if not measured."""
        for row in self._rows("streaming", "way"):
            if row["way"] in ("window", name_of("sinks", row["sink_tokens"])):
                self.kept.append(row)

    def _rows(self, evaluation: str, kind: str) -> list[dict[str, Any]]:
        if evaluation not in self.own:
            return []
        return self.own[evaluation].rows_with(kind=kind)

    def measures(self) -> Iterator[tuple[str, float, float | None]]:
        """Yield (measure, the model's value, the base's value or None) of all summaries."""
        for evaluation, scores in self.own.items():
            of_base: dict[str, float] = {}
            if evaluation in self.of_base:
                of_base = self.of_base[evaluation].summary
            for measure, value in scores.summary.items():
                yield measure, value, of_base.get(measure)

    def metadata(self) -> str:
        """Return the card's YAML metadata for the Hugging Face Hub."""
        from huggingface_hub import ModelCardData

        licence: dict[str, Any] = {"license": self.licence.lower().replace(" ", "-")}
        if licence["license"] not in ("apache-2.0", "mit"):
            licence = {"license": "other", "license_name": self.licence}
        tags = ["longreach", "long-context"]
        if "+" in self.training.arm.tune:
            tags.append("longlora")
        source = self.origin.get("source", "")
        base_model = None
        if source.startswith("hub:") and not self.scratch:
            base_model = source.removeprefix("hub:")
        data = ModelCardData(
            **licence,
            base_model=base_model,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=tags,
        )
        if results := self.results():
            data.model_name, data.eval_results = f"{self.recipe.name}: {self.recipe.arm}", results
        return data.to_yaml()

    def results(self) -> list[EvalResult]:
        """Return all scores for the card's `model-index`, except speeds, which depend on the
        machine."""
        from huggingface_hub import EvalResult

        from longreach.evaluation import EVALS
        from longreach.evaluation.longbench import DATASETS

        results = []

        def add(dataset: str, title: str, metric: str, value: float) -> None:
            rounded = float(f"{value:.6g}")
            results.append(EvalResult("text-generation", dataset, title, metric, rounded, metric_name=metric))

        for evaluation, scores in self.own.items():
            if evaluation == HARNESS:
                for row in scores.rows_with(kind="task"):
                    task = row["task"]
                    title = task
                    if task in DATASETS:
                        title = f"LongBench {DATASETS[task].name}"
                    asked, there = row.get("documents"), row.get("documents_in_all")
                    if asked and there and asked < there:
                        title += f" (the first {asked:,} of {there:,})"
                    add(task, title, row["metric"], row["value"])
                continue
            for measure, value in scores.summary.items():
                if not measure.endswith("tokens_per_s") and not measure.startswith(("decode_ms", "endurance_growth")):
                    add(f"longreach/{evaluation}", EVALS[evaluation].title, measure, value)
        return results

    def text(self) -> str:
        from jinja2 import Environment, StrictUndefined

        environment = Environment(
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
        )
        environment.filters["thousands"] = "{:,}".format
        template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        return template.render(card=self, packed=self.packed, trained=self.training)


def _write_mlmodel(out: Path, card: Card) -> None:
    """Write the MLmodel file, with which mlflow.transformers and mlflow.pyfunc load the folder."""
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
