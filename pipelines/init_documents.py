"""What the documents are that `longreach init` was given: sources for a recipe, sizes, what to hold
out.

    look(["texts", "chats.jsonl", "path/to/a/checkout"]).sources
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from longreach.training.chats import TEXT, Conversation, form_of
from longreach.training.documents import KINDS, BadLine, matches, read_documents, record_files
from longreach.training.readers import kind_of, read_records
from longreach.training.recipe import CorpusRecipe, SourceRecipe

CHARS_PER_TOKEN = 5
"""Characters of a token, rather too many (English and code have 3 to 4.5): what is counted by it is
there."""
MOST_CHARS = 200_000_000  # of more documents the rest is not looked at: a few seconds
MOST_MALFORMED = 0.2  # of entries: with more of them something is wrong
CODE = (".py", ".js", ".ts", ".go", ".rs", ".java", ".kt", ".c", ".h", ".cc", ".cpp", ".rb", ".php", ".sh", ".scala")
KINDS_OF_CODE = 4  # the most frequent endings of a repository that are read


@dataclass
class Documents:
    """Documents as they were found."""

    sources: list[SourceRecipe]
    chars: dict[str, int] = field(default_factory=dict)  # by what split patterns match
    chats: int = 0
    left_out: list[str] = field(default_factory=list)  # files that are not read, and entries that are malformed
    malformed: int = 0  # entries
    entries: int = 0  # all of them: files of repositories, lines, texts
    partly: bool = False  # there was more than MOST_CHARS
    test: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)

    def _tokens(self, name: str) -> int:
        return self.chars[name] // CHARS_PER_TOKEN

    @property
    def training(self) -> list[str]:
        """Return the names of those that are not held out."""
        held = {*self.test, *self.validation}
        return [name for name in self.chars if name not in held]

    @property
    def training_tokens(self) -> int:
        """Return about how many tokens there are to train on, rather too few."""
        return sum(map(self._tokens, self.training))

    @property
    def most_row_tokens(self) -> int:
        """Return the longest row that makes sense: as long as some text, or as all chats
        together."""
        if self.chats:
            return self.training_tokens
        return max(map(self._tokens, self.training))

    @property
    def test_tokens(self) -> int:
        """Return the length of the longest test document; 0 for chats, whose perplexity says
        little."""
        if self.chats:
            return 0
        return max(map(self._tokens, self.test))

    def limit(self, trained: int) -> str:
        """Return what keeps rows short, in words: the documents, or the base."""
        if trained < self.most_row_tokens:
            return f"the base is trained to {trained:,}"
        what = "all chats together have" if self.chats else "the longest document to train on has"
        return f"{what} about {self.most_row_tokens:,}"

    def facts(self) -> list[str]:
        """Return what was found, a sentence each."""
        more = ", and more that was not looked at" if self.partly else ""
        what = f"{len(self.chars):,} documents ({self.chats:,} of them chats)"
        facts = [
            f"documents: {what} of {sum(self.chars.values()):,} characters{more}; held out: {len(self.test)} for "
            f"the test, {len(self.validation)} for validation"
        ]
        if self.left_out:
            facts.append(f"left out: {len(self.left_out):,}, e.g. {'; '.join(self.left_out[:3])}")
        return facts


def look(places: Sequence[str]) -> Documents:
    """Return what a recipe should say of these files, folders, globs and repositories.

    Raises:
        ValueError: nothing is found, nothing can be read, or too little to hold something out.
    """
    documents = Documents([])
    for place in places:
        documents.sources += _sources(place, documents.left_out)
    _read(documents)
    if len(documents.chars) == 1 and documents.sources[-1].repositories:
        sources, inner = _split_repository(documents.sources[-1])
        documents = Documents(sources, test=[inner])
        _read(documents)
        return documents
    if len(documents.chars) < 2:
        found = len(documents.chars)
        why = f" ({documents.left_out[0]})" if documents.left_out else ""
        raise ValueError(
            f"--documents {' '.join(places)}: {found} document{'s' * (found != 1)} can be read{why}, and it takes 2: "
            f"one to train on, one to test on"
        )
    _hold_out(documents)
    return documents


def _sources(place: str, left_out: list[str]) -> list[SourceRecipe]:
    """Return the sources that one place on the command line stands for."""
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
        raise ValueError(f"--documents {place!r} finds nothing (looked in {Path.cwd()})")
    readable, others = [], []
    endings = set()  # of names that can be read, such as .txt.gz
    for path in found:
        if not Path(path).is_file():
            continue
        stem, kind = kind_of(Path(path))
        if kind in KINDS:
            readable.append(path)
            endings.add(Path(path).name.removeprefix(stem))
        else:
            others.append(f"{path}: not of a known kind")
    sources = []
    if readable and not others:
        sources.append(_of_files(place))
    elif readable and Path(place).name == "*":  # one source for each ending that can be read
        sources += [_of_files(f"{place}{ending}") for ending in sorted(endings)]
    else:
        sources += map(_of_files, readable)
    left_out += others
    if "**" not in place:  # else what is in folders was found already
        for folder in found:
            if Path(folder).is_dir() and (_code_patterns(Path(folder)) or _kinds(Path(folder), KINDS)):
                sources += _sources(folder, left_out)
    if not sources:
        raise ValueError(f"--documents {place!r}: none of {len(found)} can be read; known are {', '.join(KINDS)}")
    return sources


def _kinds(folder: Path, kinds: Sequence[str]) -> Counter[str]:
    """Return how many files there are of each kind, hidden ones left out."""
    counts: Counter[str] = Counter()
    for _, inner, files in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in files:
            _, kind = kind_of(Path(name))
            if kind in kinds and not name.startswith("."):
                counts[kind] += 1
    return counts


def _code_patterns(folder: Path) -> tuple[str, ...]:
    """Return which files make a folder a repository; none if it is a folder of texts."""
    code = _kinds(folder, CODE)
    if not code or (not (folder / ".git").exists() and code.total() <= _kinds(folder, KINDS).total()):
        return ()
    return tuple(f"**/*{kind}" for kind, _ in code.most_common(KINDS_OF_CODE))


def _of_files(place: str) -> SourceRecipe:
    """Return a source of files, with the column that holds their text where it is not `text`."""
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
            f"--documents {place!r}: {first} has its text in {one!r} and {second} in {other!r}: give --documents once "
            f"for each"
        )
    return source.model_copy(update={"text_field": next(iter(columns), source.text_field)})


def _text_column(record: Mapping[str, object]) -> str | None:
    """Return `text` if there is such a column, else that of the longest text."""
    if "text" in record:
        return "text"
    texts = {name: value for name, value in record.items() if isinstance(value, str)}
    return max(texts, key=lambda name: len(texts[name]), default=None)


def _read(documents: Documents) -> None:
    """Count the characters of each document, as far as MOST_CHARS."""
    total = 0
    for document in read_documents(CorpusRecipe(sources=tuple(documents.sources))):
        if isinstance(document, BadLine):
            documents.left_out.append(f"{document.file}:{document.line}: {document.reason}")
            documents.malformed += 1
            documents.entries += 1
            continue
        chars = sum(map(len, document.blocks()))
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
            f"{documents.malformed} of {documents.entries} documents are malformed, and at most {MOST_MALFORMED:.0%} "
            f"are left out: mend them, or name others; the first is {documents.left_out[-documents.malformed]}"
        )


def _hold_out(documents: Documents) -> None:
    """Name what is tested on: the longest documents that are no more than a fifth of all, a tenth
    of their number at most."""
    names = sorted(documents.chars, key=lambda name: -documents.chars[name])
    fifth = sum(documents.chars.values()) / 5
    fitting = [name for name in names if documents.chars[name] <= fifth] or names[-1:]
    count = max(1, min(3, len(names) // 10))
    documents.test = fitting[:count]
    if len(names) >= 10:
        documents.validation = fitting[count : 2 * count]


def _split_repository(source: SourceRecipe) -> tuple[list[SourceRecipe], str]:
    """Return two sources, the second of which is a folder inside of the first, and its name: it is
    held out.

    ValueError: there is no such folder.
    """
    root = Path(source.repositories[0])
    kinds = [pattern.removeprefix("**/*") for pattern in source.patterns]
    total = _kinds(root, kinds).total()
    sizes = {}  # of the folders that may be held out
    for folder in sorted(root.iterdir()):
        if not folder.is_dir() or folder.name[0] in "._" or matches(root.resolve().name, folder.name):
            continue
        files = _kinds(folder, kinds).total()
        if 0 < files <= total / 2:
            sizes[folder] = files
    if not sizes:
        raise ValueError(
            f"--documents {root}: one repository is one document, and it has no folder with at most half of its "
            f"{total} files of code to hold out: give another repository beside it"
        )
    held = max(sizes, key=lambda folder: sizes[folder])
    outer = source.model_copy(update={"patterns": (*source.patterns, f"!{held.name}/**")})
    return [outer, source.model_copy(update={"repositories": (str(held),)})], held.name
