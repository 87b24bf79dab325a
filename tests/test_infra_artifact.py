"""Artifacts: on a local folder and on an S3 server (moto), the same promises."""

import json
import re
import threading
from pathlib import Path

import pytest
import s3fs

from longreach.infra.artifact import AlreadyPublished, Store
from longreach.infra.errors import CorruptArtifact
from longreach.infra.files import digest_of, file_digest
from longreach.infra.share import Share

RECORD = {"summary": {"rows": 3}, "inputs": {}, "recipe": {}}


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "root"), tmp_path / "scratch")
    return Store(f"{request.getfixturevalue('s3_root')}/{tmp_path.name}", tmp_path / "scratch")


def write(attempt, text: str = "tokens") -> None:
    (attempt.out / "rows").mkdir()
    (attempt.out / "rows" / "data.arrow").write_text(text)


def test_a_published_artifact_is_found_again_whole(store: Store):
    attempt = store.new_attempt("pack", "f1")
    write(attempt)
    (attempt.work / "checkpoint").write_text("private")
    published = store.publish(attempt, RECORD)
    fetched = store.fetch("pack", "f1")
    assert fetched.manifest == published.manifest
    assert fetched.summary == {"rows": 3}
    assert (fetched.path / "rows/data.arrow").read_text() == "tokens"
    assert not attempt.work.exists()
    assert [m["fingerprint"] for m in store.manifests("pack")] == ["f1"]


@pytest.mark.parametrize("root", ["notes [2024]/what?/*", "memory://{name}"])
def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path: Path, root: str):
    """Of the store, or where its URL is elsewhere of the attempts and the cache."""
    place = tmp_path / "notes [2024]"
    (tmp_path / "notes 2").mkdir()  # what the pattern would match
    whole = root.format(name=tmp_path.name) if "://" in root else str(tmp_path / root)
    store = Store(whole, place / "scratch")
    attempt = store.new_attempt("pack", "f1")
    write(attempt)
    (attempt.out / "part [1].txt").write_text("one")
    store.publish(attempt, RECORD)
    assert [manifest["fingerprint"] for manifest in store.manifests()] == ["f1"]
    assert {file["path"] for file in store.fetch("pack", "f1").manifest["files"]} == {"part [1].txt", "rows/data.arrow"}


def test_a_checkpoint_is_found_again_by_the_file_that_seals_it(tmp_path: Path):
    share = Share(f"memory://{tmp_path.name}", str(tmp_path / "notes [2024]"), "train", "f2", "0001-a")
    checkpoint = share.store.attempts_folder("train", "f2") / share.attempt / "work/checkpoints/step-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "meta.json").write_text("{}")
    share.push(checkpoint.parent)
    assert [name for name, _ in share.sealed("work/checkpoints", "meta.json")] == ["step-1"]
    assert share.sealed("work/checkpoints", "other.json") == []


def test_a_url_that_looks_like_a_pattern_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"store 'memory://runs \[2024\]'.*choose a store.root without them"):
        Store("memory://runs [2024]", tmp_path).checked()


def test_folders_that_hold_no_artifacts_are_passed_over(store: Store, monkeypatch):
    """Beside the stages are an MLflow database and, on a disk of its own, a folder of root's."""
    attempt = store.new_attempt("pack", "f1")
    write(attempt)
    store.publish(attempt, RECORD)
    store.fs.pipe_file(f"{store.base}/mlflow.db", b"")
    store.fs.pipe_file(f"{store.base}/pack/notes.txt", b"")
    listed = type(store)._list

    def refusing(self: Store, folder: str) -> list[str]:
        if folder.endswith("lost+found"):
            raise PermissionError(folder)
        return [*listed(self, folder), *(["lost+found"] if folder == self.base else [])]

    monkeypatch.setattr(type(store), "_list", refusing)
    assert [manifest["fingerprint"] for manifest in store.manifests()] == ["f1"]


def test_nothing_is_published_before_publication(store: Store):
    write(store.new_attempt("pack", "f2"))
    assert store.find("pack", "f2") is None
    with pytest.raises(CorruptArtifact, match="not published"):
        store.fetch("pack", "f2")


