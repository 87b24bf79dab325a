"""The text of `gain` in colours: what is kept of each token, what a reader sees, and that a hostile text stays text."""

import re
from html import unescape

import numpy as np
from evaluating import evaluate
from tiny_models import byte_tokenizer, tiny_llama

from longreach.evaluation import gain_text
from longreach.evaluation.base import Background
from longreach.evaluation.blocks import Coloured, Details, Section
from longreach.evaluation.documents import Document
from longreach.evaluation.figures import Style
from longreach.evaluation.gain import Gain
from longreach.evaluation.gain_text import coloured_blocks, level, token_texts
from longreach.evaluation.scores import EvalScores
from longreach.pipelines.report.page import Page

TOKENIZER = byte_tokenizer()
RUDE = "</div><script>alert(1)</script>\n\x00 <b onmouseover='x'>\u202ea"


def bytes_of(text):
    return np.array(TOKENIZER(text).input_ids)


def run(texts, **choices):
    choices = {"lengths": (40, 64, 128), "score_tokens": 16} | choices
    return evaluate(Gain, tiny_llama(), TOKENIZER, texts, **choices).named("m")


def made_up(texts, short, long):
    """Scores of one document with these tokens, and their NLL in a context of 40 and one of 128 tokens."""
    case = {"document": RUDE, "domain": "d", "end": 200, "texts": texts, "nll": {"40": short, "128": long}}
    return EvalScores("gain", "p", {}, [], {}, cases=[case], model="m")


def coloured(scores):
    (details,) = coloured_blocks({"m": scores})
    assert isinstance(details, Details)
    return details.blocks


def test_tokens_are_parts_of_the_text_and_a_letter_of_several_stands_with_its_last():
    texts = token_texts(TOKENIZER, bytes_of("aé€ b").tolist())
    assert texts == ["a", "", "é", "", "", "€", " ", "b"]
    assert "".join(token_texts(TOKENIZER, bytes_of("é€")[:4].tolist())) == "é\ufffd"


def test_a_text_is_coloured_by_its_own_tokens_where_more_tokens_were_scored():
    text, _ = coloured(made_up(["x", "y"], [1, 9, 5, 1], [1, 1, 1, 1]))
    assert [piece[:2] for piece in text.pieces] == [("x", 4), ("y", 0)]


def test_the_texts_of_the_last_tokens_of_the_first_documents_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(gain_text, "KEPT_DOCUMENTS", 2)
    monkeypatch.setattr(gain_text, "KEPT_TOKENS", 10)
    long = [Document(name, "d", bytes_of(name * 300)) for name in "abc"]
    scores = run([Document("short", "d", bytes_of("s" * 60)), *long], windows=2)
    assert [(case["document"], case["end"], "".join(case["texts"])) for case in scores.cases if "texts" in case] == [
        ("a", 300, "a" * 10),
        ("b", 300, "b" * 10),
    ]
    assert len(scores.cases) == 6
    scores.write(tmp_path)
    assert EvalScores.read(tmp_path).cases == scores.cases


def test_colours_follow_the_gain_and_the_tokens_that_changed_most_stand_in_numbers():
    assert [level(nats) for nats in (-3, -0.5, -0.05, 0, 0.1, 1.9, 2)] == [-4, -2, 0, 0, 1, 3, 4]
    text, numbers = coloured(made_up([" x", " y", " z", "w"], [5, 1, 1, 1], [0.5, 1, 1, 1.6]))
    assert [piece[:2] for piece in text.pieces] == [(" x", 4), (" y z", 0), ("w", -2)]
    assert text.pieces[0].says == "40: 5.00; 128: 0.50"
    assert "Mean: +0.975 nats per token. Tokens with a gain" in text.caption
    assert text.caption.endswith(": 1.")
    assert [row[1:] for row in numbers.rows] == [["5.00", "0.50", "+4.50"], ["1.00", "1.60", "-0.60"]]
    assert numbers.rows[1][0] == "w\nafter …x y z"


def test_scores_of_an_earlier_version_are_said_to_have_no_single_tokens():
    old, new = EvalScores("gain", "p", {}, [], {}), made_up(["a"], [1], [1])
    folded, sentence = coloured_blocks({"old": old, "new": new})
    assert folded.summary.startswith("new: ")
    assert sentence.startswith("Single tokens are not stored for old, because")


def test_a_hostile_text_is_shown_as_it_is_and_closes_nothing():
    texts = [RUDE, "b\r", "<i>"]
    page = Page("t", "a", "", [Section("s", coloured(made_up(texts, [3, 1, 1], [1, 1, 3])))])
    html = page.html()
    assert not re.search(r"<(script|b|i)\b", html)
    (shown,) = re.findall(r'<div class="text" dir="auto">(.*?)</div>', html, re.DOTALL)
    assert unescape(re.sub(r"<[^>]*>", "", shown)) == "".join(texts).replace("\x00", "\ufffd").replace("\r", "\ufffd")
    assert "<script" not in page.markdown().replace("\\<", "")


def test_the_page_of_one_model_folds_its_texts_in():
    scores = run([Document("a", "d", bytes_of("ab" * 150))])
    blocks = Gain.section({"m": scores}, Style.of(["m"]), Background()).blocks
    (details,) = [block for block in blocks if isinstance(block, Details)]
    html = Page("t", "a", "", [Section("s", blocks)]).html(interactive=True)
    assert html.count('<details class="fold">') == 1
    assert html.index("<summary>m: the text") < html.index("ab" * 4)
    assert isinstance(details.blocks[0], Coloured)
