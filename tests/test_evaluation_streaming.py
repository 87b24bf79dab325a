import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from evaluating import drawn, evaluate, names_of
from tiny_models import byte_tokenizer, tiny_llama
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    FalconConfig,
    FalconForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from longreach.attention.evicting_cache import EvictingCache
from longreach.attention.sink_cache import reading_sink_cache
from longreach.evaluation.base import Background
from longreach.evaluation.blocks import Table
from longreach.evaluation.documents import Document
from longreach.evaluation.figures import Style, lines
from longreach.evaluation.scores import EvalScores
from longreach.evaluation.small_cache import streamed_nll
from longreach.evaluation.streaming import Streaming
from longreach.evaluation.streaming_page import latency_table
from longreach.training.model import with_softmax_sinks


def document(tokens=200, seed=0):
    return Document("a", "d", np.random.default_rng(seed).integers(0, 256, tokens))


def run(model=None, text=None, tokenizer=None, **choices):
    usual = {"document": "a", "tokens": 150, "cache_tokens": 24, "sink_tokens": (3,), "recompute_every": 1}
    subject = (model or tiny_llama(), tokenizer or byte_tokenizer(), [text or document()])
    return evaluate(Streaming, *subject, **usual | choices)


class Decoder:
    """StreamingLLM as its paper says it, one token after the other: keys are kept un-rotated; the cache holds the first
    `sinks` and the last `window` keys; each step rotates them by their places in the cache (or in the text) and the
    current token takes the place after them."""

    def __init__(self, model, sinks, window, positions):
        self.model, self.sinks, self.window, self.positions = model, sinks, window, positions
        self.cache = {}
        self.before = model.config._attn_implementation
        AttentionInterface.register("decoder", self.attend)
        AttentionMaskInterface.register("decoder", lambda *args, **kwargs: None)

    def attend(self, module, q, k, v, attention_mask, *, scaling, **kwargs):
        """q, k arrive un-rotated: the model is told that every token is at position 0."""
        kept = self.cache.setdefault(module.layer_idx, [])
        if len(kept) > self.sinks + self.window:
            del kept[self.sinks]
        kept.append((k, v, self.now))
        places = range(len(kept)) if self.positions == "cache" else [at for _, _, at in kept]
        places = torch.tensor([list(places)])
        keys, values = torch.cat([k for k, _, _ in kept], 2), torch.cat([v for _, v, _ in kept], 2)
        rotary = self.model.model.rotary_emb
        q, keys = q / rotary.attention_scaling, keys / rotary.attention_scaling  # of "position 0" (YaRN)
        _, keys = apply_rotary_pos_emb(keys, keys, *rotary(keys, places))
        q, _ = apply_rotary_pos_emb(q, q, *rotary(q, places[:, -1:]))
        keys, values = repeat_kv(keys, q.shape[1] // keys.shape[1]), repeat_kv(values, q.shape[1] // values.shape[1])
        scores = q @ keys.mT * scaling
        if (sink_logit := kwargs.get("s_aux")) is not None:
            scores = torch.cat([scores, sink_logit.view(1, -1, 1, 1)], -1)
        return (scores.softmax(-1)[..., : len(kept)] @ values).transpose(1, 2), None

    @torch.no_grad()
    def nll(self, ids):
        self.model.set_attn_implementation("decoder")
        found = []
        for self.now in range(len(ids) - 1):
            x, zero = torch.tensor([[ids[self.now]]]), torch.zeros(1, 1, dtype=torch.long)
            logp = self.model(x, position_ids=zero, use_cache=False).logits[0, -1].double().log_softmax(-1)
            found.append(-float(logp[ids[self.now + 1]]))
        self.model.set_attn_implementation(self.before)
        return np.array(found)


def curve(scores, way):
    return [row["nll"] for row in scores.rows if row["kind"] == "stream" and row["way"] == way]


def binned(nll):
    edges = np.linspace(0, len(nll), 25).astype(int)
    return [nll[a:b].mean() for a, b in pairwise(edges)]


@pytest.mark.parametrize("positions", ["cache", "text"])
@pytest.mark.parametrize(("way", "sinks", "window"), [("dense", 0, 999), ("window", 0, 24), ("sinks", 3, 21)])
def test_one_pass_equals_decoding_token_by_token(way, sinks, window, positions):
    """The whole curve; float32 with sums in another order: 2e-5 relative."""
    model, text = tiny_llama(), document()
    scores = run(model, text, ways=(way,), positions=(positions,))
    decoded = Decoder(model, sinks, window, positions).nll(text.ids_T[:151])
    named = "3 sinks" + ", text positions" * (positions == "text") if sinks else way
    assert curve(scores, named) == pytest.approx(binned(decoded), rel=2e-5)
    assert scores.summary[f"streaming_ppl_{named.replace(',', '').replace(' ', '_')}"] == pytest.approx(
        math.exp(decoded[24:].mean()), rel=1e-4
    )


def test_yarn_positions_in_the_cache_equal_decoding_too():
    """YaRN scales cos and sin, so a query must not be scaled twice when its rotation is taken back."""
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    model, text = tiny_llama(rope_parameters=rope), document()
    scores = run(model, text, ways=("sinks",))
    assert curve(scores, "3 sinks") == pytest.approx(
        binned(Decoder(model, 3, 21, "cache").nll(text.ids_T[:151])), rel=2e-5
    )


def test_a_sink_in_the_softmax_takes_part_in_every_way():
    model, text = with_softmax_sinks(tiny_llama()), document()
    with torch.no_grad():
        for n, layer in enumerate(model.model.layers):
            layer.self_attn.sinks.copy_(torch.tensor([0.0, 1.0, -2.0, 3.0]) + n)
    scores = run(model, text, latency_tokens=3, endurance_tokens=199)
    assert model.config._attn_implementation == "eager"
    assert all(scores.summary[f"decode_ms_{way}"] > 0 for way in ("dense", "window", "recompute", "3_sinks"))
    endured = [row["nll"] for row in scores.rows if row["kind"] == "endurance"]
    every = streamed_nll(model, text.ids_T, 3, 21, "cache", "a")
    assert np.mean(endured) == pytest.approx(np.mean(binned(every)), rel=2e-5)
    for way, sinks, window in (("window", 0, 24), ("3 sinks", 3, 21)):
        decoded = Decoder(model, sinks, window, "cache").nll(text.ids_T[:151])
        assert curve(scores, way) == pytest.approx(binned(decoded), rel=2e-5)


def test_recomputation_sees_its_window_and_nothing_else():
    model, text = tiny_llama(), document()
    scores = run(model, text, ways=("recompute",))
    alone = []
    with torch.no_grad():
        for t in range(24, 150):
            logits = model(torch.tensor(text.ids_T[t - 24 : t + 1])[None]).logits[0, -1].double()
            alone.append(-float(logits.log_softmax(-1)[text.ids_T[t + 1]]))
    assert scores.summary["streaming_ppl_recompute"] == pytest.approx(math.exp(np.mean(alone)), rel=1e-4)


def test_ways_differ_only_once_the_cache_is_full():
    scores = run(tokens=240, cache_tokens=120, text=document(300), sink_tokens=(4,))
    for way in ("window", "4 sinks"):
        assert curve(scores, way)[:12] == pytest.approx(curve(scores, "dense")[:12], rel=1e-5)
        assert abs(curve(scores, way)[14] - curve(scores, "dense")[14]) > 1e-3


def test_a_sample_of_recomputed_tokens_is_judged_beside_the_same_tokens_of_another_way():
    """100 of 800 tokens: by difference to sinks the mean is near that of all 800, and inside of its own interval."""
    model, text = tiny_llama(initializer_range=0.1), document(1000)
    whole, part = (run(model, text, tokens=840, cache_tokens=40, recompute_every=n) for n in (1, 8))
    exact, row = whole.summary["streaming_ppl_recompute"], next(r for r in part.rows if r["way"] == "recompute")
    assert row["scored"] == 100
    assert row["protocol"] == "1 token in 8, beside 3 sinks"
    assert row["ppl_low"] < exact < row["ppl_high"]
    assert row["ppl_high"] / row["ppl_low"] < 1.2
    assert "ppl_low" not in next(r for r in whole.rows if r["way"] == "recompute")


def test_several_numbers_of_sinks_are_ways_of_their_own():
    model, text = tiny_llama(), document()
    scores = run(model, text, ways=("window", "sinks"), sink_tokens=(1, 3))
    ways = {row["way"]: row for row in scores.rows if row["kind"] == "way"}
    assert {way: row["sink_tokens"] for way, row in ways.items()} == {"window": 0, "1 sink": 1, "3 sinks": 3}
    for sinks, way in ((1, "1 sink"), (3, "3 sinks")):
        assert curve(scores, way) == curve(run(model, text, ways=("sinks",), sink_tokens=(sinks,)), way)
    assert set(names_of(drawn(scores.named("m"))["streaming-m.png"])) == {*ways}


def test_further_sizes_of_the_cache_are_ways_of_their_own_on_the_same_tokens():
    """Each as if it were measured alone, but from the token on at which the greatest cache is full."""
    both = run(more_cache_tokens=(48,), sink_tokens=(1, 3), rivals=("tova",), latency_tokens=2).named("m")
    alone = run(cache_tokens=48, sink_tokens=(1, 3), rivals=("tova",))
    ways = {row["way"]: row for row in both.rows_with(kind="way")}
    for row in alone.rows_with(kind="way"):
        suffix = "" if row["way"] == "dense" else ", cache 48"
        found = ways.pop(row["way"] + suffix)
        assert (found["nll"], found["start"], found["scored"]) == (row["nll"], 48, row["scored"])
        if row["way"] == "tova":
            assert found["beside"] == "3 sinks, cache 48"
            assert found["ratio"] == row["ratio"]
    assert [(way, row["cache_tokens"], row["start"]) for way, row in ways.items()] == [
        (way, 24, 48) for way in ("window", "recompute", "1 sink", "3 sinks", "TOVA")
    ]
    assert {"streaming_ppl_3_sinks_cache_48", "decode_ms_recompute_cache_48"} <= both.summary.keys()
    (table,) = (block for block in Streaming.section({"m": both}, Style.of(["m"]), Background()).blocks
                if isinstance(block, Table) and block.columns == ["way", "24", "48"])  # fmt: skip
    assert [row[0] for row in table.rows] == ["window", "recompute", "1 sink", "3 sinks", "TOVA"]
    assert "–" not in {cell for row in table.rows for cell in row}


def test_rivals_are_ways_of_their_own_in_an_equal_cache():
    """Their perplexity is that of decoding token by token, their cache as large as a window's but for the scores."""
    model, text = tiny_llama(), document(80)
    choices = {"ways": ("window",), "tokens": 60, "rivals": ("tova", "h2o"), "positions": ("cache", "text")}
    scores = run(model, text, **choices, latency_tokens=3)
    ways = {row["way"]: row for row in scores.rows if row["kind"] == "way"}
    assert list(ways) == ["window", "TOVA", "TOVA, text positions", "H2O", "H2O, text positions"]
    assert {row["cache_tokens"] for row in ways.values()} == {24}
    assert ways["H2O, text positions"]["positions"] == "text"
    cache, nll = EvictingCache(model.config, "h2o", 24), []
    with torch.inference_mode(), reading_sink_cache(model):
        for token, following in pairwise(text.ids_T[:61]):
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].double()
            nll.append(-float(logits.log_softmax(-1)[following]))
    assert math.log(ways["H2O"]["ppl"]) == pytest.approx(np.mean(nll[24:]), rel=1e-5)
    assert scores.summary["streaming_ppl_H2O"] != scores.summary["streaming_ppl_TOVA"]
    costs = {row["way"]: row for row in scores.rows if row["kind"] == "latency"}
    assert {way: row["positions"] for way, row in costs.items()} == {"window": "cache", "TOVA": "cache", "H2O": "cache"}
    token = 2 * 2 * 2 * 8 * 4  # keys and values of two layers, two KV heads of 8, float32
    assert costs["H2O"]["cache_mib"] == pytest.approx((24 * token + 2 * 2 * 24 * 4) / 2**20)
    assert {"TOVA", "H2O"} < {*names_of(drawn(scores.named("m"))["streaming-m.png"])}
    section = Streaming.section({"m": scores.named("m")}, Style.of("m"), Background())
    assert "H2O evicts the token that all tokens have attended to least" in section.blocks[1].legend
    with pytest.raises(ValueError, match="lists a value twice"):
        run(model, text, rivals=("h2o", "h2o"))


