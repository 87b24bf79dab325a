"""Stretched rotary positions: each type against its paper's formula, through the model; and turning keys on."""

import math

import pytest
import torch
from transformers import (
    CohereConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    GraniteSWAConfig,
    GraniteSWAForCausalLM,
    InternLM3Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen3Config,
)
from transformers.models.cohere import modeling_cohere
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from longreach.attention.rope import TYPES, Rotary, check_stretched, fix_frequencies, rotate_pairs, stretched_config

TRAINED, HEAD, THETA = 64, 16, 10_000.0
PAIR_R = torch.arange(HEAD // 2, dtype=torch.float64)
PLAIN_R = THETA ** (-2 * PAIR_R / HEAD)


def small(**changes):
    return LlamaConfig(
        **{"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": TRAINED, "vocab_size": 64} | changes
    )


def table(config, positions):
    """cos and sin [T, R] of the positions, as a Llama built from the config would use them."""
    x = torch.zeros(1, 1, len(positions), HEAD)
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(x, torch.tensor([positions]))
    return cos[0, :, : HEAD // 2], sin[0, :, : HEAD // 2]


def linear(factor):
    return PLAIN_R / factor, 1.0


def dynamic(factor, length=2 * TRAINED):
    """NTK-aware: the base grows so that the slowest pair is stretched by length/trained times factor - (factor - 1)."""
    grown = THETA * (factor * length / TRAINED - (factor - 1)) ** (HEAD / (HEAD - 2))
    return grown ** (-2 * PAIR_R / HEAD), 1.0


def yarn(factor, fast=32, slow=1, trained=TRAINED):
    """arXiv:2309.00071: pairs turning over 32 times in the trained context stay, under once are stretched."""
    low, high = (HEAD * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(THETA)) for turns in (fast, slow))
    low, high = max(math.floor(low), 0), min(math.ceil(high), HEAD - 1)
    ramp_R = ((PAIR_R - low) / (high - low)).clamp(0, 1)
    return PLAIN_R / factor * ramp_R + PLAIN_R * (1 - ramp_R), 0.1 * math.log(factor) + 1


def llama3(factor):
    wave_R = 2 * math.pi / PLAIN_R
    smooth_R = ((TRAINED / wave_R - 1.0) / (4.0 - 1.0)).clamp(0, 1)
    return (1 - smooth_R) * PLAIN_R / factor + smooth_R * PLAIN_R, 1.0


@pytest.mark.parametrize("formula", [linear, dynamic, yarn, llama3])
@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_a_stretched_model_rotates_by_the_papers_formula(formula, factor):
    config = stretched_config(small(), formula.__name__, factor)
    positions = [0, 1, TRAINED - 1, TRAINED, 2 * TRAINED - 1]
    inv_freq_R, scale = formula(factor)
    angle_TR = torch.tensor(positions).double()[:, None] * inv_freq_R
    for ours, expected in zip(table(config, positions), (angle_TR.cos(), angle_TR.sin()), strict=True):
        torch.testing.assert_close(ours.double(), expected * scale, atol=2e-5, rtol=0)  # float32 angles up to 127


def test_yarns_own_choices_are_those_of_the_formula():
    own = {"beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.5, "original_max_position_embeddings": 32}
    config = stretched_config(small(), "yarn", 4.0, yarn=own)
    inv_freq_R, _ = yarn(4.0, fast=4.0, slow=0.5, trained=32)
    angle_TR = torch.arange(128).double()[:, None] * inv_freq_R
    for ours, expected in zip(table(config, list(range(128))), (angle_TR.cos(), angle_TR.sin()), strict=True):
        torch.testing.assert_close(ours.double(), expected * 1.5, atol=2e-5, rtol=0)  # float32 angles up to 127
    assert config.max_position_embeddings == 128, "the factor counts from the original length"
    with pytest.raises(
        ValueError, match="original_length 16 with factor 2 gives 32 positions, fewer than the model's 64"
    ):
        stretched_config(small(), "yarn", 2.0, yarn={"original_max_position_embeddings": 16})
    with pytest.raises(ValueError, match="original_length 100 exceeds the 64 positions of the model"):
        stretched_config(small(), "yarn", 2.0, yarn={"original_max_position_embeddings": 100})


def test_theta_changes_the_base_frequency_and_nothing_else():
    config = stretched_config(small(), "theta", 2.0, theta=300_000.0)
    expected = table(small(rope_parameters={"rope_type": "default", "rope_theta": 300_000.0}), [0, 5, 100])
    assert all(map(torch.equal, table(config, [0, 5, 100]), expected))


def test_interpolation_by_two_gives_even_positions_the_logits_of_their_half():
    torch.manual_seed(0)
    plain = LlamaForCausalLM(small(num_hidden_layers=2, initializer_range=0.3)).eval()
    config = stretched_config(plain.config, "linear", 2.0)
    stretched = LlamaForCausalLM(config).eval()
    stretched.load_state_dict(plain.state_dict())
    ids = torch.randint(0, 64, (1, 20))
    even = torch.arange(0, 40, 2)[None]
    one_text = torch.ones_like(ids)  # without a mask, positions that jump would mean packed documents
    with torch.no_grad():
        expected, got = plain(ids).logits, stretched(ids, attention_mask=one_text, position_ids=even).logits
        assert (stretched(ids).logits - expected).abs().max() > 1e-2
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)  # float32


@pytest.mark.parametrize("type", [t for t in TYPES if t != "dynamic"])
def test_the_context_grows_by_the_factor_and_the_given_config_stays(type):
    given = small()
    config = stretched_config(given, type, 1.5 if type != "none" else 1.0, theta=1e6 if type == "theta" else None)
    assert config.max_position_embeddings == (96 if type != "none" else 64)
    assert given.max_position_embeddings == 64
    assert given.rope_parameters["rope_type"] == "default"


def test_dynamic_scaling_begins_right_after_the_trained_context():
    """transformers reads the trained context from max_position_embeddings: raising it would postpone the scaling."""
    config = stretched_config(small(), "dynamic", 2.0)
    inside, outside = table(config, [TRAINED - 1]), table(config, [TRAINED - 1, TRAINED + 8])
    assert torch.equal(inside[0], table(small(), [TRAINED - 1])[0])
    assert (outside[0][0] - inside[0][0]).abs().max() > 1e-2


SHORT_AND_LONG = {"short_factor": [1.0] * (HEAD // 2), "long_factor": [1.0 + n for n in range(HEAD // 2)]}


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_fixed_frequencies_are_those_of_one_length_whatever_is_read_and_in_which_order(kind):
    rope = {"rope_type": kind, "rope_theta": THETA, "factor": 4.0}
    if kind == "longrope":
        rope |= SHORT_AND_LONG | {"original_max_position_embeddings": TRAINED}
    config = small(rope_parameters=rope)
    at, model = [5, TRAINED - 2], LlamaForCausalLM(config)
    whole_row = table(config, [*at, 2 * TRAINED - 1])
    assert (whole_row[0][:2] - table(config, at)[0]).abs().max() > 1e-2, "short inputs are rotated otherwise"
    fix_frequencies(model, 2 * TRAINED)
    for longest in (TRAINED - 1, 4 * TRAINED, TRAINED + 9):
        cos, sin = model.model.rotary_emb(torch.zeros(1), torch.tensor([[*at, longest]]))
        torch.testing.assert_close(
            (cos[0, :2, : HEAD // 2], sin[0, :2, : HEAD // 2]), (whole_row[0][:2], whole_row[1][:2])
        )
    assert model.config.rope_parameters["rope_type"] == kind, "the saved model is what it was"


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (small(), ("cubic", 2.0), "'cubic': use one of none, linear"),
        (small(), ("linear", 0.5), "rope factor is 0.5, but must be at least 1"),
        (small(), ("theta", 2.0), "rope type 'theta' needs theta"),
        (small(), ("yarn", 2.0, 1e6), "leave theta out, or use type 'theta'"),
        (stretched_config(small(), "linear", 2.0), ("yarn", 2.0), "'linear' already"),
        (GPT2Config(), ("linear", 2.0), "gpt2 has no RoPE"),
        (Gemma3TextConfig(), ("linear", 2.0), "gemma3_text has no single set"),
    ],
)
def test_what_cannot_be_stretched_is_refused(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        stretched_config(config, *arguments)


GRANITE = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
    "layer_types": ["full_attention"] * 2,
}


def test_a_theta_of_each_layer_is_stretched_too():
    config = stretched_config(GraniteSWAConfig(**GRANITE), "theta", 2.0, 7e5)
    model = GraniteSWAForCausalLM(config)
    check_stretched(model)
    expected_R = 7e5 ** (-2 * PAIR_R.float() / HEAD)
    torch.testing.assert_close(model.model.rotary_embs[0].inv_freq, expected_R)


def test_a_stretch_without_effect_is_refused():
    two = stretched_config(GraniteSWAConfig(**GRANITE, layer_rope_theta=[1e4, 5e4]), "theta", 2.0, 7e5)
    with pytest.raises(ValueError, match="rotates keys in some of its layers by"):
        check_stretched(GraniteSWAForCausalLM(two))
    without = {**GRANITE, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2}
    without |= {"mamba_n_heads": 4, "mamba_d_head": 16}
    hybrid = stretched_config(GraniteMoeHybridConfig(**without), "theta", 2.0, 7e5)
    with pytest.raises(ValueError, match="has no rotary embedding"):
        check_stretched(GraniteMoeHybridForCausalLM(hybrid))


HALVES = [
    small(),
    MistralConfig(),
    Qwen3Config(),
    InternLM3Config(),
    stretched_config(small(), "yarn", 4.0),
    GPTNeoXConfig(),
]


@pytest.mark.parametrize("config", [*HALVES, CohereConfig()], ids=lambda c: c.model_type)
def test_the_familys_layout_of_pairs_is_found(config):
    assert Rotary.of(config).interleaved == (config.model_type == "cohere")


FAMILIES = [
    (small(), modeling_llama, "LlamaRotaryEmbedding"),
    (stretched_config(small(), "llama3", 4.0), modeling_llama, "LlamaRotaryEmbedding"),
    (stretched_config(small(), "yarn", 4.0), modeling_llama, "LlamaRotaryEmbedding"),
    (GPTNeoXConfig(hidden_size=64, num_attention_heads=2), modeling_gpt_neox, "GPTNeoXRotaryEmbedding"),
    (CohereConfig(hidden_size=64, num_attention_heads=2), modeling_cohere, "CohereRotaryEmbedding"),
]


@pytest.mark.parametrize(("config", "family", "name"), FAMILIES)
def test_turning_a_rotated_key_on_equals_rotating_it_there(config, family, name):
    embedding, x = getattr(family, name)(config), torch.randn(2, 3, 4, config.hidden_size // 2)
    at_T = torch.tensor([0, 3, 40, 41])

    def at(positions):
        return family.apply_rotary_pos_emb(x, x, *embedding(x, positions[None]))[0]

    moved = Rotary.of(config).rotate(at(at_T), torch.tensor([7, 0, -39, 1]))
    torch.testing.assert_close(moved, at(at_T + torch.tensor([7, 0, -39, 1])), atol=2e-5, rtol=0)  # float32 angles


def test_the_rounding_of_far_angles_is_known_exactly():
    """A key at position 1,000,003, rotated in float32 and then put right, against float64 throughout."""
    config, at_T = small(), torch.tensor([1_000_003])
    x = torch.randn(1, 1, 1, HEAD, dtype=torch.float64)
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(x, at_T[None])
    off, _ = modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)
    rotary = Rotary.of(config)
    true = rotate_pairs(x, rotary.cos_sin(rotary.angles(at_T), x))
    assert (off - true).abs().max() > 1e-3
    right = rotate_pairs(off, rotary.cos_sin(rotary.rounding(at_T), x))
    torch.testing.assert_close(right, true, atol=1e-6, rtol=0)  # the table's cosines are float32


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "gpt2 has no RoPE"),
        (Gemma3TextConfig(), "gemma3_text rotates keys differently"),
        (stretched_config(small(), "dynamic", 2.0), "'dynamic' changes frequencies"),
    ],
)
def test_rotations_that_cannot_be_moved_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Rotary.of(config)
