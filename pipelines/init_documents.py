"""Inspect the documents given to `longreach init`: sources for a recipe, sizes, and what to hold
out.

look(["texts", "chats.jsonl", "path/to/a/checkout"]).sources
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from longreach.training.chats import TEXT, Conversation, form_of
from longreach.training.corpus_recipe import CorpusRecipe, SourceRecipe
from longreach.training.documents import KINDS, BadLine, matches, read_documents, record_files
from longreach.training.overlap import find_overlaps
from longreach.training.readers import kind_of, read_records
from longreach.training.tokenise import word_hashes

CHARS_PER_TOKEN = 5
"""Assumed characters per token, a high value (English and code have 3 to 4.5), so that token counts
are underestimated."""
MOST_CHARS = 200_000_000  # stop reading after this many characters, which take a few seconds
COMPARED_CHARS = 5_000_000
"""With more characters, documents are not compared with each other, which takes 0.3 s per MB."""
POOL, TRIES = 8, 8
"""How many times as many documents as are held out are considered, and how often they are compared
with the rest."""
MOST_MALFORMED = 0.2  # maximum share of malformed entries; with more, something is wrong
CODE = (".py", ".js", ".ts", ".go", ".rs", ".java", ".kt", ".c", ".h", ".cc", ".cpp", ".rb", ".php", ".sh", ".scala")
KINDS_OF_CODE = 4  # number of a repository's most frequent file suffixes that are read


@dataclass
class Documents:
    """The documents that were found."""

    sources: list[SourceRecipe]
    chars: dict[str, int] = field(default_factory=dict)  # document name, which split patterns match -> characters
    chats: int = 0
    left_out: list[str] = field(default_factory=list)  # files that are not read, and malformed entries
    malformed: int = 0  # number of malformed entries
    entries: int = 0  # number of all entries: files of repositories, lines, texts
    partly: bool = False  # whether reading stopped at MOST_CHARS
    test: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    repeating: bool = False  # whether documents repeat each other so often that none could be held out whole

    def _tokens(self, name: str) -> int:
        return self.chars[name] // CHARS_PER_TOKEN

    @property
    def training(self) -> list[str]:
        """Return the names of the documents that are not held out."""
        held = {*self.test, *self.validation}
        return [name for name in self.chars if name not in held]

    @property
    def training_tokens(self) -> int:
        """Return a low estimate of the number of training tokens."""
        return sum(map(self._tokens, self.training))

    @property
    def most_row_tokens(self) -> int:
        """Return the longest useful row: as long as the longest text, or as all chats together."""
        if self.chats:
            return self.training_tokens
        return max(map(self._tokens, self.training))

    @property
    def test_tokens(self) -> int:
        """Return the length of the longest test document; 0 for chats, whose perplexity means
        little."""
        if self.chats:
            return 0
        return max(map(self._tokens, self.test))

    def test_documents(self, tokens: int) -> list[str]:
        """Return the names of the test documents with at least so many tokens, the longest first."""
        names = [] if self.chats else [name for name in self.test if self._tokens(name) >= tokens]
        return sorted(names, key=self._tokens, reverse=True)

    def limit(self, trained: int) -> str:
        """Return a phrase that says what limits the row length: the documents, or the base."""
        if trained < self.most_row_tokens:
            return f"the base is trained to {trained:,}"
        what = "all chats together have" if self.chats else "the longest document to train on has"
        return f"{what} about {self.most_row_tokens:,}"

    def facts(self) -> list[str]:
        """Return what was found, one sentence per item."""
        more = ", and more that was not read" if self.partly else ""
        what = f"{len(self.chars):,} documents ({self.chats:,} of them chats)"
        facts = [
            f"documents: {what} of {sum(self.chars.values()):,} characters{more}; held out: {len(self.test)} for "
            f"the test, {len(self.validation)} for validation"
        ]
        if self.left_out:
            facts.append(f"left out: {len(self.left_out):,}, e.g. {'; '.join(self.left_out[:3])}")
        return facts


def look(places: Sequence[str]) -> Documents:
    """Return a recipe's sources for these files, folders, globs and repositories, and their sizes.

    Raises:
        ValueError: Nothing is found, nothing can be read, or there are too few documents to hold
            one out.
    """
    documents = Documents([])
    for place in places:
        documents.sources += _sources(place, documents.left_out)
    words = _read(documents)
    if len(documents.chars) == 1 and documents.sources[-1].repositories:
        sources, inner = _split_repository(documents.sources[-1])
        documents = Documents(sources, test=[inner])
        _read(documents)
        return documents
    if len(documents.chars) < 2:
        found = len(documents.chars)
        why = f" ({documents.left_out[0]})" if documents.left_out else ""
        raise ValueError(
            f"--documents {' '.join(places)}: {found} document{'s' * (found != 1)} can be read{why}, but it takes 2: "
            f"one for training and one for testing"
        )
    _hold_out(documents, words)
    return documents


def _sources(place: str, left_out: list[str]) -> list[SourceRecipe]:
    """Return the sources for one --documents argument."""
    if not place:
        raise ValueError("--documents is empty: name a file, a folder, a repository or a quoted glob")
    _check_name(place)
    if "://" not in place:
        place = os.path.expanduser(place)
    if "://" in place or Path(place).is_file():
        return [_of_files(place)]
    if Path(place).is_dir():
        if patterns := _code_patterns(Path(place)):
            return [SourceRecipe(repositories=(place,), patterns=patterns)]
        return [_of_files(place)]
    found = sorted(glob.glob(place, recursive=True))
    if not found:
        raise ValueError(f"--documents {place!r} finds nothing (searched in {Path.cwd()})")
    readable, others = [], []
    endings = set()  # readable suffixes, such as .txt.gz
    for path in found:
        if not Path(path).is_file():
            continue
        stem, kind = kind_of(Path(path))
        if kind in KINDS:
            readable.append(path)
            endings.add(Path(path).name.removeprefix(stem))
        else:
            others.append(f"{path}: unknown file type")
    sources = []
    if readable and not others:
        sources.append(_of_files(place))
    elif readable and Path(place).name == "*":  # one source for each readable suffix
        sources += [_of_files(f"{place}{ending}") for ending in sorted(endings)]
    else:
        sources += map(_of_files, readable)
    left_out += others
    if "**" not in place:  # with ** the glob has already found the files in folders
        for folder in found:
            if Path(folder).is_dir() and (_code_patterns(Path(folder)) or _kinds(Path(folder), KINDS)):
                sources += _sources(folder, left_out)
    if not sources:
        raise ValueError(
            f"--documents {place!r}: none of {len(found)} can be read; supported file types are {', '.join(KINDS)}"
        )
    return sources


def _check_name(name: str) -> None:
    """Raise ValueError for a file name that is not UTF-8, which no recipe can hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"--documents: the file name {name!a} is not UTF-8: rename the file") from None


