import pytest
import torch
from evaluating import drawn, evaluate
from tiny_models import byte_tokenizer, tiny_llama

from longreach.evaluation.passkey import QUESTION, TASK, Passkey, ask, draw_key, fit_prompt, prompt_text
from longreach.evaluation.reader import Reader


def test_a_prompt_written_out_by_hand():
    assert prompt_text(3, 0.5, 71432) == (
        f"{TASK}\nThe grass is green. The sky is blue.\n"
        "The pass key is 71432. Remember it. 71432 is the pass key.\nThe sun is yellow.\n"
        "What is the pass key? The pass key is"
    )


@pytest.mark.parametrize("first", [None, "<sink>"])
@pytest.mark.parametrize("length", [320, 1000])
def test_a_prompt_is_as_long_as_its_length_allows(length, first):
    tokenizer = byte_tokenizer(first)
    prompt = fit_prompt(tokenizer, length, 0.3, 12345)
    tokens = len(tokenizer(prompt).input_ids)
    assert length - 24 < tokens <= length  # the longest sentence has 23 bytes
    assert prompt.endswith(QUESTION)


@pytest.mark.parametrize(("depth", "share"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_depth_is_where_the_key_stands(depth, share):
    prompt = fit_prompt(byte_tokenizer(), 4000, depth, 12345)
    filler = len(prompt) - len(prompt_text(0, 0, 12345))
    assert (prompt.index("The pass key is") - len(TASK)) / filler == pytest.approx(share, abs=0.01)


def test_a_length_too_short_for_the_prompt_is_an_error_with_both_numbers():
    least = len(prompt_text(0, 0.5, 12345))
    with pytest.raises(ValueError, match=f"length 100: .* {least} tokens"):
        fit_prompt(byte_tokenizer(), 100, 0.5, 12345)


def test_a_cells_key_does_not_depend_on_the_rest_of_the_grid():
    small = {"lengths": (320,), "depths": (0.5,), "trials": 1}
    large = {"lengths": (400, 320), "depths": (0.1, 0.5), "trials": 2}
    run = [evaluate(Passkey, tiny_llama(), byte_tokenizer(), **grid) for grid in (small, large)]
    twin = [c for c in run[1].cases if (c["length"], c["depth"], c["trial"]) == (320, 0.5, 0)]
    [(one, other)] = zip(run[0].cases, twin, strict=True)
    assert one | {"nll": 0} == other | {"nll": 0}
    assert one["nll"] == pytest.approx(other["nll"], rel=1e-4)  # the other one's beginning was read for depth 0.1
    assert len({draw_key(0, 320, 0.5, trial) for trial in range(20)}) == 20
    assert draw_key(1, 320, 0.5, 0) != draw_key(0, 320, 0.5, 0)


def test_one_forced_pass_says_correct_exactly_when_greedy_decoding_does():
    """The answers asked for: what the model would say itself (correct), and the same with a late or early slip."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    for seed in range(5):
        prompt = f"{seed}{QUESTION}"
        ids = torch.tensor([tokenizer(prompt).input_ids])
        said = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=256, eos_token_id=None)[
            0, ids.shape[1] :
        ]
        wrong_last, wrong_first = said.clone(), said.clone()
        wrong_last[-1] = (said[-1] + 1) % 256
        wrong_first[0] = (said[0] + 1) % 256
        for answer, correct in ((said, True), (wrong_last, False), (wrong_first, False)):
            got = ask(Reader(model, Spelled(ids[0].tolist(), answer.tolist())), "p", "a", "here")
            assert got["correct"] is correct
            with torch.no_grad():
                logits = model(torch.cat([ids[0], answer])[None]).logits[0, -5:-1]
            nll = torch.nn.functional.cross_entropy(logits, answer)
            assert got["nll"] == pytest.approx(float(nll), rel=1e-4)


class Spelled:
    """A tokenizer that knows one prompt and one answer: bytes that are no valid UTF-8 have no text."""

    def __init__(self, prompt, answer):
        self.ids = {"a": [], "p": prompt, "pa": prompt + answer}

    def __call__(self, text, **choices):
        return type("Encoding", (), {"input_ids": self.ids[text]})

    def decode(self, ids):
        return str([int(n) for n in ids])


def test_a_tokenizer_that_joins_prompt_and_key_is_an_error():
    joined = Spelled([1, 2], [])
    joined.ids["pa"] = [1, 3, 4]
    with pytest.raises(ValueError, match="joins"):
        ask(Reader(tiny_llama(), joined), "p", "a", "here")


def test_scores_count_cells_and_lengths():
    grid = {"lengths": (320, 400), "depths": (0.1, 0.9), "trials": 3}
    scores = evaluate(Passkey, tiny_llama(), byte_tokenizer(), **grid)
    assert [(r["kind"], r["length"], r["depth"], r["trials"]) for r in scores.rows] == [
        ("length", 320, None, 6), ("length", 400, None, 6),
        ("cell", 320, 0.1, 3), ("cell", 320, 0.9, 3), ("cell", 400, 0.1, 3), ("cell", 400, 0.9, 3),
    ]  # fmt: skip
    assert scores.summary["passkey_320"] == sum(c["correct"] for c in scores.cases if c["length"] == 320) / 6
    assert {"passkey_nll_320", "passkey_nll_400"} < set(scores.summary)
    figures = drawn(scores.named("base"))
    assert list(figures) == ["passkey.png", "passkey-base.png"]
    assert "base" in str(figures["passkey.png"])


def test_logits_that_are_not_finite_name_the_cell():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    with pytest.raises(FloatingPointError, match=r"320.*depth.*0\.5"):
        evaluate(Passkey, model, byte_tokenizer(), lengths=(320,), depths=(0.5,))
