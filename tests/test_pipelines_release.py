"""A released model carries its attention sink: into plain transformers, tokenizer, card and caches of fixed size."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import evaluate
from test_pipelines_gate import Releases
from toy_models import VOCAB, job, packed_corpus, read_json, tiny_folder, train, training_summary
from transformers import AutoModelForCausalLM, AutoTokenizer

from longreach.attention.sink_cache import SinkCache, reading_sink_cache
from longreach.evaluation.documents import Document
from longreach.evaluation.perplexity import Perplexity
from longreach.evaluation.sinks import Sinks
from longreach.evaluation.streaming import Streaming
from longreach.training import export

SINKS = ("none", "zero", "token", "logit")
TEXT = " ".join(f"w{n}" for n in range(7, 27))
READ_BY_PLAIN_TRANSFORMERS = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

out, *folders = sys.argv[1:]
found = []
for folder in folders:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer({text!r}, return_tensors="pt").input_ids
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        last = model(ids[:, -1:], past_key_values=cache).logits
    found.append((ids, whole, last))
assert not [name for name in sys.modules if name.startswith("longreach")]
torch.save(found, out)
"""


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    return Releases(tmp_path_factory.mktemp("releases"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By sink: the folder that a short training from a base leaves, and its logits of TEXT when training ended."""
    folder, made = tmp_path_factory.mktemp("sinks"), {}
    tiny_folder(folder / "base")
    packed_corpus(folder, first_token="sink", method="concat")
    real = export.check_trained
    for sink in SINKS:
        ids, seen = torch.tensor([[VOCAB] * (sink == "token") + [*range(7, 27)]]), {}

        def spy(model, *args, ids=ids, seen=seen):
            with torch.no_grad():
                seen["logits"] = model.eval()(ids, use_cache=False).logits
            real(model, *args)

        todo = job(folder, name=sink, kind="pretrain", sink=sink, rope={})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export, "check_trained", spy)
            train(todo)
        made[sink] = todo["out"], ids, seen["logits"]
    return made


@pytest.fixture(scope="module")
def released(trained, releases):
    """By sink: the release of the trained model, without scores."""
    return {sink: releases.make(0, trained=folder)[0].path for sink, (folder, _, _) in trained.items()}


def test_plain_transformers_in_a_process_of_its_own_gives_the_training_time_logits(trained, released, tmp_path):
    """float32: with transformers' attention the sums have another order; the decoded token has its cache, too."""
    script = READ_BY_PLAIN_TRANSFORMERS.replace("{text!r}", repr(TEXT))
    arguments = [str(tmp_path / "found"), *(str(released[sink]) for sink in SINKS)]
    subprocess.run([sys.executable, "-I", "-c", script, *arguments], check=True, cwd=tmp_path)
    for sink, (ids, whole, last) in zip(SINKS, torch.load(tmp_path / "found"), strict=True):
        _, trained_ids, logits = trained[sink]
        assert torch.equal(ids, trained_ids)
        torch.testing.assert_close(whole, logits, atol=2e-6, rtol=0)
        torch.testing.assert_close(last, logits[:, -1:], atol=2e-6, rtol=0)


@pytest.mark.parametrize("sink", SINKS)
def test_every_kind_generates_in_a_cache_of_fixed_size(sink, released):
    """While all fits, what transformers' own cache gives; a prompt and single tokens alike."""
    model = AutoModelForCausalLM.from_pretrained(released[sink]).eval()
    ids = AutoTokenizer.from_pretrained(released[sink])(TEXT, return_tensors="pt").input_ids
    choices = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": -1}
    expected = model.generate(ids, **choices)
    with reading_sink_cache(model):
        assert torch.equal(model.generate(ids, past_key_values=SinkCache(model.config, 1, 50), **choices), expected)


@pytest.mark.parametrize("sink", SINKS)
def test_every_kind_is_evaluated_latencies_and_endless_streams_too(sink, released):
    model = AutoModelForCausalLM.from_pretrained(released[sink]).eval()
    tokenizer = AutoTokenizer.from_pretrained(released[sink])
    texts = [Document("a", "d", np.random.default_rng(0).integers(2, VOCAB, 64))]
    choices = {"tokens": 60, "cache_tokens": 16, "sink_tokens": (1, 4), "latency_tokens": 3, "endurance_tokens": 50}
    streaming = evaluate(Streaming, model, tokenizer, texts, **choices).summary
    assert {"streaming_ppl_window", "streaming_ppl_1_sink", "decode_ms_1_sink", "endurance_ppl"} <= streaming.keys()
    assert evaluate(Perplexity, model, tokenizer, texts, lengths=(32,), last_tokens=16).summary["ppl_32"] > 1
    heads = evaluate(Sinks, model, tokenizer, texts, lengths=(16,), texts=4, map_layers=()).rows_with(kind="head")
    assert all((row["softmax_sink"] > 0.01) == (sink in ("zero", "logit")) for row in heads)


SAID = {
    "none": "always keep the first 4 tokens in the cache (n_keep 4)",
    "zero": "Attention sink: a column of zeros in each softmax, which `GraniteSWAForCausalLM` of transformers computes",
    "token": f"Attention sink: the token `<|sink|>` (id {VOCAB}) before every text",
    "logit": "Attention sink: a learned logit for each head in each softmax, which `GraniteSWAForCausalLM`",
}


@pytest.mark.parametrize("sink", SINKS)
def test_the_card_says_how_to_serve_the_model_and_its_lines_run(sink, trained, releases):
    ways = [("dense", 0, 3.0), ("window", 0, 9.0), ("1 sink", 1, 4.0), ("1 sink, text positions", 1, 5.0)]
    rows = [
        {"kind": "way", "way": way, "sink_tokens": kept, "cache_tokens": 1024, "ppl": ppl} for way, kept, ppl in ways
    ]
    streaming = releases.scores(rows, "streaming")
    folder = releases.make(0, trained=trained[sink][0], own_streaming=streaming)[0].path
    card = (folder / "README.md").read_text()
    assert SAID[sink] in card
    assert ("Always keep that one token in the cache (n_keep 1)" in card) == (sink == "token")
    assert "Positions are counted within the cache (0, 1, 2, ... in the order of its keys), not in the text." in card
    assert "- Perplexity measured with 1,024 tokens in the cache: 9 with 0 kept, 4 with 1 kept.\n" in card
    code = "\n".join(re.findall("```python\n(.*?)```", card, re.DOTALL))
    code = code.replace("path/to/this/folder", str(folder)).replace("max_new_tokens=1000", "max_new_tokens=80")
    names = {}
    exec(code, names)
    layer, keep = names["cache"].layers[0], 1 if sink == "token" else 4
    assert keep == layer.S
    assert layer.S + layer.W + 1 == 64, "the model's own context"
    assert layer.seen > 3


def test_a_sink_token_of_the_base_is_still_told_of_after_fine_tuning(trained, releases, tmp_path):
    """Training of another kind names no sink: the tokenizer and the architecture do."""
    for sink in ("token", "logit"):
        folder = tmp_path / sink
        model, tokenizer = (kind.from_pretrained(trained[sink][0]) for kind in (AutoModelForCausalLM, AutoTokenizer))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        training_summary().write(folder)
        assert SAID[sink] in (releases.make(0, trained=folder)[0].path / "README.md").read_text()


def test_a_model_tuned_in_float32_leaves_in_its_bases_type_at_half_the_size(trained, releases):
    folder = trained["none"][0]
    out = releases.make(0, trained=folder, base_type="bfloat16")[0].path
    model = AutoModelForCausalLM.from_pretrained(out)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (out / "model.safetensors").stat().st_size < 0.6 * Path(folder, "model.safetensors").stat().st_size
    same = AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())
    assert (
        "- Weights: bfloat16, the base's type; training and evaluations used float32."
        in (out / "README.md").read_text()
    )
    assert AutoTokenizer.from_pretrained(out)(TEXT).input_ids == list(range(7, 27))


def test_gguf_files_stand_beside_the_folder_and_the_card_says_how_to_stream(releases):
    out = releases.make(0, gguf=("f16", "q8_0"))[0].path
    weights = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for kind, rounding in (("f16", 2.0**-11), ("q8_0", 1 / 254 + 2.0**-10)):  # of 11 bits, of 127 steps and a scale
        file = f"weekly-arm-{kind}.gguf"
        found = AutoModelForCausalLM.from_pretrained(out, gguf_file=file, dtype=torch.float32).state_dict()
        for name, value in weights.items():
            assert float((found[name] - value).abs().max()) <= rounding * float(value.abs().max()), name
        assert f"- `{file}`: the same model in {kind}" in (out / "README.md").read_text()
    length = read_json(out / "config.json")["max_position_embeddings"]
    command = f"llama-cli -m weekly-arm-f16.gguf --ctx-size {length} --context-shift --keep 4\n"
    assert command in (out / "README.md").read_text()
