"""Compare several runs on one page: differences in their choices, and every model's results and
cost.

A run is read from its published report and the artifacts that the report names. Perplexities are
comparable if models of one base scored the same tokens of the same texts, so the frontier shows the
largest such group. A text is identified by its tokens, not by its name, because other runs may have
another text under the same name. Models that several runs share (a base, an unchanged arm) are
shown once, under the first run.

    longreach compare quickstart 3f9a1c longer.yaml --out compare

Result files of lm-evaluation-harness are added (evaluation/lm_eval_files.py) as models that have
only the harness' tasks:

    longreach compare quickstart lm-eval-output/ results_2026-11-25T12-00-00.json
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longreach.evaluation.base import Background
from longreach.evaluation.blocks import Block, Section, Table
from longreach.evaluation.gain import Gain
from longreach.evaluation.harness import Harness
from longreach.evaluation.lm_eval_files import check_versions, read_results, result_files, write_results
from longreach.evaluation.perplexity import difference_tables
from longreach.evaluation.scores import EvalScores
from longreach.evaluation.sections import finite, perplexity_text
from longreach.infra.artifact import MANIFEST, Artifact, Store
from longreach.pipelines.artifacts import HeldOutDocuments
from longreach.pipelines.plan import open_store
from longreach.pipelines.reader import load
from longreach.pipelines.reader import names as recipe_names
from longreach.pipelines.recipe import PriceRecipe
from longreach.pipelines.report.claim import claim_of
from longreach.pipelines.report.findings import PERPLEXITY, Findings, Model, gather
from longreach.pipelines.report.page import Page
from longreach.pipelines.report.sections import losses, results
from longreach.pipelines.stage import differences
from longreach.training.summary import HeldOutSummary, PackSummary

FILES = {
    "compare.html", "compare.md", "gain.png", "perplexity.png", "frontier.png", "cost.png", "loss.png",
    "pretrain-loss.png",
}  # fmt: skip
"""Files that a comparison writes. If its folder has any other file, it refuses to write there."""
PREFIX = re.compile(r"[0-9a-f]{6,32}")
READ_HERE = re.compile(
    rf"scores\.json|metrics\.jsonl|{re.escape(PackSummary.file)}|{re.escape(HeldOutSummary.file)}|documents/.*"
)
"""The artifact files that a comparison reads; it does not download others."""


def compare(names: Sequence[str], out: Path, root: str | None) -> Path:
    """Write compare.html, compare.md and their figures into `out`; return the page's path.

    Args:
        names: Recipes, fingerprints of reports (at least six digits), report folders, or lm-eval
            result files and the folders that contain them.
        root: The store, for names that do not imply one.

    Raises:
        ValueError: Fewer than two runs or files; a run without a report or with damaged artifacts;
            a file or task of another version of lm-eval; or `out` has other files.
    """
    if out.exists() and (foreign := sorted({path.name for path in out.iterdir()} - FILES)):
        raise ValueError(f"{out} has {foreign[0]}, which no comparison wrote: choose another --out")
    reports, files = {}, dict[Path, None]()
    for name in names:
        if found_files := result_files(name):
            files |= dict.fromkeys(found_files)
            continue
        store, manifest = find(name, root)
        reports[manifest["fingerprint"]] = store, manifest
    if len(reports) + len(files) < 2:
        raise ValueError(f"{', '.join(names)}: only one report, but a comparison needs at least two")
    recipes = Counter(manifest["identity"]["recipe"]["name"] for _, manifest in reports.values())
    runs, told = {}, []
    for fingerprint, (store, manifest) in reports.items():
        recipe = manifest["identity"]["recipe"]["name"]
        name = recipe if recipes[recipe] == 1 else f"{recipe}@{fingerprint[:6]}"
        runs[name] = read(store, manifest)
        told.append([name, *(str(manifest.get(key, "")) for key in ("fingerprint", "commit", "host", "command"))])
    found = merge(runs)
    heading = "Results and cost of every model"
    main = results(found, heading, "All models; those on the same texts first, best first")
    for file in files:  # after the main table, in which they have no numbers
        _add_file(found, file)
        told.append([f"{LM_EVAL}: {file.name}", "", "", "", str(file)])
    check_versions(found.scores_of(Harness.name))
    differing = []
    if len(runs) > 1:
        differing.append(changes(runs))
    sections = [
        main,
        _differences(found),
        _tasks(found),
        Section("What differs", differing),
        *(losses(found, kind, title, file, SAYS) for kind, title, file in LOSSES),
        Section("Runs", [Table("Reports", ["run", "fingerprint", "commit", "host", "command"], told, prose=True)]),
    ]
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    kept = [section for section in sections if section and section.blocks]
    about = f"{len(runs)} runs, {len(files)} files of lm-eval, {len(found.models)} models"
    if not files:
        about = f"{len(runs)} runs, {len(found.models)} models"
    title = shortened([*runs, *(file.name for file in files)], 5)
    Page(f"longreach: {title}", about, headline(found), kept).write(out, "compare")
    return out / "compare.html"


def _differences(found: Merged) -> Section:
    """Return the section on each model's difference from the best one, and on models that are not
    compared because they read other texts under the same names."""
    blocks: list[Block] = []
    for groups, documents in found.namesakes.items():
        readers = " than by ".join(shortened(models, 4) for models in groups)
        blocks.append(
            f"Under the same names ({shortened(documents, 4)}) other texts were read by {readers}, so these models "
            f"are not compared with each other."
        )
    blocks += difference_tables(found.of_the_first_base(PERPLEXITY))
    return Section("Differences on the same tokens", blocks)


LM_EVAL = "lm-eval"
"""Prefix of the names of models from lm-eval result files."""


def _add_file(found: Merged, file: Path) -> None:
    """Add the model of an lm-eval result file to the runs' models."""
    scores = read_results(file)
    name = f"{LM_EVAL}: {scores.model}"
    if name in found.models:
        name += f" ({file.name})"
    found.models[name] = Model(name, "baseline", scores.protocol, scores={Harness.name: scores})
    found.sources[name] = name


