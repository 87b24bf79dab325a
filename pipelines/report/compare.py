"""Several runs on one page: what differs between their choices, what every model reached, and what
it cost.

A run is read from its published report and the artifacts that this names. Perplexities compare
where the same tokens of the same texts were scored by models of one base, so the frontier holds the
largest such group. A text is known by its tokens, not by its name: another language's test.txt is
another text. What several runs share (a base, an arm that was not changed) stands once, under
the first of them.

    longreach compare quickstart 3f9a1c longer.yaml --out compare

Result files of lm-evaluation-harness stand beside them (evaluation/lm_eval_files.py), as models of
which only the harness' tasks are known:

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
from longreach.pipelines.artifacts import PackedCorpus
from longreach.pipelines.plan import open_store
from longreach.pipelines.reader import load
from longreach.pipelines.reader import names as recipe_names
from longreach.pipelines.recipe import PriceRecipe
from longreach.pipelines.report.claim import claim_of
from longreach.pipelines.report.findings import PERPLEXITY, Findings, Model, gather
from longreach.pipelines.report.page import Page
from longreach.pipelines.report.sections import losses, results
from longreach.pipelines.stage import differences
from longreach.training.summary import PackSummary

FILES = {
    "compare.html", "compare.md", "gain.png", "perplexity.png", "frontier.png", "cost.png", "loss.png",
    "pretrain-loss.png",
}  # fmt: skip
"""What a comparison may write: all else in its folder is somebody's."""
PREFIX = re.compile(r"[0-9a-f]{6,32}")
READ_HERE = re.compile(rf"scores\.json|metrics\.jsonl|{re.escape(PackSummary.file)}|documents/.*")
"""The artifacts' files that a comparison reads; it fetches no others."""


def compare(names: Sequence[str], out: Path, root: str | None) -> Path:
    """Write compare.html, compare.md and their figures into `out`; returns the page's path.

    Args:
        names: recipes, fingerprints of reports (six digits are enough), reports' folders, or result
            files of lm-eval and the folders that it wrote them into.
        root: the store, where a name does not say it.

    ValueError: fewer than two runs or files, a run without a report or with damaged artifacts, a
    file or a task of another version of lm-eval, or `out` holds other files.
    """
    if out.exists() and (foreign := sorted({path.name for path in out.iterdir()} - FILES)):
        raise ValueError(f"{out} holds {foreign[0]}, which no comparison wrote: choose another --out")
    reports, files = {}, dict[Path, None]()
    for name in names:
        if found_files := result_files(name):
            files |= dict.fromkeys(found_files)
            continue
        store, manifest = find(name, root)
        reports[manifest["fingerprint"]] = store, manifest
    if len(reports) + len(files) < 2:
        raise ValueError(f"{', '.join(names)}: one report; a comparison needs two or more")
    recipes = Counter(manifest["identity"]["recipe"]["name"] for _, manifest in reports.values())
    runs, told = {}, []
    for fingerprint, (store, manifest) in reports.items():
        recipe = manifest["identity"]["recipe"]["name"]
        name = recipe if recipes[recipe] == 1 else f"{recipe}@{fingerprint[:6]}"
        runs[name] = read(store, manifest)
        told.append([name, *(str(manifest.get(key, "")) for key in ("fingerprint", "commit", "host", "command"))])
    found = merge(runs)
    heading = "What every model reached, and what it cost"
    main = results(found, heading, "All models; on the same texts first, best first")
    for file in files:  # which have no number in the main table
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
    """Return how much better or worse each model predicts than the best one, and which models are
    not compared, since they read other texts of the same names."""
    blocks: list[Block] = []
    for groups, documents in found.namesakes.items():
        readers = " than by ".join(shortened(models, 4) for models in groups)
        blocks.append(
            f"Under the same names ({shortened(documents, 4)}) other texts were read by {readers}: they are not "
            f"compared with each other."
        )
    blocks += difference_tables(found.of_the_first_base(PERPLEXITY))
    return Section("Differences on the same tokens", blocks)


LM_EVAL = "lm-eval"
"""Begins the names of models whose numbers come from a file of lm-eval."""


