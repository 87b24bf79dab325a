"""Several runs on one page: what differs between their choices, what every model reached, and what it cost.

A run is read from its published report and the artifacts that this names. Perplexities compare where the same tokens of
the same texts were scored by models of one base, so the frontier holds the largest such group. What several runs share
(a base, an arm that was not changed) stands once, under the first of them.

    longreach compare quickstart 3f9a1c longer.yaml --out compare
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longreach.evaluation.blocks import Section, Table
from longreach.infra.artifact import MANIFEST, Artifact, Store
from longreach.pipelines.reader import load
from longreach.pipelines.reader import names as recipe_names
from longreach.pipelines.recipe import PriceRecipe
from longreach.pipelines.report.findings import Found, Model, finite, gather, show_ppl
from longreach.pipelines.report.page import Page
from longreach.pipelines.report.sections import losses, pairs, results
from longreach.pipelines.runner import open_store
from longreach.pipelines.stage import differences
from longreach.training.summary import PackSummary

FILES = {"compare.html", "compare.md", "perplexity.png", "frontier.png", "cost.png", "loss.png", "pretrain-loss.png"}
"""What a comparison may write: all else in its folder is somebody's."""
PREFIX = re.compile(r"[0-9a-f]{6,32}")


def compare(names: Sequence[str], out: Path, root: str | None) -> Path:
    """Write compare.html, compare.md and their figures into `out`; returns the page's path.

    Args:
        names: recipes, fingerprints of reports (six digits are enough) or reports' folders.
        root: the store, where a name does not say it.

    Raises:
        ValueError: fewer than two runs, a run without a report or with damaged artifacts, or `out` holds other files.
    """
    if out.exists() and (foreign := sorted({path.name for path in out.iterdir()} - FILES)):
        raise ValueError(f"{out} holds {foreign[0]}, which no comparison wrote: choose another --out")
    reports = {manifest["fingerprint"]: (store, manifest) for store, manifest in (find(name, root) for name in names)}
    if len(reports) < 2:
        raise ValueError(f"{', '.join(names)}: one report; a comparison needs two or more")
    recipes = Counter(manifest["identity"]["recipe"]["name"] for _, manifest in reports.values())
    runs, told = {}, []
    for fingerprint, (store, manifest) in reports.items():
        recipe = manifest["identity"]["recipe"]["name"]
        name = recipe if recipes[recipe] == 1 else f"{recipe}@{fingerprint[:6]}"
        runs[name] = read(store, manifest)
        told.append([name, *(str(manifest.get(key, "")) for key in ("fingerprint", "commit", "host", "command"))])
    found = merge(runs)
    sections = [
        results(found, "What every model reached, and what it cost", "All models; on the same texts first, best first"),
        Section("Differences on the same tokens", list(pairs(found.models, resamples=1000))),
        Section("What differs", [changes(runs)]),
        *(losses(found, kind, title, file, SAYS) for kind, title, file in LOSSES),
        Section("Runs", [Table("Reports", ["run", "fingerprint", "commit", "host", "command"], told, prose=True)]),
    ]
    listed = ", ".join(list(runs)[:5]) + f" and {len(runs) - 5} more" * (len(runs) > 5)
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    kept = [section for section in sections if section and section.blocks]
    about = f"{len(runs)} runs, {len(found.models)} models"
    Page(f"longreach: {listed}", about, headline(found), kept).write(out, "compare")
    return out / "compare.html"


SAYS = "Arms of one run read the same rows in the same order; other runs may read others. Lower is better."
LOSSES = (
    ("finetune", "Training", "loss.png"),
    ("pretrain", "Attention-sink pretraining", "pretrain-loss.png"),
)


def find(name: str, root: str | None) -> tuple[Store, dict[str, Any]]:
    """(store, manifest of the report) of a recipe, a fingerprint's first digits or a folder; ValueError without one."""
    path = Path(name).absolute()
    for folder in (path, *path.parents) if path.exists() else ():
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
    """The report's manifest whose fingerprint begins so; None without one, ValueError for several."""
    found = [m for m in store.manifests("report") if m["fingerprint"].startswith(prefix)]
    if len(found) > 1:
        raise ValueError(f"{prefix} begins {len(found)} fingerprints in {store.root}: give more digits")
    return found[0] if found else None


