"""Models and texts that lie, each in a process of its own with 8 GiB more address space and 60 s.

Each is refused by name, or read as what it is. None fills the memory, hangs, runs code, or ends in a traceback.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import pickle
import resource
import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_models import change_config, tiny_folder

from longreach.training.convert import config_of, convert, known_config, source_digest
from longreach.training.corpus_recipe import CorpusRecipe
from longreach.training.documents import BadLine, read_documents

pytestmark = pytest.mark.long

LIMIT_BYTES, LIMIT_S = 8 << 30, 60
DEEP = 200_000
"""Brackets in each other, more than any reader's stack holds."""


def _bounded(task: Callable[[], str], answer: Any) -> None:
    # The fork starts with all that the test process has mapped, which alone can be more than the limit.
    mapped_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit_bytes = mapped_pages * resource.getpagesize() + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    try:
        answer.send(("read", task()))
    except ValueError as error:
        users = type(error) is ValueError or hasattr(error, "render")  # as pipelines/cli.py tells mistakes from faults
        answer.send(("refused" if users else "traceback", str(error)))
    except BaseException as error:  # noqa: BLE001 (whatever it is, the test is to show it)
        answer.send(("traceback", f"{type(error).__name__}: {error}"))


def outcome(task: Callable[[], str]) -> tuple[str, str]:
    """What a task came to in a bounded process: ("read" or "refused" or "traceback" or "killed" or "hangs", why)."""
    forks = multiprocessing.get_context("fork")
    here, there = forks.Pipe(duplex=False)
    child = forks.Process(target=_bounded, args=(task, there))
    began = time.monotonic()
    child.start()
    there.close()
    try:
        result = here.recv() if here.poll(LIMIT_S) else ("hangs", f"{time.monotonic() - began:.0f} s")
    except EOFError:
        result = ("killed", "it ended without a word")
    child.kill()
    child.join()
    return result


# Models


def config(folder: Path, **changes: Any) -> None:
    change_config(folder, **changes)


def file(folder: Path, name: str, content: str | bytes | Callable[[], str | bytes]) -> None:
    """Write a file; large content is made by a function, when it is needed."""
    made = content() if callable(content) else content
    (folder / name).write_bytes(made.encode() if isinstance(made, str) else made)


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


