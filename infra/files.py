"""Atomic writing of files, syncing to disk, and digests of content.

A reader never sees half a file: it is written under a temporary name in the same folder and then
renamed, which is atomic on every file system. Its content is synced before that, since otherwise
after a power cut the disk may hold the new name without the content. The name itself is on the disk
once its folder is synced (`sync_tree`, `sync`).

    write_whole(Path("state.json"), "{}")
    with draft_of(Path("corpus.txt")) as draft: download(url, draft)
"""

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import xxhash

BLOCK_BYTES = 1 << 22


OWN_DISKS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "tmpfs", "overlay")
"""File systems that only one machine mounts at a time. Others may be shared between machines."""


class Digest(Protocol):
    """A running hash: one of xxhash's or hashlib's."""

    def update(self, data: Any, /) -> None:
        """Add bytes to what is hashed."""


@contextlib.contextmanager
def draft_of(target: Path, publish: Callable[[Path, Path], None] = os.replace) -> Iterator[Path]:
    """Give the block a temporary path beside `target`, and publish it under that name if the block
    succeeds. `publish`: called with the draft and the target; `os.replace` overwrites, `publish_new`
    raises FileExistsError instead."""
    # At most 50 characters of the name are kept, since it may already be as long as the disk allows.
    # Leases read the beginning of the name.
    draft = target.with_name(f"{target.name[:50]}.{uuid.uuid4().hex[:8]}.draft")
    try:
        yield draft
        sync(draft)
        publish(draft, target)
    finally:
        draft.unlink(missing_ok=True)


WITHOUT_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""Errors of file systems without hard links: exFAT, FAT, some network mounts."""
RENAME_NOREPLACE = 1


def publish_new(draft: Path, target: Path) -> None:
    """Give a finished draft its name atomically. Raises FileExistsError if the name is taken.

    Uses a hard link or, on file systems without them, Linux's rename that never replaces a file.
    Raises OSError if the file system has neither.
    """
    try:
        os.link(draft, target)
    except OSError as error:
        if error.errno not in WITHOUT_LINKS:
            raise
        _rename_new(draft, target)


def _rename_new(draft: Path, target: Path) -> None:
    """Rename a file. Raises FileExistsError if the new name is taken, where os.rename would replace
    the file."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_current_folder = -100  # AT_FDCWD; both paths are absolute or relative to the current folder
    if hasattr(libc, "renameat2"):
        names = os.fsencode(draft), os.fsencode(target)
        if libc.renameat2(at_current_folder, names[0], at_current_folder, names[1], RENAME_NOREPLACE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(number, os.strerror(number), str(target))
    raise OSError(
        errno.ENOTSUP,
        "this file system has neither hard links nor a rename that never replaces, so two runs could both publish: "
        "put the store (store.root, --root) on another disk, or in an object store (s3://...)",
        str(target),
    )


def sync(path: Path) -> None:
    """Sync a file's content, or a folder's list of names, to the disk, so that it survives a power
    cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise  # the disk is full or broken
        warnings.warn(f"the file system of {path} cannot sync: a power cut may lose the last writes", stacklevel=2)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Sync everything below a folder to the disk: the files of each folder, then the folder, bottom
    up."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            if (path := Path(place, name)).is_file():  # skips pipes, which would block, and broken links
                sync(path)
        sync(Path(place))


def on_own_disk(path: Path) -> bool:
    """Return whether a path is on a disk that no other machine can access, judging by the type of its
    file system."""
    place, kind = "", ""
    with contextlib.suppress(FileNotFoundError):  # only Linux has this file; elsewhere the answer is False
        for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).strip("\n").split("\n"):
            # a space is written \040; other characters, such as letters beyond ASCII, are not escaped
            mounted = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), line.split(" ")[4])
            if len(mounted) >= len(place) and path.resolve().is_relative_to(mounted):
                place, kind = mounted, line.partition(" - ")[2].split()[0]
    return kind in OWN_DISKS


def write_whole(target: Path, text: str) -> None:
    """Write a text file (UTF-8) atomically, replacing a file of that name."""
    with draft_of(target) as draft:
        draft.write_text(text, encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file from outside. Raises ValueError, which names the file, if it
    holds none."""
    if not path.is_file():  # reading a pipe would block
        raise ValueError(f"{path} is not a file: fetch or save it again")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch or save it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__} instead of an object: fetch or save it again")
    return value


def home() -> Path | None:
    """Return the user's home folder; None if HOME is not set and the system does not know the user, as
    in a container with any user id."""
    folder = os.path.expanduser("~")
    return None if folder == "~" else Path(folder)


def cache_folder() -> Path | None:
    """Return longreach's folder in the user's cache (XDG_CACHE_HOME, ~/.cache); None without a home."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "longreach"
    folder = home()
    return folder and folder / ".cache" / "longreach"


def kept_text(name: str, make: Callable[[], str]) -> str:
    """Return the text cached under this name, or call `make` and cache its result.

    If there is no cache folder, or it cannot be written, `make` is called each time.
    """
    cache = cache_folder()
    if cache is None:
        return make()
    path = cache / name
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8")
    text = make()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    return text


def link_or_copy(source: str, target: str) -> None:
    """Hard-link a published file, which never changes, to a second path. Copy it if the disk has no
    hard links."""
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def add_file(digest: Digest, path: Path) -> None:
    """Add a file's bytes to a running digest, a block at a time."""
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(BLOCK_BYTES, os.fstat(file.fileno()).st_size or 1)))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])


def file_digest(path: Path) -> str:
    """Return the xxh3-128 of a file as 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    add_file(digest, path)
    return digest.hexdigest()


def canonical(value: Any) -> str:
    """Return a value's canonical JSON text. Raises ValueError if there is none (NaN, sets, objects)."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot be serialized deterministically: {error}") from error


def digest_of(value: Any) -> str:
    """Return the xxh3-128 of a value's canonical JSON."""
    return xxhash.xxh3_128(canonical(value).encode()).hexdigest()


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to dotted names: `{"optim": {"steps": 8}}` -> `{"optim.steps": 8}`."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
