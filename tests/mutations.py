"""Mutation testing of the store, the lease, the mirror and the checkpoint: break one line, check that a test fails.

    python tests/mutations.py                     # all; ten minutes of one core
    python tests/mutations.py lease checkpoint    # some groups
    python tests/mutations.py store --only sync   # mutations whose line contains a text

Each mutation is made in a copy of the checkout, and the tests of its group run there until the first failure. Each run
is a fork of a process that has imported the libraries, and imports longreach anew. "LIVES" marks a gap in the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_CPU_S, LIMIT_S = 120, 400
"""Limits for the tests of one mutation. One that makes a test hang counts as noticed; the machine may be busy."""
STORE = (
    "tests/test_infra_artifact.py tests/test_infra_files.py tests/faults/test_faults_power.py -k 'not of_a_checkpoint'"
)
LOST_ANSWER = "tests/faults/test_faults_s3.py -k answer_was_lost"
LEASE = "tests/test_infra_lease.py tests/test_infra_lease_orders.py"
MIRROR = (
    "tests/test_infra_mirror.py -k 'embedded_store_shows or refuses or deleted or made_twice or two_mirrors or "
    "waited_for or without_a_parent'"
)
CHECKPOINT = (
    "tests/test_training_checkpoint.py tests/faults/test_faults_power.py -k 'bit or damaged or never_finished or "
    "newest or another_recipe or only_the_last or zero_stage or moment_of_a_checkpoint'"
)
BEST = "tests/test_training_validation.py -k best"
MUTATIONS: dict[str, list[tuple[str, str, str, str]]] = {  # group -> (tests, file, text in the file, its replacement)
    "store": [
        (STORE, "infra/artifact.py", "if digest != digest_of(manifest):", "if False:"),
        (STORE, "infra/artifact.py", 'if parts.is_absolute() or ".." in parts.parts:', "if parts.is_absolute():"),
        (
            STORE, "infra/artifact.py",
            'if (manifest["stage"], manifest["fingerprint"]) != (stage, fingerprint):', "if False:",
        ),
        (STORE, "infra/artifact.py", 'folder.with_name(folder.name + ".superseded").touch()', "pass"),
        (
            STORE, "infra/artifact.py",
            "key=lambda folder: folder.name, reverse=True)", "key=lambda folder: folder.name)",
        ),
        (
            STORE, "infra/artifact.py",
            "if loser.name != attempt.id and self._published(attempt):", "if loser.name != attempt.id:",
        ),
        (STORE, "infra/artifact.py", "self._remove(attempt.stage, attempt.fingerprint, attempt.id)", "pass"),
        (LOST_ANSWER, "infra/artifact.py", "return winner is not None", "return False"),
        (STORE, "infra/artifact.py", "shutil.rmtree(attempt.work, ignore_errors=True)", "pass"),
        (STORE, "infra/artifact.py", "if artifact and not self.problems(artifact, hashes=self.local):", "if False:"),
        (STORE, "infra/artifact.py", "if moved != looked_at:", "if False:"),
        (STORE, "infra/artifact.py", "sync_tree(attempt.out)", "pass"),
        (STORE, "infra/artifact.py", "            sync(target.parent)", "            pass"),
        (STORE, "infra/artifact.py", "                sync(folder)", "                pass"),
        (STORE, "infra/artifact.py", "draft_of(target, publish=publish_new)", "draft_of(target)"),
        (STORE, "infra/artifact.py", 'mode="create")', 'mode="overwrite")'),
        (
            STORE, "infra/artifact.py",
            'self.fs.get_file(f"{out}/{name}", str(draft))',
            'self.fs.get_file(f"{out}/{name}", str(path)); shutil.copy(path, draft)',
        ),
        (STORE, "infra/artifact.py", '!= entry["size"]:', '< entry["size"]:'),
        (STORE, "infra/artifact.py", 'if hashes and file_digest(path) != entry["xxh3"]:', "if False:"),
        (STORE, "infra/artifact.py", "path.chmod(mode | folder_mode)", "pass"),
        (STORE, "infra/files.py", "        sync(Path(place))", "        pass"),
        (STORE, "infra/files.py", "        sync(draft)", "        pass"),
    ],
    "lease": [
        (LEASE, "infra/lease.py", "if self._newest() > self._generation:  # meanwhile", "if False:  # meanwhile"),
        (LEASE, "infra/lease.py", "< self._generation - 1:", "< self._generation:"),
        (LEASE, "infra/lease.py", "< self._generation - 1:", "< self._generation - 2:"),
        (LEASE, "infra/lease.py", "mark[:2] != ours[:2]", "mark[:1] != ours[:1]"),
        (LEASE, "infra/lease.py", '"ended" if state == "Z" else ticks', "ticks"),
        (LEASE, "infra/lease.py", "patience_beats = min(self.clone_beats, patience_beats)", "patience_beats = 0"),
        (LEASE, "infra/lease.py", "elif not wait:", "elif False:"),
        (LEASE, "infra/lease.py", "counter, beats_without_change = newer_counter, 0", "counter = newer_counter"),
        (LEASE, "infra/lease.py", "self.lost.set()", "pass"),
        (LEASE, "infra/lease.py", "if not self.lost.is_set():", "if True:"),
        (LEASE, "infra/lease.py", "        self._stop.set()", "        pass"),
        (
            LEASE, "infra/lease.py",
            "                    continue  # another run was faster: start over", "                    raise",
        ),
        (LEASE, "infra/lease.py", "if self.store.local and on_own_disk(Path(self.store.base)):", "if False:"),
    ],
    "mirror": [
        (MIRROR, "infra/mirror.py", "if position.run_id != tail.run_id:", "if False:"),
        (MIRROR, "infra/mirror.py", 'batch.skipped += len(event["values"]) - len(finite)', "pass"),
        (MIRROR, "infra/mirror.py", "if runs and not live:", "if False:"),
        (MIRROR, "infra/mirror.py", "self.client.delete_run(twin)", "pass"),
        (
            MIRROR, "infra/mirror.py",
            "self._log(tail, kind, items[:half]) + self._log(tail, kind, items[half:])",
            "self._log(tail, kind, items[:half])",
        ),
        (MIRROR, "infra/mirror.py", "if entry not in tables:", "if True:"),
        (MIRROR, "infra/mirror.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
        (MIRROR, "infra/mirror.py", "        mirror.close_runs()", "        pass"),
        (MIRROR, "infra/mirror.py", "before, moved_s = now, now_s", "before = now"),
        (MIRROR, "infra/mirror.py", "and mirror.batches > batches:", "and False:"),
    ],
    "checkpoint": [
        (CHECKPOINT, "training/checkpoint.py", "            sync_tree(draft)", "            pass"),
        (CHECKPOINT, "training/checkpoint.py", "            sync(self.folder)", "            pass"),
        (BEST, "training/checkpoint.py", "if other not in kept:", "if True:"),
        (CHECKPOINT, "training/checkpoint.py", "[-keep_last:]", "[-keep_last - 1 :]"),
        (CHECKPOINT, "training/checkpoint.py", " if path <= self.path_of(step)", ""),
        (CHECKPOINT, "training/checkpoint.py", "torch.save(_random_states(engine), draft / random_file())", "pass"),
        (
            CHECKPOINT, "training/checkpoint.py",
            "_restore_random_states(engine, torch.load(states, weights_only=True))", "pass",
        ),
        (CHECKPOINT, "training/checkpoint.py", 'if about["identity"] != identity:', "if False:"),
        (CHECKPOINT, "training/checkpoint.py", " or file_digest(path / name) != digest", ""),
        (CHECKPOINT, "training/checkpoint.py", "key=lambda p: p.name, reverse=True)", "key=lambda p: p.name)"),
        (CHECKPOINT, "training/checkpoint.py", 'if written[key] != now[key]:', "if False:"),
        (
            CHECKPOINT, "training/checkpoint.py",
            "            shutil.rmtree(draft)\n        sync", "            pass\n        sync",
        ),
    ],
}  # fmt: skip


def copy_of_checkout(folder: Path) -> Path:
    """Copy the tracked files, with a link that makes them importable as `longreach`, as in an installed checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in map(os.fsdecode, filter(None, listed.split(b"\0"))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "src").mkdir()
    (folder / "src" / "longreach").symlink_to("..")
    return folder


