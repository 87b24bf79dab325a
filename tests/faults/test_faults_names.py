"""Names that would lead somewhere else: in recipes, documents, stores and links. Nothing is written outside."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
from toy_models import tiny_tokenizer

from longreach.infra.artifact import Store
from longreach.infra.errors import CorruptArtifact
from longreach.infra.share import Share
from longreach.pipelines.reader import RecipeError, load
from longreach.training.corpus import pack_corpus
from longreach.training.corpus_recipe import CorpusRecipe, PackRecipe, SourceRecipe

RECORD = {"summary": {}, "inputs": {}, "recipe": {}}
OUTSIDE = ["../up", "/etc/up", "..", "a/b", "a\\b", ".hidden", "up\n", "ü"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("field", ["name", "finetune.arms", "baselines"])
def test_a_recipes_names_are_folders_of_their_own(tmp_path: Path, field: str, name: str):
    recipe = Path("pipelines/recipes/quickstart.yaml")
    recipe = Path(__file__).parents[2] / recipe
    text = f"{field}={json.dumps(name if field == 'name' else {name: {}})}"
    with pytest.raises(RecipeError):
        load(str(recipe), [text])


def test_a_documents_name_is_never_a_path(tmp_path: Path):
    names = ["../../../escaped", "/tmp/escaped", "a/../../b", ""]
    lines = [json.dumps({"text": "w2 w3 w4 " * 9, "name": name}) for name in names]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.jsonl").write_text("\n".join(lines))
    out = tmp_path / "deep/er/out"
    out.mkdir(parents=True)
    corpus = CorpusRecipe(sources=(SourceRecipe(files=str(tmp_path / "in/*.jsonl"), name_field="name"),), test=("a*",))
    pack_corpus(corpus, PackRecipe(seq_len=16), tiny_tokenizer(), out)
    written = {p for p in tmp_path.rglob("*") if p.is_file()}
    assert {p for p in written if out not in p.parents} == {tmp_path / "in/x.jsonl"}


def test_what_a_link_in_an_artifact_leads_to_cannot_change_unnoticed(tmp_path: Path):
    store, secret = Store(str(tmp_path / "root")), tmp_path / "elsewhere"
    secret.write_text("as published")
    attempt = store.new_attempt("pack", "f")
    (attempt.out / "link").symlink_to(secret)
    store.publish(attempt, RECORD)
    secret.write_text("as changed!!")
    with pytest.raises(CorruptArtifact, match="link: its content changed"):
        store.fetch("pack", "f")


def test_removing_an_attempt_follows_no_link(tmp_path: Path):
    store, mine = Store(str(tmp_path / "root")), tmp_path / "mine"
    mine.mkdir()
    (mine / "keep").touch()
    loser, winner = store.new_attempt("pack", "f"), store.new_attempt("pack", "f")
    (loser.work / "link").symlink_to(mine)
    (winner.out / "rows").touch()
    store.publish(winner, RECORD)
    assert not loser.folder.exists()
    assert (mine / "keep").exists()


def test_a_key_of_the_store_cannot_lead_out_of_the_folder_that_is_pulled(tmp_path: Path):
    share = Share("memory://names", str(tmp_path / "node/scratch"), "finetune", "f", "0001-a")
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"/names/{share.folder}/out/good", b"")
    fs.pipe_file(f"/names/{share.folder}/out/../../../../../../escaped", b"")
    folder = share.store.attempts_folder("finetune", "f") / share.attempt / "out"
    with pytest.raises(CorruptArtifact):
        share.pull(folder)
    assert not [p for p in tmp_path.rglob("escaped") if folder not in p.parents]