def test_a_choice_of_rivals_or_further_texts_is_part_of_identity_only_once_it_is_made():
    assert not {"rivals", "more_documents", "more_cache_tokens"} & Streaming.Choices().identity().keys()
    assert Streaming.Choices(rivals=("tova",)).identity()["rivals"] == ["tova"]


def test_ways_are_compared_on_the_same_tokens_of_several_texts(monkeypatch):
    """The ratio to the most sinks has an interval over texts, or over pieces of a single text."""
    for module in ("streaming", "streaming_page"):
        monkeypatch.setattr(f"longreach.evaluation.{module}.PIECE_TOKENS", 20)
    model, choices = tiny_llama(), {"ways": ("dense", "window", "sinks", "recompute"), "sink_tokens": (1, 3)}
    texts = [document(), Document("b", "d", document(seed=1).ids_T), Document("c", "d", document(seed=2).ids_T)]
    usual = {"document": "a", "tokens": 150, "cache_tokens": 24, "recompute_every": 4} | choices
    scores = evaluate(Streaming, model, byte_tokenizer(), texts, more_documents=("[bx]", "c"), **usual)
    alone = [evaluate(Streaming, model, byte_tokenizer(), texts, **usual | {"document": name}) for name in "abc"]
    ways = {row["way"]: row for row in scores.rows if row["kind"] == "way"}
    for way, row in ways.items():
        of_texts = [row for one in alone for row in one.rows if (row["kind"], row["way"]) == ("way", way)]
        assert row["nll"] == pytest.approx(np.mean([one["nll"] for one in of_texts]))
        assert row["scored"] == sum(one["scored"] for one in of_texts)
        by_text = [row["nll"] for row in scores.rows if (row["kind"], row["way"]) == ("text", way)]
        assert by_text == [one["nll"] for one in of_texts]
        if way in ("dense", "window", "1 sink"):
            assert row["beside"] == "3 sinks"
            assert row["ratio"] == pytest.approx(row["ppl"] / ways["3 sinks"]["ppl"])
            logs = [math.log(one["ratio"]) for one in of_texts]
            half = 4.302653 * np.std(logs, ddof=1) / math.sqrt(3)  # Student's t, two degrees of freedom
            expected = [np.mean(logs) - half, np.mean(logs) + half]
            assert np.log([row["ratio_low"], row["ratio_high"]]) == pytest.approx(expected, rel=1e-5)
            assert of_texts[0]["ratio_low"] < of_texts[0]["ratio"] < of_texts[0]["ratio_high"]
        else:
            assert "ratio" not in row
    assert curve(scores, "window") == curve(alone[0], "window")
    assert "of a, b, c;" in scores.protocol
    table, by_text = Streaming.section({"m": scores.named("m")}, Style.of("m"), Background()).blocks[1:3]
    assert f"{ways['window']['ratio']:.4g} × (" in table.rows[1][1]
    assert "95% interval over the texts." in table.legend
    of_one = Streaming.section({"m": alone[0].named("m")}, Style.of("m"), Background()).blocks[1]
    assert "over pieces of 20 tokens of this one text." in of_one.legend
    assert [row[0] for row in by_text.rows[:2]] == ["dense\na", "window\na"]
    with pytest.raises(ValueError, match="choose a, a, which has a text twice: choose each text once"):
        run(more_documents=("*",))


