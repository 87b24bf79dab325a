"""The environment: what a run ran on (versions, system metrics), and `doctor`: can a run work here?

No package is imported for its version, and torch only inside what needs it, so `longreach doctor` starts fast.

    python -c "from longreach.infra.environment import doctor; print(*doctor('.longreach'), sep='\\n')"
"""

from __future__ import annotations

import functools
import importlib.util
import ipaddress
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PACKAGES = ("longreach", "torch", "transformers", "deepspeed", "peft", "ray", "mlflow")
GIB = 2**30
OPEN_PORTS = (5000, 8080, *range(8265, 8275))
"""Where MLflow and Ray's dashboard listen by default; where 8265 is taken, Ray takes the next one."""


def versions() -> dict[str, str | int]:
    """Python's, the main packages' (`missing` if not installed) and the machine's, to record beside a result."""
    found = {package: installed(package) or "missing" for package in PACKAGES}
    return {"python": platform.python_version(), **found, "platform": platform.platform(), "cpus": _cores()}


def system_metrics() -> dict[str, float]:
    """The machine's and this process's load, to spool beside a step's metrics; MLflow groups `system/` by itself.

    `system/cpu_percent` (all cores) is since the previous call in this process, 0.0 at the first.
    """
    import psutil

    return {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_percent": psutil.virtual_memory().percent,
        "system/rss_gib": psutil.Process().memory_info().rss / GIB,
    }


@dataclass(frozen=True)
class Check:
    """One finding of `doctor`."""

    name: str
    ok: bool
    detail: str
    """What was found."""
    fix: str = ""
    """What to do if it is not ok."""
    needed: bool = True
    """False: runs work without it."""


def doctor(root: Path | str, ui_port: int = 5000) -> list[Check]:
    """Can runs work here, with artifacts and metrics under `root` (a folder, or a fsspec URL)?"""
    return [
        _python(),
        *check_requirements(_requirements()),
        _device(),
        Check("cores", _cores() >= 2, f"{_cores()}", "set resources.workers=1: one training rank", needed=False),
        _memory(),
        _shared_memory(),
        _writable("home", Path.home(), "Ray writes there: set HOME to a folder of yours"),
        *_root(str(root)),
        _port(ui_port),
        _ray_cluster_file(),
        _open_to_others({*OPEN_PORTS, ui_port, *_tracking_port()}),
        _git(),
    ]


def _python() -> Check:
    return Check("python", sys.version_info >= (3, 11), platform.python_version(), "use Python 3.11 or newer")


def _requirements() -> list[str]:
    try:
        return metadata.requires("longreach") or []
    except metadata.PackageNotFoundError:
        return ["longreach"]  # reported as missing, with the command that installs it


