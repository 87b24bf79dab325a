"""Result files of lm-evaluation-harness: read, written, and refused where their numbers would mislead."""

import json
from types import SimpleNamespace

import pytest

from longreach.evaluation.lm_eval_files import check_versions, read_results, result_files, write_results
from longreach.evaluation.scores import EvalScores
from longreach.pipelines.release import Card

THEIRS = {
    "results": {
        "longbench_qasper": {
            "name": "longbench_qasper", "alias": "longbench_qasper", "sample_len": 20,
            "score,none": 0.25, "score_stderr,none": 0.05,
        },
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A"},
    },
    "versions": {"longbench_qasper": 5.0, "gsm8k": 3.0},
    "n-samples": {"longbench_qasper": {"original": 200, "effective": 20}, "gsm8k": {"original": 9, "effective": 9}},
    "higher_is_better": {"longbench_qasper": {"score": True}},
    "config": {"model_args": "pretrained=owner/model,dtype=float32", "limit": 20.0},
    "lm_eval_version": "0.4.13",
    "model_name": "owner/model",
    "max_length": 8192,
}  # fmt: skip


def written(folder, name="results_2026-11-25T12-00-00.json", **changes):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(THEIRS | changes))
    return path


def test_a_result_file_of_lm_eval_is_read_with_its_intervals_and_limits(tmp_path):
    scores = read_results(written(tmp_path))
    assert (scores.model, scores.eval) == ("owner/model", "harness")
    assert scores.protocol == "lm-eval 0.4.13, prompts of up to 8,192 tokens, limit 20"
    qasper, gsm8k = scores.rows
    assert (qasper["task"], qasper["metric"], qasper["value"]) == ("longbench_qasper", "score", 0.25)
    assert (qasper["low"], qasper["high"]) == pytest.approx((0.152, 0.348))
    assert (qasper["documents"], qasper["documents_in_all"], qasper["version"]) == (20, 200, 5.0)
    assert (gsm8k["metric"], gsm8k["filter"], "low" in gsm8k) == ("exact_match_strict-match", "strict-match", False)
    assert scores.summary == {"longbench_qasper_score": 0.25, "gsm8k_exact_match_strict-match": 0.5}


@pytest.mark.parametrize("missing", ["model_name", "lm_eval_version"])
def test_early_files_of_the_same_format_say_less_and_are_read_too(missing, tmp_path):
    path = written(tmp_path)
    path.write_text(json.dumps({key: value for key, value in THEIRS.items() if key != missing}))
    scores = read_results(path)
    assert (scores.model, len(scores.rows)) == ("owner/model", 2)


def test_what_we_write_comes_back_the_same_and_lm_eval_makes_its_table_of_it(tmp_path):
    lm_eval = pytest.importorskip("lm_eval.utils")
    theirs = read_results(written(tmp_path / "theirs"))
    ours = EvalScores("perplexity", "made up", {}, [], {"ppl_1024": 12.5})
    path = write_results([theirs, ours], "owner/model", tmp_path / "ours", source="hub:owner/model")
    assert path.parent == tmp_path / "ours" / "owner__model"
    back = read_results(path)
    assert back.protocol.endswith("limit 20"), "or 20 documents of 200 would pass for all"
    for row, expected in zip(back.rows, theirs.rows, strict=False):
        numbers = {key: pytest.approx(value) for key, value in expected.items() if isinstance(value, float)}
        assert row == expected | numbers
    assert back.summary == theirs.summary | {"longreach_perplexity_ppl_1024": 12.5}
    table = lm_eval.make_table(json.loads(path.read_text()))
    for cells in ("|longbench_qasper", "|score", " 0.25|", "0.0500", "strict-match", "longreach_perplexity", "12.50|"):
        assert cells in table


def test_of_an_output_path_the_newest_file_of_each_model_is_meant(tmp_path):
    written(tmp_path / "a", "results_2026-11-24T12-00-00.json")
    newest = written(tmp_path / "a")
    other = written(tmp_path / "b")
    assert result_files(str(tmp_path)) == [newest, other]
    assert result_files(str(tmp_path / "a")) == [newest]
    assert result_files(str(other)) == [other]
    assert result_files("quickstart") == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lm_eval_version": "0.5.1"}, r"is from lm-eval 0\.5\.1, but only files of lm-eval 0\.4 can be read"),
        ({"lm_eval_version": "0.40.0"}, r"is from lm-eval 0\.40\.0, but only files of lm-eval 0\.4 can"),
        ({"lm_eval_version": "", "results": {"x": {"acc": 0.5}}}, r"is from lm-eval 0\.3 or older, but only files of"),
        ({"results": None}, "is not a result file of lm-eval"),
    ],
)
def test_a_file_of_another_version_is_refused_with_both_versions(change, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        read_results(written(tmp_path, **change))


def test_two_versions_of_one_task_do_not_compare(tmp_path):
    older = written(tmp_path / "older", versions={"longbench_qasper": 4.0, "gsm8k": 3.0})
    models = {"new": read_results(written(tmp_path / "new")), "old": read_results(older)}
    with pytest.raises(ValueError, match=r"longbench_qasper has version 5\.0 in new and version 4\.0 in old"):
        check_versions(models)
    unknown = EvalScores("harness", "", {}, [{"kind": "task", "task": "longbench_qasper", "value": 0.1}], {})
    check_versions({"new": models["new"], "unknown": unknown})


def test_a_card_says_which_tasks_were_asked_in_part(tmp_path):
    qasper, gsm8k = Card.results(SimpleNamespace(own={"harness": read_results(written(tmp_path))}))
    assert qasper.dataset_name == "LongBench Qasper (the first 20 of 200)"
    assert gsm8k.dataset_name == "gsm8k"