def test_the_first_publisher_wins_and_the_orphan_is_refused_and_removed(store: Store):
    orphan, retry = store.new_attempt("train", "f3"), store.new_attempt("train", "f3")
    assert orphan.id != retry.id
    assert orphan.superseded_file.exists()
    assert not retry.superseded_file.exists()
    write(orphan, "by the orphan")
    write(retry, "by the retry")
    store.publish(retry, RECORD)
    orphan.out.mkdir(parents=True, exist_ok=True)  # it writes on after its folder was removed
    (orphan.out / "late").write_text("late")
    with pytest.raises(AlreadyPublished) as refused:
        store.publish(orphan, RECORD)
    assert refused.value.artifact.attempt == retry.id
    assert not orphan.folder.exists()
    assert (store.fetch("train", "f3").path / "rows/data.arrow").read_text() == "by the retry"


def test_two_stores_with_one_scratch_folder_leave_each_others_attempts_and_inputs_alone(tmp_path: Path):
    ann, bob = (Store(f"memory://{name}-{tmp_path.name}", tmp_path / "scratch") for name in ("ann", "bob"))
    running = ann.new_attempt("train", "f3")
    write(running, "by ann")
    retry = bob.new_attempt("train", "f3")
    assert not running.superseded_file.exists()
    write(retry, "by bob")
    bob.publish(retry, RECORD)
    assert ann.publish(running, RECORD).attempt == running.id
    ours = ann.fetch("train", "f3").path
    bob.fetch("train", "f3")
    bob.withdraw("train", "f3")
    bob.clear("train", "f3")
    assert (ours / "rows/data.arrow").read_text() == "by ann"
    assert [path.name for path in (tmp_path / "scratch/cache/train/f3/attempts").iterdir()] == [running.id]


def test_of_many_publishers_at_once_exactly_one_wins(store: Store):
    attempts = [store.new_attempt("race", "f4") for _ in range(6)]
    for n, attempt in enumerate(attempts):
        write(attempt, str(n))
    outcomes: list[str] = []
    refused: list[str] = []

    def publish(attempt):
        try:
            store.publish(attempt, RECORD)
            outcomes.append(attempt.id)
        except AlreadyPublished:
            refused.append(attempt.id)

    threads = [threading.Thread(target=publish, args=(a,)) for a in attempts]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert outcomes == [store.fetch("race", "f4").attempt]
    assert len(refused) == 5


def test_a_summary_by_numbers_is_read_as_it_was_published(store: Store):
    """JSON's keys are texts, and sort otherwise than the numbers that they were: 12288 before 2048."""
    attempt = store.new_attempt("report", "f12")
    write(attempt)
    store.publish(attempt, RECORD | {"summary": {"gains": {2048: -0.01, 12288: 0.04}}})
    assert store.fetch("report", "f12").summary == {"gains": {"2048": -0.01, "12288": 0.04}}


def test_an_attempt_that_a_winner_removes_while_it_is_synced_is_refused(tmp_path: Path, monkeypatch):
    store = Store(str(tmp_path))
    loser, winner = store.new_attempt("race", "f9"), store.new_attempt("race", "f9")
    write(loser)
    write(winner)
    real = Store._upload

    def upload(self: Store, attempt, names) -> None:
        if attempt is loser:
            store.publish(winner, RECORD)
            raise FileNotFoundError(loser.out / "rows/data.arrow")  # as opening it to sync it does now
        real(self, attempt, names)

    monkeypatch.setattr(Store, "_upload", upload)
    with pytest.raises(AlreadyPublished):
        store.publish(loser, RECORD)


def test_a_new_attempt_sees_the_checkpoints_of_earlier_ones_newest_first(store: Store):
    first, second = store.new_attempt("train", "f5"), store.new_attempt("train", "f5")
    third = store.new_attempt("train", "f5")
    folders = store.earlier_attempts("train", "f5")
    assert [p.name for p in folders] == [third.id, second.id, first.id]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_files_are_noticed_and_named(tmp_path: Path, damage: str):
    store = Store(str(tmp_path))
    attempt = store.new_attempt("pack", "f6")
    write(attempt)
    path = store.publish(attempt, RECORD).path / "rows/data.arrow"
    if damage == "delete":
        path.unlink()
    else:
        path.write_text("tokenZ" if damage == "flip" else "tok")
    with pytest.raises(CorruptArtifact, match=r"rows/data\.arrow"):
        store.fetch("pack", "f6")


def test_a_file_that_is_gone_from_an_object_store_is_named(tmp_path: Path):
    root = f"memory://{tmp_path.name}"
    attempt = Store(root, tmp_path / "a").new_attempt("pack", "f1")
    write(attempt)
    Store(root, tmp_path / "a").publish(attempt, RECORD)
    elsewhere = Store(root, tmp_path / "b")
    (file,) = [path for path in elsewhere.fs.find(elsewhere.base) if path.endswith("data.arrow")]
    elsewhere.fs.rm(file)
    with pytest.raises(CorruptArtifact, match=r"pack/f1: rows/data\.arrow: "):
        elsewhere.fetch("pack", "f1")


