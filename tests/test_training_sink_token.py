"""The sink token stands before every text, for our packing and for whoever loads the tokenizer with transformers."""

import pytest
from tokenizers import processors
from toy_models import tiny_tokenizer
from toy_tokenizers import LINES, PRE_TOKENIZERS, toy_tokenizer
from transformers import AutoTokenizer

from longreach.training.sink_token import SINK_TOKEN, with_sink_token

TEXT = LINES[0]


def template_only():
    """One whose post-processor is a bare template."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B <eos>", special_tokens=[("<eos>", 0)]
    )
    return tokenizer


TOKENIZERS = {family: lambda family=family: toy_tokenizer(family) for family in PRE_TOKENIZERS} | {
    "bos": lambda: toy_tokenizer(adds_bos=True),
    "words": tiny_tokenizer,
    "template": template_only,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_plain_transformers_puts_the_sink_before_every_text_after_saving(kind, tmp_path):
    plain = TOKENIZERS[kind]()
    tokenizer, sink = with_sink_token(plain)
    tokenizer.save_pretrained(tmp_path)
    for again in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert again(TEXT).input_ids == [sink, *plain(TEXT).input_ids]  # before BOS, where there is one
        assert again([TEXT, "w5"]).input_ids == [[sink, *plain(text).input_ids] for text in (TEXT, "w5")]
        assert again(TEXT, "w5").input_ids == [sink, *plain(TEXT, "w5").input_ids]
        assert again(TEXT, add_special_tokens=False).input_ids == plain(TEXT, add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_sink_is_one_new_token_and_the_others_keep_their_ids(kind):
    plain = TOKENIZERS[kind]()
    before = plain(TEXT).input_ids
    tokenizer, sink = with_sink_token(plain)
    assert tokenizer.get_vocab() == plain.get_vocab() | {SINK_TOKEN: sink}
    assert sink == len(plain) == len(tokenizer) - 1
    assert plain(TEXT).input_ids == before  # the tokenizer that was given is as it was
    for name in ("eos_token_id", "bos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(tokenizer, name) == getattr(plain, name)


@pytest.mark.parametrize("several", [False, True])
def test_the_sink_stands_before_every_chat_too(several, tmp_path):
    plain = toy_tokenizer()
    plain.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    if several:
        plain.chat_template = {"default": plain.chat_template, "tool_use": plain.chat_template}
    with_sink_token(plain)[0].save_pretrained(tmp_path)
    again, chat = AutoTokenizer.from_pretrained(tmp_path), [{"role": "user", "content": TEXT}]
    expected = [len(plain), *plain.apply_chat_template(chat)["input_ids"]]
    assert again.apply_chat_template(chat)["input_ids"] == expected
    if several:
        assert again.apply_chat_template(chat, chat_template="tool_use")["input_ids"] == expected


def test_the_sink_leaves_a_text_that_is_decoded():
    tokenizer, _ = with_sink_token(toy_tokenizer())
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert tokenizer.decode(ids) == SINK_TOKEN + TEXT


def test_a_tokenizer_with_a_sink_comes_back_as_it_is(tmp_path):
    first, sink = with_sink_token(toy_tokenizer())
    assert with_sink_token(first) == (first, sink)
    first.save_pretrained(tmp_path)
    again, same = with_sink_token(AutoTokenizer.from_pretrained(tmp_path))
    assert same == sink
    assert again(TEXT).input_ids == first(TEXT).input_ids


def test_other_special_tokens_stay_special():
    plain = toy_tokenizer()
    plain.add_special_tokens({"extra_special_tokens": ["<mark>"]})
    tokenizer, _ = with_sink_token(plain)
    assert set(tokenizer.all_special_tokens) == {"<eos>", "<bos>", "<mark>", SINK_TOKEN}


def test_tokenizers_without_a_place_for_a_sink_are_refused():
    bert = tiny_tokenizer()
    bert.backend_tokenizer.post_processor = processors.BertProcessing(("<eos>", 0), ("<unk>", 1))
    with pytest.raises(ValueError, match=r"ends in BertProcessing cannot add <\|sink\|>"):
        with_sink_token(bert)

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow is not a fast tokenizer"):
        with_sink_token(Slow())


def test_a_tokenizer_that_loses_the_sink_on_loading_is_refused(monkeypatch):
    plain = toy_tokenizer()
    monkeypatch.setattr("longreach.training.sink_token.AutoTokenizer.from_pretrained", lambda *args, **kwargs: plain)
    with pytest.raises(ValueError, match=r"drops <\|sink\|> on loading"):
        with_sink_token(plain)