def test_positions_and_meaning_of_the_sinks_are_ways_of_their_own():
    model, text = tiny_llama(), document()
    scores = run(model, text, ways=("sinks",), positions=("cache", "text"), newlines=True)
    ways = {row["way"]: row for row in scores.rows if row["kind"] == "way"}
    assert list(ways) == ["3 sinks", "3 sinks, text positions", "3 sinks, newlines"]
    replaced = Document("a", "d", np.concatenate([[byte_tokenizer()("\n").input_ids[0]] * 3, text.ids_T[3:]]))
    twin = run(model, replaced, ways=("sinks",))
    assert curve(scores, "3 sinks, newlines") == curve(twin, "3 sinks")
    assert "streaming_ppl_3_sinks_text_positions" in scores.summary


def test_latency_is_measured_while_decoding_and_only_dense_keeps_the_whole_text():
    scores = run(latency_tokens=5, tokens=150)
    rows = {row["way"]: row for row in scores.rows if row["kind"] == "latency"}
    assert list(rows) == ["dense", "window", "recompute", "3 sinks"]
    assert all(row["ms"] > 0 for row in rows.values())
    token = 2 * 2 * 2 * 8 * 4  # keys and values of two layers, two KV heads of 8, float32
    assert rows["dense"]["cache_mib"] == pytest.approx(151 * token / 2**20)
    assert rows["recompute"]["cache_mib"] == 0
    assert rows["window"]["cache_mib"] < rows["3 sinks"]["cache_mib"] < 35 * token / 2**20
    assert scores.summary["decode_ms_3_sinks"] == rows["3 sinks"]["ms"]
    with pytest.raises(ValueError, match="latency_tokens 140 and cache_tokens 24"):
        run(latency_tokens=140)


