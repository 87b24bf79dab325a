"""What each arm trains, and what it says when it cannot."""

import re

import pytest
import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from toy_models import TINY, VOCAB

from longreach.training.export import save_adapter
from longreach.training.longlora import apply_arm, trainable_parameters
from longreach.training.model import fresh_llama
from longreach.training.recipe import ArmRecipe
from longreach.training.summary import TrainableParameters

IDS = torch.arange(2, 40)[None]
NORMS = (2 * TINY.layers + 1) * TINY.hidden
EMBED = VOCAB * TINY.hidden
LORA = TINY.layers * 4 * 2 * (32 + 32 + 32 + 16 + 32 + 16 + 32 + 32) // 2  # rank 4; k and v have half the width


def arm(tune, **choices):
    return ArmRecipe(tune=tune, lora_rank=4, lora_alpha=8, **choices)


@pytest.mark.parametrize(
    ("tune", "lora", "embed", "norm"),
    [
        ("lora", LORA, 0, 0),
        ("lora+embed", LORA, EMBED, 0),
        ("lora+norm", LORA, 0, NORMS),
        ("lora+embed+norm", LORA, EMBED, NORMS),
    ],
)
def test_an_arm_trains_what_its_name_says(tune, lora, embed, norm):
    model = apply_arm(fresh_llama(TINY, VOCAB, seed=0), arm(tune))
    got = trainable_parameters(model)
    assert got == TrainableParameters(total=lora + embed + norm, lora=lora, embed=embed, norm=norm, other=0)


def test_tuning_all_trains_every_parameter_and_counts_a_tied_one_once():
    model = apply_arm(fresh_llama(TINY, VOCAB, seed=0).requires_grad_(False), arm("all"))
    got = trainable_parameters(model)
    assert got.total == sum(p.numel() for p in model.parameters())
    assert (got.embed, got.norm, got.lora) == (EMBED, NORMS, 0)


@pytest.mark.parametrize("tune", ["all", "lora", "lora+embed", "lora+norm", "lora+embed+norm"])
def test_an_arm_starts_from_the_bases_logits(tune):
    base = fresh_llama(TINY, VOCAB, seed=0)
    with torch.no_grad():
        before = base(IDS).logits
        assert torch.equal(apply_arm(base, arm(tune))(IDS).logits, before)


def test_each_kind_of_lora_is_what_peft_computes_with():
    def layer(**choices):
        return apply_arm(fresh_llama(TINY, VOCAB, seed=0), arm("lora", **choices)).base_model.model.model.layers[0]

    plain, rs, dora, pissa = (
        one.self_attn.q_proj
        for one in (layer(), layer(use_rslora=True), layer(use_dora=True), layer(init_lora_weights="pissa"))
    )
    assert (plain.scaling["default"], rs.scaling["default"]) == (8 / 4, 8 / 4**0.5)
    assert dora.lora_magnitude_vector["default"].weight.shape == (32,)
    assert not plain.lora_B["default"].weight.any()
    out = pissa.scaling["default"] * pissa.lora_B["default"].weight @ pissa.lora_A["default"].weight
    torch.testing.assert_close(pissa.base_layer.weight + out, plain.base_layer.weight)
    largest = torch.linalg.svdvals(plain.base_layer.weight)
    torch.testing.assert_close(torch.linalg.svdvals(out)[:4], largest[:4])


def test_only_trainable_parameters_get_a_gradient():
    model = apply_arm(fresh_llama(TINY, VOCAB, seed=0), arm("lora+norm"))
    model(IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == ("lora_" in name or "norm" in name), name


def of_family(name, **choices):
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, **heads, pad_token_id=0, eos_token_id=0, **choices)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize(
    ("family", "choices", "norms"),
    [
        ("Nemotron", {}, 5 * 2 * 32),
        ("StableLm", {"qk_layernorm": True}, 5 * 2 * 32 + 2 * (4 + 2) * 8),
        ("Qwen3", {"head_dim": 8}, 5 * 32 + 2 * 2 * 8),
    ],
)
def test_every_norm_trains_and_peft_loads_it_again(family, choices, norms, tmp_path):
    model = apply_arm(of_family(family, **choices), arm("lora+embed+norm"))
    assert trainable_parameters(model).norm == norms
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
        save_adapter(model, tmp_path)
        again = PeftModel.from_pretrained(of_family(family, **choices), tmp_path)
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        layers = sum(isinstance(module, BaseTunerLayer) for module in again.modules())
    assert layers == TINY.layers * 4


def test_norms_that_are_asked_for_and_not_there_are_refused():
    for tune, instead in (("lora+norm", "lora"), ("lora+embed+norm", "lora+embed")):
        said = f"tune {tune!r}: OlmoForCausalLM has no norms with weights to train: use {instead!r}"
        with pytest.raises(ValueError, match=re.escape(said)):
            apply_arm(of_family("Olmo"), arm(tune))


def test_a_norm_whose_whole_name_is_another_modules_end_is_refused():
    model = of_family("Llama")
    model.other = torch.nn.Module()
    model.other.model = torch.nn.Module()
    model.other.model.norm = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"takes other\.model\.norm for model\.norm, which trains in addition to LoRA"):
        apply_arm(model, arm("lora+norm"))


def test_a_target_module_that_the_model_lacks_is_answered_with_the_nearest_names():
    with pytest.raises(ValueError, match=r"no linear layer 'query_proj'; nearest: .*k_proj") as refused:
        apply_arm(fresh_llama(TINY, VOCAB, seed=0), arm("lora", target_modules=("query_proj",)))
    assert "lm_head" not in str(refused.value)


@pytest.mark.parametrize("tune", ["lora", "lora+embed"])
def test_the_head_is_no_target_since_the_loss_never_calls_it(tune):
    with pytest.raises(ValueError, match=r"'lm_head' is the head of LlamaForCausalLM\. The loss reads only its"):
        apply_arm(fresh_llama(TINY, VOCAB, seed=0), arm(tune, target_modules=("q_proj", "lm_head")))