def _kinds(folder: Path, kinds: Sequence[str]) -> Counter[str]:
    """Return the number of files of each kind, without hidden ones."""
    counts: Counter[str] = Counter()
    for _, inner, files in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in files:
            _, kind = kind_of(Path(name))
            if kind in kinds and not name.startswith("."):
                counts[kind] += 1
    return counts


def _code_patterns(folder: Path) -> tuple[str, ...]:
    """Return patterns for the code files of a repository; empty if the folder holds texts."""
    code = _kinds(folder, CODE)
    if not code or (not (folder / ".git").exists() and code.total() <= _kinds(folder, KINDS).total()):
        return ()
    return tuple(f"**/*{kind}" for kind, _ in code.most_common(KINDS_OF_CODE))


def _of_files(place: str) -> SourceRecipe:
    """Return a source of files; set its text column if that is not `text`."""
    _check_name(place)
    source = SourceRecipe(files=place)
    columns: dict[str, Path] = {}
    for path in record_files(source):
        for _, record in read_records(path, source, lambda names: names):
            if isinstance(record, Mapping):
                if form_of(list(record), source, str(path)) == TEXT and (column := _text_column(record)):
                    columns.setdefault(column, path)
                break
    if len(columns) > 1:
        (one, first), (other, second) = list(columns.items())[:2]
        raise ValueError(
            f"--documents {place!r}: {first} has its text in {one!r} and {second} in {other!r}: "
            f"give each its own --documents"
        )
    return source.model_copy(update={"text_field": next(iter(columns), source.text_field)})


def _text_column(record: Mapping[str, object]) -> str | None:
    """Return `text` if there is such a column, else the column with the longest text, if any."""
    if "text" in record:
        return "text"
    texts = {name: value for name, value in record.items() if isinstance(value, str)}
    return max(texts, key=lambda name: len(texts[name]), default=None)


