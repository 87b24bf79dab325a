"""Information recorded with a result: package versions, the code's commit and the machine.

Versions are read without importing the packages, which is fast.

    python -c "from longreach.infra.versions import versions; print(versions())"
"""

import functools
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from longreach.infra.machine import usable_cores

RECORDED = ("longreach", "torch", "transformers", "deepspeed", "peft", "ray", "mlflow")
"""Packages whose versions go into every artifact's manifest."""


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
