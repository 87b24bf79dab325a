"""Read text, JSON, CSV and Parquet files, also compressed ones, one entry at a time.

Only a .json file is loaded as a whole. SourceRecipe.max_piece_chars limits the size of a piece in
memory, and max_growth the size of a decompressed file. An entry or file that cannot be read yields
a Malformed with the reason in its place and never stops the reading. This module does not import
torch, and imports pyarrow only for files that need it.

    from longreach.training.readers import read_records
    list(read_records(Path("chats.jsonl.gz"), SourceRecipe(files="chats.jsonl.gz"), lambda columns: columns))

    pytest tests/test_training_documents.py
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from longreach.training.corpus_recipe import SourceRecipe

BLOCK_BYTES = 1 << 20
SMALL_GROWTH = 16 << 20
"""Bytes to which any compressed file may grow: a small file of repeated lines is no attack."""
BATCH_ROWS = 16  # rows of a Parquet file in memory at a time
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark is its beginning
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Encodings by the byte order mark at the start of a file. These codecs strip the mark."""
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""Exceptions raised when a file cannot be read or does not have the format of its suffix."""


class Malformed(str):
    """The reason why an entry, or the rest of a file, cannot be read."""


def _open_zst(path: Path) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(str(path), "zstd")


COMPRESSED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}


def kind_of(path: Path) -> tuple[str, str]:
    """Return a file's stem and lower-case suffix: ("notes", ".txt") for `notes.TXT.gz`."""
    if path.suffix.lower() in COMPRESSED:
        path = path.with_suffix("")
    return path.stem, path.suffix.lower()


class _Growing(io.RawIOBase):
    """The content of a compressed file. Reading raises ValueError beyond max_growth."""

    def __init__(self, path: Path, source: SourceRecipe) -> None:
        self.path, self.source = path, source
        self.raw = COMPRESSED[path.suffix.lower()](path)
        self.limit = _limit(path, source)
        self.seen = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self.raw.read(len(buffer))
        buffer[: len(block)] = block
        self.seen += len(block)
        if self.seen > self.limit:
            raise ValueError(_grows(self.path, self.seen, self.source))
        return len(block)

    def close(self) -> None:
        self.raw.close()
        super().close()


def _limit(path: Path, source: SourceRecipe) -> int:
    """Return the number of bytes to which a compressed file may grow."""
    return max(SMALL_GROWTH, source.max_growth * path.stat().st_size)


def _grows(path: Path, size: int, source: SourceRecipe) -> str:
    return (
        f"{path}: its {path.stat().st_size:,} bytes grow to more than {size - 1:,}, over max_growth "
        f"{source.max_growth} times. If this is intended, raise the source's max_growth, else leave the file out"
    )


def open_bytes(path: Path, source: SourceRecipe) -> io.BufferedReader:
    """Open a file's content, decompressed if it has the suffix of a compression.

    Reading raises one of DAMAGED, or ValueError for a file that grows beyond max_growth.
    """
    if path.suffix.lower() in COMPRESSED:
        return io.BufferedReader(_Growing(path, source), BLOCK_BYTES)
    return path.open("rb")


def encoding_of(file: io.BufferedReader, source: SourceRecipe) -> str:
    """Return the encoding of a file's byte order mark, else the source's; consume nothing."""
    start = file.peek(4)[:4]
    for mark, encoding in MARKS.items():
        if start.startswith(mark):
            return encoding
    return source.encoding


def text_blocks(path: Path, source: SourceRecipe) -> Iterator[str]:
    """Yield a file's text in blocks of at most 1 Mi characters, with line endings unchanged."""
    with open_bytes(path, source) as file:
        text = io.TextIOWrapper(file, encoding_of(file, source), newline="")
        while block := text.read(BLOCK_BYTES):
            yield block


