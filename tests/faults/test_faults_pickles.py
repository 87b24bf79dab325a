"""Pickles run code when they are opened: one that was slipped in is not opened."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from test_training_checkpoint import crash  # noqa: F401 (a fixture)
from toy_models import job, tiny_folder, train
from transformers import AutoModelForCausalLM

from longreach.training.convert import convert


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self):
        return Path.touch, (self.sprung,)


@pytest.fixture
def trap(tmp_path: Path) -> tuple[bytes, Path]:
    sprung = tmp_path / "sprung"
    content = pickle.dumps(Trap(sprung))
    pickle.loads(content)
    assert sprung.exists(), "the trap works"
    sprung.unlink()
    return content, sprung


def test_a_pickle_in_a_checkpoint_is_not_run_unless_its_manifest_vouches_for_it(tmp_path: Path, crash, trap):  # noqa: F811
    content, sprung = trap
    todo = job(tmp_path)
    crash(todo, 5)
    newest = Path(todo["work"]) / "checkpoints/step-00000004"
    for file in newest.glob("*.pt"):
        file.write_bytes(content)
    (newest / "more.pkl").write_bytes(content)
    assert train(todo).resumed_from_step == 2
    assert not sprung.exists()


def test_a_pickle_in_a_model_folder_is_never_opened(tmp_path: Path, trap):
    content, sprung = trap
    source = tiny_folder(tmp_path / "source")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (source / name).write_bytes(content)
    convert(str(source), tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not [p for p in (tmp_path / "out").iterdir() if p.read_bytes() == content]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"without adapter_model\.safetensors"):
        convert(str(adapter), tmp_path / "merged")
    assert not sprung.exists()


def test_a_pickle_named_like_a_tokenizer_is_not_copied(tmp_path: Path, trap):
    source = tiny_folder(tmp_path / "source")
    (source / "tokenizer.pkl").write_bytes(trap[0])
    convert(str(source), tmp_path / "out")
    assert not (tmp_path / "out/tokenizer.pkl").exists()
