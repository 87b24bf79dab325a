"""The atlas says what its results say: the page and its pictures are those that docs/atlas.py makes of the results
beside it, the newest result of a store is taken, and what is not there is written as missing."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from longreach.evaluation.scores import EvalScores
from longreach.infra.artifact import Store

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def atlas() -> ModuleType:
    spec = spec_from_file_location("docs_atlas", DOCS / "atlas.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def entries() -> dict[str, Any]:
    return yaml.safe_load((DOCS / "atlas" / "entries.yaml").read_text(encoding="utf-8"))


def test_the_page_is_what_the_script_makes_of_the_results_beside_it(atlas: ModuleType, entries: dict[str, Any]) -> None:
    results = atlas.read_results(entries["results"], DOCS / "atlas")
    made = atlas.page(entries, results)
    assert (DOCS / "atlas.md").read_text(encoding="utf-8") == made, "run: python docs/atlas.py"
    pictures = {path.name for path in (DOCS / "images").glob("atlas-*.png")}
    named = {f"atlas-{entry['name']}.png" for entry in entries["entries"]}
    assert {name for name in named if name in made} == pictures
    assert sum(path.stat().st_size for path in (DOCS / "atlas").glob("*.json")) < 300_000


def test_a_figure_without_its_results_is_missing_and_has_the_command_that_makes_it(
    atlas: ModuleType, entries: dict[str, Any], tmp_path: Path
) -> None:
    made = atlas.page(entries, atlas.read_results(entries["results"], tmp_path))
    stored = [name for name, want in entries["results"].items() if "table" not in want]
    for entry, section in zip(entries["entries"], made.split("\n## ")[1:], strict=True):
        has_none = "of" not in entry or any(name in stored for name in entry["of"])
        older = has_none and "older" in entry
        assert ("**Missing.**" in section) == (has_none and not older), entry["name"]
        assert ("The scores of this run are gone" in section) == older, entry["name"]
        if has_none:
            assert f"$ {entry['make']}" in section
            assert "images/atlas-" not in section


def scores(tokens: int) -> EvalScores:
    rows = [{"kind": "way", "way": "dense", "ppl": 20.1234567}, {"kind": "stream", "way": "dense", "ppl": 1.0}]
    return EvalScores("streaming", "made up", {"tokens": tokens}, rows, {"streaming_ppl_dense": 20.1234567}, model="m")


def publish(store: Store, tokens: int, day: int, revision: int) -> None:
    """Publish scores as an evaluation of `tokens` tokens, made on a day of May."""
    choices = {"tokens": tokens, "more_cache_tokens": []}
    attempt = store.new_attempt("evaluate", f"{tokens}-{revision}")
    scores(tokens).write(attempt.out)
    record = {
        "label": "evaluate[m,streaming]",
        "identity": {"recipe": {"eval": "streaming", "model": "m", "choices": choices}},
        "command": "longreach run mine",
        "commit": "0123456789ab",
        "seconds": 90.0,
        "versions": {"cpus": 2},
        "published_at": f"2026-05-{day:02}T10:00:00+00:00",
    }
    store.publish(attempt, record)


def test_the_newest_result_with_the_wanted_choices_is_copied_and_says_where_it_is_from(
    atlas: ModuleType, tmp_path: Path
) -> None:
    store, kept = Store(str(tmp_path / "store")), tmp_path / "kept"
    kept.mkdir()
    for tokens, day, revision in ((100, 3, 1), (100, 5, 2), (200, 9, 1)):
        publish(store, tokens, day, revision)
    wanted = {"short": {"eval": "streaming", "model": "m", "choices": {"tokens": 100}, "keep": [{"kind": "w*"}]}}
    assert atlas.collect(store, wanted, kept) == ["short"]
    assert atlas.collect(store, wanted, kept) == [], "it is there already"
    found, origin = atlas.read_results(wanted, kept)["short"]
    assert found.recipe == {"tokens": 100}
    assert [(row["kind"], row["ppl"]) for row in found.rows] == [("way", 20.1235)]
    assert origin[0] == "`longreach run mine`"
    assert origin[1] == "evaluate[m,streaming] at 0123456, 1.5 minutes on 2 CPU cores, 2026-05-05"
    assert json.loads((kept / "short.json").read_text())["from"]["fingerprint"] == "100-2"


def test_a_heading_that_results_md_does_not_have_is_named(atlas: ModuleType) -> None:
    with pytest.raises(ValueError, match="no heading that begins with 'no such run'"):
        atlas.results_table("no such run")
