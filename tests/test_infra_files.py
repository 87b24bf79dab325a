"""Files written whole or not at all, and digests that name content."""

import os
from pathlib import Path

import pytest

from longreach.infra.files import digest_of, draft_of, flatten, kept_text, write_whole


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path):
    target = tmp_path / "state.json"
    write_whole(target, "old")
    with pytest.raises(TypeError), draft_of(target) as draft, draft.open("w") as file:
        file.writelines(["half of the new", 7])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"state.json": "old"}


def test_a_file_that_exists_is_not_replaced_by_one_that_is_published_exclusively(tmp_path: Path):
    target = tmp_path / "artifact.json"
    write_whole(target, "first")
    with pytest.raises(FileExistsError), draft_of(target, publish=os.link) as draft:
        draft.write_text("second")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"artifact.json": "first"}


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


def test_nested_sections_flatten_to_dotted_names_and_lists_stay_values():
    assert flatten({"optim": {"steps": 8, "none": {}}, "seeds": [1, 2]}) == {"optim.steps": 8, "seeds": [1, 2]}


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object()])
def test_values_without_one_serialisation_are_refused_as_identity(value):
    with pytest.raises(ValueError, match="deterministically"):
        digest_of({"a": value})
