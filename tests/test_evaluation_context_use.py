"""How far a model uses what it reads: what is drawn of each evaluation, and where the effective length stands."""

from longreach.evaluation.base import Background
from longreach.evaluation.blocks import Details
from longreach.evaluation.context_use import MOST_MODELS, found_by_length, gained_by_length, reached, use_figure
from longreach.evaluation.figures import Style
from longreach.evaluation.passkey import Passkey
from longreach.evaluation.scores import EvalScores, retrieval_row


def ruler(*rows):
    return EvalScores(
        "ruler", "p", {}, [{"kind": "length", "task": t, "length": n, "score": s} for t, n, s in rows], {}
    )


def gain(by_length):
    rows = [{"kind": "pooled", "split": "validation", "length": 64, "own_gain": 9}]
    for length, nats in by_length.items():
        rows.append({"kind": "pooled", "split": "test", "length": length, "own_gain": nats})
    return EvalScores("gain", "p", {}, rows, {})


def passkey(found, depths=(0, 1)):
    """Scores in which the first found[length] keys of a length are found, one key at each depth."""
    cases, rows, cells = [], [], []
    for length, count in found.items():
        of_length = []
        for number, depth in enumerate(depths):
            right = number < count
            place = {"length": length, "depth": depth, "trial": 0, "expected": "7", "got": "7" if right else "8"}
            of_length.append(place | {"correct": right, "token_accuracy": float(right), "nll": 1.0})
            cells.append(retrieval_row("cell", of_length[-1:], length, depth))
        rows.append(retrieval_row("length", of_length, length, None))
        cases += of_length
    return EvalScores("passkey", "p", {}, rows + cells, {"passkey": 1.0}, cases=cases)


def test_shares_are_rulers_mean_its_own_task_alone_and_found_keys_and_gain_is_of_test_documents():
    rows = [("vt", 64, 1.0), ("qa", 64, 0.5), ("no_shared_words", 64, 0.25), ("vt", 128, 0.0), ("qa", 128, 0.5)]
    assert found_by_length({"passkey": passkey({64: 2, 128: 1}), "ruler": ruler(*rows)}) == {
        "passkey": [(64, 1.0), (128, 0.5)],
        "RULER's tasks, mean": [(64, 0.75), (128, 0.25)],
        "no_shared_words": [(64, 0.25)],
    }
    assert gained_by_length({"gain": gain({128: 0.2, 64: 0.0})}) == [(64, 0.0), (128, 0.2)]
    assert found_by_length({}) == {}
    assert gained_by_length({}) == []


def test_the_effective_length_is_the_last_before_the_first_fall():
    assert reached([(1, 0.5), (2, 0.43), (4, 0.42), (8, 0.5)]) == 2
    assert reached([(1, 0.0), (2, 1.0)]) == 0


def test_each_model_is_a_row_with_one_ring_a_kind_and_all_share_their_axes():
    both = {"passkey": passkey({64: 2, 128: 1}), "gain": gain({64: 0.0, 128: 0.2})}
    (figure,) = use_figure({"a": both, "b": {"gain": gain({64: 0.0, 256: -1.0})}})
    rows = figure.chart.vconcat
    assert [row.title.text for row in rows] == ["a", "b"]
    points = rows[0].hconcat[0].data.values
    assert [(point["x"], point["y"], point["ring"]) for point in points] == [(64, 1.0, True), (128, 0.5, False)]
    for panels in zip(*(row.hconcat for row in rows), strict=True):
        axes = [panel.layer[0].to_dict()["encoding"] for panel in panels]
        assert axes[0]["x"]["scale"]["domain"] == axes[1]["x"]["scale"]["domain"] == [64, 256]
        assert axes[0]["y"]["scale"]["domain"] == axes[1]["y"]["scale"]["domain"]
    assert figure.png.startswith(b"\x89PNG")
    assert use_figure({str(n): both for n in range(MOST_MODELS + 2)})[0].caption.endswith("2 more are left out.")
    assert use_figure({"a": {"passkey": passkey({64: 2})}, "b": {}}) == []
    assert use_figure({"a": {"gain": both["gain"]}}) == []
    assert use_figure({"a": both | {"passkey": passkey({64: 2, 128: 2})}}) == []  # all was found: nothing to see


def test_several_models_have_one_figure_by_depth_and_their_answers_folded_in():
    scores = passkey({64: 1, 128: 2})
    *_, figures, answers = Passkey.section({"a": scores, "b": scores}, Style.of("ab"), Background()).blocks
    assert [figure.file for figure in figures] == ["passkey.png", "passkey-depths.png"]
    assert figures[1].png.startswith(b"\x89PNG")
    assert isinstance(answers, Details)
    first, second = answers.blocks[0].rows[:2]
    assert first == ["length 64, depth 0", "7", "7", "yes"]
    assert second == ["length 64, depth 1", "7", "8", "no"]
    *_, figures, _ = Passkey.section({"a": scores}, Style.of("a"), Background()).blocks
    assert [figure.file for figure in figures] == ["passkey.png", "passkey-a.png"]
