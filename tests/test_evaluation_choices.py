"""What all evaluations' sections refuse alike: a value named twice, a list without any, a length of no token."""

import re

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


IMPOSSIBLE = [
    ("perplexity", {"lengths": (64,)}, "lengths [64] must be above last_tokens 256"),
    ("perplexity", {"lengths": (-3, 0), "last_tokens": 1}, "lengths [-3, 0] must be above last_tokens 1"),
    ("sinks", {"lengths": (4, 16)}, "lengths 4 must be more than first_tokens 4"),
    ("sinks", {"lengths": (80,)}, "the shortest length is 80 tokens, but maps have at most 64"),
    ("lost_in_the_middle", {"documents": (200,)}, "documents is 200, but at most 128 can be invented"),
    ("passkey", {"models": ()}, "models\n  Tuple should have at least 1 item"),
    *(
        (name, {"documents": ()}, "documents\n  Tuple should have at least 1 item")
        for name in ("gain", "needle", "ruler")
    ),
]


@pytest.mark.parametrize(("name", "fields", "message"), IMPOSSIBLE)
def test_what_no_model_can_be_measured_with_is_refused_with_the_recipe(name, fields, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        EVALS[name].Choices(**fields)


def test_noise_and_tasks_without_a_haystack_need_no_held_out_document():
    assert not EVALS["ruler"].Choices(haystack="noise").selected()
    assert not EVALS["ruler"].Choices(tasks=("cwe", "qa")).selected()
    assert EVALS["ruler"].Choices().selected()
    assert {name for name in ("passkey", "stream_questions", "sinks") if EVALS[name].Choices().selected()} == {"sinks"}