def test_latencies_say_the_length_of_each_models_text():
    models = {}
    for name, tokens in (("short", 100), ("long", 1500)):
        row = {"kind": "latency", "way": "dense", "text_tokens": tokens, "ms": 12.5, "cache_mib": 0.25}
        models[name] = EvalScores("streaming", "p", {"cache_tokens": 24}, [row], {}).named(name)
    (latencies,) = latency_table(models)
    assert latencies.columns == ["way", "short\n100 tokens", "long\n1,500 tokens"]
    assert "100" not in latencies.caption


def test_the_endurance_run_is_the_one_pass_form_over_all_documents_and_its_memory_is_flat():
    """20,000 tokens in pieces of 512 through one cache against the whole text at once; dense keys take 5 MiB."""
    model, texts = tiny_llama(), [Document(n, "d", document(10_100, seed).ids_T) for seed, n in enumerate("ab")]
    choices = {"document": "a", "tokens": 30, "cache_tokens": 24, "ways": ("sinks",)}
    scores = evaluate(Streaming, model, byte_tokenizer(), texts, endurance_tokens=20_000, **choices)
    rows = [row for row in scores.rows if row["kind"] == "endurance"]
    assert (rows[0]["start"], rows[-1]["end"], len(rows)) == (0, 20_000, 24)
    whole = streamed_nll(model, np.concatenate([d.ids_T for d in texts])[:20_001], 4, 20, "cache", "a")
    expected = [whole[row["start"] : row["end"]].mean() for row in rows]
    assert [row["nll"] for row in rows] == pytest.approx(expected, rel=1e-4)
    assert abs(scores.summary["endurance_growth_mib"]) < 1  # dense keys would be 3.5 of their 5 MiB
    section = Streaming.section({"m": scores.named("m")}, Style.of("m"), Background())
    assert section.blocks[-2].rows[0][1] == "20,000"
    assert section.blocks[-1][-1].file == "endurance.png"
    with pytest.raises(ValueError, match="endurance_tokens is 20200, but must be less than the 20200 tokens"):
        evaluate(Streaming, model, byte_tokenizer(), texts, endurance_tokens=20_200, **choices)


