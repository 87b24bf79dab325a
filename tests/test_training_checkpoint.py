"""Resuming is bitwise, damage is noticed, and what leaves training loads in plain transformers and plain peft."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from ranks import run_spawned
from safetensors.torch import load_file
from torch.nn.functional import dropout
from toy_models import TINY, VOCAB, change_config, job, packed_corpus, read_json, tiny_folder, train
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from longreach.infra.errors import DiskFull
from longreach.training import export
from longreach.training.checkpoint import Checkpoints, newest_valid, problem
from longreach.training.export import check_trained, merge_adapter, tensor_digests
from longreach.training.longlora import apply_arm
from longreach.training.model import fresh_llama, load_model
from longreach.training.recipe import ArmRecipe, RopeRecipe
from longreach.training.row_order import RowOrder
from longreach.training.summary import TrainingSummary

STRETCH = RopeRecipe(type="linear", factor=2.0)
S2 = {"pattern": "shifted_sparse", "group_tokens": 8}
IDS = torch.arange(2, 40)[None]


def logged(todo):
    return [json.loads(line) for line in (Path(todo["out"]) / "metrics.jsonl").read_text().splitlines()]


def losses(todo):
    return [row["loss"] for row in logged(todo)]


def weights(todo):
    return load_file(next(Path(todo["out"]).glob("*.safetensors")))


def assert_identical(one, other):
    assert losses(one) == losses(other)
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def crash(monkeypatch):
    """Training of `todo` dies when it comes to a step (counted from 0)."""

    def crash_at(todo, step):
        def for_rank(self, at, *args, real=RowOrder.for_rank):
            if at == step:
                raise KeyboardInterrupt
            return real(self, at, *args)

        with monkeypatch.context() as patch:
            patch.setattr(RowOrder, "for_rank", for_rank)
            with pytest.raises(KeyboardInterrupt):
                train(todo)

    return crash_at


@pytest.mark.parametrize("tune", ["all", "lora+embed+norm"])
@pytest.mark.parametrize("another_attempt", [False, True])
def test_resume_is_bitwise_identical(tmp_path, crash, tune, another_attempt):
    arm = {"tune": tune, "attention": S2}
    whole = job(tmp_path, name="whole", arm=arm)
    train(whole)
    stopped = job(tmp_path, name="stopped", arm=arm)
    crash(stopped, 5)
    if another_attempt:
        stopped = job(tmp_path, name="again", arm=arm, earlier=(stopped["work"],))
    assert train(stopped).resumed_from_step == 4
    assert_identical(whole, stopped)


SETTINGS = {
    "ZeRO 0": {"resources": {"zero_stage": 0}},
    "ZeRO 1": {"resources": {"zero_stage": 1}},
    "ZeRO 3": {"resources": {"zero_stage": 3}},
    "bfloat16": {"resources": {"dtype": "bfloat16"}},
    "bfloat16, ZeRO 0": {"resources": {"dtype": "bfloat16", "zero_stage": 0}, "optim": {"weight_decay": 0.1}},
    "bfloat16, ZeRO 3": {"resources": {"dtype": "bfloat16", "zero_stage": 3}},
    "activation checkpointing": {"resources": {"activation_checkpointing": True}},
    "8 rows accumulated": {"optim": {"global_batch_tokens": 256}},
    "2 rows at a time": {"optim": {"global_batch_tokens": 256}, "resources": {"micro_batch_rows": 2}},
    "wsd, weight decay": {"optim": {"schedule": "wsd", "decay_fraction": 0.5, "weight_decay": 0.1}},
    "another clip": {"optim": {"clip_norm": 0.01, "beta2": 0.9}},
}
"""Settings in which training goes on exactly; dropout has a test of its own, below."""
TIMES = {"seconds", "tokens_per_s", "phases", "mfu"}


@pytest.mark.long
@pytest.mark.parametrize("setting", SETTINGS)
def test_resume_is_bitwise_identical_in_every_setting(tmp_path, crash, setting):
    choices = SETTINGS[setting]
    whole, stopped = (job(tmp_path, name=name, **{k: dict(v) for k, v in choices.items()}) for name in ("whole", "cut"))
    train(whole)
    crash(stopped, 5)
    assert train(stopped).resumed_from_step == 4
    assert_identical(whole, stopped)
    for row, again in zip(logged(whole), logged(stopped), strict=True):
        for key in row.keys() - TIMES:
            assert row[key] == again[key]


def test_dropout_goes_on_bit_by_bit_as_if_training_had_not_been_stopped(tmp_path, crash, monkeypatch):
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x, real=LlamaMLP.forward: dropout(real(self, x), 0.3))
    whole, stopped = job(tmp_path, name="whole"), job(tmp_path, name="stopped")
    train(whole)
    crash(stopped, 5)
    torch.rand(7)  # another process has drawn other numbers before
    assert train(stopped).resumed_from_step == 4
    assert_identical(whole, stopped)


def test_frequencies_that_depend_on_the_length_do_not_remember_what_was_read_before(tmp_path, crash):
    """Dynamic NTK in packed rows of 16, twice the trained length. The step after resuming reads documents up to 11."""
    choices = {"rope": RopeRecipe(type="dynamic", factor=2.0), "seed": 23}
    whole, stopped = (job(tmp_path, name=name, optim={"global_batch_tokens": 32}, **choices) for name in ("a", "b"))
    change_config(tmp_path / "base", max_position_embeddings=8)
    train(whole)
    crash(stopped, 5)
    assert train(stopped).resumed_from_step == 4
    assert_identical(whole, stopped)


def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, crash):
    whole, stopped = job(tmp_path, name="whole"), job(tmp_path, name="stopped")
    train(whole)
    crash(stopped, 5)
    newest = Path(stopped["work"]) / "checkpoints/step-00000004"
    state = next(newest.glob("*model_states.pt"))
    flipped = bytearray(state.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    state.write_bytes(flipped)
    summary = train(stopped)
    assert summary.resumed_from_step == 2
    assert summary.notes == (f"{newest} passed over: {state.name} is damaged",)
    assert_identical(whole, stopped)


def test_a_checkpoint_that_was_never_finished_is_not_seen_and_goes(tmp_path, crash):
    todo = job(tmp_path)
    crash(todo, 3)
    folder = Path(todo["work"]) / "checkpoints"
    (folder / "step-00000002").rename(folder / ".draft-step-00000002")
    (folder / ".draft-step-00000099").mkdir()  # no later checkpoint takes this one's place
    assert train(todo).resumed_from_step == 0
    assert not list(folder.glob(".draft*"))


def test_a_checkpoint_of_another_recipe_is_not_resumed_from(tmp_path, crash):
    todo = job(tmp_path)
    crash(todo, 3)
    path = Path(todo["work"]) / "checkpoints/step-00000002"
    identity = read_json(path / "checkpoint.json")["identity"]
    assert problem(path, identity=identity) is None
    assert problem(path, identity="other") == "it belongs to another recipe"
    changed = job(tmp_path, optim={"learning_rate": 1e-3})
    assert train(changed).resumed_from_step == 0


def test_the_newest_of_all_attempts_wins_and_a_missing_file_disqualifies(tmp_path, crash):
    first, second = job(tmp_path, name="first"), job(tmp_path, name="second")
    crash(first, 5)
    crash(second, 3)
    folders = [Path(todo["work"]) / "checkpoints" for todo in (second, first)]
    identity = read_json(folders[0] / "step-00000002/checkpoint.json")["identity"]
    assert newest_valid(folders, identity=identity) == (folders[1] / "step-00000004", [])
    next((folders[1] / "step-00000004").glob("*optim_states.pt")).unlink()
    path, passed_over = newest_valid(folders, identity=identity)
    assert path == folders[0] / "step-00000002"
    assert len(passed_over) == 1


def test_only_the_last_checkpoints_are_kept(tmp_path):
    todo = job(tmp_path, resources={"checkpoint_every_steps": 1, "keep_last": 2})
    train(todo)
    kept = sorted(p.name for p in (Path(todo["work"]) / "checkpoints").glob("step-*"))
    assert kept == ["step-00000004", "step-00000005"]


def test_a_damaged_checkpoint_of_a_later_step_does_not_drive_out_the_one_just_written(tmp_path, crash):
    todo = job(tmp_path)
    crash(todo, 5)
    folder = Path(todo["work"]) / "checkpoints"
    next((folder / "step-00000004").glob("*model_states.pt")).write_bytes(b"")
    again = job(tmp_path, resources={"checkpoint_every_steps": 3, "keep_last": 1})
    crash(again, 4)
    assert [path.name for path in folder.glob("step-*")] == ["step-00000003"]
    assert train(again).resumed_from_step == 3


WORLDS = [(1, 2, 1), (2, 2, 1), (2, 1, 2), (3, 2, 1), (3, 1, 2), (0, 2, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "before", "after"), WORLDS, ids=str)
def test_another_number_of_ranks_goes_on_with_the_same_rows(tmp_path, zero_stage, before, after):
    """Through DeepSpeed's universal checkpoint; the ranks' gradients are then added in another order."""
    arm = {"tune": "lora+embed+norm", "embedding_learning_rate": 1e-3}
    one = job(tmp_path, name="one", arm=arm, resources={"workers": before, "zero_stage": zero_stage})
    on_ranks(one, before, tmp_path)  # the attempt that is continued left its checkpoint after step 4 of 6
    other = job(
        tmp_path, name="other", arm=arm, resources={"workers": after, "zero_stage": zero_stage}, earlier=[one["work"]]
    )
    on_ranks(other, after, tmp_path)
    assert TrainingSummary.read(other["out"]).resumed_from_step == 4
    rows = [(Path(todo["out"]) / "metrics.jsonl").read_text().splitlines() for todo in (one, other)]
    for a, b in zip(*([json.loads(line) for line in lines] for lines in rows), strict=True):
        assert a["rows"] == b["rows"]
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-6)  # measured: 1e-7 in float32
    assert not (Path(other["work"]) / "checkpoints/.universal").exists(), "the converted copy is gone"


def on_ranks(todo, world, folder):
    (folder / "rendezvous").unlink(missing_ok=True)
    run_spawned("longreach.training.loop:train", todo, world=world, folder=folder)


def test_another_zero_stage_or_dtype_is_refused_with_both_values(tmp_path):
    one = job(tmp_path, name="one")
    train(one)
    for choice, said in (
        ({"zero_stage": 3}, "zero_stage is 3, but the checkpoint .*step-00000004 was written with 2"),
        ({"dtype": "bfloat16"}, "dtype is bfloat16, but the checkpoint .*step-00000004 was written with float32"),
    ):
        with pytest.raises(ValueError, match=rf"resources\.{said}: use that value"):
            train(job(tmp_path, name="other", earlier=[one["work"]], resources=choice))


def test_a_checkpoint_of_an_earlier_version_that_names_no_dtype_is_resumed_from(tmp_path, crash):
    todo = job(tmp_path)
    crash(todo, 3)
    manifest = Path(todo["work"]) / "checkpoints/step-00000002/checkpoint.json"
    about = read_json(manifest)
    assert about.pop("dtype") == "float32"
    manifest.write_text(json.dumps(about))
    assert train(todo).resumed_from_step == 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tune", ["lora", "lora+embed", "lora+norm", "lora+embed+norm"])
def test_an_adapter_loads_in_plain_peft_with_the_trained_logits(tmp_path, monkeypatch, tune, tied):
    tiny_folder(tmp_path / "base", tied=tied)
    seen = {}
    real = check_trained

    def spy(model, start, steps):
        with torch.no_grad():
            seen["logits"] = model.eval()(IDS, use_cache=False).logits
        real(model, start, steps)

    monkeypatch.setattr("longreach.training.export.check_trained", spy)
    packed_corpus(tmp_path)
    todo = job(tmp_path, arm={"tune": tune})
    train(todo)
    base, _ = load_model(tmp_path / "base", rope=STRETCH)
    plain = PeftModel.from_pretrained(base, todo["out"]).eval()
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, seen["logits"])


@pytest.mark.parametrize("dora", [False, True])
def test_adapter_files_have_the_names_that_peft_itself_would_write(tmp_path, dora):
    todo = job(tmp_path, arm={"tune": "lora+embed+norm", "use_dora": dora})
    train(todo)
    names = ["embed_tokens", "input_layernorm", "norm", "post_attention_layernorm"]
    config = LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], modules_to_save=names)
    config.ensure_weight_tying, config.use_dora = True, dora
    get_peft_model(fresh_llama(TINY, VOCAB, seed=0), config).save_pretrained(tmp_path / "peft")
    theirs = {k: v.shape for k, v in load_file(tmp_path / "peft/adapter_model.safetensors").items()}
    assert {k: v.shape for k, v in weights(todo).items()} == theirs


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tune", ["lora", "lora+embed+norm"])
def test_merged_logits_equal_adapter_logits_and_the_stretch_travels(tmp_path, tune, tied):
    tiny_folder(tmp_path / "base", tied=tied)
    packed_corpus(tmp_path)
    todo = job(tmp_path, arm={"tune": tune, "attention": S2})
    train(todo)
    merged = merge_adapter(tmp_path / "base", Path(todo["out"]), tmp_path / "merged", rope=STRETCH)
    assert merged["merge_error"] < 1e-5
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapter = PeftModel.from_pretrained(load_model(tmp_path / "base", rope=STRETCH)[0], todo["out"]).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, adapter(IDS).logits, rtol=1e-5, atol=1e-5)
    assert plain.config.rope_parameters["rope_type"] == "linear"
    assert plain.config.rope_parameters["factor"] == 2.0
    assert plain.config.max_position_embeddings == 128
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied


KNOBS = [
    {"use_dora": True},
    {"use_rslora": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa", "lora_rank": 24},  # k and v have 16 outputs
    {"lora_plus_ratio": 16.0},
    {"use_dora": True, "use_rslora": True, "init_lora_weights": "pissa", "lora_plus_ratio": 4.0},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_what_leaves_training_is_what_was_trained_whatever_the_kind_of_lora(tmp_path, monkeypatch, knobs):
    trained = []

    def remember(model, out, real=export.save_adapter):
        with torch.no_grad():
            trained.append(model.eval()(IDS, use_cache=False).logits)
        real(model, out)

    monkeypatch.setattr(export, "save_adapter", remember)
    arm = {"tune": "lora+norm", "lora_rank": 4, "lora_alpha": 8} | knobs
    todo = job(tmp_path, arm=arm, optim={"learning_rate": 1e-2}, resources={"zero_stage": 0})
    train(todo)
    merged = merge_adapter(tmp_path / "base", Path(todo["out"]), tmp_path / "merged", rope=STRETCH)
    assert merged["merge_error"] < 1e-5
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    untrained, _ = load_model(tmp_path / "base", rope=STRETCH)
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, trained[0], rtol=1e-4, atol=1e-5)  # float32
        assert (untrained(IDS).logits - trained[0]).abs().max() > 1e-2, "there was something to lose"


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_every_kind_of_lora_learns_the_same_on_sharded_weights(tmp_path, knobs):
    arm = {"tune": "lora", "lora_rank": 4, "lora_alpha": 8} | knobs
    whole = job(tmp_path, name="whole", arm=arm, resources={"zero_stage": 0})
    sharded = job(tmp_path, name="sharded", arm=arm, resources={"zero_stage": 3})
    train(whole)
    train(sharded)
    assert losses(sharded) == pytest.approx(losses(whole), abs=2e-5)  # of about 4, in float32
    ours, theirs = weights(sharded), weights(whole)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)  # AdamW divides by small numbers


@pytest.mark.parametrize("rs", [False, True])
def test_a_pissa_adapter_leaves_as_plain_lora_for_the_untouched_base(tmp_path, rs):
    arm = {"tune": "lora", "lora_rank": 4, "lora_alpha": 8, "init_lora_weights": "pissa", "use_rslora": rs}
    todo = job(tmp_path, arm=arm, resources={"zero_stage": 0})
    train(todo)
    merge_adapter(tmp_path / "base", Path(todo["out"]), tmp_path / "merged", rope=STRETCH)
    adapter, config = weights(todo), read_json(Path(todo["out"]) / "adapter_config.json")
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    layer = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{layer}.lora_{x}.weight"] for x in "AB")
    scale = config["lora_alpha"] / (8**0.5 if rs else 8)
    torch.testing.assert_close(base[f"{layer}.weight"] + scale * b @ a, merged[f"{layer}.weight"])
    assert (base[f"{layer}.weight"] - merged[f"{layer}.weight"]).abs().max() < 0.1, "nothing was left taken out"


def test_resuming_takes_the_same_out_of_the_base_again(tmp_path, crash):
    arm = {"tune": "lora"} | KNOBS[-1]
    whole, stopped = (job(tmp_path, name=name, arm=arm) for name in ("whole", "stopped"))
    train(whole)
    crash(stopped, 5)
    assert train(stopped).resumed_from_step == 4
    assert_identical(whole, stopped)


def test_a_merge_that_loses_the_adapter_is_refused(tmp_path, monkeypatch):
    todo = job(tmp_path, arm={"tune": "lora"}, optim={"learning_rate": 0.1})
    train(todo)
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(RuntimeError, match="logits differ by"):
        merge_adapter(tmp_path / "base", Path(todo["out"]), tmp_path / "merged", rope=STRETCH)


def test_a_trainable_tensor_that_did_not_move_is_an_error():
    model = apply_arm(fresh_llama(TINY, VOCAB, seed=0), ArmRecipe(tune="lora+norm"))
    start = tensor_digests(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "layers.1.input_layernorm" not in name:
                p.add_(0.1)
    with pytest.raises(RuntimeError, match=r"0 are empty or not finite and 1 unchanged .*layers.1.input_layernorm"):
        check_trained(model, start, 2)
    dict(model.named_parameters())["base_model.model.model.layers.1.input_layernorm.weight"].data.add_(0.1)
    check_trained(model, start, 2)


def test_steps_that_bfloat16_rounds_away_are_an_error_and_larger_ones_are_not(tmp_path):
    bf16 = {"dtype": "bfloat16"}
    arm = {"arm": {"tune": "all"}}
    with pytest.raises(RuntimeError, match=r"20 unchanged .* bfloat16 rounds such small steps away"):
        train(job(tmp_path, optim={"steps": 2, "learning_rate": 1e-9}, resources=bf16, **arm))
    train(job(tmp_path, name="larger", optim={"steps": 2, "learning_rate": 1e-3}, resources=bf16, **arm))


def test_full_fine_tuning_leaves_a_plain_model_with_the_stretch_and_the_tokenizer(tmp_path):
    todo = job(tmp_path)
    train(todo)
    shutil.rmtree(tmp_path / "base")
    model, tokenizer = load_model(todo["out"])
    assert model.config.rope_parameters["factor"] == 2.0
    assert tokenizer("w7").input_ids == [7]


def test_a_quota_that_is_used_up_is_called_full_by_name_although_the_disk_has_room(tmp_path, monkeypatch):
    class Engine:
        def save_checkpoint(self, *_, **__):
            raise RuntimeError("PytorchStreamWriter failed writing file")

    def write():
        Checkpoints._write(SimpleNamespace(folder=tmp_path), Engine(), tmp_path / "draft", 3)

    def over_quota(_):  # NFS says so when a file is synced or closed
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with pytest.raises(RuntimeError, match="PytorchStreamWriter"):
        write()
    monkeypatch.setattr(os, "fsync", over_quota)
    with pytest.raises(
        DiskFull, match=r"No space left for the checkpoint after step 3 \(\d+ MiB free, or less under a"
    ):
        write()