def _tasks(found: Merged) -> Section | None:
    """Return the section on lm-eval tasks; None if no model has any."""
    scores = found.scores_of(Harness.name)
    return Section(Harness.title, Harness.task_tables(scores)) if scores else None


def export(store: Store, manifest: dict[str, Any], folder: Path) -> list[Path]:
    """Write the scores of every model in a report as lm-eval result files; return the files.

    Args:
        manifest: The report's manifest.
    """
    findings = read(store, manifest)
    files = []
    for name, model in findings.models.items():
        if model.scores:
            source = ""
            if model.kind == "baseline":
                source = str(findings.base.get("source", ""))
            files.append(write_results(model.scores.values(), name, folder, source))
    return files


SAYS = "Arms of one run read the same rows in the same order; other runs may read other rows. Lower is better."
LOSSES = (("finetune", "Training", "loss.png"), ("pretrain", "Attention-sink pretraining", "pretrain-loss.png"))


def find(name: str, root: str | None) -> tuple[Store, dict[str, Any]]:
    """Return (store, manifest of the report) for a recipe, a fingerprint prefix or a folder;
    ValueError if there is no report."""
    path = Path(name).absolute()
    if path.exists():
        for folder in (path, *path.parents):
            if folder.parent.name == "report" and (folder / MANIFEST).is_file():
                store = Store(str(folder.parents[1]))
                artifact = store.find("report", folder.name)
                assert artifact, "its manifest exists"
                return store, artifact.manifest
    if PREFIX.fullmatch(name) and name not in recipe_names():
        store = Store(root or ".longreach").checked()
        if (found := by_prefix(store, name)) is None:
            raise ValueError(f"no report in {store.root} has a fingerprint that starts with {name}")
        return store, found
    loaded = load(name)
    store = Store(root).checked() if root else open_store(loaded)
    manifests = [m for m in store.manifests("report") if m["identity"]["recipe"]["name"] == loaded.recipe.name]
    if not manifests:
        raise ValueError(f"{name} has no report in {store.root} yet; make one with: longreach run {name}")
    return store, max(manifests, key=lambda m: m["published_at"])


def by_prefix(store: Store, prefix: str) -> dict[str, Any] | None:
    """Return the manifest of the report with this fingerprint prefix; None if there is none,
    ValueError if there are several."""
    found = [m for m in store.manifests("report") if m["fingerprint"].startswith(prefix)]
    if len(found) > 1:
        raise ValueError(f"{prefix} matches {len(found)} fingerprints in {store.root}: give more digits")
    return next(iter(found), None)


def read(store: Store, manifest: dict[str, Any]) -> Findings:
    """Return a report's inputs; download and verify only the artifact files that are read here."""
    recipe, artifacts = manifest["identity"]["recipe"], {}
    if "labels" in recipe:  # until November 2026 inputs were numbered, and their labels were in the recipe
        raise ValueError(
            f"{recipe['name']}: an older version wrote its report; make a new one with: longreach run {recipe['name']}"
        )
    for label, fingerprint in manifest["identity"]["inputs"].items():
        if (artifact := store.find(label.partition("[")[0], fingerprint)) is None:
            raise ValueError(f"{recipe['name']}: {label} ({fingerprint[:8]}) is no longer in {store.root}")
        files = [file for file in artifact.manifest["files"] if READ_HERE.fullmatch(file["path"])]
        if problems := store.problems(Artifact(artifact.path, artifact.manifest | {"files": files})):
            raise ValueError(f"{recipe['name']}: {label} is damaged: {'; '.join(problems)}")
        artifacts[label] = artifact
    return gather(artifacts, PriceRecipe(**recipe.get("prices", {})), recipe.get("failed"))