def test_a_file_that_grew_is_noticed_without_reading_it(tmp_path: Path):
    store = Store(str(tmp_path))
    attempt = store.new_attempt("pack", "f14")
    write(attempt)
    artifact = store.publish(attempt, RECORD)
    with (artifact.path / "rows/data.arrow").open("a") as file:
        file.write("more")
    assert store.problems(artifact, hashes=False) == ["rows/data.arrow: has 10 bytes, but 6 were published"]


def test_a_download_that_is_cut_leaves_nothing_under_the_files_name(s3_root: str, tmp_path: Path, monkeypatch):
    store = Store(f"{s3_root}/{tmp_path.name}", tmp_path / "scratch")
    attempt = store.new_attempt("pack", "f15")
    write(attempt)
    artifact = store.publish(attempt, RECORD)

    def half(key: str, place: str) -> None:
        Path(place).write_text("tok")
        raise OSError("the connection is gone")

    monkeypatch.setattr(store.fs, "get_file", half)
    with pytest.raises(OSError, match="connection"):
        store.fetch("pack", "f15")
    assert not [path for path in artifact.path.rglob("*") if path.is_file()]


def test_a_remote_root_without_its_keys_or_bucket_is_one_clear_error(s3_root: str, tmp_path: Path, monkeypatch):
    assert Store(f"{s3_root}/nothing-there-yet", tmp_path).checked().fs, "nobody has published yet"
    with pytest.raises(ValueError, match=r"store 's3://missing/runs': there is no bucket missing\. Correct store.root"):
        Store("s3://missing/runs", tmp_path).checked()
    assert Store("memory://nothing/yet", tmp_path).checked(), "a file system without buckets"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ValueError, match=r"Unable to locate credentials.*AWS_ACCESS_KEY_ID.*submit --no-plan"):
        Store(s3_root, tmp_path).checked()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_remote_download_that_was_damaged_is_brought_again(s3_root: str, tmp_path: Path, monkeypatch):
    store = Store(f"{s3_root}/{tmp_path.name}", tmp_path / "scratch")
    attempt = store.new_attempt("pack", "f6")
    write(attempt)
    store.publish(attempt, RECORD)
    cached = store.fetch("pack", "f6").path / "rows/data.arrow"
    cached.write_text("tokenZ")
    assert (store.fetch("pack", "f6").path / "rows/data.arrow").read_text() == "tokens"
    with monkeypatch.context() as patch:
        read: list[Path] = []
        patch.setattr("longreach.infra.artifact.file_digest", lambda path: read.append(path) or file_digest(path))
        store.fetch("pack", "f6")
        assert read == [cached], "what is in the cache is read once"
    store.fs.pipe_file(f"{store.base}/pack/f6/attempts/{attempt.id}/out/rows/data.arrow", b"tokenZ")
    cached.unlink()
    with pytest.raises(CorruptArtifact, match=r"rows/data\.arrow"):
        store.fetch("pack", "f6")


def test_a_published_file_is_as_open_as_its_folder(tmp_path: Path):
    store = Store(str(tmp_path / "root"))
    attempt = store.new_attempt("merge", "f8")
    write(attempt)
    (attempt.out / "rows/data.arrow").chmod(0o600)
    attempt.out.chmod(0o750)
    assert (store.publish(attempt, RECORD).path / "rows/data.arrow").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("conflicts", [2, 9])
def test_s3s_conflict_of_two_requests_is_tried_again(tmp_path: Path, monkeypatch, conflicts: int):
    store, answers = Store(f"memory://{tmp_path.name}", tmp_path), [True] * conflicts
    real = store.fs.pipe_file

    def conflicting(path: str, body: bytes, **options: str) -> None:
        if answers and answers.pop():
            raise OSError(5, "An error occurred (ConditionalRequestConflict) when calling the PutObject operation")
        real(path, body, **options)

    monkeypatch.setattr(store.fs, "pipe_file", conflicting)
    monkeypatch.setattr("longreach.infra.artifact.CONFLICT_PAUSES_S", (0.0,) * 4)
    if conflicts == 2:
        store.create(f"{store.base}/lease", b"1")
        assert store.fs.cat_file(f"{store.base}/lease") == b"1"
    else:
        with pytest.raises(OSError, match="ConditionalRequestConflict"):
            store.create(f"{store.base}/lease", b"1")
        assert len(answers) == 4, "five tries"