def _add_file(found: Merged, file: Path) -> None:
    """Add the model of one of lm-eval's result files to those of the runs."""
    scores = read_results(file)
    name = f"{LM_EVAL}: {scores.model}"
    if name in found.models:
        name += f" ({file.name})"
    found.models[name] = Model(name, "baseline", scores.protocol, scores={Harness.name: scores})
    found.sources[name] = name


def _tasks(found: Merged) -> Section | None:
    """Return what every model reached in tasks of lm-eval; None where none was asked."""
    scores = found.scores_of(Harness.name)
    return Section(Harness.title, Harness.task_tables(scores)) if scores else None


def export(store: Store, manifest: dict[str, Any], folder: Path) -> list[Path]:
    """Write the scores of every model in a report as result files of lm-eval; returns the files.

    manifest: the report's.
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


SAYS = "Arms of one run read the same rows in the same order; other runs may read others. Lower is better."
LOSSES = (("finetune", "Training", "loss.png"), ("pretrain", "Attention-sink pretraining", "pretrain-loss.png"))


def find(name: str, root: str | None) -> tuple[Store, dict[str, Any]]:
    """(store, manifest of the report) of a recipe, a fingerprint's first digits or a folder;
    ValueError without one."""
    path = Path(name).absolute()
    if path.exists():
        for folder in (path, *path.parents):
            if folder.parent.name == "report" and (folder / MANIFEST).is_file():
                store = Store(str(folder.parents[1]))
                artifact = store.find("report", folder.name)
                assert artifact, "its manifest is there"
                return store, artifact.manifest
    if PREFIX.fullmatch(name) and name not in recipe_names():
        store = Store(root or ".longreach").checked()
        if (found := by_prefix(store, name)) is None:
            raise ValueError(f"no report in {store.root} has a fingerprint that begins with {name}")
        return store, found
    loaded = load(name)
    store = Store(root).checked() if root else open_store(loaded)
    manifests = [m for m in store.manifests("report") if m["identity"]["recipe"]["name"] == loaded.recipe.name]
    if not manifests:
        raise ValueError(f"{name} has no report in {store.root} yet; make one with: longreach run {name}")
    return store, max(manifests, key=lambda m: m["published_at"])


def by_prefix(store: Store, prefix: str) -> dict[str, Any] | None:
    """The report's manifest whose fingerprint begins so; None without one, ValueError for
    several."""
    found = [m for m in store.manifests("report") if m["fingerprint"].startswith(prefix)]
    if len(found) > 1:
        raise ValueError(f"{prefix} begins {len(found)} fingerprints in {store.root}: give more digits")
    return next(iter(found), None)


def read(store: Store, manifest: dict[str, Any]) -> Findings:
    """What a report was made of; of each artifact only the files that are read here are fetched and
    verified."""
    recipe, artifacts = manifest["identity"]["recipe"], {}
    if "labels" in recipe:  # until November 2026 inputs were numbered, and their labels a choice
        raise ValueError(
            f"{recipe['name']}: its report is an earlier version's; make it again with: longreach run {recipe['name']}"
        )
    for label, fingerprint in manifest["identity"]["inputs"].items():
        if (artifact := store.find(label.partition("[")[0], fingerprint)) is None:
            raise ValueError(f"{recipe['name']}: {label} ({fingerprint[:8]}) is not in {store.root} any more")
        files = [file for file in artifact.manifest["files"] if READ_HERE.fullmatch(file["path"])]
        if problems := store.problems(Artifact(artifact.path, artifact.manifest | {"files": files})):
            raise ValueError(f"{recipe['name']}: {label} is damaged: {'; '.join(problems)}")
        artifacts[label] = artifact
    return gather(artifacts, PriceRecipe(**recipe.get("prices", {})), recipe.get("failed"))


Namesakes = dict[tuple[tuple[str, ...], ...], list[str]]
"""Documents whose names stand for several texts, by the groups of models that read the same one."""


@dataclass(eq=False)
class Merged(Findings):
    """The models of several runs, named `run: model`; those that compare come first, the best of
    them first."""

    length: int = 0  # the text length at which most models scored the same tokens
    alike: frozenset[str] = frozenset()  # models that scored the same tokens at this length
    sources: dict[str, str] = field(default_factory=dict)  # of each model's base
    namesakes: Namesakes = field(default_factory=dict)
    trained_lengths: dict[str, int] = field(default_factory=dict)  # of each model's base, where it is known

    @property
    def compared(self) -> dict[str, Model]:
        """All models: a comparison shows every one of them."""
        return self.models

    def greatest(self) -> tuple[int, dict[str, float]]:
        """Return the length, and the perplexities there of the models that scored the same
        tokens."""
        row = self.ppl().get(self.length, {})
        return self.length, {name: row[name]["ppl"] for name in self.models if name in self.alike}

    def of_the_first_base(self, evaluation: str) -> dict[str, EvalScores]:
        """Return the scores of the best model, and of all that have its base: those of another one
        may have other tokens at the same places of a text."""
        scores = self.scores_of(evaluation)
        first = next(iter(scores), "")
        return {name: one for name, one in scores.items() if self.sources[name] == self.sources[first]}

    def background(self) -> Background:
        """Return the first run's base as what all arms of that base are held against, in whichever
        run."""
        found = super().background()
        base = found.base or ""
        related = [name for name in self.models if self.sources[name] == self.sources.get(base)]
        trained_length = self.trained_lengths.get(base) if self.scores_of(Gain.name) else None
        return replace(found, trained_length=trained_length, related=frozenset(related))

    def yardstick(self, tune: str) -> Model | None:
        """Return no model, since a ratio of speeds says nothing across machines and row lengths."""
        return None


def merge(runs: dict[str, Findings]) -> Merged:
    """Return the models of all runs; a model whose artifacts are those of an earlier run is left
    out."""
    models: dict[str, Model] = {}
    bases: dict[str, str] = {}
    trained_lengths: dict[str, int] = {}
    digests: dict[str, dict[str, str]] = {}
    seen: set[frozenset[str]] = set()
    for run, findings in runs.items():
        for artifact in findings.artifacts.values():
            if artifact.stage == "pack" and artifact.fingerprint not in digests:
                digests[artifact.fingerprint] = PackedCorpus(artifact.path, artifact.manifest).text_digests()
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
    """Give documents that share a name, but not their text, names of their own in all scores, so
    that nothing takes one for the other; returns them.

    digests: of a corpus' texts by the documents' names, by the corpus' fingerprint.
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
    """Return the names of the documents that a model's scores speak of."""
    return {row["document"] for scores in model.scores.values() for row in scores.rows if "document" in row}


