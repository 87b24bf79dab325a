import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from longreach.evaluation import EVALS
from longreach.evaluation.base import EvalChoices
from longreach.evaluation.scores import EvalScores, bootstrap_mean, wilson


def scores(**changes):
    rows = [{"kind": "a", "length": 8, "ppl": 2.5}, {"kind": "b", "ppl": 3.0, "low": None}]
    case = {"expected": "é", "got": "e"}
    given = {"eval": "perplexity", "protocol": "p", "recipe": {"lengths": [8]}, "rows": rows, "summary": {"ppl_8": 2.5}}
    return EvalScores(**given | {"cases": [case]} | changes)


def test_what_is_written_is_read_back(tmp_path):
    before = scores().named("base")
    before.write(tmp_path)
    assert EvalScores.read(tmp_path) == before
    table = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert table[0] == {"model": "base", "eval": "perplexity", "kind": "a", "length": 8, "ppl": 2.5, "low": None}
    assert table[1]["length"] is None
    assert json.loads((tmp_path / "cases.jsonl").read_text())["expected"] == "é"


@pytest.mark.parametrize(
    ("changes", "place"),
    [({"summary": {"ppl_8": float("nan")}}, "summary"), ({"rows": [{"ppl": float("inf")}]}, "row 0")],
)
def test_a_score_that_is_no_number_is_not_written(tmp_path, changes, place):
    with pytest.raises(ValueError, match=f"ppl.*{place}"):
        scores(**changes).write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wilson_agrees_with_the_published_example():
    """Newcombe 1998, table I: 81 of 263 and 0 of 20, Wilson's method without continuity correction."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0


def test_the_bootstrap_interval_has_the_width_of_the_mean():
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    low, high = bootstrap_mean(values, seed=1)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    assert bootstrap_mean(values, seed=1) == (low, high)
    assert bootstrap_mean(values[:1], seed=1) is None


@pytest.mark.parametrize("name", EVALS)
def test_every_evaluation_is_registered_by_its_name_and_defines_all_parts(name):
    kind = EVALS[name]
    assert kind.name == name
    assert kind.title
    assert issubclass(kind.Choices, EvalChoices)
    assert {"cells", "measure", "scores", "figures"} < vars(kind).keys()