Namesakes = dict[tuple[tuple[str, ...], ...], list[str]]
"""Groups of models that read the same text each -> names of documents that have several texts."""


@dataclass(eq=False)
class Merged(Findings):
    """The models of several runs, named `run: model`; comparable ones come first, best first."""

    length: int = 0  # the text length at which most models scored the same tokens
    alike: frozenset[str] = frozenset()  # models that scored the same tokens at this length
    sources: dict[str, str] = field(default_factory=dict)  # model -> its base
    namesakes: Namesakes = field(default_factory=dict)
    trained_lengths: dict[str, int] = field(default_factory=dict)  # model -> trained length of its base, if known

    @property
    def compared(self) -> dict[str, Model]:
        """All models, because a comparison shows every one."""
        return self.models

    def greatest(self) -> tuple[int, dict[str, float]]:
        """Return the length and, for the models that scored the same tokens there, the
        perplexities."""
        row = self.ppl().get(self.length, {})
        return self.length, {name: row[name]["ppl"] for name in self.models if name in self.alike}

    def of_the_first_base(self, evaluation: str) -> dict[str, EvalScores]:
        """Return the scores of the best model and of all with the same base. Models of another base
        may have other tokens at the same positions of a text."""
        scores = self.scores_of(evaluation)
        first = next(iter(scores), "")
        return {name: one for name, one in scores.items() if self.sources[name] == self.sources[first]}

    def background(self) -> Background:
        """Return the background with the first run's base, with which all arms of that base in any
        run are compared."""
        found = super().background()
        base = found.base or ""
        related = [name for name in self.models if self.sources[name] == self.sources.get(base)]
        trained_length = self.trained_lengths.get(base) if self.scores_of(Gain.name) else None
        return replace(found, trained_length=trained_length, related=frozenset(related))

    def yardstick(self, tune: str) -> Model | None:
        """Return None, because speed ratios across machines and row lengths have no meaning."""
        return None


def merge(runs: dict[str, Findings]) -> Merged:
    """Return the models of all runs, without those whose artifacts an earlier run has too."""
    models: dict[str, Model] = {}
    bases: dict[str, str] = {}
    trained_lengths: dict[str, int] = {}
    digests: dict[str, dict[str, str]] = {}
    seen: set[frozenset[str]] = set()
    for run, findings in runs.items():
        for artifact in findings.artifacts.values():
            if artifact.stage in ("hold_out", "pack") and artifact.fingerprint not in digests:
                digests[artifact.fingerprint] = HeldOutDocuments(artifact.path, artifact.manifest).text_digests()
        for name, model in findings.models.items():
            fingerprints = _fingerprints(findings, name)
            if fingerprints and fingerprints in seen:
                continue
            seen.add(fingerprints)
            full_name = f"{run}: {name}"
            models[full_name] = replace(model, name=full_name, of=model.of and f"{run}: {model.of}")
            bases[full_name] = _base_of(findings, model)
            if findings.base:
                trained_lengths[full_name] = findings.base["context_length"]
    namesakes = _tell_texts_apart(models, bases, digests)
    length, alike = _largest_group(models, bases)
    asked = [findings.prices for findings in runs.values()]
    prices = PriceRecipe()
    if asked and asked.count(asked[0]) == len(asked):
        prices = asked[0]
    merged = Merged(
        {},
        models=models,
        prices=prices,
        length=length,
        alike=alike,
        sources=bases,
        namesakes=namesakes,
        trained_lengths=trained_lengths,
    )
    _, ppl = merged.greatest()

    def rank(name: str) -> tuple[bool, float]:
        if name not in ppl:
            return True, 0.0
        if not finite(ppl[name]):
            return False, math.inf
        return False, ppl[name]

    merged.models = {name: models[name] for name in sorted(models, key=rank)}
    return merged


def _tell_texts_apart(models: dict[str, Model], bases: dict[str, str], digests: dict[str, dict[str, str]]) -> Namesakes:
    """Rename documents with the same name but different texts in all scores, so that they are not
    confused; return them.

    Args:
        digests: Corpus fingerprint -> document name -> digest of its text.
    """
    readers: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, model in models.items():
        texts = digests.get(model.corpus, {})
        for document in sorted(_documents(model) & texts.keys()):
            readers.setdefault((bases[name], document), {}).setdefault(texts[document], []).append(name)
    namesakes: Namesakes = {}
    new_names: dict[str, dict[str, str]] = {}
    for (_, document), by_text in readers.items():
        if len(by_text) == 1:
            continue
        namesakes.setdefault(tuple(map(tuple, by_text.values())), []).append(document)
        for digest, names in by_text.items():
            for name in names:
                new_names.setdefault(name, {})[document] = f"{document} {digest}"
    for name, new in new_names.items():
        models[name] = _with_documents_renamed(models[name], new)
    return namesakes


