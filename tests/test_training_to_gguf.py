"""A GGUF file holds the model: transformers' own reader, which knows nothing of our writer, gets the same logits."""

import json
import math

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from longreach.attention.rope import stretched_config
from longreach.training.corpus_recipe import CorpusRecipe, SourceRecipe
from longreach.training.sink_token import with_sink_token
from longreach.training.to_gguf import Facts, problem_of, write_gguf
from longreach.training.train_tokenizer import train_tokenizer

FACTS = Facts("tiny", "apache-2.0", keep=1)
TEXT = "To be, or not to be: 123 questions's end.\n\n  And so on"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    (folder / "a.txt").write_text("To be or not to be, that is the question. " * 20)
    train_tokenizer(CorpusRecipe(sources=(SourceRecipe(files=str(folder / "a.txt")),)), 280, folder / "t")
    return AutoTokenizer.from_pretrained(folder / "t")


def tiny(folder, tokenizer, rope=("none", 1.0, None), extra=0, tied=True):
    """A random Llama in `folder`, with as many rows as tokens and `extra` more."""
    config = LlamaConfig(
        vocab_size=len(tokenizer) + extra, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    config = stretched_config(config, *rope)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 2e-3), ("q8_0", 3e-2)])
def test_transformers_reads_the_same_logits_from_the_file(kind, tolerance, tied, tokenizer, tmp_path):
    model = tiny(tmp_path / "m", tokenizer, tied=tied)
    write_gguf(tmp_path / "m", tmp_path / "m.gguf", kind, facts=FACTS)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        expected, found = model(ids).logits, again(ids).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance
    assert AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")(TEXT).input_ids == ids[0].tolist()


def test_a_stretch_and_its_length_stand_in_the_file(tokenizer, tmp_path):
    for kind in ("linear", "yarn", "llama3"):
        tiny(tmp_path / kind, tokenizer, rope=(kind, 4.0, None), extra=3)
        write_gguf(tmp_path / kind, tmp_path / f"{kind}.gguf", "f16", facts=FACTS)
        found = fields(tmp_path / f"{kind}.gguf")
        assert found["llama.context_length"] == 256
        assert found["llama.vocab_size"] == len(found["tokenizer.ggml.tokens"]) == len(tokenizer) + 3
        assert found["longreach.n_keep"] == 1
        if kind == "llama3":
            continue
        assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == (kind, 4.0)
        if kind == "yarn":
            assert found["llama.rope.scaling.original_context_length"] == 64
    tiny(tmp_path / "theta", tokenizer, rope=("theta", 4.0, 80_000.0))
    write_gguf(tmp_path / "theta", tmp_path / "theta.gguf", "f16", facts=FACTS)
    assert fields(tmp_path / "theta.gguf")["llama.rope.freq_base"] == 80_000.0


