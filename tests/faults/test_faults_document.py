"""One document of 100 MB: it is streamed, so memory stays far below its size, and no token is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.drill]

LINE = " Überraschung, 日本語のテキスト — they've 12 ships\n"
MEASURE = """
import json, resource, sys
from pathlib import Path
from toy_tokenizers import toy_tokenizer
from longreach.training.corpus import pack_corpus
from longreach.training.corpus_recipe import CorpusRecipe, PackRecipe, SourceRecipe

folder, tokenizer = Path(sys.argv[1]), toy_tokenizer()

def pack(name):
    (out := folder / ("packed-" + name)).mkdir()
    corpus = CorpusRecipe(sources=(SourceRecipe(files=str(folder / name) + ".txt"),))
    pack_corpus(corpus, PackRecipe(seq_len=1024, method="concat"), tokenizer, out)

pack("small")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pack("large")
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
report = json.loads((folder / "packed-large/packed.json").read_text())
line = len(tokenizer(sys.argv[2]).input_ids)
print(json.dumps({"mib": grown / 1024, "tokens": report["document_tokens"]["train"], "line": line}))
"""


def test_a_document_of_100_mb_is_packed_in_a_fraction_of_its_size(tmp_path: Path):
    times = 100_000_000 // len(LINE.encode()) + 1
    (tmp_path / "small.txt").write_text(LINE * (times // 20), encoding="utf-8")
    (tmp_path / "large.txt").write_text(LINE * times, encoding="utf-8")
    assert (tmp_path / "large.txt").stat().st_size >= 100_000_000
    started = time.monotonic()
    run = [sys.executable, "-c", MEASURE, str(tmp_path), LINE]
    done = subprocess.run(run, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.PIPE, timeout=500)
    packed = json.loads(done.stdout.splitlines()[-1])
    print(f"{time.monotonic() - started:.0f} s, {packed['mib']:.0f} MiB more")
    assert packed["tokens"] == times * packed["line"]
    assert packed["mib"] < 100