def check_requirements(requirements: Iterable[str]) -> list[Check]:
    """One check for all packages that fit, and one for each that is missing or outside of its range.

    Args:
        requirements: as in pyproject.toml; those of extras are left out.
    """
    from packaging.requirements import Requirement

    needed = [r for r in map(Requirement, requirements) if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = []
    for requirement in needed:
        found = installed(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            detail = f"{found or 'not installed'}, but {requirement.specifier or 'any version'} is needed"
            wrong.append(Check(requirement.name, False, detail, "make setup (or: pip install -e .)"))
    return wrong or [Check("packages", True, f"{len(needed)} packages are within their ranges")]


def installed(package: str) -> str | None:
    """A package's version, if it is there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device() -> Check:
    """The GPU, if any; a GPU that this torch cannot use is a fault."""
    if importlib.util.find_spec("torch") is None:
        return Check("device", False, "torch is not installed", "make setup")
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        flash = installed("flash-attn")
        extra = f"flash-attn {flash}" if flash else "without flash-attn (optional: pip install -e '.[gpu]')"
        return Check("device", True, f"{', '.join(names)}; CUDA {torch.version.cuda}; {extra}")
    if shutil.which("nvidia-smi") and not torch.version.cuda:
        fix = "install a CUDA build of torch, or go on with CPU"
        return Check(
            "device", False, f"a GPU is here, but torch {torch.__version__} is built for CPU", fix, needed=False
        )
    return Check("device", True, "CPU (gloo between ranks)")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> Check:
    import psutil

    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's own limit
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    fix = "set resources.workers=1 and a shorter seq_len: two ranks of the quickstart hold about 4 GiB each"
    return Check("memory", total >= 12 * GIB, f"{total / GIB:.0f} GiB", fix, needed=False)


def _shared_memory() -> Check:
    """Ray's object store lies in /dev/shm; Docker gives 64 MiB, and Ray then falls back to a slow disk."""
    if not Path("/dev/shm").exists():
        return Check("/dev/shm", True, "not used on this system")
    size = shutil.disk_usage("/dev/shm").total
    return Check("/dev/shm", size >= GIB, f"{size / GIB:.1f} GiB", "docker run --shm-size=4g", needed=False)


def _root(root: str) -> list[Check]:
    if "://" in root:
        return [Check("root", True, f"{root}: asked when a run starts")]
    folder = Path(root).absolute()
    there = next(f for f in (folder, *folder.parents) if f.exists())
    free = shutil.disk_usage(there).free
    room = Check("disk", free >= 10 * GIB, f"{free / GIB:.0f} GiB free", f"make room under {there}", needed=False)
    return [_writable("root", there, "choose another store.root"), room]


def _writable(name: str, folder: Path, fix: str) -> Check:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Check(name, True, f"{folder} is writable")
    except OSError as error:
        return Check(name, False, f"{folder} is not writable: {error.strerror}", fix)


def _port(port: int) -> Check:
    with socket.socket() as probe:
        used = probe.connect_ex(("127.0.0.1", port)) == 0
    fix = f"if it is not `longreach ui` that listens there: longreach ui --port {port + 1}"
    return Check("port", not used, f"{port} is {'in use' if used else 'free'}", fix, needed=False)


def _ray_cluster_file() -> Check:
    """`ray.init()` of other programs joins the cluster that this file names, even a dead one. Ours never reads it."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    file = Path(folder, "ray", "ray_current_cluster")
    if not file.exists():
        return Check("ray", True, "no cluster is recorded on this machine")
    address = file.read_text().strip()
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.settimeout(1)
        try:
            alive = probe.connect_ex((host, int(port))) == 0
        except (ValueError, OSError):
            alive = False
    if alive:
        return Check("ray", True, f"a cluster runs at {address}; runs start their own unless --address names it")
    return Check("ray", False, f"{file} names {address or 'nothing'}, where nobody answers", f"rm {file}", needed=False)


def _tracking_port() -> set[int]:
    """MLFLOW_TRACKING_URI's, whosever machine it names: only this one's sockets are looked at."""
    found = re.match(r"https?://[^/]*:(\d+)", os.environ.get("MLFLOW_TRACKING_URI", ""))
    return {int(found[1])} if found else set()


def _open_to_others(ports: set[int]) -> Check:
    """A dashboard of Ray or an MLflow that others reach and that asks for no login runs code for whoever comes by."""
    import psutil

    try:
        sockets = [one.laddr for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    except psutil.AccessDenied:
        return Check("open", False, "this system shows sockets to root alone", "run doctor as root", needed=False)
    public = sorted({(ip, port) for ip, port in sockets if port in ports and not ipaddress.ip_address(ip).is_loopback})
    found = [f"{name} at {ip}:{port}" for ip, port in public if (name := _without_login(ip, port))]
    fix = (
        "listen on 127.0.0.1 (from elsewhere: an SSH tunnel), or ask for a login: RAY_AUTH_MODE=token before Ray "
        "starts, mlflow server --app-name basic-auth"
    )
    if found:
        return Check("open", False, f"{'; '.join(found)}: other machines reach it and it asks for no login", fix)
    return Check("open", True, "neither Ray nor MLflow lets other machines in without a login")


def _without_login(ip: str, port: int) -> str:
    """What answers there without a token or password: "Ray's dashboard", "MLflow", or "" for neither."""
    import requests

    address = ipaddress.ip_address(ip)
    if address.is_unspecified:  # all of the machine's addresses
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    base = f"http://[{address}]:{port}" if address.version == 6 else f"http://{address}:{port}"
    probes = {
        "Ray's dashboard": ("GET", "/api/version", None, "ray_version"),
        "MLflow": ("POST", "/api/2.0/mlflow/experiments/search", {"max_results": 1}, "experiments"),
    }
    with requests.Session() as session:
        session.trust_env = False  # no proxy, and no login from .netrc
        for name, (method, path, asked, key) in probes.items():
            try:  # `Host` is the sender's to choose, so --allowed-hosts is no login
                answer = session.request(
                    method, base + path, json=asked, headers={"Host": f"localhost:{port}"}, timeout=3
                )
                if answer.status_code == 200 and key in answer.json():
                    return name
            except (requests.RequestException, TypeError):  # not HTTP, or not JSON with keys: neither of them
                continue
    return ""


def _git() -> Check:
    fix = "install git and work in a checkout: artifacts then record the commit that made them"
    found = git_commit()
    return Check("git", found != "unknown", f"commit {found}", fix, needed=False)


@functools.cache  # once a process: asking takes longer than a small stage
def git_commit() -> str:
    """The commit of the code that runs, `-dirty` if it was changed since; `unknown` outside of a checkout."""
    if not shutil.which("git"):
        return "unknown"
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
