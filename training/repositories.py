"""Read a repository as one document: its files in path order, each with its path as a header.

Repositories repeat names, signatures and idioms over thousands of tokens. A model therefore gains
from a long context there, while it hardly does on speeches and plays.

    from longreach.training.repositories import find_repositories
    find_repositories(SourceRecipe(repositories=("package:jinja2",)), Path("."))

This module does not import torch, since `longreach plan` lists and hashes the files.
"""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from longreach.training.corpus_recipe import PACKAGE, SourceRecipe

FIELD = "corpus source repositories"  # the name of the field in messages


@dataclass(frozen=True)
class Repository:
    """One repository: its name, which split patterns match, and the files that are read."""

    name: str  # `peft.tuners.lora` for a package, the folder's own name for a folder
    folder: Path
    files: tuple[tuple[str, Path], ...]
    """(path in the file's header, location of the file), in reading order."""


@dataclass(frozen=True)
class Piece:
    """Consecutive files of a repository, as one text."""

    name: str  # the repository's name, with `#1`, `#2`, ... if it has several pieces
    text: str
    files: int  # number of files in the text


@dataclass(frozen=True)
class Unreadable:
    """A file that is not UTF-8 text."""

    path: Path
    line: int
    reason: str


def find_repositories(source: SourceRecipe, base_dir: Path) -> list[Repository]:
    """Return a source's repositories in the recipe's order, and those of a glob sorted by path.

    Raises:
        ValueError: a package is not installed, an entry matches no folder, the patterns match no
            file, or a folder is named twice.
    """
    found: dict[Path, Repository] = {}
    for entry in source.repositories:
        for name, folder in _folders(entry, base_dir):
            if folder in found:
                raise ValueError(f"{FIELD}: {entry!r} is {folder}, which is named twice: remove one")
            files = _files(folder, source.patterns)
            if not files:
                patterns = ", ".join(source.patterns)
                raise ValueError(f"{FIELD}: in {entry!r} {patterns} finds no file (looked in {folder})")
            head = name.replace(".", "/") if entry.startswith(PACKAGE) else name
            shown = tuple((f"{head}/{file}", folder / file) for file in files)
            found[folder] = Repository(name, folder, shown)
    return list(found.values())


def repository_names(source: SourceRecipe, base_dir: Path) -> list[str]:
    """Return the names of a source's repositories without looking for their files.

    ValueError: a package is not installed, or an entry matches no folder.
    """
    return [name for entry in source.repositories for name, _ in _folders(entry, base_dir)]


def read_pieces(repository: Repository, max_chars: int) -> Iterator[Piece | Unreadable]:
    """Yield a repository's text in pieces, cut before a file that would exceed `max_chars`.

    A longer file stays whole. Blank files are left out. Only one piece is in memory at a time.
    """
    parts: list[str] = []
    chars = cuts = 0
    for shown, path in repository.files:
        text = _read(path)
        if isinstance(text, Unreadable):
            yield text
            continue
        if not text.strip():
            continue
        part = f"# path: {shown}\n{text.rstrip()}\n"
        if parts and chars + len(part) > max_chars:
            cuts += 1
            yield Piece(f"{repository.name}#{cuts}", "\n".join(parts), len(parts))
            parts, chars = [], 0
        parts.append(part)
        chars += len(part) + 1
    if parts:
        name = f"{repository.name}#{cuts + 1}" if cuts else repository.name
        yield Piece(name, "\n".join(parts), len(parts))


def _folders(entry: str, base_dir: Path) -> list[tuple[str, Path]]:
    """Return (name, folder) of each repository that an entry of `repositories` names."""
    if entry.startswith(PACKAGE):
        name = entry.removeprefix(PACKAGE)
        return [(name, _package(name))]
    matches = [base_dir / entry]
    if not matches[0].is_dir():  # a folder's own name may contain brackets
        matches = [base_dir / match for match in glob.glob(entry, root_dir=base_dir, recursive=True)]
    folders = sorted(match.resolve() for match in matches if match.is_dir())
    if not folders:
        raise ValueError(f"{FIELD}: {entry!r} finds no folder (looked for {base_dir / entry})")
    return [(folder.name, folder) for folder in folders]


def _package(name: str) -> Path:
    """Return the folder of an installed package or subpackage, without importing anything."""
    top, *inner = name.split(".")
    spec = importlib.util.find_spec(top)  # for a dotted name, find_spec would import the parents
    if spec is None:
        raise ValueError(
            f"{FIELD}: {PACKAGE}{name} is not installed here: install it, or use the name that `import` takes "
            f"({PACKAGE}sklearn for scikit-learn)"
        )
    places = [Path(place, *inner) for place in spec.submodule_search_locations or ()]
    folders = [place.resolve() for place in places if place.is_dir()]
    if len(folders) != 1:
        raise ValueError(f"{FIELD}: {PACKAGE}{name} has {len(folders)} folders, not 1: name another part of it")
    return folders[0]


def _files(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Return the files that patterns select, relative to the folder, sorted by path.

    Hidden files and folders, __pycache__, virtual environments and linked folders are skipped.
    """
    wanted, unwanted = [], []
    for pattern in patterns:
        if pattern.startswith("!"):
            unwanted.append(pattern[1:].split("/"))
        else:
            wanted.append(pattern.split("/"))
    chosen = []
    for place, inner, files in os.walk(folder):
        if "pyvenv.cfg" in files:
            inner.clear()
            continue
        inner[:] = [one for one in inner if not one.startswith(".") and one != "__pycache__"]
        for file in files:
            path = Path(place, file)
            parts = path.relative_to(folder).parts
            if file.startswith(".") or not path.is_file():
                continue
            left_out = any(path_fits(parts, one) for one in unwanted)
            if not left_out and any(path_fits(parts, one) for one in wanted):
                chosen.append(parts)
    return ["/".join(parts) for parts in sorted(chosen)]


def path_fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether a path matches a pattern, both split into parts.

    `**` matches any number of folders, `*` does not cross a folder.
    """
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return path_fits(parts, pattern[1:]) or (bool(parts) and path_fits(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and path_fits(parts[1:], pattern[1:])


def _read(path: Path) -> str | Unreadable:
    """Return a file's text with Unix line endings, or an Unreadable with the reason."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Unreadable(path, 1 + raw[: error.start].count(b"\n"), f"invalid UTF-8: {error.reason}")
    if "\0" in text:
        line = 1 + text[: text.index("\0")].count("\n")
        return Unreadable(path, line, "binary: a byte 0")
    return text.removeprefix("\ufeff").replace("\r\n", "\n")