def _documents(model: Model) -> set[str]:
    """Return the names of the documents in a model's scores."""
    return {row["document"] for scores in model.scores.values() for row in scores.rows if "document" in row}


def _with_documents_renamed(model: Model, new: dict[str, str]) -> Model:
    """Return a copy of a model whose scores have new document names."""
    scores = {}
    for evaluation, one in model.scores.items():
        rows = [row | {"document": new[row["document"]]} if row.get("document") in new else row for row in one.rows]
        scores[evaluation] = replace(one, rows=rows)
    return replace(model, scores=scores)


def _base_of(findings: Findings, model: Model) -> str:
    """Return what a model was made from: the run's base, or, if it was trained from scratch, the
    tokenizer of its rows."""
    trained = model.variant_of or model
    if trained.kind == "pretrain" and trained.training.model is not None:
        tokenizer = trained.name
        if "pack[sink]" in findings.packs:
            tokenizer = findings.packs["pack[sink]"].tokenizer_sha256
        return f"from scratch, tokenizer {tokenizer}"
    return str(findings.base.get("source", model.name))


def _fingerprints(findings: Findings, name: str) -> frozenset[str]:
    of_model = re.compile(rf"\[{re.escape(name)}[],]")
    return frozenset(a.fingerprint for label, a in findings.artifacts.items() if of_model.search(label))


def _largest_group(models: dict[str, Model], bases: dict[str, str]) -> tuple[int, frozenset[str]]:
    """Return the length at which most models of one base scored the same tokens (the greatest such
    length), and these models."""
    length, alike = 0, frozenset[str]()
    groups: dict[tuple[int, frozenset[Any]], list[str]] = {}
    for name, model in models.items():
        texts: dict[int, set[Any]] = {}
        for row in model.rows(PERPLEXITY, kind="document", protocol="last_stride"):
            texts.setdefault(row["length"], {bases[name]}).add((row["document"], row["tokens"]))
        for text_length, scored in texts.items():
            groups.setdefault((text_length, frozenset(scored)), []).append(name)
    for (text_length, _), names in groups.items():
        if (len(names), text_length) > (len(alike), length):
            length, alike = text_length, frozenset(names)
    return length, alike


def headline(found: Merged) -> str:
    """Return sentences on the gain from context, on the models with the lowest perplexity, and on
    how many models are not comparable."""
    length, ppl = found.greatest()
    claim = claim_of(found)
    sentences = claim.sentences() if claim else []
    if ppl:
        best = ", ".join(f"{name} {perplexity_text(ppl[name])}" for name in list(ppl)[:3])
        sentences.append(f"Lowest perplexity at {length:,} tokens: {best}.")
    text = " ".join(sentences) or "No perplexity was measured."
    others = len(found.scores_of(PERPLEXITY)) - len(ppl)
    if others:
        text += f" {others} models read other texts or have another base, so they are not comparable."
    return text


def changes(runs: dict[str, Findings]) -> Table:
    """Return a table of the choices, resources and hosts in which runs differ from the first one,
    with one row per difference."""
    (first, ours), *others = runs.items()
    rows = []
    for run, theirs in others:
        labels_by_change: dict[str, list[str]] = {}
        for label in dict.fromkeys([*ours.artifacts, *theirs.artifacts]):
            old, new = ours.artifacts.get(label), theirs.artifacts.get(label)
            if old and new:
                differing = differences(_choices(old), _choices(new))
            elif new:
                differing = [f"only in {run}"]
            else:
                differing = [f"only in {first}"]
            for change in differing:
                labels_by_change.setdefault(change, []).append(label)
        for change, labels in labels_by_change.items():
            rows.append([run, change, shortened(labels, 4)])
    return Table(f"Against {first}", ["run", f"{first} -> run", "stages"], rows or [["all", "nothing", ""]], prose=True)


def shortened(names: Sequence[str], most: int) -> str:
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


def _choices(artifact: Artifact) -> dict[str, Any]:
    """Return what a result or its cost depends on, without input fingerprints, which would repeat
    the differences of earlier stages."""
    manifest = artifact.manifest
    choices = {key: manifest["identity"][key] for key in ("revision", "recipe", "digests")}
    return choices | {key: manifest.get(key) for key in ("resources", "host")}
