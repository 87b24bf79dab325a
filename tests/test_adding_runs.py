"""A pattern and an evaluation, each one file and one line more, run through the whole chain to its report."""

from __future__ import annotations

from pathlib import Path

import pytest
from product_copies import product_with
from test_adding_a_pattern import SMALL
from test_adding_an_evaluation import ADDITION
from test_quickstart import longreach, make_project

from longreach.infra.artifact import Store

PATTERN = (
    "toy_pattern.py",
    "attention/dilated.py",
    """
from longreach.attention.dilated import Dilated

PATTERNS["dilated"] = Dilated
""",
)


@pytest.mark.slow
def test_with_their_files_and_lines_the_whole_chain_runs_and_the_report_describes_both(tmp_path: Path):
    evaluate = {"distinct_tokens": {"first_tokens": 8, "models": ["base"]}}
    recipe = SMALL | {"baselines": {"base": {}}, "evaluate": evaluate}
    project = make_project(tmp_path / "project", recipe)
    env = product_with(tmp_path / "source", PATTERN, ADDITION)
    done = longreach(project, "run", "tiny.yaml", "--set", "resources.eval_workers=2", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    store = Store(str(project / ".longreach"))
    manifests = {manifest["label"]: manifest for manifest in store.manifests()}
    report = store.fetch("report", manifests["report"]["fingerprint"])
    page = (report.path / "report.md").read_text()

    assert manifests["finetune[dilated]"]["summary"]["pattern"] == "dilated(stride_tokens=4)"
    assert "one key in 4" in (report.path / "report.html").read_text()

    summary = manifests["evaluate[base,distinct_tokens]"]["summary"]
    assert summary["rows"] == 2
    assert 1 < summary["distinct_tokens"] <= 8
    assert "## Distinct tokens" in page
    assert f"| distinct\\_tokens | {summary['distinct_tokens']:.4g} |" in page
    assert report.summary["metrics"]["eval/distinct_tokens/base"] == summary["distinct_tokens"]