def link(folder: Path, name: str, target: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


def header(folder: Path, about: Any, size: int | None = None) -> None:
    """Weights with a header of one's own, and 64 bytes of numbers."""
    text = about if isinstance(about, bytes) else json.dumps(about).encode()
    length = struct.pack("<Q", len(text) if size is None else size)
    (folder / "model.safetensors").write_bytes(length + text + bytes(64))


def adapter(folder: Path, base: str) -> None:
    """An adapter's folder; without a base it is its own."""
    for path in folder.iterdir():
        path.unlink()
    file(
        folder, "adapter_config.json", json.dumps({"base_model_name_or_path": base or str(folder), "peft_type": "LORA"})
    )
    file(folder, "adapter_model.safetensors", b"")


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> Any:
        return Path.touch, (self.sprung,)


def code(folder: Path, **changes: Any) -> None:
    """A model that brings a program of its own, which leaves a file when it is imported."""
    file(folder, "evil.py", f"open({str(folder.parent / 'sprung')!r}, 'w')")
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    config(folder, auto_map=names, **changes)


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    file(folder, "pytorch_model.bin", pickle.dumps(Trap(folder.parent / "sprung")))


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
"""YAML of 500 bytes whose last value has 9 ** 10 items when it is written out."""
MODELS: dict[str, Callable[[Path], None]] = {
    "a config of brackets": partial(file, name="config.json", content="[" * DEEP),
    "a config nested too deep": partial(file, name="config.json", content='{"a":' * DEEP + "1" + "}" * DEEP),
    "a config that is a list": partial(file, name="config.json", content="[1, 2]"),
    "a config that is null": partial(file, name="config.json", content="null"),
    "an empty config": partial(file, name="config.json", content=""),
    "a config that is no text": partial(file, name="config.json", content=b"\xff\xfe\x00\x80"),
    "a config with a number of 100,000 digits": partial(
        file, name="config.json", content='{"a": ' + "9" * 100_000 + "}"
    ),
    "a config that is a pipe": partial(pipe, name="config.json"),
    "a config that is a link to an endless file": partial(link, name="config.json", target="/dev/zero"),
    "10 ** 5 layers": partial(config, num_hidden_layers=10**5),
    "layers that are a text": partial(config, num_hidden_layers="9" * 30),
    "10 ** 12 words": partial(config, vocab_size=10**12),
    "a hidden size of 10 ** 15": partial(config, hidden_size=10**15),
    "no heads": partial(config, num_attention_heads=0),
    "a negative size": partial(config, intermediate_size=-1),
    "a nan": partial(config, hidden_size=float("nan")),
    "an unknown kind": partial(config, model_type="nobody knows"),
    "quantized in an unknown way": partial(config, quantization_config={"quant_method": "evil"}),
    "quantized by a text": partial(config, quantization_config="evil"),
    "a program of a known kind": code,
    "a program of a kind of its own": partial(code, model_type="evil"),
    "a tokenizer's program": partial(
        file, name="tokenizer_config.json", content='{"auto_map": {"AutoTokenizer": ["evil.T", null]}}'
    ),
    "a tokenizer of brackets": partial(file, name="tokenizer.json", content="[" * DEEP),
    "only a pickle": only_a_pickle,
    "weights that are a pipe": partial(pipe, name="model.safetensors"),
    "weights that are a link to a key": partial(link, name="model.safetensors", target="/etc/passwd"),
    "a header of 2 ** 62 bytes": partial(header, about={}, size=2**62),
    "a header of brackets": partial(header, about=b"[" * DEEP),
    "a tensor of 10 ** 18 numbers": partial(
        header, about={"model.norm.weight": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 64]}}
    ),
    "a tensor behind the end": partial(
        header, about={"model.norm.weight": {"dtype": "F32", "shape": [16], "data_offsets": [10**15, 10**15 + 64]}}
    ),
    "an index of brackets": partial(file, name="model.safetensors.index.json", content="[" * DEEP),
    "an index without a map": partial(file, name="model.safetensors.index.json", content="{}"),
    "an index of lists": partial(file, name="model.safetensors.index.json", content='{"weight_map": {"a": ["b"]}}'),
    "an index that leads out": partial(
        file, name="model.safetensors.index.json", content='{"weight_map": {"a": "../../../../etc/passwd"}}'
    ),
    "an index that is a pipe": partial(pipe, name="model.safetensors.index.json"),
    "a card that is a bomb": partial(file, name="README.md", content=f"---\n{BOMB}license: *j\n---\n"),
    "a card of brackets": partial(file, name="README.md", content=f"---\nlicense: {'[' * 20_000}\n---\n"),
    "a card that is a pipe": partial(pipe, name="README.md"),
    "a card that is a link to a key": partial(link, name="README.md", target="/etc/passwd"),
    "a link to itself": partial(link, name="tokenizer.json", target="tokenizer.json"),
    "an adapter that is its own base": partial(adapter, base=""),
    "an adapter on markup": partial(adapter, base="<script>alert(1)</script>"),
    "an adapter on a program": partial(adapter, base="$(touch sprung); `touch sprung`"),
}
READABLE_MODELS = {
    "a program of a known kind",
    "a card that is a pipe",
    "a card that is a bomb",
    "a card of brackets",
}
"""Of these the model is taken, and what lies is not."""


def take_model(folder: Path, out: Path) -> str:
    """All that `plan` and `run` read of a base."""
    source_digest(str(folder))
    known_config(str(folder))
    config_of(str(folder))
    convert(str(folder), out)
    licence = json.loads((out / "origin.json").read_text())["licence"]
    return f"{sorted(path.name for path in out.iterdir())}, licence {licence}"


@pytest.mark.parametrize("what", MODELS)
def test_a_model_that_lies_is_refused_by_name_or_taken_without_what_lies(tmp_path: Path, what: str) -> None:
    folder = tiny_folder(tmp_path / "model")
    MODELS[what](folder)
    came_to, why = outcome(partial(take_model, folder, tmp_path / "out"))
    assert came_to == ("read" if what in READABLE_MODELS else "refused"), why
    assert "evil.py" not in why
    assert len(why) < 3000
    if came_to == "refused":
        assert str(folder) in why
    assert not list(Path.cwd().glob("sprung")) + list(tmp_path.rglob("sprung"))


