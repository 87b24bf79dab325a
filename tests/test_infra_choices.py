"""What every section of a recipe shares: paths as people write them."""

from longreach.infra.choices import Choices, PathOrUrl


class Place(Choices):
    """A section with a path."""

    root: PathOrUrl


def test_a_tilde_is_the_home_folder_in_every_path_of_a_recipe(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert Place(root="~/runs").root == "/home/ann/runs"
    assert Place(root="s3://bucket/~/runs").root == "s3://bucket/~/runs"
    assert Place(root="texts/~old.txt").root == "texts/~old.txt"