def _read(documents: Documents) -> dict[str, np.ndarray]:
    """Count the characters of each document, up to MOST_CHARS in total.

    Return the hashes of their words; nothing if they have more than COMPARED_CHARS together.
    """
    total = 0
    words: dict[str, np.ndarray] = {}
    for document in read_documents(CorpusRecipe(sources=tuple(documents.sources))):
        if isinstance(document, BadLine):
            documents.left_out.append(f"{document.file}:{document.line}: {document.reason}")
            documents.malformed += 1
            documents.entries += 1
            continue
        blocks = []
        chars = 0
        for block in document.blocks():
            chars += len(block)
            if total + chars <= COMPARED_CHARS:
                blocks.append(block)
        own = words.get(document.key, np.empty(0, np.uint32))
        words[document.key] = np.concatenate([own, word_hashes("".join(blocks))])
        documents.chars[document.key] = documents.chars.get(document.key, 0) + chars
        documents.chats += isinstance(document.text, Conversation)
        documents.entries += document.entries
        total += chars
        if total > MOST_CHARS:
            documents.partly = True
            break
    share = documents.malformed / max(1, documents.entries)
    if share > MOST_MALFORMED:
        raise ValueError(
            f"{documents.malformed} of {documents.entries} documents are malformed, but at most {MOST_MALFORMED:.0%} "
            f"may be: fix them, or give others; the first is {documents.left_out[-documents.malformed]}"
        )
    return words if total <= COMPARED_CHARS else {}


def _hold_out(documents: Documents, words: Mapping[str, np.ndarray]) -> None:
    """Choose the held-out documents.

    The test documents are the longest that have at most a fifth of all characters each: a tenth of
    the documents, at least one and at most three. With ten documents or more, as many of the next
    ones become validation documents. Documents that the others repeat too much for
    `corpus.max_overlap` are passed over, if there are `words` to compare.
    """
    names = sorted(documents.chars, key=lambda name: -documents.chars[name])
    fifth = sum(documents.chars.values()) / 5
    fitting = [name for name in names if documents.chars[name] <= fifth] or names[-1:]
    count = max(1, min(3, len(names) // 10))
    wanted = 2 * count if len(names) >= 10 else count
    chosen = _not_repeated(fitting[: POOL * wanted], wanted, words)
    documents.repeating = not chosen
    documents.test = (chosen or fitting)[:count]
    documents.validation = (chosen or fitting)[count:wanted]


def _not_repeated(names: list[str], wanted: int, words: Mapping[str, np.ndarray]) -> list[str]:
    """Return the first documents, up to `wanted`, that no other document repeats too much; none if
    there are none."""
    if not words:
        return names[:wanted]
    limit = CorpusRecipe.model_fields["max_overlap"].default
    every = list(words)
    numbers = {name: number for number, name in enumerate(every)}

    def repeated(held: Sequence[int], others: Iterable[int]) -> set[int]:
        found = find_overlaps(lambda number: words[every[number]], held, others)
        return {one.document for one in found if one.share > limit}

    left = [numbers[name] for name in names]
    held = left  # all at first: in most folders one more comparison is enough
    for _ in range(TRIES):
        again = repeated(held, sorted({*numbers.values()} - {*held}))
        for n in range(1, len(held[:wanted])):
            again |= repeated(held[n : n + 1], held[:n])
        left = [number for number in left if number not in again]
        if not again and held == left[:wanted]:
            return [every[number] for number in held]
        held = left[:wanted]
    return []


def _split_repository(source: SourceRecipe) -> tuple[list[SourceRecipe], str]:
    """Hold out one folder of a repository: return the sources of the rest and of the folder, and
    the folder's name.

    Raises:
        ValueError: No folder has at most half of the files.
    """
    root = Path(source.repositories[0])
    kinds = [pattern.removeprefix("**/*") for pattern in source.patterns]
    total = _kinds(root, kinds).total()
    sizes = {}  # folder that may be held out -> number of its files
    for folder in sorted(root.iterdir()):
        if not folder.is_dir() or folder.name[0] in "._" or matches(root.resolve().name, folder.name):
            continue
        files = _kinds(folder, kinds).total()
        if 0 < files <= total / 2:
            sizes[folder] = files
    if not sizes:
        raise ValueError(
            f"--documents {root}: one repository is one document, and it has no folder with at most half of its "
            f"{total} code files that could be held out: add another repository"
        )
    held = max(sizes, key=lambda folder: sizes[folder])
    outer = source.model_copy(update={"patterns": (*source.patterns, f"!{held.name}/**")})
    return [outer, source.model_copy(update={"repositories": (str(held),)})], held.name
