"""The script for a GPU, rehearsed on a CPU with tiny shapes, so that the first minute on a GPU is used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu"


def rehearse(out, *options):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--tiny", "--out", out, *options], capture_output=True, text=True, check=False
    )
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return done, rows


def test_every_section_runs_to_its_end_on_a_cpu(tmp_path):
    done, rows = rehearse(tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert list(dict.fromkeys(row["section"] for row in rows)) == ["right", "fast", "steps", "decode", "real"]
    assert not [row for row in rows if "left_out" in row or row["what"].startswith("WRONG")]
    compared = {row["what"]: row for row in rows if "compared" in row}
    assert all(row["compared"] and not row["wrong"] for row in compared.values())
    assert "== real: done" in done.stdout
    assert "DeepSpeed ZeRO 0 over a plain loop" in done.stdout.partition("== real")[2]


def test_a_section_that_fails_leaves_its_traceback_and_the_next_one_runs(tmp_path):
    """A file stands where the section wants a folder for its work."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "fast").write_text("in the way")
    done, rows = rehearse(tmp_path, "--only", "fast,decode")
    assert done.returncode == 1
    assert "FileExistsError" in (tmp_path / "fast.error.txt").read_text()
    assert {row["section"] for row in rows} == {"decode"}
    assert "== fast: failed, exit code 1: see fast.error.txt" in done.stdout
    assert "== decode: done" in done.stdout