# Texts


def parquet(folder: Path, name: str, columns: Any, **options: Any) -> None:
    made = columns() if callable(columns) else columns
    pq.write_table(pa.table(made), folder / name, **options)


def damaged_parquet(folder: Path, name: str, at: int, content: bytes) -> None:
    """A table whose bytes from `at` on (counted from its end) are others."""
    parquet(folder, name, {"text": ["good"] * 100})
    data = bytearray((folder / name).read_bytes())
    data[len(data) - at : len(data) - at + len(content)] = content
    (folder / name).write_bytes(data)


def nested(depth: int) -> Any:
    value: Any = ["good"]
    for _ in range(depth):
        value = [value]
    return value


MEGA = 1_000_000
TEXTS: dict[str, tuple[str, Callable[..., None]]] = {
    "a gzip bomb": ("x.txt.gz", partial(file, content=lambda: gzip.compress(bytes(50 * MEGA)))),
    "a bomb in a bomb": ("x.jsonl.gz", partial(file, content=lambda: gzip.compress(gzip.compress(bytes(50 * MEGA))))),
    "a line of 40 MB": ("x.jsonl", partial(file, content=lambda: '{"text": "' + "x" * 40 * MEGA + '"}')),
    "brackets": ("x.json", partial(file, content="[" * MEGA)),
    "a line of brackets": ("x.jsonl", partial(file, content='{"text":' * DEEP)),
    "a number of a million digits": ("x.jsonl", partial(file, content='{"text": ' + "9" * MEGA + "}")),
    "half a surrogate pair": ("x.jsonl", partial(file, content='{"text": "\\ud800"}')),
    "a name that is markup": ("<script>x.jsonl", partial(file, content="no json")),
    "a byte 0": ("x.txt", partial(file, content="text\0text")),
    "no text": ("x.txt", partial(file, content=b"\x80\x81" * 1000)),
    "a million columns": (
        "x.csv",
        partial(file, content=lambda: ",".join(f"a{n}" for n in range(MEGA)) + "\n" + "," * MEGA),
    ),
    "a table bomb": ("x.parquet", partial(parquet, columns=lambda: {"text": ["x" * 40 * MEGA]}, compression="zstd")),
    "a dictionary bomb": ("x.parquet", partial(parquet, columns=lambda: {"text": ["x" * MEGA] * 200})),
    "a table of lists": ("x.parquet", partial(parquet, columns={"text": pa.array([nested(50)])})),
    "a table of numbers": ("x.parquet", partial(parquet, columns={"text": [1, 2]})),
    "a table without a text": ("x.parquet", partial(parquet, columns={"$(touch sprung)": ["x"]})),
    "a footer of 2 ** 31 bytes": ("x.parquet", partial(damaged_parquet, at=8, content=b"\xff\xff\xff\x7f")),
    "a footer of noise": ("x.parquet", partial(damaged_parquet, at=300, content=b"\xff" * 200)),
    "a pipe": ("x.txt", pipe),
    "an endless file": ("x.txt", partial(link, target="/dev/zero")),
    "a link to itself": ("x.txt", partial(link, target="x.txt")),
}


def take_texts(folder: Path) -> str:
    """Read a folder's texts as `pack` does; return what is wrong with each entry."""
    corpus = CorpusRecipe.model_validate({"sources": [{"files": "*"}], "test": ["nothing"]})
    wrong, characters = [], 0
    for item in read_documents(corpus, folder):
        if isinstance(item, BadLine):
            wrong.append(f"{item.file}:{item.line}: {item.reason}")
        else:
            characters += sum(map(len, item.blocks()))
    return f"{characters} characters; " + "; ".join(wrong)


@pytest.mark.parametrize("what", TEXTS)
def test_a_text_that_lies_is_refused_by_name_or_said_to_be_malformed(tmp_path: Path, what: str) -> None:
    name, make = TEXTS[what]
    make(tmp_path, name=name)
    came_to, why = outcome(partial(take_texts, tmp_path))
    assert came_to in ("read", "refused"), why
    assert name in why or "finds no file" in why
    if came_to == "read":
        assert why.startswith("0 characters")
    assert not list(Path.cwd().glob("sprung")) + list(tmp_path.glob("sprung"))