def problem_of_text(path: Path, source: SourceRecipe) -> tuple[int, Malformed] | None:
    """Read a file in full. Return the line and reason if it contains no valid text, else None."""
    line, blank = 1, True
    encoding = ""
    try:
        with open_bytes(path, source) as file:
            if problem := _no_content(file):
                return line, problem
            encoding = encoding_of(file, source)
            decoder = codecs.getincrementaldecoder(encoding)()
            more = True
            while more:
                block = file.read(BLOCK_BYTES)
                more = bool(block)
                text = decoder.decode(block, final=not more)
                if "\0" in text:
                    line += text[: text.index("\0")].count("\n")
                    return line, Malformed("a byte 0: no text, or UTF-16 without a byte order mark")
                blank = blank and not text.strip()
                line += text.count("\n")
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        return line, _undecodable(encoding, error.reason, error.object[error.start :])
    except DAMAGED as error:
        return line, Malformed(f"cannot be read: {error}")
    return (1, Malformed("text is empty")) if blank else None


def _undecodable(encoding: str, reason: str, sample: bytes) -> Malformed:
    name = encoding.upper().removesuffix("-SIG")
    return Malformed(f"invalid {name}: {reason} at {sample[:8]!r}; if it is text, name the source's encoding")


def _no_content(file: io.BufferedReader) -> Malformed | None:
    """Return the problem of an empty file or a Git LFS pointer, else None; consume nothing."""
    start = file.peek(len(LFS_POINTER))
    if start.startswith(LFS_POINTER):
        return Malformed("a pointer of Git LFS, not the file itself: run git lfs pull")
    return None if start else Malformed("text is empty")


Record = tuple[int, Any]
"""A line or row number, from 1, and its content: a JSON value, a row, or Malformed."""


def read_records(
    path: Path, source: SourceRecipe, columns: Callable[[Sequence[str]], Sequence[str]]
) -> Iterator[Record]:
    """Yield the entries of a .jsonl, .json, .csv, .tsv or .parquet file.

    columns: takes the column names of a Parquet file and returns those to read.

    Raises:
        ValueError: the file grows beyond max_growth, or `columns` raises it.
    """
    kind, line = kind_of(path)[1], 0
    if kind == ".parquet":
        yield from _parquet(path, source, columns)
        return
    read = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv}[kind]
    try:
        with open_bytes(path, source) as file:
            if problem := _no_content(file):
                yield 1, problem
                return
            for line, record in read(file, path, source):
                yield line, record
    except UnicodeDecodeError as error:
        yield line + 1, _undecodable(error.encoding, error.reason, error.object[error.start :])
    except DAMAGED as error:
        yield line + 1, Malformed(f"the rest cannot be read: {error}")


def _lines(file: io.BufferedReader, source: SourceRecipe) -> Iterator[tuple[int, str]]:
    """Yield a file's lines with their line endings. A too long or undecodable line is Malformed."""
    encoding = encoding_of(file, source)
    # invalid bytes become half surrogate pairs, so that only their own line is lost
    text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="\n")
    most, number = source.max_piece_chars, 0
    while line := text.readline(most + 1):
        number += 1
        if len(line) > most and not line.endswith("\n"):
            while rest := text.readline(most):
                if rest.endswith("\n"):
                    break
            yield number, Malformed(f"longer than max_piece_chars {most:,}: cut it, or raise the limit")
            continue
        try:
            line.encode("utf-8")
        except UnicodeEncodeError as error:
            sample = line[error.start : error.start + 8].encode(errors="surrogateescape")
            yield number, _undecodable(encoding, "invalid byte", sample)
        else:
            yield number, line


def _jsonl(file: io.BufferedReader, path: Path, source: SourceRecipe) -> Iterator[Record]:
    """Yield the JSON value of each line. Blank lines are skipped."""
    for number, line in _lines(file, source):
        if isinstance(line, Malformed):
            yield number, line
        elif line.strip():
            yield number, _parsed(line)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also covers a number with thousands of digits
        return Malformed(f"malformed JSON: {error}")