def read(store: Store, manifest: dict[str, Any]) -> Found:
    """What a report was made of; of each artifact only the files that are read here are fetched and verified."""
    recipe, artifacts = manifest["identity"]["recipe"], {}
    for key, label in recipe["labels"].items():
        stage, fingerprint = label.partition("[")[0], manifest["identity"]["inputs"][key]
        if (artifact := store.find(stage, fingerprint)) is None:
            raise ValueError(f"{recipe['name']}: {label} ({fingerprint[:8]}) is not in {store.root} any more")
        files = [
            file
            for file in artifact.manifest["files"]
            if file["path"] in ("scores.json", "metrics.jsonl", PackSummary.file)
        ]
        if problems := store.problems(Artifact(artifact.path, artifact.manifest | {"files": files})):
            raise ValueError(f"{recipe['name']}: {label} is damaged: {'; '.join(problems)}")
        artifacts[label] = artifact
    return gather(artifacts, PriceRecipe(**recipe.get("prices", {})), recipe.get("failed"))


@dataclass
class Merged(Found):
    """The models of several runs, `run: model`; those that compare first, the best first."""

    length: int = 0
    alike: frozenset[str] = frozenset()
    """Models that scored the same tokens at this length."""

    @property
    def compared(self) -> dict[str, Model]:
        return self.models

    def greatest(self) -> tuple[int, dict[str, float]]:
        row = self.ppl().get(self.length, {})
        return self.length, {name: row[name]["ppl"] for name in self.models if name in self.alike}

    def yardstick(self, tune: str) -> Model | None:
        return None  # a ratio of speeds says nothing across machines and rows


def merge(runs: dict[str, Found]) -> Merged:
    """One Found of all; models whose artifacts are those of an earlier run are left out."""
    models: dict[str, Model] = {}
    scored: dict[int, dict[str, frozenset[Any]]] = {}
    """By length and model: its base, and the texts and numbers of tokens that it was measured on."""
    seen = set()
    for run, found in runs.items():
        for name, model in found.models.items():
            parts = {
                a.fingerprint for label, a in found.artifacts.items() if re.search(rf"\[{re.escape(name)}[],]", label)
            }
            if parts and frozenset(parts) in seen:
                continue
            seen.add(frozenset(parts))
            models[f"{run}: {name}"] = replace(model, name=f"{run}: {name}")
            documents = model.rows("perplexity", kind="document", protocol="last_stride")
            for length in {row["length"] for row in documents}:
                texts = {(row["document"], row["tokens"]) for row in documents if row["length"] == length}
                scored.setdefault(length, {})[f"{run}: {name}"] = frozenset({found.base.get("source", name), *texts})
    common = {
        length: max(Counter(texts.values()).items(), key=lambda item: item[1]) for length, texts in scored.items()
    }
    length = max(common, key=lambda n: (common[n][1], n), default=0)
    alike = frozenset(name for name, texts in scored.get(length, {}).items() if texts == common[length][0])
    prices = [found.prices for found in runs.values()]
    price = prices[0] if all(other == prices[0] for other in prices) else PriceRecipe()
    merged = Merged({}, models=models, prices=price, length=length, alike=alike)
    ppl = {name: value if finite(value) else math.inf for name, value in merged.greatest()[1].items()}
    merged.models = {
        name: models[name] for name in sorted(models, key=lambda name: (name not in ppl, ppl.get(name, 0.0)))
    }
    return merged


def headline(found: Merged) -> str:
    """Which model is the best, and how many cannot be compared with it."""
    length, ppl = found.greatest()
    best = ", ".join(f"{name} {show_ppl(ppl[name])}" for name in list(ppl)[:3])
    other = sum("perplexity" in model.scores for model in found.models.values()) - len(ppl)
    said = f"Lowest perplexity at {length:,} tokens: {best}." if ppl else "No perplexity was measured."
    return said + f" {other} models read other texts or have another base, and do not compare." * bool(other)


def changes(runs: dict[str, Found]) -> Table:
    """Choices, resources and hosts in which each run differs from the first; equal changes of several stages once."""
    (first, ours), *others = runs.items()
    rows = []
    for run, theirs in others:
        stages: dict[str, list[str]] = {}
        for label in dict.fromkeys([*ours.artifacts, *theirs.artifacts]):
            pair = [found.artifacts.get(label) for found in (ours, theirs)]
            old, new = (_choices(artifact) if artifact else None for artifact in pair)
            for change in differences(old, new) if old and new else [f"only in {run if new else first}"]:
                stages.setdefault(change, []).append(label)
        rows += [
            [run, change, ", ".join(labels[:4]) + f" and {len(labels) - 4} more" * (len(labels) > 4)]
            for change, labels in stages.items()
        ]
    rows = rows or [["all", "nothing", ""]]
    return Table(f"Against {first}", ["run", f"{first} -> run", "stages"], rows, prose=True)


def _choices(artifact: Artifact) -> dict[str, Any]:
    """What a result or its cost depends on; other stages' fingerprints would say it twice."""
    identity, manifest = artifact.manifest["identity"], artifact.manifest
    return {key: identity[key] for key in ("revision", "recipe", "digests")} | {
        key: manifest.get(key) for key in ("resources", "host")
    }