def test_the_models_own_first_token_is_the_first_sink_and_not_scored():
    model, text = tiny_llama(), document()
    scores = run(model, text, byte_tokenizer("<sink>"), ways=("sinks", "recompute"), sink_tokens=(1,))
    decoded = Decoder(model, 1, 23, "cache").nll(np.array([257, *text.ids_T[:151]]))[1:]
    assert curve(scores, "1 sink") == pytest.approx(binned(decoded), rel=2e-5)
    assert {row["scored"] for row in scores.rows if row["kind"] == "way"} == {126}


def test_the_model_attends_as_before_afterwards():
    model = tiny_llama()
    run(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"tokens": 200}, "a has 200 tokens, but scoring 200 tokens needs at least one more"),
        ({"document": "b"}, "b.*there are: a"),
        ({"sink_tokens": (4, 4)}, r"sink_tokens \[4, 4\] lists a value twice"),
        ({"sink_tokens": (0,)}, r"sink_tokens \[0\] must be at least 1"),
        ({"sink_tokens": (4, 24)}, "sink_tokens 24 .*cache_tokens 24"),
        ({"more_cache_tokens": (150,)}, "tokens 150 .*cache_tokens 150"),
        ({"more_cache_tokens": (3,)}, "sink_tokens 3 .*cache_tokens 3"),
        ({"more_cache_tokens": (48, 24)}, r"more_cache_tokens \[24, 48, 24\] list a size twice"),
        ({"cache_tokens": 150}, "tokens 150 .*cache_tokens 150"),
    ],
)
def test_choices_that_cannot_be_measured_are_errors_with_both_numbers(recipe, message):
    with pytest.raises(ValueError, match=message):
        run(**recipe)