def test_both_ways_to_state_yarns_factor_of_attention_are_what_transformers_computes(tokenizer, tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for name, stated in {"factor": {"attention_factor": 1.5}, "scales": {"mscale": 1.0, "mscale_all_dim": 0.5}}.items():
        tiny(tmp_path / name, tokenizer, rope=("yarn", 4.0, None))
        file = tmp_path / name / "config.json"
        config = json.loads(file.read_text())
        config["rope_parameters"] |= stated
        file.write_text(json.dumps(config))
        _, scaling = ROPE_INIT_FUNCTIONS["yarn"](AutoConfig.from_pretrained(tmp_path / name), "cpu")
        write_gguf(tmp_path / name, tmp_path / f"{name}.gguf", "f16", facts=FACTS)
        by_llama_cpp = fields(tmp_path / f"{name}.gguf")["llama.rope.scaling.attn_factor"] * (0.1 * math.log(4) + 1)
        assert by_llama_cpp == pytest.approx(scaling)


def test_llama3s_divisors_are_the_frequencies_that_transformers_computes(tokenizer, tmp_path):
    model = tiny(tmp_path / "m", tokenizer, rope=("llama3", 4.0, None))
    write_gguf(tmp_path / "m", tmp_path / "m.gguf", "f16", facts=FACTS)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    plain = 10_000.0 ** -(torch.arange(0, 16, 2) / 16)
    divided = plain / torch.tensor(tensors["rope_freqs.weight"].copy())
    torch.testing.assert_close(divided, model.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)


def test_the_sink_token_is_what_llama_cpp_puts_first(tokenizer, tmp_path):
    sunk, sink_id = with_sink_token(tokenizer)
    tiny(tmp_path / "plain", tokenizer)
    tiny(tmp_path / "sunk", sunk)
    found = {}
    for name in ("plain", "sunk"):
        write_gguf(tmp_path / name, tmp_path / f"{name}.gguf", "f16", facts=FACTS)
        found[name] = fields(tmp_path / f"{name}.gguf")
    assert found["plain"]["tokenizer.ggml.add_bos_token"] is False
    assert found["sunk"]["tokenizer.ggml.add_bos_token"] is True
    assert found["sunk"]["tokenizer.ggml.bos_token_id"] == sink_id


def test_what_llama_cpp_would_read_wrongly_is_refused_by_name(tokenizer, tmp_path):
    tiny(tmp_path / "m", tokenizer)
    config, spec = (json.loads((tmp_path / "m" / f"{name}.json").read_text()) for name in ("config", "tokenizer"))
    assert problem_of(config, spec, ("f16", "q8_0"), sink=True) is None

    def said(sink=False, spec=spec, **changes):
        return problem_of(config | changes, spec, ("q8_0",), sink) or ""

    assert "Qwen3ForCausalLM" in said(model_type="qwen3", architectures=["Qwen3ForCausalLM"])
    assert "96" not in said()
    assert "100 is not a multiple of 32" in said(intermediate_size=100)
    assert "'dynamic'" in said(rope_parameters={"rope_type": "dynamic"})
    assert "'dynamic'" in said(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert "head_dim 48 is not a multiple of 32" in said(num_attention_heads=4, head_dim=12)
    assert "attention_bias" in said(attention_bias=True)
    assert "WordLevel" in said(spec=spec | {"model": {"type": "WordLevel"}})
    for model in ({"type": "Unigram"}, {"type": "BPE", "byte_fallback": True}):
        assert "a SentencePiece tokenizer" in said(spec=spec | {"model": model, "normalizer": {"type": "Sequence"}})
    assert "Whitespace" in said(spec=spec | {"pre_tokenizer": {"type": "Whitespace"}})
    bos = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}
    assert "2 tokens before each text" in said(sink=True, spec=spec | {"post_processor": bos})
    assert said(spec=spec | {"post_processor": bos}) == ""


def test_numbers_that_float16_cannot_hold_are_refused(tokenizer, tmp_path):
    model = tiny(tmp_path / "m", tokenizer)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e5
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=r"ffn_up.* beyond 65504"):
        write_gguf(tmp_path / "m", tmp_path / "m.gguf", "f16", facts=FACTS)


STRETCHES = [("none", 1.0, None), ("linear", 4.0, None), ("yarn", 4.0, None), ("llama3", 4.0, None)]


@pytest.mark.parametrize("rope", [*STRETCHES, ("theta", 4.0, 80_000.0)], ids=lambda rope: rope[0])
@pytest.mark.parametrize("sink", [False, True])
def test_llama_cpp_itself_has_the_next_tokens_of_transformers(rope, sink, tokenizer, tmp_path):
    """Of a text, so with llama.cpp's own tokens, past the length that the stretch counts from."""
    llama_cpp = pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    if sink:
        tokenizer, _ = with_sink_token(tokenizer)
    model = tiny(tmp_path / "m", tokenizer, rope=rope)
    with torch.no_grad():  # so large that attention is sharp, and depends on positions
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.mul_(8)
        for token in range(len(tokenizer)):  # of bytes that are no text alone, llama.cpp tells nothing
            if "\ufffd" in tokenizer.decode([token]):
                model.model.embed_tokens.weight[token] = 0
    model.save_pretrained(tmp_path / "m")
    write_gguf(tmp_path / "m", tmp_path / "m.gguf", "f16", facts=FACTS)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float16).float()  # the file's rounding
    parameters = llama_cpp.CommonParams()
    parameters.model.path, parameters.n_parallel, parameters.warmup = str(tmp_path / "m.gguf"), 1, False
    parameters.n_ctx, parameters.cpuparams.n_threads = model.config.max_position_embeddings, 1
    text = TEXT * (1 if rope[0] == "none" else 3)
    server = llama_cpp.Server(parameters)
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = torch.log_softmax(model(ids).logits[0], -1)
    for prompt, length in ((text, ids.shape[1]), *((ids[0, :n].tolist(), n) for n in (2, 9, 30))):
        asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 5, "ignore_eos": True}
        answer = server.handle_completions(asked)
        assert answer["usage"]["prompt_tokens"] == length
        (content,) = answer["choices"][0]["logprobs"]["content"]
        best = expected[length - 1].topk(5)
        assert [one["id"] for one in content["top_logprobs"]] == best.indices.tolist()
        for one, value in zip(content["top_logprobs"], best.values.tolist(), strict=True):
            assert one["logprob"] == pytest.approx(value, abs=0.02)
