import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from longreach.evaluation import EVALS
from longreach.evaluation.base import EvalChoices
from longreach.evaluation.scores import EvalScores, mean_interval, wilson


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


def test_the_interval_of_a_mean_is_students():
    """Student 1908, table IX: the additional hours of sleep of ten patients; 95% interval as R's t.test gives it."""
    hours = np.array([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert mean_interval(hours) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert mean_interval(hours, np.full(10, 7)) == pytest.approx(mean_interval(hours))
    assert mean_interval(hours[:1]) is None
    assert mean_interval(hours[:3, None]) is None, "three seeds of one document"
    assert mean_interval(np.full(3, 2.0)) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("seeds", "documents", "of_seeds", "of_documents", "of_both"),
    [(1, 3, 0, 1, 0), (1, 10, 0, 1, 0), (3, 10, 0.2, 1, 0.3), (3, 10, 1, 0.1, 0.3), (3, 5, 1, 1, 0)],
)
def test_95_of_100_intervals_hold_the_mean_of_few_documents_and_seeds(
    seeds, documents, of_seeds, of_documents, of_both
):
    """Percentiles of a bootstrap hold it 75 times in 100 with three documents, and 89 times with ten."""
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        values = of_documents * draw.normal(size=documents) + of_seeds * draw.normal(size=(seeds, 1))
        low, high = mean_interval(values + of_both * draw.normal(size=(seeds, documents)))
        held += low <= 0 <= high
    assert 930 <= held <= 985


def test_a_document_of_more_tokens_counts_for_more():
    values, tokens = np.array([1.0, 2.0, 4.0]), np.array([10, 10, 80])
    low, high = mean_interval(values, tokens)
    assert (low + high) / 2 == pytest.approx(3.5)
    assert high - low > 4, "most of it is one document"


@pytest.mark.parametrize("name", EVALS)
def test_every_evaluation_is_registered_by_its_name_and_defines_all_parts(name):
    kind = EVALS[name]
    assert kind.name == name
    assert kind.title
    assert issubclass(kind.Choices, EvalChoices)
    assert {"cells", "measure", "scores", "figures"} < vars(kind).keys()