@pytest.mark.parametrize("name", ["q?versionId=1.txt", "new\nline.txt"])
def test_a_file_that_an_object_store_cannot_hold_is_refused_by_name_before_anything_is_uploaded(
    tmp_path: Path, name: str
):
    store = Store(f"memory://{tmp_path.name}-{len(name)}", tmp_path)
    attempt = store.new_attempt("pack", "f9")
    write(attempt)
    (attempt.out / name).touch()
    with pytest.raises(ValueError, match=re.escape(f"cannot hold the file {name!r}")):
        store.publish(attempt, RECORD)
    assert store.names(f"{store.base}/pack/f9") == []


def test_a_flipped_bit_in_the_manifest_is_noticed(store: Store):
    attempt = store.new_attempt("pack", "f7")
    write(attempt)
    store.publish(attempt, RECORD)
    path = f"{store.base}/pack/f7/artifact.json"
    store.fs.pipe_file(path, store.fs.cat_file(path).replace(b'"rows": 3', b'"rows": 2'))
    with pytest.raises(CorruptArtifact, match="damaged"):
        store.find("pack", "f7")
    store.quarantine("pack", "f7")
    assert store.find("pack", "f7") is None


def test_the_manifest_of_another_artifact_is_not_taken(store: Store):
    attempt = store.new_attempt("pack", "f12")
    write(attempt)
    store.publish(attempt, RECORD)
    manifest = store.fs.cat_file(f"{store.base}/pack/f12/artifact.json")
    store.fs.makedirs(f"{store.base}/pack/f13", exist_ok=True)
    store.fs.pipe_file(f"{store.base}/pack/f13/artifact.json", manifest)
    with pytest.raises(CorruptArtifact, match="pack/f13: the manifest belongs to another artifact"):
        store.find("pack", "f13")


def test_an_artifact_that_another_run_has_repaired_meanwhile_is_not_put_aside(store: Store, monkeypatch):
    """A run looks at a damaged artifact; before it acts, another one has put it aside and published anew."""

    def publish() -> str:
        attempt = store.new_attempt("pack", "f10")
        write(attempt)
        return store.publish(attempt, RECORD).attempt

    publish()
    path = f"{store.base}/pack/f10/artifact.json"
    store.fs.pipe_file(path, b"damaged")
    assert store.quarantine("pack", "f10")
    repaired = publish()
    assert store.quarantine("pack", "f10") is None
    store.fs.pipe_file(path, b"damaged again")
    find = Store.find

    def find_and_be_slow(self, stage, fingerprint):
        monkeypatch.setattr(Store, "find", find)
        store.withdraw(stage, fingerprint)
        nonlocal repaired
        repaired = publish()
        raise CorruptArtifact("what was looked at")

    monkeypatch.setattr(Store, "find", find_and_be_slow)
    assert store.quarantine("pack", "f10") is None
    assert store.fetch("pack", "f10").attempt == repaired
    assert not [name for name in store.fs.ls(f"{store.base}/pack/f10", detail=False) if name.endswith(".damaged")]


def test_a_publisher_that_pauses_takes_nothing_from_what_was_published_anew_meanwhile(store: Store, monkeypatch):
    paused, forced = store.new_attempt("pack", "f11"), store.new_attempt("pack", "f11")
    write(paused, "by the paused one")
    write(forced, "by the forced one")
    create = type(store).create

    def create_and_pause(self, path, body):
        create(self, path, body)
        monkeypatch.setattr(type(store), "create", create)
        store.withdraw("pack", "f11")  # run --force
        if not forced.out.exists():
            write(forced, "by the forced one")
        store.publish(forced, RECORD)

    monkeypatch.setattr(type(store), "create", create_and_pause)
    with pytest.raises(AlreadyPublished) as refused:
        store.publish(paused, RECORD)
    assert refused.value.artifact.attempt == forced.id
    assert (store.fetch("pack", "f11").path / "rows/data.arrow").read_text() == "by the forced one"


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path):
    store = Store(str(tmp_path))
    attempt = store.new_attempt("pack", "f8")
    write(attempt)
    manifest = store.publish(attempt, RECORD).manifest
    manifest["files"][0]["path"] = "../../../../secret"
    (tmp_path / "pack/f8/artifact.json").write_text(json.dumps({**manifest, "digest": digest_of(manifest)}))
    with pytest.raises(CorruptArtifact, match="points outside the folder"):
        store.find("pack", "f8")
