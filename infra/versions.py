"""Information recorded with a result: package versions, the code's commit, and the machine's load.

Versions are read without importing the packages, which is fast.

    python -c "from longreach.infra.versions import versions; print(versions())"
"""

import functools
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

RECORDED = ("longreach", "torch", "transformers", "deepspeed", "peft", "ray", "mlflow")
"""Packages whose versions go into every artifact's manifest."""
GIB = 2**30


def versions() -> dict[str, str | int]:
    """Return the versions of Python and the main packages (`missing` if not installed), the platform
    and the number of CPU cores."""
    packages = {package: installed(package) or "missing" for package in RECORDED}
    return {"python": platform.python_version(), **packages, "platform": platform.platform(), "cpus": usable_cores()}


def installed(package: str) -> str | None:
    """Return a package's version, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use, or all of the machine's cores if the
    system does not report that."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_memory() -> int:
    """Return the bytes of memory that this process may use: the machine's total or a container's
    limit, whichever is lower."""
    import psutil

    total: int = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")  # the container's limit
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total


@functools.cache  # once per process: calling git takes longer than a small stage
def git_commit() -> str:
    """Return the commit of the running code, with `-dirty` if it has uncommitted changes, or `unknown`
    outside a checkout (also in an environment inside another repository, which does not track this file)."""
    if not shutil.which("git"):
        return "unknown"
    file, folder = Path(__file__).name, str(Path(__file__).parent)
    tracked = ["git", "-C", folder, "ls-files", "--error-unmatch", file]
    if subprocess.run(tracked, capture_output=True, check=False).returncode:
        return "unknown"
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def system_metrics() -> dict[str, float]:
    """Return the load of the machine and of this process, to log with a step's metrics. MLflow shows
    `system/` as a group of its own.

    `system/cpu_percent` (all cores) is the mean since the previous call in this process, or 0.0 at
    the first call.
    """
    import psutil

    return {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_percent": psutil.virtual_memory().percent,
        "system/rss_gib": psutil.Process().memory_info().rss / GIB,
    }