def _json(file: io.BufferedReader, path: Path, source: SourceRecipe) -> Iterator[Record]:
    """Yield the items of the file's list, its single value, or one value per line."""
    encoding, most = encoding_of(file, source), source.max_piece_chars
    whole = io.TextIOWrapper(file, encoding, newline="").read(most + 1).strip()
    first, more, _ = whole.partition("\n")
    if more and isinstance(_parsed(first), dict):
        with open_bytes(path, source) as again:
            yield from _jsonl(again, path, source)
    elif len(whole) > most:
        advice = "write one object a line into a .jsonl, or raise the limit"
        yield 1, Malformed(f"longer than max_piece_chars {most:,}, and a .json is read as a whole: {advice}")
    else:
        value = _parsed(whole)
        yield from enumerate(value if isinstance(value, list) else [value], start=1)


def _csv(file: io.BufferedReader, path: Path, source: SourceRecipe) -> Iterator[Record]:
    """Yield the rows, keyed by the header's names. A row's number is that of its last line."""
    csv.field_size_limit(source.max_piece_chars)
    problems: list[Record] = []
    number = 0

    def good_lines() -> Iterator[str]:
        nonlocal number
        for number, line in _lines(file, source):
            if isinstance(line, Malformed):
                problems.append((number, line))
            else:
                yield line

    delimiter = {".csv": ",", ".tsv": "\t"}[kind_of(path)[1]]
    rows = csv.DictReader(good_lines(), delimiter=delimiter)
    while True:
        try:
            record: Any = next(rows, None)
        except csv.Error as error:  # e.g. a quotation mark that is never closed
            record = Malformed(f"malformed CSV: {error}")
        yield from problems
        problems.clear()
        if record is None:
            return
        yield number, record


def _parquet(path: Path, source: SourceRecipe, columns: Callable[[Sequence[str]], Sequence[str]]) -> Iterator[Record]:
    """Yield the rows, with BATCH_ROWS of them in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    line = size = 0
    limit = _limit(path, source)
    try:
        with path.open("rb") as start:
            if problem := _no_content(start):
                yield 1, problem
                return
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            wanted = columns(schema.names)
            _check_growth(file.metadata, wanted, path, source)
            # read strings as bytes, so that invalid UTF-8 loses only its own row
            texts = [name for name in wanted if schema.field(name).type in (pa.string(), pa.large_string())]
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=wanted):
                for text in texts:
                    at = batch.schema.get_field_index(text)
                    batch = batch.set_column(at, text, batch[text].cast(pa.large_binary()))
                for row in batch.to_pylist():
                    line += 1
                    size += sum(len(value) for value in row.values() if isinstance(value, (str, bytes)))
                    if size > limit:  # a text stored once in a dictionary may occur in every row
                        raise ValueError(_grows(path, size, source))
                    yield line, _decoded(row, texts, source)
    except (pa.ArrowException, *DAMAGED) as error:
        yield line + 1, Malformed(f"no Parquet file that can be read: {error}")


def _decoded(row: dict[str, Any], texts: Sequence[str], source: SourceRecipe) -> dict[str, Any] | Malformed:
    for text in texts:
        if row[text] is None:
            continue
        if len(row[text]) > source.max_piece_chars:
            return Malformed(
                f"{text} is longer than max_piece_chars {source.max_piece_chars:,}: cut it, or raise the limit"
            )
        try:
            row[text] = row[text].decode()
        except UnicodeDecodeError as error:
            return Malformed(f"invalid UTF-8: {error.reason}")
    return row


def _check_growth(metadata: Any, wanted: Sequence[str], path: Path, source: SourceRecipe) -> None:
    """Raise ValueError, before reading, if the wanted columns grow beyond max_growth."""
    size = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for number in range(row_group.num_columns):
            column = row_group.column(number)
            if column.path_in_schema.split(".")[0] in wanted:
                size += column.total_uncompressed_size
    if size > _limit(path, source):
        raise ValueError(_grows(path, size, source))
