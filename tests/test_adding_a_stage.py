"""A stage defined here and registered by one line runs through recipe, plan, run and report: nothing else is edited."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from toy_models import tiny_folder

from longreach.infra.artifact import Artifact
from longreach.infra.choices import Choices
from longreach.infra.resources import Resources
from longreach.pipelines import graph
from longreach.pipelines.artifacts import PackedCorpus
from longreach.pipelines.display import Display
from longreach.pipelines.kind import StageRun, stage
from longreach.pipelines.plan import open_store, plan
from longreach.pipelines.reader import load
from longreach.pipelines.run import run
from longreach.pipelines.stage import Stage
from longreach.pipelines.stages import STAGES


class WordCount(Artifact):
    """How often each word stands in the rows' documents."""

    @property
    def documents(self) -> int:
        return self.summary["documents"]


class CountRecipe(Choices):
    """What is counted."""

    split: str
    """The split whose documents count."""


@stage(makes=WordCount, revision=1, cpus=lambda resources: 1)
def count_words(
    corpus: PackedCorpus, *, recipe: CountRecipe, resources: Resources, out: Path, run: StageRun
) -> dict[str, Any]:
    documents = corpus.packed.documents[recipe.split]
    (out / "count.json").write_text(json.dumps(documents))
    return {"documents": documents}


@stage(makes=WordCount, revision=1, cpus=lambda resources: 1)
def add_counts(
    counts: Mapping[str, WordCount], *, recipe: Choices, resources: Resources, out: Path, run: StageRun
) -> dict[str, Any]:
    total = sum(count.documents for count in counts.values())
    (out / "count.json").write_text(json.dumps(total))
    return {"documents": total}


def add_word_counts(pipeline: graph.Pipeline) -> None:
    counts = {}
    for split in ("train", "test"):
        counts[split] = Stage("count", f"count[{split}]", CountRecipe(split=split), {"corpus": pipeline.corpus})
    pipeline.stages += [*counts.values(), Stage("add", "add", Choices(), counts)]


def test_a_stage_of_ones_own_is_planned_run_and_listed_in_the_report(cluster, tmp_path, monkeypatch):
    monkeypatch.setitem(STAGES, "count", count_words)
    monkeypatch.setitem(STAGES, "add", add_counts)
    where = graph.BUILDERS.index(graph.add_evaluations)
    monkeypatch.setattr(graph, "BUILDERS", [*graph.BUILDERS[:where], add_word_counts, *graph.BUILDERS[where:]])
    tiny_folder(tmp_path / "base")
    (tmp_path / "texts").mkdir()
    for n in range(4):
        (tmp_path / "texts" / f"text{n}.txt").write_text("w2 w3 w4 w5 w6 w7 w8 w9 " * 4)
    recipe = {
        "name": "counted",
        "base": {"source": str(tmp_path / "base")},
        "corpus": {"sources": [{"files": f"{tmp_path}/texts/*.txt"}], "test": ["text0"]},
        "baselines": {"base": {}},
        "store": {"root": str(tmp_path / "root"), "workdir": str(tmp_path / "work")},
        "tracking": {"enabled": False},
    }
    (tmp_path / "counted.yaml").write_text(json.dumps(recipe))
    loaded = load(str(tmp_path / "counted.yaml"))

    planned = [row.stage for row in plan(loaded)]
    assert planned == ["convert", "pack", "count[train]", "count[test]", "add", "report"]
    with Display(console=Console(file=io.StringIO())) as display:
        outcome = run(loaded, display=display)
    assert outcome.failed == {}
    assert sorted(outcome.ran) == sorted(planned)
    (total,) = open_store(loaded).manifests("add")
    assert total["summary"] == {"documents": 4}
    page = (outcome.report_path.parent / "report.md").read_text()
    stages = page.partition("## How it was run")[2]
    for label in (r"| count\[train\] |", r"| count\[test\] |", "| add |"):
        assert label in stages
