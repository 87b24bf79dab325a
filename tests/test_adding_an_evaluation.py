"""A new evaluation is one file and one line in EVALS: recipe, plan, measuring and figures take it as it is.

The whole chain, to its report: tests/test_adding_runs.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from evaluating import drawn, evaluate
from product_copies import product_with
from test_quickstart import RECIPE, longreach, make_project
from tiny_models import byte_tokenizer, tiny_llama
from toy_evaluation import DistinctTokens

from longreach.evaluation import EVALS
from longreach.evaluation.base import Background
from longreach.evaluation.documents import Document
from longreach.evaluation.figures import Style

ADDITION = (
    "toy_evaluation.py",
    "evaluation/distinct_tokens.py",
    """
from longreach.evaluation.distinct_tokens import DistinctTokens

EVALS["distinct_tokens"] = DistinctTokens
""",
)
SMALL = RECIPE | {
    "baselines": {"base": {}},
    "finetune": None,
    "pretrain": None,
    "evaluate": {"distinct_tokens": {"first_tokens": 8}},
}


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    """The environment in which `longreach` is the product with the evaluation's file and line."""
    return product_with(tmp_path_factory.mktemp("source"), ADDITION)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"), SMALL)


def test_a_recipe_chooses_it_and_the_plan_shows_its_stage(project: Path, env: dict[str, str]):
    done = longreach(project, "plan", "tiny.yaml", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "evaluate[base,distinct_tokens]" in done.stdout


def test_mistakes_in_its_section_are_shown_with_their_place(project: Path, env: dict[str, str]):
    done = longreach(project, "plan", "tiny.yaml", "--set", "evaluate.distinct_tokens={first_token: 8}", env=env)
    assert done.returncode != 0
    assert "evaluate.distinct_tokens.first_token: no such field; did you mean first_tokens?" in done.stderr
    assert "evaluate.distinct_tokens.first_tokens: missing, and it has no default (Number of tokens" in done.stderr


def test_it_is_measured_and_drawn_for_one_model_and_for_many(monkeypatch):
    monkeypatch.setitem(EVALS, "distinct_tokens", DistinctTokens)
    texts = [Document("a", "d", np.array([5, 5, 6, 7, 8])), Document("b", "d", np.array([5, 5, 5, 5, 9]))]
    scores = evaluate(DistinctTokens, tiny_llama(), byte_tokenizer(), texts, first_tokens=4)
    assert [(row["document"], row["distinct"]) for row in scores.rows] == [("a", 3), ("b", 1)]
    assert scores.summary == {"distinct_tokens": 2}
    assert list(drawn(scores.named("base"))) == ["distinct_tokens.png"]
    both = {name: scores.named(name) for name in ("base", "other")}
    section = DistinctTokens.section(both, Style.of(both), Background())
    text, table, _ = section.blocks
    assert text.startswith("How many different tokens does a held-out document have? Protocol: different ids among")
    assert table.rows == [["distinct_tokens", "2", "2"]]
