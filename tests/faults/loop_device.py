"""Simulate power cuts on a real ext4: copy its device at random moments, mount the copy and check its content.

    sudo python tests/faults/loop_device.py --cuts 100      # root and Linux only; about a second per cut

A process publishes artifacts and writes checkpoints on a file system in an image file, and prints what is finished.
At a random moment it is stopped (SIGSTOP), and the image is copied. As after a power cut, the copy lacks what was only
in the kernel's memory. The copy is mounted, which replays the journal as booting does. Then every published artifact
must be intact, no manifest may name a file that is not, and the newest finished checkpoint must be there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

IMAGE_MB = 256
KEPT = 20  # artifacts that stay on the disk while new ones are published


def write(folder: Path) -> None:
    """Publish artifacts and write checkpoints forever; print a line for each one that is finished."""
    import torch.distributed as dist
    from test_faults_power import ToyEngine

    from longreach.infra.artifact import Store
    from longreach.training.checkpoint import Checkpoints

    rendezvous = f"file://{tempfile.mkdtemp()}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    store, number = Store(str(folder / "root")), 0
    (folder / "work").mkdir()
    checkpoints = Checkpoints(folder / "work" / "checkpoints", identity="run")
    while True:
        number += 1
        attempt = store.new_attempt("finetune", f"{number:06d}")
        for name in ("model.safetensors", "summary.json"):
            (attempt.out / name).write_bytes(os.urandom(random.randrange(1, 300_000)))
        store.publish(attempt, {"summary": {}})
        print(json.dumps({"published": attempt.fingerprint}), flush=True)
        checkpoints.save(ToyEngine(), number, keep_last=1)
        print(json.dumps({"checkpoint": number}), flush=True)
        if number > KEPT:
            gone = f"{number - KEPT:06d}"
            print(json.dumps({"removing": gone}), flush=True)
            shutil.rmtree(folder / "root" / "finetune" / gone)


@contextlib.contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """Mount an image file as a boot after a power cut would."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def check(folder: Path, promised: set[str], step: int) -> int:
    """Return the number of artifacts. Raises AssertionError if a promised artifact or checkpoint is missing or bad."""
    from longreach.infra.artifact import Store
    from longreach.training.checkpoint import newest_valid

    store, there = Store(str(folder / "root")), 0
    for place in (folder / "root" / "finetune").glob("*"):
        artifact = store.find("finetune", place.name)  # raises CorruptArtifact for a manifest without its content
        if artifact:
            there += 1
            problems = store.problems(artifact)
            assert not problems or place.name not in promised, problems
        assert artifact or place.name not in promised, f"{place.name} was published and is gone"
    missing = promised - {place.name for place in (folder / "root" / "finetune").glob("*")}
    assert not missing, f"{sorted(missing)} were published and are gone"
    if step:
        path, _ = newest_valid([folder / "work" / "checkpoints"], identity="run")
        found = json.loads((path / "checkpoint.json").read_text())["step"] if path else 0
        assert found >= step, f"the checkpoint of step {step} was finished, {found} is there"
    return there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--write", type=Path, help="run as the process that writes to this folder")
    options = parser.parse_args()
    if options.write:
        write(options.write)
    print(f"seed {options.seed}")
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        image, copy = home / "disk.img", home / "after.img"
        with image.open("wb") as file:
            file.truncate(IMAGE_MB << 20)
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        with mounted(image, home / "disk") as disk:
            command = [sys.executable, __file__, "--write", str(disk)]
            writer = subprocess.Popen(command, stdout=subprocess.PIPE)
            try:
                _cut_often(writer, image, copy, home / "after", options.cuts)
            finally:
                writer.kill()
                writer.wait()


def _cut_often(writer: subprocess.Popen, image: Path, copy: Path, after: Path, cuts: int) -> None:
    """Repeatedly stop the writer, copy its disk and check the copy."""
    assert writer.stdout
    promised: set[str] = set()
    first = json.loads(writer.stdout.readline())  # waits until the writer has started
    promised.add(first["published"])
    os.set_blocking(writer.stdout.fileno(), False)
    step, artifacts, unread = 0, 0, b""
    for cut in range(cuts):
        time.sleep(random.uniform(0.01, 0.6))
        writer.send_signal(signal.SIGSTOP)
        unread += os.read(writer.stdout.fileno(), 1 << 20) if _readable(writer.stdout.fileno()) else b""
        *lines, unread = unread.split(b"\n")
        for line in lines:
            event = json.loads(line)
            if "published" in event:
                promised.add(event["published"])
            promised.discard(event.get("removing", ""))
            step = event.get("checkpoint", step)
        shutil.copyfile(image, copy)
        writer.send_signal(signal.SIGCONT)
        with mounted(copy, after) as folder:
            artifacts += check(folder, promised, step)
        if writer.poll() is not None:
            raise SystemExit("the writing process has ended")
        print(f"cut {cut + 1}: {len(promised)} artifacts promised, checkpoint {step}: intact", flush=True)
    print(f"{cuts} power cuts: {artifacts} artifacts checked, no promised one was lost; last step {step}")


def _readable(handle: int) -> bool:
    import select

    return bool(select.select([handle], [], [], 0)[0])


if __name__ == "__main__":
    main()
