"""A model folder whose weights are not those of its config is refused; every fault here once loaded silently."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_models import change_config, tiny_folder
from transformers import AutoModelForCausalLM

from longreach.training.convert import convert
from longreach.training.model import load_source
from longreach.training.weights import check_weights


@pytest.fixture
def folder(tmp_path):
    return tiny_folder(tmp_path / "model")


def rewrite(folder, change):
    """Save a model's tensors, a dict that `change` may change or replace."""
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def renamed(tensors):
    return {name.replace("model.", "other."): tensor for name, tensor in tensors.items()}


def without_mlp(tensors):
    return {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name}


def with_more(tensors):
    return {**tensors, "model.layers.2.more.weight": torch.zeros(3)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (renamed, r"21 tensors are missing \(.*, \.\.\.\); 20 tensors are unknown to the model \(other"),
        (without_mlp, r"3 tensors are missing \(model\.layers\.1\.mlp\.down_proj\.weight"),
        (with_more, r"1 tensors are unknown to the model \(model\.layers\.2\.more\.weight\)"),
    ],
)
def test_tensors_that_are_missing_or_unknown_are_named(folder, tmp_path, change, says):
    rewrite(folder, change)
    for refused in (lambda: convert(str(folder), tmp_path / "out"), lambda: load_source(str(folder))):
        with pytest.raises(ValueError, match=says):
            refused()


def test_a_folder_without_a_tokenizer_is_refused_when_it_is_converted(folder, tmp_path):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="model has no tokenizer: save the model's tokenizer there"):
        convert(str(folder), tmp_path / "out")


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"num_hidden_layers": 100_000}, "num_hidden_layers 100,000, but the weights are 20 tensors"),
        ({"num_hidden_layers": 1}, "9 tensors are unknown to the model"),
        ({"num_hidden_layers": 3}, "9 tensors are missing"),
        ({"vocab_size": 10**9}, r"1 tensors are of another size \(model.embed_tokens.weight \[64, 32\], in the config"),
        ({"num_attention_heads": 0}, "no model can be built from its config.json"),
        ({"tie_word_embeddings": False}, r"1 tensors are missing \(lm_head.weight\)"),
        ({"model_type": "nobodys"}, "no model can be built from its config.json"),
    ],
)
def test_a_config_that_is_not_the_weights_is_refused(folder, choice, says):
    change_config(folder, **choice)
    with pytest.raises(ValueError, match=says):
        check_weights(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(folder, value):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    rewrite(folder, spoil)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight contains NaN or infinity"):
        check_weights(folder)


def test_a_pointer_and_a_file_that_is_cut_short_are_no_weights(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is truncated or damaged"):
        check_weights(folder)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        check_weights(folder)
    weights.rename(folder / "consolidated.safetensors")
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        check_weights(folder)


def test_shards_a_stored_head_and_a_second_copy_pass(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    check_weights(folder)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]) == 20
    check_weights(folder)