def _with_documents_renamed(model: Model, new: dict[str, str]) -> Model:
    """Return a model whose scores know documents by new names."""
    scores = {}
    for evaluation, one in model.scores.items():
        rows = [row | {"document": new[row["document"]]} if row.get("document") in new else row for row in one.rows]
        scores[evaluation] = replace(one, rows=rows)
    return replace(model, scores=scores)


def _base_of(findings: Findings, model: Model) -> str:
    """Return what a model was made from: the run's base or, of one that was trained from scratch,
    the tokenizer of its rows."""
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
    """Return the (greatest) length at which most models of one base scored the same tokens, and
    these models."""
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
    """Say what is gained from context, which model has the best perplexity, and how many do not
    compare with it."""
    length, ppl = found.greatest()
    claim = claim_of(found)
    sentences = claim.sentences() if claim else []
    if ppl:
        best = ", ".join(f"{name} {perplexity_text(ppl[name])}" for name in list(ppl)[:3])
        sentences.append(f"Lowest perplexity at {length:,} tokens: {best}.")
    text = " ".join(sentences) or "No perplexity was measured."
    others = len(found.scores_of(PERPLEXITY)) - len(ppl)
    if others:
        text += f" {others} models read other texts or have another base, and do not compare."
    return text


def changes(runs: dict[str, Findings]) -> Table:
    """Return the choices, resources and hosts in which runs differ from the first; shared ones
    stand once."""
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
    """Return what a result or its cost depends on, without other stages' fingerprints, which would
    repeat it."""
    manifest = artifact.manifest
    choices = {key: manifest["identity"][key] for key in ("revision", "recipe", "digests")}
    return choices | {key: manifest.get(key) for key in ("resources", "host")}
