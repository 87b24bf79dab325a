"""Files written whole or not at all, and digests that name content."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from longreach.infra import doctor, files, jobs
from longreach.infra.artifact import Store
from longreach.infra.files import digest_of, draft_of, flatten, kept_text, on_own_disk, publish_new, write_whole
from longreach.training import documents


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path):
    target = tmp_path / "state.json"
    write_whole(target, "old")
    with pytest.raises(TypeError), draft_of(target) as draft, draft.open("w") as file:
        file.writelines(["half of the new", 7])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"state.json": "old"}


def no_links(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")  # as exFAT answers


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_exists_is_not_replaced_by_one_that_is_published_exclusively(tmp_path: Path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    target = tmp_path / "artifact.json"
    with draft_of(target, publish=publish_new) as draft:
        draft.write_text("first")
    with pytest.raises(FileExistsError), draft_of(target, publish=publish_new) as draft:
        draft.write_text("second")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"artifact.json": "first"}


def test_of_many_writers_one_wins_where_there_are_no_links(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    target = tmp_path / "artifact.json"

    def write(number: int) -> bool:
        try:
            with draft_of(target, publish=publish_new) as draft:
                draft.write_text(str(number))
        except FileExistsError:
            return False
        return target.read_text() == str(number)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(write, range(64))) == 1


def test_a_file_system_on_which_nothing_is_exclusive_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    refuses = SimpleNamespace(renameat2=lambda *_: -1)
    monkeypatch.setattr(files, "ctypes", SimpleNamespace(CDLL=lambda *_, **__: refuses, get_errno=lambda: errno.EINVAL))
    with pytest.raises(OSError, match="on another disk, or in an object store") as refused:
        Store(str(tmp_path)).create(str(tmp_path / "artifact.json"), b"{}")
    assert refused.value.filename == str(tmp_path / "artifact.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["плёнка", "with space", "back\\slash", "wide\u3000space", "line\u2028end", "n\udcff"])
def test_a_mount_point_may_have_any_name(tmp_path: Path, monkeypatch, name: str):
    folder = tmp_path / name
    written = str(folder).replace("\\", "\\134").replace(" ", "\\040")
    lines = ["22 1 8:1 / / rw - ext4 /dev/sda1 rw", f"36 22 0:45 / {written} rw - nfs4 server:/export rw"]
    monkeypatch.setattr(Path, "read_bytes", lambda self: os.fsencode("\n".join([*lines, ""])))
    assert not on_own_disk(folder / "store"), "other machines mount it too"
    assert on_own_disk(tmp_path)


def test_a_kept_text_is_made_once_and_each_time_where_nothing_can_be_kept(tmp_path: Path, monkeypatch):
    made = []

    def make() -> str:
        made.append("text")
        return "text"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert [kept_text("name", make), kept_text("name", make), len(made)] == ["text", "text", 1]
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [kept_text("name", make), kept_text("name", make), len(made)] == ["text", "text", 3]


def test_without_a_home_nothing_is_kept_and_nothing_fails(monkeypatch):
    """As in a container that runs with any user id."""
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert kept_text("name", lambda: "made") == "made"
    assert jobs.token()[0] is None
    assert not doctor._home().ok
    assert "set HOME" in doctor._home().fix
    with pytest.raises(ValueError, match="set HOME or XDG_CACHE_HOME"):
        documents._fetched("memory://texts/*.txt")


def test_nested_sections_flatten_to_dotted_names_and_lists_stay_values():
    assert flatten({"optim": {"steps": 8, "none": {}}, "seeds": [1, 2]}) == {"optim.steps": 8, "seeds": [1, 2]}


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object()])
def test_values_without_one_serialisation_are_refused_as_identity(value):
    with pytest.raises(ValueError, match="deterministically"):
        digest_of({"a": value})
