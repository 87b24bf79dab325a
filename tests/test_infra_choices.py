"""What every section of a recipe shares: paths as people write them."""

import pytest

from longreach.infra.choices import Choices, PathOrUrl, refuse_password


class Place(Choices):
    """A section with a path."""

    root: PathOrUrl


def test_a_tilde_is_the_home_folder_in_every_path_of_a_recipe(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert Place(root="~/runs").root == "/home/ann/runs"
    assert Place(root="s3://bucket/~/runs").root == "s3://bucket/~/runs"
    assert Place(root="texts/~old.txt").root == "texts/~old.txt"


@pytest.mark.parametrize(
    ("url", "user"),
    [
        ("https://ann:secret@mlflow.example.org", "https://ann"),
        ("https://ann:sec/ret@mlflow.example.org", "https://ann"),
        ("https://ann:1234@mlflow.example.org:5000/x", "https://ann"),
        ("s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI/K7MDENG/bPxR@bucket/p", "s3://AKIAIOSFODNN7EXAMPLE"),
        ("simplecache::s3://key:sec/ret@bucket/p", "s3://key"),
    ],
)
def test_a_password_in_a_url_is_refused_with_whatever_characters(url, user):
    with pytest.raises(ValueError, match=f"^{user} holds one$"):
        refuse_password(url, "{user} holds one")


@pytest.mark.parametrize(
    "url",
    [
        "http://mlflow:5000/models:/m@champion",
        "http://[::1]:5000/m@champion",
        "https://ann@mlflow:5000",
        "http://127.0.0.1:5000",
        "models:/m@champion",
        "s3://bucket/a:b@c",
        "zip://*.txt::https://host.org/books@1.0/a.zip",
        "texts/a:b@c",
    ],
)
def test_a_port_and_an_at_sign_in_a_path_are_no_password(url):
    assert refuse_password(url, "{user}") == url
