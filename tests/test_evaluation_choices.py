"""What all evaluations' sections refuse alike: a value named twice, a list without any, a length of no token."""

import pytest
from pydantic import ValidationError

from longreach.evaluation import EVALS

TWICE = [
    ("passkey", "lengths", [400, 400]),
    ("passkey", "depths", [0.5, 0.1, 0.5]),
    ("passkey", "models", ["base", "base"]),
    ("needle", "lengths", [400, 400]),
    ("needle", "depths", [0.5, 0.5]),
    ("needle", "documents", ["a*", "a*"]),
    ("lost_in_the_middle", "pairs", [3, 3]),
    ("lost_in_the_middle", "documents", [3, 3]),
    ("ruler", "tasks", ["vt", "vt"]),
    ("ruler", "lengths", [400, 400]),
    ("ruler", "depths", [0.0, 0.0]),
    ("sinks", "lengths", [16, 16]),
    ("sinks", "map_layers", [1, 1]),
    ("perplexity", "lengths", [300, 300]),
    ("gain", "lengths", [2048, 4096, 2048]),
    ("streaming", "ways", ["sinks", "sinks"]),
    ("streaming", "positions", ["text", "text"]),
    ("streaming", "sink_tokens", [4, 4]),
    ("stream_questions", "cache_tokens", [256, 256]),
    ("harness", "tasks", ["qasper", "qasper"]),
]


@pytest.mark.parametrize(("name", "field", "values"), TWICE)
def test_a_list_names_each_value_once(name, field, values):
    """Else its cells are measured and counted twice, and intervals are too narrow."""
    needed = {"harness": {"tasks": ("qasper",)}, "lost_in_the_middle": {"pairs": (5,)}}.get(name, {})
    kind = EVALS[name].Choices
    with pytest.raises(ValidationError) as error:
        kind(**needed | {field: tuple(values)})
    assert f"{field} {values} lists a value twice" in str(error.value)
    once = tuple(dict.fromkeys(values))
    if name != "ruler" or field != "depths":  # which needs tasks of one fact
        assert list(once) == kind(**needed | {field: once}).identity()[field], "in the recipe's order"


@pytest.mark.parametrize("name", ["passkey", "needle", "ruler", "sinks"])
@pytest.mark.parametrize("lengths", [(), (0, 16), (16, -5)])
def test_a_length_has_a_token_and_a_list_of_them_a_length(name, lengths):
    with pytest.raises(ValidationError, match=r"^1 validation error for Choices\nlengths"):
        EVALS[name].Choices(lengths=lengths)
