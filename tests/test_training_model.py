"""Models as training gets them: what the folder says, stretched, in agreement with their tokenizer."""

import json

import pytest
import torch
from toy_models import TINY, VOCAB, tiny_folder, tiny_tokenizer
from transformers import BartConfig, BartForCausalLM

from longreach.pipelines.artifacts import ModelCheckpoint
from longreach.pipelines.stages import StretchRecipe, stretch
from longreach.training.export import check_saves
from longreach.training.model import describe, fit_embeddings, fresh_llama, load_model
from longreach.training.recipe import RopeRecipe


def test_a_folder_loads_with_the_same_logits_as_the_model_that_was_saved(tmp_path):
    ids = torch.arange(2, 40)[None]
    model, tokenizer = load_model(tiny_folder(tmp_path))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fresh_llama(TINY, VOCAB, seed=0)(ids).logits)
    assert tokenizer("w5 w6").input_ids == [5, 6]


def test_a_linear_stretch_gives_each_position_half_its_angle(tmp_path):
    plain, _ = load_model(tiny_folder(tmp_path))
    stretched, _ = load_model(tmp_path, rope=RopeRecipe(type="linear", factor=2.0))
    x, positions = torch.zeros(1, 32, 32), torch.arange(0, 64, 2)[None]
    for ours, reference in zip(
        stretched.model.rotary_emb(x, positions), plain.model.rotary_emb(x, positions // 2), strict=True
    ):
        torch.testing.assert_close(ours, reference)
    assert stretched.config.max_position_embeddings == 2 * plain.config.max_position_embeddings


def test_yarns_choices_reach_the_config_and_the_bases_fingerprints_stay_without_them(tmp_path):
    rope = RopeRecipe(type="yarn", factor=2, beta_fast=16, attention_factor=1.2, original_length=64)
    config = load_model(tiny_folder(tmp_path), rope=rope)[0].config
    assert {"beta_fast": 16, "attention_factor": 1.2}.items() <= config.rope_parameters.items()
    assert rope.about() == "RoPE yarn × 2, beta_fast 16, attention_factor 1.2, original_max_position_embeddings 64"
    assert RopeRecipe(type="yarn", factor=2).identity() == {"type": "yarn", "factor": 2.0, "theta": None}


def test_a_stretch_travels_in_the_saved_config(tmp_path):
    tiny_folder(tmp_path / "base")
    stretched, tokenizer = load_model(tmp_path / "base", rope=RopeRecipe(type="theta", theta=3e5, factor=2.0))
    stretched.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = load_model(tmp_path / "saved")
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, stretched(ids).logits)


@pytest.mark.parametrize("trained", [{"type": "linear", "factor": 2}, {"type": "theta", "theta": 3e5, "factor": 2}])
@pytest.mark.parametrize("later", [{"type": "linear", "factor": 4}, {"type": "yarn", "factor": 4}, {}])
def test_a_variant_has_its_arms_weights_and_the_whole_stretch_counted_from_the_base(tmp_path, trained, later):
    base, arm, out = tiny_folder(tmp_path / "base"), tmp_path / "arm", tmp_path / "out"
    model, tokenizer = load_model(base, rope=RopeRecipe(**trained))
    model.save_pretrained(arm)
    tokenizer.save_pretrained(arm)
    before = (arm / "config.json").read_bytes()
    out.mkdir()
    facts = stretch(ModelCheckpoint(arm, {}), ModelCheckpoint(base, {}), recipe=StretchRecipe(rope=later), out=out)
    variant, expected = load_model(out)[0], load_model(base, rope=RopeRecipe(**later))[0]
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        assert torch.equal(variant(ids).logits, expected(ids).logits)
    assert facts["context_length"] == expected.config.max_position_embeddings
    assert (arm / "config.json").read_bytes() == before, "the arm's own files stay as they are"
    assert (out / "model.safetensors").samefile(arm / "model.safetensors")


def test_weights_come_in_the_asked_type(tmp_path):
    model, _ = load_model(tiny_folder(tmp_path), dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_stay_tied_or_untied(tmp_path, tied):
    model, _ = load_model(tiny_folder(tmp_path, tied=tied))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path):
    tiny_folder(tmp_path)
    tiny_tokenizer(VOCAB + 3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 67 tokens, but the embedding has 64 rows"):
        load_model(tmp_path)


def test_a_model_with_an_encoder_is_refused(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    BartForCausalLM(BartConfig(vocab_size=VOCAB, max_position_embeddings=16, **sizes, **heads)).save_pretrained(
        tmp_path
    )
    tiny_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"is_encoder_decoder": True})
    )  # as models on hubs have it
    with pytest.raises(ValueError, match="bart is an encoder-decoder model: use a decoder-only model"):
        load_model(tmp_path)


def test_describe_counts_what_the_model_has(tmp_path):
    facts = describe(tiny_folder(tmp_path))
    model = fresh_llama(TINY, VOCAB, seed=0)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert (facts["layers"], facts["heads"], facts["kv_heads"], facts["head_dim"]) == (2, 4, 2, 8)
    assert (facts["vocab"], facts["context_length"], facts["architecture"]) == (VOCAB, 64, "LlamaForCausalLM")


def test_a_tiny_models_weights_depend_on_its_seed_alone():
    torch.manual_seed(123)
    first = fresh_llama(TINY, VOCAB, seed=7).state_dict()
    torch.manual_seed(456)
    second, other = fresh_llama(TINY, VOCAB, seed=7).state_dict(), fresh_llama(TINY, VOCAB, seed=8).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_get_the_mean_embedding_and_old_logits_do_not_move(tmp_path, tied):
    model, _ = load_model(tiny_folder(tmp_path, tied=tied))
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
        assert fit_embeddings(model, tiny_tokenizer(VOCAB + 1)) == 1
        after = model(ids).logits
    assert torch.equal(after[..., :VOCAB], before)
    weight = model.get_input_embeddings().weight
    torch.testing.assert_close(weight[VOCAB], weight[:VOCAB].mean(0))
    assert (model.lm_head.weight is weight) == tied
    assert fit_embeddings(model, tiny_tokenizer(VOCAB + 1)) == 0


def test_a_new_token_on_an_unused_row_of_the_base_gets_the_mean_of_the_rows_in_use(tmp_path):
    """Qwen and Pythia have more rows than tokens."""
    model, _ = load_model(tiny_folder(tmp_path))
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[VOCAB - 4 :] = 0
    mean = weight[: VOCAB - 4].mean(0)
    known, tokenizer = tiny_tokenizer(VOCAB - 4).get_vocab(), tiny_tokenizer(VOCAB - 3)
    assert fit_embeddings(model, tokenizer, known) == 0
    torch.testing.assert_close(weight[VOCAB - 4], mean)
    assert not weight[VOCAB - 3 :].any()
    assert fit_embeddings(model, tiny_tokenizer(VOCAB + 1), known) == 1
    torch.testing.assert_close(model.get_input_embeddings().weight[[VOCAB - 1, VOCAB]], mean.expand(2, -1))


@pytest.mark.parametrize(
    ("fault", "kind"), [(OSError(28, "No space left on device"), OSError), (KeyError("lm_head"), ValueError)]
)
def test_a_model_that_cannot_be_saved_is_refused_before_training_and_a_full_disk_is_not_its_fault(
    tmp_path, monkeypatch, fault, kind
):
    model = fresh_llama(TINY, VOCAB, seed=0)

    def fail(folder):
        raise fault

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(kind):
        check_saves(model, tiny_tokenizer(), tmp_path / "untrained")
    assert not (tmp_path / "untrained").exists()
