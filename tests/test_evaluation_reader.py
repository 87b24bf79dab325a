import numpy as np
import pytest
import torch
from tiny_models import byte_tokenizer, tiny_llama
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import FalconConfig, FalconForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from longreach.attention.streamed import streamed_attention
from longreach.evaluation import small_cache
from longreach.evaluation.likelihood import token_nll
from longreach.evaluation.reader import Reader, spelled

TEXT = np.random.default_rng(0).integers(0, 256, 300).tolist()
PROMPTS = [TEXT, TEXT[:200] + TEXT[150:250], TEXT[:100] + TEXT[50:250], TEXT[5:]]
"""The second shares 200 tokens with the first, the third 100 with the second, the last nothing."""
ANSWER = [7, 8, 9, 10]


@pytest.mark.parametrize("new_tokens", [0, 5])
def test_what_is_shared_is_read_once_and_changes_no_answer(new_tokens):
    model = tiny_llama()
    reader, fresh = (Reader(model, byte_tokenizer(), reuse=reuse) for reuse in (True, False))
    read = []
    for prompt in PROMPTS:
        ours, theirs = (one.answer(prompt, ANSWER, "here", new_tokens=new_tokens) for one in (reader, fresh))
        assert ours.nll == pytest.approx(theirs.nll, rel=1e-4)
        assert (ours.got, ours.correct, ours.token_accuracy) == (theirs.got, theirs.correct, theirs.token_accuracy)
        assert theirs.read_tokens == len(prompt) + 3
        assert ours.nll == pytest.approx(token_nll(model, np.array(prompt + ANSWER), "t")[-4:].mean(), rel=1e-4)
        read.append(ours.read_tokens - 3)
    assert read == [300, 100, 200, 295]


def test_the_rest_of_a_prompt_is_read_without_a_mask(monkeypatch):
    model, lengths = tiny_llama(), []

    def attend(q, recent, sinks, **options):
        lengths.append((q.shape[2], recent[0].shape[2]))
        return streamed_attention(q, recent, sinks, **options)

    monkeypatch.setattr(small_cache, "streamed_attention", attend)
    reader = Reader(model, byte_tokenizer())
    for prompt in PROMPTS[:2]:
        reader.answer(prompt, ANSWER, "here")
    assert lengths == [(103, 303)] * model.config.num_hidden_layers
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_computes_its_attention_itself_reads_on_with_its_own():
    config = FalconConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = FalconForCausalLM(config).eval()
    reader, fresh = (Reader(model, byte_tokenizer(), reuse=reuse) for reuse in (True, False))
    for prompt in PROMPTS[:2]:
        found = reader.answer(prompt, ANSWER, "here")
        assert found.nll == pytest.approx(fresh.answer(prompt, ANSWER, "here").nll, rel=1e-4)
    assert found.read_tokens == 103


def test_generation_is_the_models_own_greedy_one():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    reader = Reader(model, tokenizer)
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        assert (
            reader.answer(prompt, ANSWER, "here", new_tokens=6).got
            == tokenizer.decode(said[0, len(prompt) :], skip_special_tokens=True).strip()
        )


@pytest.mark.parametrize(
    "model",
    [
        tiny_llama(
            rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, max_position_embeddings=64
        ),
        MistralForCausalLM(
            MistralConfig(
                vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, sliding_window=64,
            )
        ).eval(),
    ],
)  # fmt: skip
def test_keys_that_cannot_be_taken_up_again_are_not(model):
    reader = Reader(model, byte_tokenizer())
    for prompt in PROMPTS[:2]:
        found = reader.answer(prompt, ANSWER, "here")
        assert found.read_tokens == len(prompt) + 3
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ANSWER[:-1]])).logits[0, -4:]
        assert found.nll == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits, torch.tensor(ANSWER))), rel=1e-4
        )


def test_greedy_is_greedy_whatever_the_model_would_like():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    plain = [Reader(model, tokenizer).answer(prompt, ANSWER, "here", new_tokens=8).got for prompt in PROMPTS]
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.num_beams = 3
    reader = Reader(model, tokenizer)
    assert [reader.answer(prompt, ANSWER, "here", new_tokens=8).got for prompt in PROMPTS] == plain


def test_an_answer_does_not_depend_on_what_was_read_before():
    """Dynamic frequencies: transformers keeps those of the longest text so far."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = tiny_llama(rope_parameters=rope, max_position_embeddings=64)
    short = TEXT[:100]
    alone = Reader(model, byte_tokenizer()).answer(short, ANSWER, "here").nll
    nll = token_nll(model, np.array(short), "t")
    reader = Reader(model, byte_tokenizer())
    reader.answer(TEXT, ANSWER, "here")
    assert reader.answer(short, ANSWER, "here").nll == alone
    token_nll(model, np.array(TEXT), "t")
    assert (token_nll(model, np.array(short), "t") == nll).all()


def test_an_answer_is_spelled_as_it_goes_on_and_a_blank_alone_is_not_part_of_it():
    tokenizer = byte_tokenizer("<sink>")
    prompt, answer = spelled(tokenizer, "key is", " 12", "here")
    assert (tokenizer.decode(prompt), tokenizer.decode(answer)) == ("<sink>key is ", "12")
    ends = processors.TemplateProcessing(single="<sink> $A <s>", special_tokens=[("<sink>", 257), ("<s>", 256)])
    tokenizer.backend_tokenizer.post_processor = ends
    assert tokenizer("key").input_ids[-1] == 256
    assert spelled(tokenizer, "key is", " 12", "here") == (prompt, answer), "a text that goes on has no end token"
    core = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate("▁key12")}, merges=[]))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Replace("▁", " ")
    dummy = PreTrainedTokenizerFast(tokenizer_object=core)  # like Llama-2's: each text alone gets a blank before it
    prompt, answer = spelled(dummy, "key", " 12", "here", special=False)
    assert dummy.convert_ids_to_tokens(prompt) == ["▁", "k", "e", "y", "▁"]
    assert dummy.convert_ids_to_tokens(answer) == ["1", "2"]


def test_logits_that_are_not_finite_say_where():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    with pytest.raises(FloatingPointError, match=r"needle at 0\.5"):
        Reader(model, byte_tokenizer()).answer(TEXT, ANSWER, "needle at 0.5")
