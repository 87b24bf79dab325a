import pytest
import torch
from tiny_models import byte_tokenizer, tiny_llama
from transformers import AutoConfig, FalconConfig, FalconForCausalLM

from longreach.attention.sink_cache import SinkCache
from longreach.pipelines.chat import chat, reply, turn
from longreach.training.model import with_softmax_sinks
from longreach.training.sink_token import with_sink_token

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def talk(folder, lines, **choices):
    said = iter(lines)

    def ask():
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    chat(folder, ask=ask, **{"sinks": 2, "window": 20, "max_new_tokens": 30, "temperature": 0.0} | choices)


def test_it_warns_answers_and_its_cache_does_not_grow(folder, capsys):
    talk(folder, ["hello", "go on " * 20, "and on"])
    out = capsys.readouterr().out
    assert "does not extend its context" in out
    lines = [line for line in out.splitlines() if line.startswith("[") and "tokens/s" in line]
    assert len(lines) == 3
    assert len({line.rpartition("cache ")[2] for line in lines}) == 1
    assert "so far" in lines[-1]


def test_a_chat_whose_positions_grow_says_when_they_are_past_the_models_own(folder, capsys):
    context = AutoConfig.from_pretrained(folder).max_position_embeddings
    for positions, warned in (("text", [False, True]), ("cache", [False, False])):
        talk(folder, ["hello", "go on " * (context // 5)], positions=positions)
        lines = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
        assert [f"past the model's {context:,} positions" in line for line in lines] == warned


def test_a_template_that_raises_ends_it_with_a_sentence(folder):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"refuses messages of user \(TemplateError: a system message first\)"):
        talk(folder, ["hello"])


def test_an_empty_line_ends_it(folder, capsys):
    talk(folder, ["", "never read"])
    assert "tokens/s" not in capsys.readouterr().out


def test_replies_are_the_models_own_greedy_ones_while_all_fits(folder):
    model = tiny_llama()
    ids = list(range(10, 30))
    said = list(reply(model, SinkCache(model.config, 4, 100), ids, 12, 0.0))
    expected = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, 20), max_new_tokens=12, do_sample=False, pad_token_id=0
    )[0, 20:]
    assert said == expected.tolist()


@pytest.mark.parametrize("logit", [0.0, 2.0], ids=["zero", "logit"])
def test_a_model_with_a_sink_in_its_softmax_chats_too(tmp_path, capsys, logit):
    """Its answer is what transformers' own cache and attention give while all fits."""
    model = with_softmax_sinks(tiny_llama())
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(logit)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    talk(str(tmp_path), ["hello"], window=100)
    ids = byte_tokenizer()("hello\n", return_tensors="pt").input_ids
    expected = model.eval().generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    text = byte_tokenizer().decode(expected, skip_special_tokens=True).rstrip("\ufffd")  # no whole character
    assert text in capsys.readouterr().out


def test_a_model_that_takes_no_attention_from_outside_is_refused_before_it_answers(tmp_path, capsys):
    config = FalconConfig(vocab_size=260, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    FalconForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="FalconForCausalLM computes its attention itself, so it cannot"):
        talk(str(tmp_path), ["hello"])
    assert capsys.readouterr().out == ""


def test_a_sink_token_stands_once_before_a_chat():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    with_token, sink = with_sink_token(tokenizer)
    for first in (True, False):
        assert turn(with_token, "Hi", first=first) == [sink] * first + turn(tokenizer, "Hi", first=first)


def test_a_system_prompt_is_read_once():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    first, later = (tokenizer.decode(turn(tokenizer, "Hi", first=first)) for first in (True, False))
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert first == "<|im_start|>system\nBe kind.<|im_end|>\n" + asked
    assert later == "<|im_end|>\n" + asked  # from the end of the model's own answer on
    tokenizer.chat_template = "<bos>{% for m in messages %}[{{ m.role }}]{{ m.content }}<eot>{% endfor %}[assistant]"
    assert tokenizer.decode(turn(tokenizer, "Hi", first=False)) == "<eot>[user]Hi<eot>[assistant]"
    assert byte_tokenizer().decode(turn(byte_tokenizer(), "Hi", first=False)) == "Hi\n"