def _run_tests(folder: Path, tests: str) -> None:
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_CPU_S, LIMIT_CPU_S))
    os.chdir(folder)
    sys.path[:0] = [str(folder / "src"), str(folder / "tests")]
    os.environ["PYTHONPATH"] = str(folder / "src")
    log = os.open(folder / "tests.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow and not drill"]
    os._exit(pytest.main([*options, *shlex.split(tests)]))


def noticed(folder: Path, tests: str) -> str:
    """Run the tests and return "noticed", "noticed (too slow)" or "LIVES"; the log stays in the folder."""
    child = multiprocessing.get_context("fork").Process(target=_run_tests, args=(folder, tests))
    child.start()
    child.join(LIMIT_S)
    if child.is_alive() or child.exitcode is None or child.exitcode < 0:
        child.kill()
        child.join()
        return "noticed (too slow)"
    if child.exitcode > 1:
        raise RuntimeError((folder / "tests.log").read_text()[-3000:])
    return "noticed" if child.exitcode else "LIVES"


def failed_test(folder: Path) -> str:
    """Return the first failed test from the log."""
    for line in (folder / "tests.log").read_text(errors="replace").splitlines():
        if line.startswith(("FAILED", "ERROR")):
            return line.split("::")[-1].partition(" - ")[0]
    return ""


def main(groups: list[str], only: str) -> None:
    for module in ("pytest", "torch", "transformers", "deepspeed", "peft", "mlflow", "fsspec", "s3fs", "moto.server"):
        with contextlib.suppress(ImportError):
            __import__(module)
    assert "longreach" not in sys.modules, "a mutation would have no effect"
    lives = count = 0
    with tempfile.TemporaryDirectory(prefix="longreach-mutations-") as scratch:
        folder = copy_of_checkout(Path(scratch))
        for group in groups:
            chosen = [mutation for mutation in MUTATIONS[group] if only in mutation[2]]
            for tests in dict.fromkeys(mutation[0] for mutation in chosen):
                assert noticed(folder, tests) == "LIVES", "the tests fail without a mutation: " + failed_test(folder)
            for tests, file, line, becomes in chosen:
                text = (ROOT / file).read_text()
                assert text.count(line) >= 1, f"{file} has no {line!r}"
                (folder / file).write_text(text.replace(line, becomes, 1))
                began = time.monotonic()
                how = noticed(folder, tests)
                (folder / file).write_text(text)
                count, lives = count + 1, lives + (how == "LIVES")
                by = failed_test(folder) if how == "noticed" else ""
                print(f"| {group} | `{line.strip()}` | {how} | {by} | {time.monotonic() - began:.0f} s |", flush=True)
    print(f"{count - lives} of {count} noticed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=list(MUTATIONS), choices=list(MUTATIONS))
    parser.add_argument("--only", default="", metavar="TEXT")
    options = parser.parse_args()
    main(options.groups, options.only)