def test_frequencies_that_change_with_the_length_are_refused():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    with pytest.raises(ValueError, match=r"dynamic.*151.*24"):
        run(tiny_llama(rope_parameters=rope, max_position_embeddings=64), ways=("dense", "sinks"))


def test_logits_that_are_not_finite_name_document_and_token():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    for way, token in (("dense", 1), ("recompute", 25)):
        with pytest.raises(FloatingPointError, match=f"a: .*token {token} "):
            run(model, ways=(way,))


def test_the_figure_has_a_line_a_way():
    chart = drawn(run().named("base"))["streaming-base.png"]
    assert names_of(chart) == ["dense", "window", "recompute", "3 sinks"]
    assert "base" in str(chart["title"]["text"])


@pytest.mark.parametrize(("x", "align"), [(5, "left"), (60, "right")])
def test_the_name_of_a_line_does_not_cross_the_axis(x, align):
    points = {"a": [(0, 1), (100, 2)]}
    chart = lines("a.png", "a", "", ("x", "y"), points, Style.of(points), marks={"cache full": x}).chart.to_dict()
    (mark,) = [layer["mark"] for layer in chart["layer"] if layer["mark"]["type"] == "text"]
    assert mark["align"] == align


def test_what_the_cache_cannot_do_is_refused_before_anything_is_measured():
    with pytest.raises(ValueError, match="sliding window of 64"):
        run(windowed())
    config = FalconConfig(vocab_size=260, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="FalconForCausalLM computes its attention itself"):
        run(FalconForCausalLM(config).eval())


def windowed():
    config = MistralConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=64,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()
